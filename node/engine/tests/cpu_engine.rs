//! The CPU engine through its seam, on a small made-up model: placement changes nothing, and bad
//! steps harm nobody.

#![allow(clippy::unwrap_used)]

#[path = "cpu_engine/tiny.rs"]
mod tiny;

use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, Isa, LoadError, StageInput, StageOutput, StepError};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{Dtype, RopeStyle, TensorType};
use millrace_shared::wire::control::{EngineSettings, ProfileSpec};
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};
use tiny::{Pipeline, Tiny, row, tables};

const LEN: usize = 150;

fn tokens(sequence: u64) -> Vec<u32> {
    (0..LEN as u32).map(|i| (i * 37 + sequence as u32 * 11 + 5) % 96).collect()
}

/// Logits after every position of a sequence, fed in chunks of the given sizes (the last repeated).
fn run(pipeline: &mut Pipeline, chunks: &[usize]) -> Vec<Vec<u32>> {
    let ids = tokens(1);
    let (mut at, mut turn, mut out) = (0, 0, Vec::new());
    while at < LEN {
        let n = chunks[turn.min(chunks.len() - 1)].min(64).min(LEN - at);
        let tables = if at == 0 { tables(1, LEN, pipeline.block_size, 0) } else { Vec::new() };
        let rows = vec![row(1, at, n, Want::Score { top_k: 0 })];
        let meta = StepMeta { rows, tables, ..StepMeta::default() };
        let logits = pipeline.step(&meta, &ids[at..at + n]).unwrap();
        out.extend(logits.into_iter().map(|l| l.2));
        at += n;
        turn += 1;
    }
    out
}

#[test]
fn cuts_chunks_threads_and_instruction_sets_change_nothing() {
    for types in [[TensorType::Q4_1, TensorType::Q8_0], [TensorType::Q8_0, TensorType::F32]] {
        let tiny = Tiny::new(types[0], types[1]);
        let reference = run(&mut tiny.pipeline(&[4], 1, Isa::Scalar), &[64]);
        assert_eq!(reference.len(), LEN);
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512] {
            if isa > Isa::best() {
                continue;
            }
            let stages: [&[u32]; 4] = [&[4], &[1, 4], &[1, 3, 4], &[2, 4, 4]];
            for cuts in stages {
                for (threads, chunks) in
                    [(1, &[1][..]), (2, &[7][..]), (1, &[64][..]), (2, &[33, 1, 5, 50][..])]
                {
                    let got = run(&mut tiny.pipeline(cuts, threads, isa), chunks);
                    assert!(got == reference, "{types:?} {isa} {cuts:?} {threads} {chunks:?}");
                }
            }
        }
    }
}

#[test]
fn blocks_of_256_are_the_same_everywhere() {
    for types in [[TensorType::Q4_K, TensorType::Q6_K], [TensorType::Q6_K, TensorType::Q4_K]] {
        let tiny = Tiny::new(types[0], types[1]);
        let reference = run(&mut tiny.pipeline(&[4], 1, Isa::Scalar), &[64]);
        let values = |row: &[u32]| row.iter().map(|&x| f32::from_bits(x)).collect::<Vec<_>>();
        assert!(reference.iter().all(|row| values(row).iter().any(|&x| x != 0.0)));
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512] {
            if isa > Isa::best() {
                continue;
            }
            let got = run(&mut tiny.pipeline(&[1, 3, 4], 2, isa), &[33, 1, 5, 50]);
            assert!(got == reference, "{types:?} {isa}");
        }
    }
}

#[test]
fn company_and_block_size_change_nothing() {
    let tiny = Tiny::new(TensorType::Q4_0, TensorType::Q4_1);
    company_changes_nothing(&tiny.with_experts());
    company_changes_nothing(&tiny);
}

