//! Frames that a stage must refuse, and what it says of them.

mod common;

use common::*;
use millrace_engine::mock::MockConfig;
use millrace_engine::stage::{StageError, StageRunner};
use millrace_shared::id::{Epoch, PipelineId, SequenceId};
use millrace_shared::model::Dtype;
use millrace_shared::sampling::{SamplingParams, TokenMask};
use millrace_shared::wire::data::{
    Failure, FrameHeader, FrameKind, MaskMeta, OpenMeta, ResultMeta, RowMask, RowOutcome,
    SequenceOpen, StepMeta, TableUpdate, Want,
};
use millrace_shared::wire::frame::Frame;

fn first() -> StageRunner {
    runner(&spec(0..3, true, false, Dtype::F32), 0, MockConfig::default())
}

fn last() -> StageRunner {
    runner(&spec(3..6, false, true, Dtype::F32), 1, MockConfig::default())
}

fn good_meta() -> StepMeta {
    let mut meta = one_row(0, 0, 2, Want::Sample);
    meta.tables = blocks(0, 0, 2);
    meta
}

fn refused(stage: &mut StageRunner, frame: &Frame, says: &str) {
    let error = stage.run(frame).expect_err(says);
    assert!(error.is_bad_frame() && !error.is_stale(), "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn the_first_stage_checks_its_frames() {
    let mut stage = first();
    let meta = good_meta();
    let tokens = bytemuck::cast_slice::<u32, u8>(&[1, 2]);
    let bad = |change: &dyn Fn(&mut FrameHeader)| {
        let mut header = header(1);
        change(&mut header);
        frame(header, &meta, tokens)
    };
    refused(&mut stage, &bad(&|h| h.kind = FrameKind::Activations), "takes Step frames");
    refused(&mut stage, &bad(&|h| h.kind = FrameKind::Results), "takes Step frames");
    refused(&mut stage, &bad(&|h| h.dtype = Dtype::F32), "type f32");
    refused(&mut stage, &step_frame(1, &meta, &[1]), "payload of 4 bytes");
    refused(&mut stage, &step_frame(1, &meta, &[1, 2, 3]), "payload of 12 bytes");
    refused(&mut stage, &step_frame(1, &meta, &[1, VOCAB]), "outside the vocabulary");
    let long = one_row(0, 0, 65, Want::None);
    refused(&mut stage, &step_frame(1, &long, &[1; 65]), "the stage allows 64");
    let empty = one_row(0, 0, 0, Want::None);
    refused(&mut stage, &step_frame(1, &empty, &[]), "0 positions");
    let far = one_row(0, 127, 2, Want::None);
    refused(&mut stage, &step_frame(1, &far, &[1, 2]), "the limit is 128");
    let wrap = one_row(0, u32::MAX, 2, Want::None);
    refused(&mut stage, &step_frame(1, &wrap, &[1, 2]), "positions from");
    for (first, blocks, says) in
        [(0, vec![64], "block 64"), (u32::MAX, vec![1], "blocks"), (64, vec![0], "65 blocks")]
    {
        let mut meta = good_meta();
        meta.tables = vec![TableUpdate { sequence: SequenceId(0), first, blocks }];
        refused(&mut stage, &step_frame(1, &meta, &[1, 2]), says);
    }
    stage.run(&step_frame(1, &meta, &[1, 2])).expect("a good frame is still welcome");
    assert_eq!(stage.steps(), 1, "what is refused is not run");
}

#[test]
fn a_later_stage_checks_its_frames() {
    let mut stage = last();
    let mut meta = good_meta();
    let activations =
        |h: FrameHeader| FrameHeader { kind: FrameKind::Activations, dtype: Dtype::F32, ..h };
    let zeros = [0u8; 64];
    refused(&mut stage, &step_frame(1, &meta, &[1, 2]), "takes Activations frames");
    let half = FrameHeader { dtype: Dtype::F16, ..activations(header(1)) };
    refused(&mut stage, &frame(half, &meta, &zeros[..32]), "type f16");
    refused(&mut stage, &frame(activations(header(1)), &meta, &zeros[..60]), "payload of 60");
    refused(&mut stage, &frame(activations(header(1)), &meta, &[]), "payload of 0");
    stage.run(&frame(activations(header(1)), &meta, &zeros)).expect("good");
    meta.failed = Some(Failure::of_stage(0, "because".to_owned()));
    refused(&mut stage, &frame(activations(header(1)), &meta, &zeros), "no payload");
    let passed = stage.run(&frame(activations(header(1)), &meta, &[])).expect("good");
    let results: ResultMeta = passed.meta().expect("results");
    assert_eq!(
        results.rows[0].outcome,
        RowOutcome::Failed(Failure::of_stage(0, "because".to_owned()))
    );
}

/// Metadata of another kind than the header says.
#[test]
fn foreign_metadata_is_refused() {
    let mut stage = first();
    let opens = OpenMeta { opens: vec![open(0, &[1], SamplingParams::greedy())] };
    let frame = Frame::build(header(1), &opens, 0).expect("within limits").seal();
    match stage.run(&frame) {
        Ok(_) => panic!("ran an OpenMeta as a step"),
        Err(error) => assert!(error.is_bad_frame(), "{error}"),
    }
}

/// A constrained sequence gives tokens of its masks, each for one position, and never one without.
#[test]
fn constrained_rows_need_their_masks() {
    let mut pipeline = Pipeline::new(2, Dtype::F32, vec![]);
    let constrained = SequenceOpen {
        constrained: true,
        ..open(0, &[1, 2], SamplingParams { logprobs: Some(1), ..SamplingParams::greedy() })
    };
    let opens = OpenMeta { opens: vec![constrained, open(1, &[1, 2], SamplingParams::greedy())] };
    pipeline.stages[1].open(Epoch(1), opens).expect("last stage");
    let mask = |position, ids: &[u32]| {
        let allowed = TokenMask::of(ids.iter().copied());
        MaskMeta { masks: vec![RowMask { sequence: SequenceId(0), position, allowed }] }
    };
    let mut outcome = |given: Option<MaskMeta>| {
        if let Some(given) = given {
            pipeline.stages[1].mask(Epoch(1), given).expect("last stage");
        }
        pipeline.step(&good_meta(), &[1, 2]).rows.remove(0).outcome
    };
    let failed = |outcome: RowOutcome, says: &str| match outcome {
        RowOutcome::Failed(why) => assert!(why.message.contains(says), "{why:?}"),
        other => panic!("{other:?}"),
    };
    failed(outcome(None), "never came");
    failed(outcome(Some(mask(0, &[5]))), "after position 1 never came");
    for id in [5, 0, VOCAB - 1] {
        match outcome(Some(mask(1, &[id, VOCAB + 7]))) {
            RowOutcome::Token { token, logprobs } => {
                assert_eq!(token, id);
                assert!(logprobs.is_some_and(|l| l.logprob <= 0.0 && l.top.len() == 1));
            }
            other => panic!("{other:?}"),
        }
    }
    failed(outcome(Some(mask(1, &[]))), "no token");
    failed(outcome(Some(mask(1, &[VOCAB]))), "no token");
    let error = first().mask(Epoch(1), mask(1, &[5])).expect_err("not the last stage");
    assert!(error.is_bad_frame(), "{error}");
    assert!(last().mask(Epoch(0), mask(1, &[5])).expect_err("stale").is_stale());
    // Nobody else is concerned.
    let mut meta = one_row(1, 0, 2, Want::Sample);
    meta.tables = blocks(1, 0, 2);
    let other = pipeline.step(&meta, &[1, 2]).rows.remove(0).outcome;
    assert!(matches!(other, RowOutcome::Token { .. }), "{other:?}");
}

#[test]
fn stale_frames_are_told_apart() {
    let mut stage = first();
    for header in [
        FrameHeader { epoch: Epoch(0), ..header(1) },
        FrameHeader { epoch: Epoch(2), ..header(1) },
        FrameHeader { pipeline: PipelineId(2), ..header(1) },
    ] {
        let payload = bytemuck::cast_slice::<u32, u8>(&[1, 2]);
        let error = stage.run(&frame(header, &good_meta(), payload)).expect_err("stale");
        assert!(error.is_stale() && !error.is_bad_frame(), "{error}");
    }
    stage.unload();
    let error = stage.run(&step_frame(1, &good_meta(), &[1, 2])).expect_err("unloaded");
    assert!(matches!(error, StageError::NotLoaded) && error.is_stale());
}

#[test]
fn sequences_are_opened_at_the_last_stage_and_within_limits() {
    let opens = |ids: std::ops::Range<u64>| OpenMeta {
        opens: ids.map(|id| open(id, &[1], SamplingParams::greedy())).collect(),
    };
    let error = first().open(Epoch(1), opens(0..1)).expect_err("not the last stage");
    assert!(error.is_bad_frame());
    let mut stage = last();
    assert!(stage.open(Epoch(0), opens(0..1)).expect_err("stale").is_stale());
    // Four sequences at once, opened anew by each of 1,025 micro-batches in flight, and a few.
    let most = 1025 * 4 + 64;
    stage.open(Epoch(1), opens(0..most)).expect("all that can be in flight fit");
    stage.open(Epoch(1), opens(0..most)).expect("opening again takes no more room");
    let error = stage.open(Epoch(1), opens(most..most + 1)).expect_err("too many");
    assert!(matches!(error, StageError::TooManySequences { limit, .. } if limit == most as usize));
}

#[test]
fn unusable_activation_types_are_a_load_error() {
    let mut stage =
        StageRunner::new(Box::new(millrace_engine::mock::MockEngine::new(MockConfig::default())));
    let spec = spec(0..3, true, false, Dtype::U32);
    let error = stage.load(&spec, place(0), &[], &mut |_| {}).expect_err("u32 activations");
    assert!(error.to_string().contains("u32"));
}
