//! A tiny model of floats in a GGUF file, steps on it, and stages that compute with the result.

#![allow(dead_code)]

use std::path::{Path, PathBuf};

use millrace_compress::compare::Terms;
use millrace_compress::recipe;
use millrace_compress::{CompressError, Settings, Source, Step, StepReport, apply};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, Isa, LogitsRow, StageInput, StageOutput, StageSpec, TensorSource};
use millrace_shared::id::SequenceId;
use millrace_shared::model::gguf::GgufWriter;
use millrace_shared::model::{
    Dtype, ModelFiles, StageTensors, TensorEntry, TensorType, stage_tensors,
};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

pub(crate) const HIDDEN: u64 = 64;
pub(crate) const VOCAB: u64 = 96;
pub(crate) const FFN: u64 = 128;
pub(crate) const LAYERS: u32 = 4;

/// Small random numbers, the same ones each time.
pub(crate) fn floats(state: &mut u64, count: u64) -> Vec<f32> {
    let mut number = || {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        ((*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.5
    };
    (0..count).map(|_| number()).collect()
}

/// Four heads of 16, two of keys; one weight of a tensor may be broken.
pub(crate) fn model(dir: &Path, broken: Option<&str>) -> PathBuf {
    write(dir, broken, None)
}

/// The same; matrices of layers may have a low rank.
pub(crate) fn write(dir: &Path, broken: Option<&str>, rank: Option<u64>) -> PathBuf {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("llama.block_count", LAYERS)
        .set("llama.embedding_length", HIDDEN as u32)
        .set("llama.attention.head_count", 4u32)
        .set("llama.attention.head_count_kv", 2u32)
        .set("llama.feed_forward_length", FFN as u32)
        .set("llama.context_length", 512u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("llama.vocab_size", VOCAB as u32);
    let mut state = 88_172_645_463_325_252;
    let mut tensor = |name: &str, dims: &[u64]| {
        let mut data = floats(&mut state, dims.iter().product());
        if dims.len() == 1 {
            data.iter_mut().for_each(|x| *x += 1.0);
        }
        if let (Some(rank), &[cols, rows]) = (rank, dims)
            && name.starts_with("blk.")
        {
            let (a, b) = (floats(&mut state, rows * rank), floats(&mut state, rank * cols));
            let one = |i: u64| -> f32 {
                let (row, col) = (i / cols, i % cols);
                (0..rank).map(|k| a[(row * rank + k) as usize] * b[(k * cols + col) as usize]).sum()
            };
            data = (0..rows * cols).map(one).collect();
        }
        if broken == Some(name) {
            data[70] = f32::NAN;
        }
        let data: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        w.tensor(name, TensorType::F32, dims, data).expect("a valid tensor");
    };
    tensor("token_embd.weight", &[HIDDEN, VOCAB]);
    for layer in 0..LAYERS {
        for (name, dims) in [
            ("attn_norm", &[HIDDEN][..]),
            ("attn_q", &[HIDDEN, 64]),
            ("attn_k", &[HIDDEN, 32]),
            ("attn_v", &[HIDDEN, 32]),
            ("attn_output", &[64, HIDDEN]),
            ("ffn_norm", &[HIDDEN]),
            ("ffn_gate", &[HIDDEN, FFN]),
            ("ffn_up", &[HIDDEN, FFN]),
            ("ffn_down", &[FFN, HIDDEN]),
        ] {
            tensor(&format!("blk.{layer}.{name}.weight"), dims);
        }
    }
    tensor("output_norm.weight", &[HIDDEN]);
    let path = dir.join("tiny.gguf");
    std::fs::write(&path, w.to_bytes()).expect("the model is written");
    path
}

pub(crate) fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + i * i % 11) % VOCAB as u32).collect()
}

pub(crate) fn settings(calibration: &[u32]) -> Settings<'_> {
    Settings { calibration, known: None, store: TensorType::F32, threads: 2, overwrite: false }
}

pub(crate) const TERMS: Terms = Terms { window: 64, threads: 1, kv_dtype: Dtype::F32 };

pub(crate) fn step(
    model: &Path,
    target: &Path,
    text: &str,
    calibration: &[u32],
) -> Result<StepReport, CompressError> {
    let source = Source::open(model)?;
    apply(&source, target, &Step::parse(text)?, &settings(calibration), &mut |_| {})
}

/// Who does not want to know how far a recipe is.
pub(crate) struct Deaf;

impl recipe::Progress for Deaf {
    fn begin(&mut self, _: usize, _: usize, _: &str, _: u64) {}
    fn advance(&mut self, _: u64) {}
}

/// What is in a folder, by name.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("the folder is there").flatten();
    let mut names: Vec<String> =
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Logits after every position of a text, as bits, from stages that begin and end with these layers.
pub(crate) fn through(path: &Path, cuts: &[u32], text: &[u32]) -> Vec<u32> {
    let files = ModelFiles::open(path).expect("a model");
    let source = |t: &TensorEntry| TensorSource {
        entry: t.clone(),
        path: files.path_of(t).to_owned(),
        offset: t.offset,
    };
    let count = text.len() as u32;
    let sequence = SequenceId(0);
    let row =
        Row { sequence, sequence_epoch: 0, position: 0, count, want: Want::Score { top_k: 0 } };
    let blocks = (0..count.div_ceil(16)).collect();
    let meta = StepMeta {
        rows: vec![row],
        tables: vec![TableUpdate { sequence, first: 0, blocks }],
        ..StepMeta::default()
    };
    let mut hidden = vec![0f32; text.len() * files.config.hidden as usize];
    let mut bits = Vec::new();
    for (i, layers) in cuts.windows(2).map(|cut| cut[0]..cut[1]).enumerate() {
        let (embed, head) = (i == 0, i + 2 == cuts.len());
        let needed = StageTensors { layers: layers.clone(), embed, head };
        let tensors: Vec<TensorSource> =
            stage_tensors(&files.config, &files.tensors, &needed).into_iter().map(source).collect();
        let spec = StageSpec {
            config: files.config.clone(),
            layers: layers.clone(),
            embed,
            head,
            settings: EngineSettings {
                kv_blocks: 8,
                kv_block_size: 16,
                kv_dtype: Dtype::F16,
                activation_dtype: Dtype::F16,
                max_batch_tokens: 64,
                max_num_seqs: 1,
                max_model_len: 128,
            },
            threads: 1 + i % 2,
            host_threads: 2,
            isa: Isa::detect().expect("a known processor"),
            packed_cache: None,
        };
        let mut engine = CpuEngine::new();
        engine.load(&spec, &tensors, &mut |_| {}).expect("a stage");
        let from = hidden.clone();
        let input = if embed { StageInput::Tokens(text) } else { StageInput::Hidden(&from) };
        let mut sink = |row: LogitsRow<'_>| bits.extend(row.logits.iter().map(|x| x.to_bits()));
        let output =
            if head { StageOutput::Logits(&mut sink) } else { StageOutput::Hidden(&mut hidden) };
        engine.step(&meta, input, output).expect("a step");
    }
    bits
}