fn company_changes_nothing(tiny: &Tiny) {
    let alone = run(&mut tiny.pipeline(&[4], 2, Isa::best()), &[64]);
    for block_size in [1, 4, 16, 64] {
        let mut tiny = tiny.clone();
        tiny.settings.kv_block_size = block_size;
        tiny.settings.kv_blocks = tiny::POSITIONS / block_size;
        assert!(run(&mut tiny.pipeline(&[2, 4], 2, Isa::best()), &[30]) == alone, "{block_size}");
    }
    // Sequence 1 decodes among others, whose blocks lie between its own.
    let mut pipeline = tiny.pipeline(&[4], 2, Isa::best());
    let others = [2u64, 3, 4, 5];
    for (at, expected) in alone.iter().enumerate() {
        let mut rows = vec![row(3, at, 1, Want::Sample), row(1, at, 1, Want::Sample)];
        rows.extend(others.iter().filter(|&&s| s != 3).map(|&s| row(s, at, 1, Want::Sample)));
        let ids: Vec<u32> = rows.iter().map(|r| tokens(r.sequence.0)[at]).collect();
        let mut meta = StepMeta { rows, ..StepMeta::default() };
        if at % 16 == 0 {
            let first = at as u32 / 16;
            let update = |s: u64| TableUpdate {
                sequence: SequenceId(s),
                first,
                blocks: vec![first * 5 + s as u32 - 1],
            };
            meta.tables = (1..=5).map(update).collect();
        }
        let logits = pipeline.step(&meta, &ids).unwrap();
        assert_eq!(logits[1].0, 1);
        assert!(logits[1].2 == *expected, "position {at}");
    }
}

#[test]
fn dtypes_and_rope_styles_hold_across_cuts() {
    for (kv, activation, style) in [
        (Dtype::F32, Dtype::Bf16, RopeStyle::Halves),
        (Dtype::F16, Dtype::F16, RopeStyle::Interleaved),
        (Dtype::Int8, Dtype::F32, RopeStyle::Halves),
    ] {
        let mut tiny = Tiny::new(TensorType::F16, TensorType::BF16);
        tiny.settings.kv_dtype = kv;
        tiny.settings.activation_dtype = activation;
        tiny.config.rope.style = style;
        let one = run(&mut tiny.pipeline(&[4], 1, Isa::Scalar), &[64]);
        let three = run(&mut tiny.pipeline(&[1, 2, 4], 2, Isa::best()), &[5]);
        assert!(one == three, "{kv:?} {activation:?}");
    }
}

/// Logits after the last few of 530 positions: attention in more than one part.
#[test]
fn long_contexts_are_the_same_everywhere() {
    const LONG: usize = 530;
    for kv in [Dtype::F16, Dtype::Int8, Dtype::F32] {
        let mut tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
        tiny.settings.kv_dtype = kv;
        tiny.settings.max_model_len = 576;
        let ids: Vec<u32> = (0..LONG as u32).map(|i| (i * 37 + 5) % 96).collect();
        let run = |block_size: u32, threads, isa, chunk: usize| {
            let mut tiny = tiny.clone();
            tiny.settings.kv_block_size = block_size;
            tiny.settings.kv_blocks = 576 / block_size;
            let mut pipeline = tiny.pipeline(&[2, 4], threads, isa);
            let (mut at, mut out) = (0, Vec::new());
            while at < LONG {
                // The last ten one by one: their parts are computed apart where threads are idle.
                let n = if at >= LONG - 10 { 1 } else { chunk.min(LONG - 10 - at) };
                let new = if at == 0 { tables(1, LONG, block_size, 0) } else { Vec::new() };
                let rows = vec![row(1, at, n, Want::Sample)];
                let meta = StepMeta { rows, tables: new, ..StepMeta::default() };
                let logits = pipeline.step(&meta, &ids[at..at + n]).unwrap();
                if at >= LONG - 10 {
                    out.extend(logits.into_iter().map(|l| l.2));
                }
                at += n;
            }
            out
        };
        let reference = run(64, 1, Isa::best(), 64);
        assert_eq!(reference.len(), 10);
        assert!(run(16, 2, Isa::best(), 37) == reference, "{kv:?}");
        assert!(run(4, 1, Isa::best(), 64) == reference, "{kv:?}");
        assert!(run(32, 2, Isa::Scalar, 50) == reference, "{kv:?} scalar");
        if Isa::best() > Isa::Avx2 {
            assert!(run(64, 2, Isa::Avx2, 64) == reference, "{kv:?} AVX2");
        }
    }
}

