//! Checks the CPU engine against the reference values of `tests/testdata/smollm2-reference.json` and
//! measures it.
//!
//! `cargo run --release -p millrace-engine --example reference -- MODEL.gguf REFERENCE.json [check|bench]`

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::path::Path;
use std::time::Instant;

use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, Isa, StageInput, StageOutput, StageSpec, TensorSource};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{Dtype, ModelFiles, TensorEntry};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

const BLOCK: u32 = 16;
const BLOCKS_PER_SEQUENCE: u32 = 64;

struct Model {
    engine: CpuEngine,
    vocab: usize,
}

impl Model {
    fn load(path: &Path, threads: usize, isa: Isa) -> Self {
        let files = ModelFiles::open(path).unwrap();
        let config = files.config.clone();
        let source = |t: &TensorEntry| TensorSource {
            entry: t.clone(),
            path: files.path_of(t).to_owned(),
            offset: t.offset,
        };
        let sources: Vec<TensorSource> = files.tensors.iter().map(source).collect();
        let spec = StageSpec {
            layers: 0..config.layers,
            embed: true,
            head: true,
            settings: EngineSettings {
                kv_blocks: 40 * BLOCKS_PER_SEQUENCE,
                kv_block_size: BLOCK,
                kv_dtype: Dtype::F16,
                activation_dtype: Dtype::F32,
                max_batch_tokens: 512,
                max_num_seqs: 64,
                max_model_len: BLOCK * BLOCKS_PER_SEQUENCE,
            },
            threads,
            host_threads: threads,
            isa,
            packed_cache: None,
            config: config.clone(),
        };
        let mut engine = CpuEngine::new();
        let start = Instant::now();
        let loaded = engine.load(&spec, &sources, &mut |_| {}).unwrap();
        println!(
            "{isa}, {threads} threads: loaded {} MiB of weights, {} MiB of KV in {:?}",
            loaded.weight_bytes >> 20,
            loaded.kv_bytes >> 20,
            start.elapsed()
        );
        Self { engine, vocab: config.vocab as usize }
    }

    /// Gives sequences `0..n` their blocks.
    fn tables(n: u32) -> Vec<TableUpdate> {
        let blocks = |i| (i * BLOCKS_PER_SEQUENCE..(i + 1) * BLOCKS_PER_SEQUENCE).collect();
        (0..n)
            .map(|i| TableUpdate { sequence: SequenceId(i.into()), first: 0, blocks: blocks(i) })
            .collect()
    }

    fn step(&mut self, rows: &[(u32, u32, u32, Want)], tokens: &[u32], new: u32) -> Vec<Vec<f32>> {
        let row = |&(sequence, position, count, want): &(u32, u32, u32, Want)| Row {
            sequence: SequenceId(sequence.into()),
            sequence_epoch: 0,
            position,
            count,
            want,
        };
        let meta = StepMeta {
            rows: rows.iter().map(row).collect(),
            tables: Self::tables(new),
            ..StepMeta::default()
        };
        let mut out = Vec::new();
        let mut sink = |l: millrace_engine::LogitsRow<'_>| out.push(l.logits.to_vec());
        self.engine
            .step(&meta, StageInput::Tokens(tokens), StageOutput::Logits(&mut sink))
            .unwrap();
        out
    }
}

fn argmax(x: &[f32]) -> usize {
    (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b])).unwrap()
}

fn nll(logits: &[f32], token: usize) -> f64 {
    let top = f64::from(logits[argmax(logits)]);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - top).exp()).sum();
    sum.ln() + top - f64::from(logits[token])
}

