//! Stages in a row: the same tokens however the model is cut, failures that stay where they belong.

mod common;

use std::time::Duration;

use common::*;
use millrace_engine::mock::{Fault, MockConfig, expected_tokens};
use millrace_shared::id::{Epoch, SequenceId};
use millrace_shared::model::Dtype;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::control::VoidRows;
use millrace_shared::wire::data::{OpenMeta, ResultMeta, RowOutcome, StepMeta, Want};

const PROMPT: [u32; 11] = [5, 250, 3, 3, 77, 128, 299, 0, 41, 5, 9];

fn with_fault(stages: usize, at: usize, call: u64, fault: Fault) -> Vec<MockConfig> {
    let mut mocks = vec![MockConfig::default(); stages];
    mocks[at].faults = vec![(call, fault)];
    mocks
}

fn failure(results: &ResultMeta, row: usize) -> &str {
    match &results.rows[row].outcome {
        RowOutcome::Failed(cause) => &cause.message,
        other => panic!("expected a failure, got {other:?}"),
    }
}

fn token(results: &ResultMeta, row: usize) -> u32 {
    match &results.rows[row].outcome {
        RowOutcome::Token { token, .. } => *token,
        other => panic!("expected a token, got {other:?}"),
    }
}

#[test]
fn placement_and_chunking_change_nothing() {
    let expected = expected_tokens(&config(), &PROMPT, 12);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for stages in [1, 2, 3, 5, 7] {
            for chunk in [1, 2, 3, 4, 7, 64] {
                let mut pipeline = Pipeline::new(stages, dtype, Vec::new());
                let got = pipeline.generate(0, &PROMPT, chunk, 12);
                assert_eq!(got, expected, "{stages} stages, chunks of {chunk}, {dtype:?}");
            }
        }
    }
}

/// The result tells what each stage spent, in order; where one failed, nothing.
#[test]
fn results_carry_the_time_of_every_stage() {
    let slow = |ms| MockConfig { step_latency: Duration::from_millis(ms), ..MockConfig::default() };
    for dtype in [Dtype::F32, Dtype::F16] {
        let mut mocks = vec![slow(2), slow(9), slow(4)];
        mocks[1].faults = vec![(1, Fault::Fail)];
        let mut pipeline = Pipeline::new(3, dtype, mocks);
        pipeline.open(0, &PROMPT, SamplingParams::greedy());
        let step = |pipeline: &mut Pipeline, at: u32| {
            let mut meta = one_row(0, at, 1, Want::None);
            meta.tables = blocks(0, at as usize, 1);
            pipeline.step(&meta, &PROMPT[at as usize..][..1])
        };
        let times = step(&mut pipeline, 0).times;
        let steps: Vec<_> = times.iter().map(|t| t.step().as_millis()).collect();
        assert!(steps.len() == 3 && steps[0] >= 2 && steps[1] >= 9 && steps[2] >= 4, "{steps:?}");
        assert!(times.iter().all(|t| t.wait().is_zero()), "nothing waited");
        assert!(step(&mut pipeline, 1).times.is_empty(), "a stage failed");
    }
}

/// Two sequences in the same frames do not disturb each other.
#[test]
fn sequences_share_frames() {
    let prompts = [&PROMPT[..], &[9, 9, 9]];
    let expected = prompts.map(|prompt| expected_tokens(&config(), prompt, 5));
    let mut pipeline = Pipeline::new(3, Dtype::F32, Vec::new());
    let mut logs = prompts.map(<[u32]>::to_vec);
    let mut done = [0, 0];
    for (id, prompt) in prompts.iter().enumerate() {
        pipeline.open(id as u64, prompt, SamplingParams::greedy());
    }
    for _ in 0..5 {
        let mut meta = StepMeta::default();
        let mut tokens = Vec::new();
        for id in 0..2 {
            let count = logs[id].len() - done[id];
            meta.rows.push(row(id as u64, done[id] as u32, count as u32, Want::Sample));
            meta.tables.extend(blocks(id as u64, done[id], count));
            tokens.extend_from_slice(&logs[id][done[id]..]);
            done[id] += count;
        }
        let results = pipeline.step(&meta, &tokens);
        for (id, log) in logs.iter_mut().enumerate() {
            log.push(token(&results, id));
        }
    }
    for id in 0..2 {
        assert_eq!(logs[id][prompts[id].len()..], expected[id]);
    }
}