#[test]
fn wants_decide_what_comes_out() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    let mut pipeline = tiny.pipeline(&[4], 1, Isa::best());
    let mut updates = tables(1, 20, 16, 0);
    updates.extend(tables(2, 20, 16, 4));
    updates.extend(tables(3, 20, 16, 8));
    let meta = StepMeta {
        rows: vec![
            row(1, 0, 3, Want::None),
            row(2, 0, 4, Want::Sample),
            row(3, 0, 2, Want::Score { top_k: 1 }),
        ],
        tables: updates,
        ..StepMeta::default()
    };
    let got = pipeline.step(&meta, &[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
    let places: Vec<(usize, u32)> = got.iter().map(|l| (l.0, l.1)).collect();
    assert_eq!(places, [(1, 3), (2, 0), (2, 1)]);
    let none = StepMeta { rows: vec![row(1, 3, 1, Want::None)], ..StepMeta::default() };
    assert!(pipeline.step(&none, &[4]).unwrap().is_empty());
}

/// The last layer and the head run for the last position alone, or for all of them.
#[test]
fn pruning_changes_nothing() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    pruning_leaves(&tiny.with_experts());
    pruning_leaves(&tiny);
}

fn pruning_leaves(tiny: &Tiny) {
    let ids = tokens(1);
    for (cuts, threads) in [(&[4][..], 1), (&[2, 4][..], 2), (&[4, 4][..], 2)] {
        let scored = run(&mut tiny.pipeline(cuts, threads, Isa::best()), &[64]);
        for chunk in [1, 2, 7, 33, 64] {
            let mut pipeline = tiny.pipeline(cuts, threads, Isa::best());
            let mut updates = tables(1, LEN, 16, 0);
            // Company of every kind, before and after.
            updates.extend([tables(2, LEN, 16, 10), tables(3, LEN, 16, 20)].concat());
            for at in (0..LEN).step_by(chunk) {
                let count = chunk.min(LEN - at).min(62);
                let rows = vec![
                    row(2, at, 1, Want::Score { top_k: 0 }),
                    row(1, at, count, Want::Sample),
                    row(3, at, 1, Want::None),
                ];
                let tables = std::mem::take(&mut updates);
                let meta = StepMeta { rows, tables, ..StepMeta::default() };
                let input = [&[1], &ids[at..at + count], &[2]].concat();
                let got = pipeline.step(&meta, &input).unwrap();
                assert_eq!((got.len(), got[1].0), (2, 1));
                let last = at + count - 1;
                assert_eq!(got[1].1 as usize, last);
                assert!(got[1].2 == scored[last], "{cuts:?}, chunks of {chunk}, position {last}");
                if count < chunk {
                    break;
                }
            }
        }
    }
}

