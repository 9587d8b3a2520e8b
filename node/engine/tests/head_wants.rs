//! Rows that want the largest logits alone get what a scan of all logits finds, in any mixture.

#![allow(clippy::unwrap_used)]

#[path = "cpu_engine/tiny.rs"]
mod tiny;

use millrace_engine::cpu::CpuEngine;
use millrace_engine::mock::{self, MockConfig, MockEngine};
use millrace_engine::{Engine, HeadLogits, HeadWant, Isa, LogitsRow, StageInput, StageOutput};
use millrace_shared::model::TensorType;
use millrace_shared::sampling::largest_logits;
use millrace_shared::wire::data::{StepMeta, Want};
use tiny::{Tiny, row, tables};

/// Row, position, and pairs of id and bits of the logit.
type Given = (usize, u32, Vec<(u32, u32)>);

fn bits(pairs: &[(u32, f32)]) -> Vec<(u32, u32)> {
    pairs.iter().map(|&(id, logit)| (id, logit.to_bits())).collect()
}

fn all(logits: &[f32]) -> Vec<(u32, f32)> {
    (0..).zip(logits.iter().copied()).collect()
}

/// What the engine gives for `wants`, and what all logits reduce to.
fn both(
    engine: &mut dyn Engine,
    meta: &StepMeta,
    input: StageInput<'_>,
    wants: &[HeadWant],
) -> [Vec<Given>; 2] {
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    let mut full = |l: LogitsRow<'_>| {
        let mut top = Vec::new();
        match wants.get(l.row) {
            Some(&HeadWant::Top(k)) if (1..=64).contains(&k) => {
                largest_logits(l.logits, k, &mut top).unwrap();
            }
            _ => top = all(l.logits),
        }
        expected.push((l.row, l.position, bits(&top)));
    };
    engine.step(meta, input, StageOutput::Logits(&mut full)).unwrap();
    let mut sink = |r: millrace_engine::HeadRow<'_>| {
        let given = match r.logits {
            HeadLogits::Full(logits) => bits(&all(logits)),
            HeadLogits::Top(top) => bits(top.unwrap()),
            HeadLogits::Hidden(_) => panic!("nobody asked for it"),
        };
        got.push((r.row, r.position, given));
    };
    engine.step(meta, input, StageOutput::Head { want: wants, sink: &mut sink }).unwrap();
    [got, expected]
}

/// 36 rows: tokens, drafts to verify and scores, 45 positions with logits in all.
fn meta(block_size: u32) -> StepMeta {
    let mut meta = StepMeta::default();
    for i in 0..36 {
        let (count, want) = match i % 8 {
            3 => (2, Want::Verify),
            5 => (2, Want::Score { top_k: 1 }),
            6 => (3, Want::Sample),
            _ => (1, Want::Sample),
        };
        meta.rows.push(row(i, 0, count, want));
        meta.tables.extend(tables(i, count, block_size, i as u32));
        let drafts = if want == Want::Verify { count - 1 } else { 0 };
        meta.drafts.extend((0..drafts).map(|d| d as u32));
    }
    meta
}

fn mixtures() -> Vec<Vec<HeadWant>> {
    let top = HeadWant::Top;
    vec![
        vec![top(1); 36],
        vec![top(64); 36],
        (0..36).map(|i| top(i % 64 + 1)).collect(),
        (0..36).map(|i| if i == 20 { HeadWant::Full } else { top(3) }).collect(),
        (0..36).map(|i| if i % 2 == 0 { HeadWant::Full } else { top(5) }).collect(),
        vec![top(2); 7],
        vec![top(0), top(65), top(usize::MAX)],
        Vec::new(),
    ]
}