/// A wrong block table gives other tokens: the mock can be trusted to notice.
#[test]
fn the_mock_notices_aliased_blocks() {
    let run = |alias: bool| {
        let mut pipeline = Pipeline::new(2, Dtype::F32, Vec::new());
        pipeline.open(0, &PROMPT, SamplingParams::greedy());
        let mut meta = one_row(0, 0, 11, Want::Sample);
        meta.tables = blocks(0, 0, 11);
        if alias {
            meta.tables[0].blocks[2] = meta.tables[0].blocks[0];
        }
        token(&pipeline.step(&meta, &PROMPT), 0)
    };
    assert_eq!(run(false), expected_tokens(&config(), &PROMPT, 1)[0]);
    assert_ne!(run(true), run(false));
}

#[test]
fn a_failed_step_passes_through_and_the_next_one_works() {
    for (at, fault, cause) in [
        (0, Fault::Fail, "stage 0, layers 0..2: fault in step 0"),
        (1, Fault::Panic, "stage 1, layers 2..4: the engine panicked: fault in step 0"),
        (2, Fault::Fail, "stage 2, layers 4..6: fault in step 0"),
        (2, Fault::Panic, "stage 2, layers 4..6: the engine panicked: fault in step 0"),
        (0, Fault::Nan, "stage 1, layers 2..4: non-finite value"),
    ] {
        let mut pipeline = Pipeline::new(3, Dtype::F32, with_fault(3, at, 0, fault));
        pipeline.open(0, &PROMPT, SamplingParams::greedy());
        let mut meta = one_row(0, 0, 11, Want::Sample);
        meta.tables = blocks(0, 0, 11);
        let results = pipeline.step(&meta, &PROMPT);
        assert!(failure(&results, 0).starts_with(cause), "{}", failure(&results, 0));
        // Tables were applied everywhere: the same rows again need no new ones.
        meta.tables.clear();
        let results = pipeline.step(&meta, &PROMPT);
        assert_eq!(token(&results, 0), expected_tokens(&config(), &PROMPT, 1)[0], "{cause}");
    }
}

#[test]
fn nan_logits_fail_their_row() {
    let mut pipeline = Pipeline::new(1, Dtype::F32, with_fault(1, 0, 0, Fault::Nan));
    pipeline.open(0, &PROMPT, SamplingParams::greedy());
    let mut meta = one_row(0, 0, 11, Want::Sample);
    meta.tables = blocks(0, 0, 11);
    assert!(failure(&pipeline.step(&meta, &PROMPT), 0).contains("not finite"));
    assert_eq!(
        token(&pipeline.step(&meta, &PROMPT), 0),
        expected_tokens(&config(), &PROMPT, 1)[0],
        "running a step again gives what it should have given"
    );
}