#[test]
fn impossible_steps_are_refused_and_harm_nobody() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    let mut pipeline = tiny.pipeline(&[4], 1, Isa::best());
    let bad = |sequence: u64, blocks: Vec<u32>, r: Row| StepMeta {
        rows: vec![r],
        tables: vec![TableUpdate { sequence: SequenceId(sequence), first: 0, blocks }],
        ..StepMeta::default()
    };
    let sample = Want::Sample;
    let cases: Vec<(StepMeta, Vec<u32>, &str)> = vec![
        (bad(7, vec![0], row(8, 0, 1, sample)), vec![1], "no block table"),
        (bad(7, vec![0], row(7, 16, 1, sample)), vec![1], "its table has 1"),
        (bad(7, vec![u32::MAX], row(7, 0, 1, sample)), vec![1], "KV block 4294967295"),
        (bad(7, vec![0], row(7, u32::MAX as usize, 1, sample)), vec![1], "positions from"),
        (bad(7, vec![0], row(7, 5000, 1, sample)), vec![1], "beyond the limit"),
        (bad(7, vec![0], row(7, 0, 1, sample)), vec![96], "outside the vocabulary"),
        (bad(7, vec![0], row(7, 0, 1, sample)), vec![1, 2], "2 token ids for 1"),
        (bad(7, vec![0], row(7, 0, 0, sample)), vec![], "0 positions"),
        (bad(7, vec![0; 65], row(7, 0, 65, sample)), vec![1; 65], "the stage allows 64"),
    ];
    for (meta, ids, expected) in cases {
        match pipeline.step(&meta, &ids) {
            Err(StepError::Invalid(e)) => assert!(e.contains(expected), "{e}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let fresh = run(&mut tiny.pipeline(&[4], 1, Isa::best()), &[64]);
    assert!(run(&mut pipeline, &[64]) == fresh);
}

#[test]
fn not_finite_is_named() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    let (spec, sources) = tiny.stage(1..3, false, false, 1, Isa::best());
    let mut engine = CpuEngine::new();
    engine.load(&spec, &sources, &mut |_| {}).unwrap();
    let meta = StepMeta {
        rows: vec![row(4, 0, 2, Want::None), row(9, 0, 2, Want::None)],
        tables: [tables(4, 16, 16, 0), tables(9, 16, 16, 1)].concat(),
        ..StepMeta::default()
    };
    let width = tiny.config.hidden as usize;
    let mut out = vec![0f32; 4 * width];
    for bad in [f32::NAN, f32::INFINITY, 3e38] {
        let mut x = vec![0.5f32; 4 * width];
        x[3 * width..].fill(bad);
        match engine.step(&meta, StageInput::Hidden(&x), StageOutput::Hidden(&mut out)) {
            Err(StepError::NonFinite { layer: 1, sequence: 9, position: 1, .. }) => {}
            other => panic!("{bad}: {other:?}"),
        }
    }
    let x = vec![0.5f32; 4 * width];
    engine.step(&meta, StageInput::Hidden(&x), StageOutput::Hidden(&mut out)).unwrap();
    assert!(out.iter().all(|x| x.is_finite()));
    assert!(engine.busy() > std::time::Duration::ZERO);
}

#[test]
fn loads_that_cannot_work_say_why() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    let (spec, sources) = tiny.stage(0..4, true, true, 1, Isa::best());
    let load = |spec: &_, sources: &[_]| CpuEngine::new().load(spec, sources, &mut |_| {});
    assert!(load(&spec, &sources).is_ok());

    let mut missing = sources.clone();
    missing.retain(|s| s.entry.name != "blk.2.ffn_down.weight");
    assert!(
        matches!(load(&spec, &missing), Err(LoadError::MissingTensor(n)) if n.contains("blk.2"))
    );

    let find = |name: &str| sources.iter().position(|s| s.entry.name == name).unwrap();
    let mut shape = sources.clone();
    shape[find("blk.0.attn_q.weight")].entry.dims[1] = 63;
    assert!(matches!(load(&spec, &shape), Err(LoadError::Shape { .. })));

    let mut strange = sources.clone();
    strange[find("blk.0.attn_q.weight")].entry.dtype = TensorType::Q8_1;
    let error = load(&spec, &strange).unwrap_err().to_string();
    assert!(error.contains("blk.0.attn_q.weight") && error.contains("Q8_1"), "{error}");

    let mut cut = sources.clone();
    cut[find("blk.3.ffn_up.weight")].offset = 1 << 40;
    assert!(matches!(load(&spec, &cut), Err(LoadError::Io { .. })));

    let mut huge = spec.clone();
    huge.settings.kv_blocks = u32::MAX;
    assert!(matches!(load(&huge, &sources), Err(LoadError::OutOfMemory { .. })));

    for set in [
        |s: &mut EngineSettings| s.max_num_seqs = u32::MAX,
        |s: &mut EngineSettings| s.max_batch_tokens = u32::MAX,
        |s: &mut EngineSettings| s.max_model_len = u32::MAX,
    ] {
        let mut huge = spec.clone();
        set(&mut huge.settings);
        assert!(matches!(load(&huge, &sources), Err(LoadError::OutOfMemory { .. })));
    }

    let mut odd = spec.clone();
    odd.settings.kv_block_size = 24;
    assert!(matches!(load(&odd, &sources), Err(LoadError::Settings(_))));
}

#[test]
fn profile_measures() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    let spec = ProfileSpec {
        sharing: 1,
        config: tiny.config.clone(),
        layer_type: TensorType::Q4_1,
        head_type: TensorType::Q8_0,
    };
    let got = CpuEngine::new().profile(&spec, 1).unwrap();
    let all = got.layer_seconds.iter().chain(&got.head_seconds);
    assert!(all.copied().all(|s| s > 0.0));
}