fn check(path: &Path, reference: &Path, isa: Isa) {
    let mut m = Model::load(path, 2, isa);
    let cases: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(reference).unwrap()).unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    };
    let (mut worst, mut total, mut count, mut wrong, mut sure) = (0f64, 0f64, 0usize, 0, 0);
    for case in cases.as_array().unwrap() {
        let (prompt, greedy) = (ids(&case["token_ids"]), ids(&case["greedy"]));
        let mut all = Vec::new();
        for (i, chunk) in prompt.chunks(64).enumerate() {
            let score = Want::Score { top_k: 0 };
            let row = (0, i as u32 * 64, chunk.len() as u32, score);
            all.extend(m.step(&[row], chunk, u32::from(i == 0)));
        }
        let mut logits = all.last().unwrap().clone();
        assert_eq!(logits.len(), m.vocab);
        let pairs: Vec<(f64, f64)> = case["top_logits"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| {
                let id = p[0].as_u64().unwrap() as usize;
                (f64::from(logits[id]), p[1].as_f64().unwrap())
            })
            .collect();
        let offset = pairs.iter().map(|(a, b)| a - b).sum::<f64>() / pairs.len() as f64;
        let errors: Vec<f64> = pairs.iter().map(|(a, b)| (a - b - offset).abs()).collect();
        let case_worst = errors.iter().copied().fold(0.0, f64::max);
        worst = worst.max(case_worst);
        total += errors.iter().sum::<f64>();
        count += errors.len();
        let mut note = String::new();
        if case["nll"].as_bool() == Some(true) {
            let sum: f64 = (1..prompt.len()).map(|i| nll(&all[i - 1], prompt[i] as usize)).sum();
            let mean = sum / (prompt.len() - 1) as f64;
            let expected = case["mean_nll"].as_f64().unwrap();
            note = format!(", nll {mean:.5} (reference {expected:.5})");
            assert!((mean - expected).abs() < 0.015, "mean NLL");
        }
        for (k, &expected) in greedy.iter().enumerate() {
            let margin = case["greedy_margin"][k].as_f64().unwrap();
            if margin >= 0.6 {
                sure += 1;
                if argmax(&logits) != expected as usize {
                    wrong += 1;
                }
            }
            let position = prompt.len() as u32 + k as u32;
            let row = [(0, position, 1, Want::Sample)];
            logits = m.step(&row, &[expected], 0).remove(0);
        }
        println!("{}: worst {case_worst:.3}{note}", case["name"]);
    }
    let mean = total / count as f64;
    println!("worst {worst:.3} (0.45), mean {mean:.4} (0.1), wrong sure steps {wrong} of {sure}");
    assert!(worst <= 0.45 && mean <= 0.1 && wrong == 0, "the rule does not hold");
}

fn bench(path: &Path, threads: usize, isa: Isa) {
    let mut m = Model::load(path, threads, isa);
    for n in [128u32, 512] {
        let tokens: Vec<u32> = (0..n).map(|i| 1000 + i * 7).collect();
        let before = m.engine.busy();
        let best = (0..4)
            .map(|_| {
                let start = Instant::now();
                m.step(&[(0, 0, n, Want::Sample)], &tokens, 1);
                start.elapsed().as_secs_f64()
            })
            .fold(f64::MAX, f64::min);
        let busy = (m.engine.busy() - before).as_secs_f64() / 4.0;
        println!(
            "  prefill {n}: {:.0} tok/s ({:.0} a CPU second)",
            f64::from(n) / best,
            f64::from(n) / busy
        );
    }
    for batch in [1u32, 8, 16, 32] {
        let tokens: Vec<u32> = (0..batch).map(|i| 500 + i).collect();
        let busy = m.engine.busy();
        let mut best = f64::MAX;
        let steps = 64;
        let all = Instant::now();
        for _ in 0..2 {
            let start = Instant::now();
            for step in 0..steps {
                let rows: Vec<_> = (0..batch).map(|s| (s, step, 1, Want::Sample)).collect();
                let meta = if step == 0 { batch } else { 0 };
                m.step(&rows, &tokens, meta);
            }
            best = best.min(start.elapsed().as_secs_f64() / f64::from(steps));
        }
        let busy = (m.engine.busy() - busy).as_secs_f64();
        let cpu = f64::from(batch * 2 * steps) / busy;
        let busy = busy / all.elapsed().as_secs_f64();
        println!(
            "  decode batch {batch}: {:.1} tok/s ({:.2} ms a step, busy {busy:.2}, {cpu:.0} a CPU second)",
            f64::from(batch) / best,
            best * 1e3
        );
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, reference, rest @ ..] = args.as_slice() else {
        println!("usage: reference MODEL.gguf REFERENCE.json [check|bench]");
        return;
    };
    let what = rest.first().map(String::as_str);
    let isa = Isa::detect().unwrap();
    if what != Some("bench") {
        check(model.as_ref(), reference.as_ref(), isa);
    }
    if what != Some("check") {
        for threads in [1, 2] {
            bench(model.as_ref(), threads, isa);
        }
    }
}