#[test]
fn rows_fail_alone() {
    let mut pipeline = Pipeline::new(2, Dtype::F32, Vec::new());
    pipeline.open(0, &PROMPT, SamplingParams::greedy());
    pipeline.open(1, &[1], SamplingParams { temperature: f32::NAN, ..SamplingParams::greedy() });
    pipeline.open(3, &[1, VOCAB], SamplingParams::greedy());
    let mut meta = StepMeta {
        rows: vec![
            row(1, 0, 1, Want::Sample), // opened with bad parameters
            row(2, 0, 1, Want::Sample), // never opened
            row(0, 0, 11, Want::Sample),
            row(3, 0, 1, Want::Score { top_k: 1 }), // opened with a bad token
            row(4, 0, 1, Want::None),               // never opened, nothing wanted
        ],
        ..StepMeta::default()
    };
    for (sequence, block) in [(1, 0), (2, 1), (3, 2), (4, 3)] {
        meta.tables.push(millrace_shared::wire::data::TableUpdate {
            sequence: SequenceId(sequence),
            first: 0,
            blocks: vec![block],
        });
    }
    meta.tables.extend(blocks(0, 0, 11));
    let mut tokens = vec![1, 1];
    tokens.extend(PROMPT);
    tokens.extend([1, 1]);
    let results = pipeline.step(&meta, &tokens);
    assert!(failure(&results, 0).contains("temperature"));
    assert!(failure(&results, 1).contains("never opened"));
    assert_eq!(token(&results, 2), expected_tokens(&config(), &PROMPT, 1)[0]);
    assert!(failure(&results, 3).contains("outside the vocabulary"));
    assert_eq!(results.rows[4].outcome, RowOutcome::Done);
    // A row beyond the token log.
    let mut meta = one_row(0, 12, 1, Want::Sample);
    meta.tables = blocks(0, 12, 1);
    assert!(failure(&pipeline.step(&meta, &[1]), 0).contains("has 12 tokens"));
}

#[test]
fn released_sequences_are_forgotten_even_before_they_open() {
    let mut pipeline = Pipeline::new(2, Dtype::F32, Vec::new());
    pipeline.open(0, &[1, 2], SamplingParams::greedy());
    let released = |ids: &[u64]| StepMeta {
        released: ids.iter().map(|&id| SequenceId(id)).collect(),
        ..StepMeta::default()
    };
    assert!(pipeline.step(&released(&[0, 5]), &[]).rows.is_empty());
    pipeline.open(5, &[1], SamplingParams::greedy());
    for id in [0, 5] {
        let mut meta = one_row(id, 0, 1, Want::Sample);
        meta.tables = blocks(id, 0, 1);
        assert!(failure(&pipeline.step(&meta, &[1]), 0).contains("never opened"), "{id}");
    }
    // Opening again replaces.
    pipeline.open(0, &[4], SamplingParams::greedy());
    pipeline.open(0, &PROMPT, SamplingParams::greedy());
    assert_eq!(pipeline.generate(0, &PROMPT, 4, 3), expected_tokens(&config(), &PROMPT, 3));
}

#[test]
fn scores_follow_the_token_log() {
    let mut pipeline = Pipeline::new(2, Dtype::F32, Vec::new());
    let mut tokens = PROMPT.to_vec();
    tokens.extend(expected_tokens(&config(), &PROMPT, 2));
    pipeline.open(0, &tokens, SamplingParams::greedy());
    let mut meta = one_row(0, 0, 13, Want::Score { top_k: 2 });
    meta.tables = blocks(0, 0, 13);
    let results = pipeline.step(&meta, &tokens);
    let RowOutcome::Scores(scores) = &results.rows[0].outcome else { panic!("{results:?}") };
    assert_eq!(scores.len(), 13);
    for (index, score) in scores.iter().enumerate() {
        assert_eq!(score.position, index as u32);
        assert_eq!(score.top_logits.len(), 2);
    }
    assert_eq!(scores[10].top_logits[0].0, tokens[11]);
    assert!(scores[10].next_logprob.expect("followed") > -0.01, "the mock is sure of itself");
    assert!(scores[11].next_logprob.expect("followed") > -0.01);
    assert_eq!(scores[12].next_logprob, None, "nothing follows the last token");
}

