//! Embeddings: the same vector however the model is cut and the prompt is chunked, each position counted
//! once.

mod common;

use common::*;
use millrace_engine::mock::{Fault, MockConfig, expected_embedding};
use millrace_shared::model::Dtype;
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::data::{ResultMeta, RowOutcome, StepMeta, Want};

const PROMPT: [u32; 11] = [5, 250, 3, 3, 77, 128, 299, 0, 41, 5, 9];

fn want(pooling: Pooling, is_last: bool) -> Want {
    match (pooling, is_last) {
        (pooling, true) => Want::Embed { pooling },
        (Pooling::Mean, false) => Want::Sum,
        (Pooling::Last, false) => Want::None,
    }
}

/// A chunk of a prompt, as the scheduler issues it.
fn chunk(sequence: u64, prompt: &[u32], at: usize, count: usize, pooling: Pooling) -> StepMeta {
    let want = want(pooling, at + count == prompt.len());
    let mut meta = one_row(sequence, at as u32, count as u32, want);
    meta.tables = blocks(sequence, at, count);
    meta
}

fn embed(pipeline: &mut Pipeline, prompt: &[u32], size: usize, pooling: Pooling) -> Vec<f32> {
    pipeline.open(0, prompt, SamplingParams::greedy());
    for at in (0..prompt.len()).step_by(size) {
        let count = size.min(prompt.len() - at);
        let results = pipeline.step(&chunk(0, prompt, at, count, pooling), &prompt[at..at + count]);
        match &results.rows[0].outcome {
            RowOutcome::Embedding(vector) if at + count == prompt.len() => return vector.clone(),
            RowOutcome::Done if at + count < prompt.len() => {}
            other => panic!("unexpected outcome {other:?}"),
        }
    }
    panic!("no embedding")
}

fn failure(results: &ResultMeta, row: usize) -> &str {
    match &results.rows[row].outcome {
        RowOutcome::Failed(cause) => &cause.message,
        other => panic!("expected a failure, got {other:?}"),
    }
}

#[test]
fn placement_and_chunking_change_nothing() {
    for pooling in [Pooling::Mean, Pooling::Last] {
        let expected = expected_embedding(&config(), &PROMPT, pooling);
        let length: f64 = expected.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((length - 1.0).abs() < 1e-6, "{length}");
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for stages in [1, 2, 3, 7] {
                for size in [1, 2, 3, 4, 7, 64] {
                    let mut pipeline = Pipeline::new(stages, dtype, Vec::new());
                    let got = embed(&mut pipeline, &PROMPT, size, pooling);
                    assert_eq!(got, expected, "{stages} stages, chunks of {size}, {dtype:?}");
                }
            }
        }
    }
}

/// Embeddings and answers share frames and do not disturb each other.
#[test]
fn embeddings_share_frames_with_answers() {
    let mut pipeline = Pipeline::new(2, Dtype::F32, Vec::new());
    for sequence in 0..3 {
        pipeline.open(sequence, &PROMPT, SamplingParams::greedy());
    }
    let mut meta = StepMeta {
        rows: vec![
            row(0, 0, 11, Want::Embed { pooling: Pooling::Last }),
            row(1, 0, 11, Want::Sample),
            row(2, 0, 11, Want::Embed { pooling: Pooling::Mean }),
        ],
        ..StepMeta::default()
    };
    meta.tables = (0..3).flat_map(|sequence| blocks(sequence, 0, 11)).collect();
    let results = pipeline.step(&meta, &PROMPT.repeat(3));
    let vector = |row: usize| match &results.rows[row].outcome {
        RowOutcome::Embedding(vector) => vector.clone(),
        other => panic!("expected an embedding, got {other:?}"),
    };
    assert_eq!(vector(0), expected_embedding(&config(), &PROMPT, Pooling::Last));
    assert_eq!(vector(2), expected_embedding(&config(), &PROMPT, Pooling::Mean));
    assert!(matches!(results.rows[1].outcome, RowOutcome::Token { .. }), "{results:?}");
}

/// A step that failed may have added some of its positions: none of them counts twice, whatever is
/// sent then.
#[test]
fn a_failed_step_never_counts_twice() {
    for (stages, at, fault) in [(2, 0, Fault::Fail), (2, 1, Fault::Panic), (1, 0, Fault::Fail)] {
        let mut mocks = vec![MockConfig::default(); stages];
        mocks[at].faults = vec![(1, fault)];
        let mut pipeline = Pipeline::new(stages as u16, Dtype::F32, mocks);
        pipeline.open(0, &PROMPT, SamplingParams::greedy());
        let mut send = |at: usize, count: usize| {
            let meta = chunk(0, &PROMPT, at, count, Pooling::Mean);
            pipeline.step(&meta, &PROMPT[at..at + count])
        };
        assert_eq!(send(0, 4).rows[0].outcome, RowOutcome::Done);
        assert!(failure(&send(4, 4), 0).contains("fault in step 1"));
        if at + 1 == stages {
            // Begun anew by nobody: what is there is not known.
            assert!(failure(&send(8, 3), 0).contains("cannot be added"));
        }
        assert_eq!(send(0, 6).rows[0].outcome, RowOutcome::Done, "it begins anew");
        assert!(failure(&send(4, 4), 0).contains("cannot be added"), "positions 4 and 5 again");
        send(0, 6);
        let results = send(6, 5);
        let RowOutcome::Embedding(vector) = &results.rows[0].outcome else { panic!("{results:?}") };
        assert_eq!(*vector, expected_embedding(&config(), &PROMPT, Pooling::Mean));
    }
}

#[test]
fn what_is_not_finite_is_no_embedding() {
    let mocks = vec![MockConfig { faults: vec![(0, Fault::Nan)], ..MockConfig::default() }];
    let mut pipeline = Pipeline::new(1, Dtype::F32, mocks);
    pipeline.open(0, &PROMPT, SamplingParams::greedy());
    let meta = chunk(0, &PROMPT, 0, 11, Pooling::Mean);
    assert!(failure(&pipeline.step(&meta, &PROMPT), 0).contains("not finite"));
}