#[test]
fn the_cpu_engine_gives_what_rows_want() {
    for (types, threads) in [(TensorType::Q8_0, 1), (TensorType::F32, 2), (TensorType::Q4_1, 3)] {
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512] {
            if isa > Isa::best() {
                continue;
            }
            let tiny = Tiny::new(TensorType::Q4_1, types);
            let (mut spec, sources) = tiny.stage(0..4, true, true, threads, isa);
            spec.settings.max_num_seqs = 36;
            let mut engine = CpuEngine::new();
            engine.load(&spec, &sources, &mut |_| {}).unwrap();
            let meta = meta(spec.settings.kv_block_size);
            let tokens: Vec<u32> = (0..meta.positions() as u32).map(|i| i * 31 % 96).collect();
            for wants in mixtures() {
                let input = StageInput::Tokens(&tokens);
                let [got, expected] = both(&mut engine, &meta, input, &wants);
                assert!(got == expected && !got.is_empty(), "{types:?} {threads} {isa} {wants:?}");
            }
        }
    }
}

#[test]
fn the_mock_gives_what_rows_want() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    let (mut spec, _) = tiny.stage(0..4, true, true, 1, Isa::Scalar);
    spec.config = mock::model_config(4, 96);
    let mut engine = MockEngine::new(MockConfig::default());
    engine.load(&spec, &[], &mut |_| {}).unwrap();
    let meta = meta(spec.settings.kv_block_size);
    let tokens: Vec<u32> = (0..meta.positions() as u32).collect();
    for wants in mixtures() {
        let [got, expected] = both(&mut engine, &meta, StageInput::Tokens(&tokens), &wants);
        assert!(got == expected && !got.is_empty(), "{wants:?}");
    }
}

/// Row, position, and bits of the hidden state.
type State = (usize, u32, Vec<u32>);

/// Rows that want hidden states change nothing for those beside them.
#[test]
fn hidden_states_beside_logits() {
    let tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    let (mut spec, sources) = tiny.stage(0..4, true, true, 2, Isa::best());
    spec.settings.max_num_seqs = 36;
    let mut engine = CpuEngine::new();
    engine.load(&spec, &sources, &mut |_| {}).unwrap();
    let meta = meta(spec.settings.kv_block_size);
    let tokens: Vec<u32> = (0..meta.positions() as u32).map(|i| i * 31 % 96).collect();
    let mut given = |wants: &[HeadWant]| {
        let (mut logits, mut hidden) = (Vec::new(), Vec::new());
        let mut sink = |r: millrace_engine::HeadRow<'_>| match r.logits {
            HeadLogits::Full(all_of_them) => {
                logits.push((r.row, r.position, bits(&all(all_of_them))));
            }
            HeadLogits::Top(top) => logits.push((r.row, r.position, bits(top.unwrap()))),
            HeadLogits::Hidden(state) => {
                hidden.push((r.row, r.position, state.iter().map(|x| x.to_bits()).collect()));
            }
        };
        let input = StageInput::Tokens(&tokens);
        engine.step(&meta, input, StageOutput::Head { want: wants, sink: &mut sink }).unwrap();
        (logits, hidden)
    };
    let (_, states): (Vec<Given>, Vec<State>) = given(&[HeadWant::Hidden; 36]);
    assert_eq!(states.len(), 45);
    assert!(states.iter().all(|(.., state)| state.len() == spec.config.hidden as usize));
    for wants in mixtures().into_iter().filter(|wants| wants.len() == 36) {
        let (expected, _) = given(&wants);
        for every in [2, 3, 5, 36] {
            let bare = |i: usize| i % every == every - 1;
            let mixed: Vec<HeadWant> = (wants.iter().enumerate())
                .map(|(i, &want)| if bare(i) { HeadWant::Hidden } else { want })
                .collect();
            let (logits, hidden) = given(&mixed);
            let rest = |(row, ..): &&Given| !bare(*row);
            assert!(logits.iter().eq(expected.iter().filter(rest)), "{mixed:?}");
            let own = |(row, ..): &&State| bare(*row);
            assert!(hidden.iter().eq(states.iter().filter(own)), "{mixed:?}");
        }
    }
}