/// Drafts are accepted up to the first that is another token than the one chosen.
#[test]
fn drafts_are_verified_in_order() {
    let expected = expected_tokens(&config(), &PROMPT, 8);
    let chosen = |results: &ResultMeta| match &results.rows[0].outcome {
        RowOutcome::Tokens(chosen) => chosen.iter().map(|c| c.token).collect::<Vec<_>>(),
        other => panic!("expected tokens, got {other:?}"),
    };
    for stages in [1, 3] {
        let mut pipeline = Pipeline::new(stages, Dtype::F32, Vec::new());
        pipeline.open(0, &PROMPT, SamplingParams::greedy());
        let mut meta = one_row(0, 0, 11, Want::Sample);
        meta.tables = blocks(0, 0, 11);
        assert_eq!(token(&pipeline.step(&meta, &PROMPT), 0), expected[0]);
        let mut verify = |position: usize, first: u32, drafts: &[u32]| {
            let count = 1 + drafts.len();
            let mut meta = one_row(0, position as u32, count as u32, Want::Verify);
            meta.drafts = drafts.to_vec();
            meta.tables = blocks(0, position, count);
            chosen(&pipeline.step(&meta, &[&[first], drafts].concat()))
        };
        assert_eq!(verify(11, expected[0], &expected[1..4]), expected[1..5], "all and one more");
        let wrong = [expected[5], (expected[6] + 1) % VOCAB, expected[7]];
        assert_eq!(verify(15, expected[4], &wrong), expected[5..7], "up to the wrong one");
        assert_eq!(verify(17, expected[6], &[0]), expected[7..8], "what was wrong leaves no trace");
    }
}

/// A row of guesses counts where the row before it ended as it takes for granted, and only there.
#[test]
fn rows_that_follow_count_where_they_were_foreseen() {
    let expected = expected_tokens(&config(), &PROMPT, 12);
    for stages in [1, 3] {
        let mut pipeline = Pipeline::new(stages, Dtype::F32, Vec::new());
        pipeline.open(0, &PROMPT, SamplingParams::greedy());
        let mut meta = one_row(0, 0, 11, Want::Sample);
        meta.tables = blocks(0, 0, 11);
        assert_eq!(token(&pipeline.step(&meta, &PROMPT), 0), expected[0]);
        let mut follow = |position: usize, want: Want, tokens: &[u32]| {
            let mut meta = one_row(0, position as u32, tokens.len() as u32, want);
            meta.drafts = tokens[usize::from(want == Want::Verify)..].to_vec();
            meta.tables = blocks(0, position, tokens.len());
            match &pipeline.step(&meta, tokens).rows[0].outcome {
                RowOutcome::Tokens(chosen) => chosen.iter().map(|c| c.token).collect(),
                RowOutcome::Done => Vec::new(),
                other => panic!("expected tokens, got {other:?}"),
            }
        };
        assert_eq!(follow(11, Want::Verify, &expected[..3]), expected[1..4]);
        // It began after a row that was right to its end, and is so itself.
        assert_eq!(follow(14, Want::Follow, &expected[3..5]), expected[4..6]);
        // The same place, guessed otherwise.
        let other = (expected[5] + 1) % VOCAB;
        assert_eq!(follow(16, Want::Follow, &[other, expected[6]]), [0; 0]);
        assert_eq!(follow(18, Want::Follow, &expected[7..9]), [0; 0], "after a guess in vain");
        // Neither has left a trace.
        assert_eq!(follow(16, Want::Verify, &[expected[5], other]), expected[6..7]);
        assert_eq!(follow(18, Want::Follow, &expected[7..8]), [0; 0], "half of it was wrong");
        assert_eq!(follow(17, Want::Follow, &expected[6..8]), expected[7..9]);
    }
}

