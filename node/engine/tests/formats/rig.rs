//! Runs models from their files and compares logits.

#![allow(dead_code)]

use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, Isa, StageSpec, TensorSource};
use millrace_shared::model::{Dtype, ModelFiles, TensorEntry};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{StepMeta, Want};

use crate::tiny::{Pipeline, row, tables};

/// Where the tensors lie.
pub(crate) fn sources(files: &ModelFiles) -> Vec<TensorSource> {
    let source = |entry: &TensorEntry| TensorSource {
        entry: entry.clone(),
        path: files.path_of(entry).to_owned(),
        offset: entry.offset,
    };
    files.tensors.iter().map(source).collect()
}

/// Stage `i` of those that end at the given layers.
pub(crate) fn spec(files: &ModelFiles, ends: &[u32], i: usize, isa: Isa) -> StageSpec {
    StageSpec {
        config: files.config.clone(),
        layers: if i == 0 { 0 } else { ends[i - 1] }..ends[i],
        embed: i == 0,
        head: i + 1 == ends.len(),
        settings: EngineSettings {
            kv_blocks: 8,
            kv_block_size: 16,
            kv_dtype: Dtype::F32,
            activation_dtype: Dtype::F32,
            max_batch_tokens: 64,
            max_num_seqs: 1,
            max_model_len: 128,
        },
        threads: 1 + i % 2,
        host_threads: 2,
        isa,
        packed_cache: None,
    }
}

/// Stages that end at the given layers.
pub(crate) fn pipeline(files: &ModelFiles, ends: &[u32], isa: Isa) -> Pipeline {
    pipeline_of(files, ends, isa, &mut |_| Box::new(CpuEngine::new()))
}

/// The same, each on an engine of its own.
pub(crate) fn pipeline_of(
    files: &ModelFiles,
    ends: &[u32],
    isa: Isa,
    engine: &mut dyn FnMut(usize) -> Box<dyn Engine>,
) -> Pipeline {
    let sources = sources(files);
    let mut stage = |i: usize| {
        let spec = spec(files, ends, i, isa);
        let mut engine = engine(i);
        engine.load(&spec, &sources, &mut |_| {}).unwrap();
        engine
    };
    Pipeline::of((0..ends.len()).map(&mut stage).collect(), files.config.hidden as usize, 16)
}

/// Bits of the logits of every position, computed in chunks.
pub(crate) fn run(mut p: Pipeline, tokens: &[u32], chunk: usize) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for (i, some) in tokens.chunks(chunk).enumerate() {
        let meta = StepMeta {
            rows: vec![row(1, i * chunk, some.len(), Want::Score { top_k: 1 })],
            tables: if i == 0 { tables(1, tokens.len(), 16, 0) } else { Vec::new() },
            ..StepMeta::default()
        };
        all.extend(p.step(&meta, some).unwrap().into_iter().map(|(_, _, logits)| logits));
    }
    all
}

pub(crate) fn floats(bits: &[u32]) -> Vec<f64> {
    bits.iter().map(|&b| f64::from(f32::from_bits(b))).collect()
}

/// The largest difference of each position from what is expected, relative to the largest logit where
/// that is above 1.
pub(crate) fn deviations(found: &[Vec<u32>], expected: &[Vec<f64>]) -> Vec<f64> {
    let size = expected.iter().flatten().fold(1f64, |m, x| m.max(x.abs()));
    let row = |(found, expected): (&Vec<u32>, &Vec<f64>)| {
        let pairs = floats(found).into_iter().zip(expected.clone());
        pairs.map(|(a, b)| (a - b).abs() / size).fold(0.0, larger)
    };
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(row).collect()
}

/// The largest of all.
pub(crate) fn worst(found: &[Vec<u32>], expected: &[Vec<f64>]) -> f64 {
    deviations(found, expected).into_iter().fold(0.0, larger)
}

/// What is no number is the largest of all.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// The token with the largest logit.
pub(crate) fn best(logits: &[u32]) -> u32 {
    let logits = floats(logits);
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

pub(crate) fn as_floats(bits: &[Vec<u32>]) -> Vec<Vec<f64>> {
    bits.iter().map(|row| floats(row)).collect()
}

/// Runs a prompt and the answer to it through a whole model; the logits must be the expected ones, and the
/// answer the one that they choose. Returns all tokens that were given, and their logits.
pub(crate) fn answers(
    name: &str,
    (prompt, answer, expected): (&[u32], &[u32], &[Vec<f64>]),
    whole: Pipeline,
) -> (Vec<u32>, Vec<Vec<u32>>) {
    let all = [prompt, &answer[..answer.len() - 1]].concat();
    let found = run(whole, &all, 64);
    let deviation = worst(&found[..prompt.len()], expected);
    assert!(deviation < 1e-3, "{name}: {deviation}");
    let said: Vec<u32> = found[prompt.len() - 1..].iter().map(|l| best(l)).collect();
    assert_eq!(said, answer, "{name}");
    (all, found)
}