#[test]
fn sampling_is_the_same_wherever_it_is_resumed() {
    let params = SamplingParams {
        temperature: 2.0,
        repetition_penalty: 1.2,
        frequency_penalty: 2.0,
        logit_bias: (0..VOCAB).map(|id| (id, 35.0)).step_by(2).collect(),
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let run = |pipeline: &mut Pipeline, log: &mut Vec<u32>, n: usize| {
        let mut done = 0;
        for _ in 0..n {
            let count = log.len() - done;
            let mut meta = one_row(0, done as u32, count as u32, Want::Sample);
            meta.tables = blocks(0, done, count);
            let results = pipeline.step(&meta, &log[done..]);
            done = log.len();
            log.push(token(&results, 0));
        }
    };
    let mut whole = PROMPT.to_vec();
    let mut pipeline = Pipeline::new(1, Dtype::F32, Vec::new());
    pipeline.open(0, &PROMPT, params.clone());
    run(&mut pipeline, &mut whole, 10);
    // After four tokens the pipeline is lost; another one takes over from the token log.
    let mut resumed = PROMPT.to_vec();
    let mut first = Pipeline::new(2, Dtype::F32, Vec::new());
    first.open(0, &PROMPT, params.clone());
    run(&mut first, &mut resumed, 4);
    let mut second = Pipeline::new(3, Dtype::F32, Vec::new());
    let mut open = open(0, &resumed, params);
    open.prompt_len = PROMPT.len() as u32;
    second.stages[2].open(Epoch(1), OpenMeta { opens: vec![open] }).expect("last stage");
    run(&mut second, &mut resumed, 6);
    assert_eq!(resumed, whole);
    let distinct: std::collections::BTreeSet<_> = whole[PROMPT.len()..].iter().collect();
    assert!(distinct.len() > 3, "it really sampled: {whole:?}");
}

/// A cancelled sequence loses its rows wherever they are; who shares a frame with it notices
/// nothing, and what comes of it later, under a newer epoch of its own, is computed.
#[test]
fn void_rows_are_left_out_and_nobody_else_notices() {
    let cancelled = VoidRows { sequence: SequenceId(0), epoch: 0 };
    let with = |rows: &[(u64, &[u32], Want)]| {
        let mut meta = StepMeta::default();
        for &(sequence, tokens, want) in rows {
            meta.rows.push(row(sequence, 0, tokens.len() as u32, want));
            meta.tables.extend(blocks(sequence, 0, tokens.len()));
        }
        (meta, rows.iter().flat_map(|(_, tokens, _)| *tokens).copied().collect::<Vec<u32>>())
    };
    for dtype in [Dtype::F32, Dtype::F16] {
        for at in 0..3 {
            let mut pipeline = Pipeline::new(3, dtype, Vec::new());
            pipeline.open(0, &PROMPT, SamplingParams::greedy());
            pipeline.open(1, &PROMPT[3..8], SamplingParams::greedy());
            pipeline.open(2, &PROMPT[..2], SamplingParams::greedy());
            pipeline.stages[at].void(Epoch(2), &[cancelled]);
            assert_eq!(pipeline.stages[at].rows_left_out(), 0, "another epoch's");
            pipeline.stages[at].void(Epoch(1), &[cancelled]);
            // In the middle, with drafts before and after it.
            let (mut meta, tokens) = with(&[
                (1, &PROMPT[3..8], Want::Sample),
                (0, &PROMPT[..3], Want::Verify),
                (2, &PROMPT[..2], Want::Sample),
            ]);
            meta.drafts = PROMPT[1..3].to_vec();
            let results = pipeline.step(&meta, &tokens);
            assert_eq!(results.rows.len(), 2, "stage {at}");
            assert_eq!(pipeline.stages[at].rows_left_out(), 1);
            let expected = |prompt: &[u32]| expected_tokens(&config(), prompt, 1)[0];
            assert_eq!(token(&results, 0), expected(&PROMPT[3..8]));
            assert_eq!(token(&results, 1), expected(&PROMPT[..2]));
            // Nothing left: the frame goes its way all the same.
            let (meta, tokens) = with(&[(0, &PROMPT[..4], Want::None)]);
            assert!(pipeline.step(&meta, &tokens).rows.is_empty());
            // Computed anew, under a newer epoch.
            let (mut meta, tokens) = with(&[(0, &PROMPT, Want::Sample)]);
            meta.rows[0].sequence_epoch = 1;
            let results = pipeline.step(&meta, &tokens);
            assert_eq!(token(&results, 0), expected(&PROMPT));
            // Released, it is forgotten.
            let released = StepMeta { released: vec![SequenceId(0)], ..StepMeta::default() };
            pipeline.step(&released, &[]);
            assert_eq!(pipeline.stages[at].rows_left_out(), 2);
        }
    }
}
