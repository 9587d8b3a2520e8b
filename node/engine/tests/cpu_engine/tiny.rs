//! A four-layer model with random weights in a temporary file, and pipelines over it.

#![allow(dead_code)]

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, Isa, StageInput, StageOutput, StageSpec, StepError, TensorSource};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{
    Dtype, Experts, Family, Features, ModelConfig, RopeConfig, RopeScaling, RopeStyle, TensorEntry,
    TensorType,
};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

/// Positions that the KV cache holds.
pub(crate) const POSITIONS: u32 = 1024;

#[derive(Clone)]
pub(crate) struct Tiny {
    pub(crate) config: ModelConfig,
    pub(crate) settings: EngineSettings,
    pub(crate) entries: Vec<TensorEntry>,
    file: Arc<tempfile::NamedTempFile>,
}

/// A run of positions.
pub(crate) fn row(sequence: u64, position: usize, count: usize, want: Want) -> Row {
    Row {
        sequence: SequenceId(sequence),
        sequence_epoch: 0,
        position: position as u32,
        count: count as u32,
        want,
    }
}

/// Blocks of `size` for `len` positions, from block `first` on.
pub(crate) fn tables(sequence: u64, len: usize, size: u32, first: u32) -> Vec<TableUpdate> {
    let blocks = (first..first + (len as u32).div_ceil(size)).collect();
    vec![TableUpdate { sequence: SequenceId(sequence), first: 0, blocks }]
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Bytes of a tensor: random quants, scales about `size / 16`.
fn bytes(dtype: TensorType, elements: u64, size: f32, state: &mut u64) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..elements / dtype.block_elements() {
        let mut block: Vec<u8> =
            (0..dtype.block_bytes()).map(|_| (random(state) >> 13) as u8).collect();
        let unit = (random(state) >> 40) as f32 / (1u64 << 24) as f32;
        let f16 = |x: f32| half::f16::from_f32(x).to_bits().to_le_bytes();
        let signed = (unit - 0.5) * size;
        match dtype {
            TensorType::F32 => block.copy_from_slice(&signed.to_le_bytes()),
            TensorType::F16 => block.copy_from_slice(&f16(signed)),
            TensorType::BF16 => {
                block.copy_from_slice(&half::bf16::from_f32(signed).to_bits().to_le_bytes());
            }
            TensorType::Q4_0 => block[..2].copy_from_slice(&f16(unit * size / 16.0)),
            TensorType::Q4_1 => {
                block[..2].copy_from_slice(&f16(unit * size / 16.0));
                block[2..4].copy_from_slice(&f16(-unit * size / 2.0));
            }
            TensorType::Q8_0 => block[..2].copy_from_slice(&f16(unit * size / 256.0)),
            TensorType::Q4_K => {
                block[..2].copy_from_slice(&f16(unit * size / 1024.0));
                block[2..4].copy_from_slice(&f16(unit * size / 128.0));
            }
            TensorType::Q6_K => block[208..].copy_from_slice(&f16(unit * size / 4096.0)),
            other => panic!("no random {other:?}"),
        }
        out.extend(block);
    }
    out
}

impl Tiny {
    pub(crate) fn new(layer_type: TensorType, head_type: TensorType) -> Self {
        // Rows of whole blocks.
        let large = [layer_type, head_type].iter().any(|t| t.block_elements() > 32);
        let (hidden, heads, ffn) = if large { (256, 8, 256) } else { (64, 6, 96) };
        let config = ModelConfig {
            family: Family::Llama,
            layers: 4,
            hidden,
            heads,
            kv_heads: 2,
            head_dim: 32,
            ffn,
            vocab: 96,
            context: 256,
            rms_eps: 1e-5,
            rope: RopeConfig {
                base: 10_000.0,
                dim: 32,
                style: RopeStyle::Interleaved,
                scaling: RopeScaling::Linear(1.0),
            },
            tied_head: true,
            rope_factors: false,
            features: Features::default(),
        };
        let [hidden, queries, ffn] = [hidden, heads * 32, ffn].map(u64::from);
        let mut tensors: Vec<(String, TensorType, Vec<u64>)> = vec![
            ("token_embd.weight".into(), head_type, vec![hidden, 96]),
            ("output_norm.weight".into(), TensorType::F32, vec![hidden]),
        ];
        for layer in 0..4 {
            for (name, dims) in [
                ("attn_q", vec![hidden, queries]),
                ("attn_k", vec![hidden, 64]),
                ("attn_v", vec![hidden, 64]),
                ("attn_output", vec![queries, hidden]),
                ("ffn_gate", vec![hidden, ffn]),
                ("ffn_up", vec![hidden, ffn]),
                ("ffn_down", vec![ffn, hidden]),
            ] {
                tensors.push((format!("blk.{layer}.{name}.weight"), layer_type, dims));
            }
            for name in ["attn_norm", "ffn_norm"] {
                tensors.push((format!("blk.{layer}.{name}.weight"), TensorType::F32, vec![hidden]));
            }
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let (mut state, mut offset, mut entries) = (0x1234_5678_9abc_def1, 0, Vec::new());
        for (name, dtype, dims) in tensors {
            let data = bytes(dtype, dims.iter().product(), 0.8, &mut state);
            file.write_all(&data).unwrap();
            let bytes = data.len() as u64;
            entries.push(TensorEntry { name, dtype, dims, file: 0, offset, bytes, hash: [0; 32] });
            offset += bytes;
        }
        file.flush().unwrap();
        let settings = EngineSettings {
            kv_blocks: POSITIONS / 16,
            kv_block_size: 16,
            kv_dtype: Dtype::F16,
            activation_dtype: Dtype::F32,
            max_batch_tokens: 64,
            max_num_seqs: 8,
            max_model_len: 256,
        };
        Self { config, settings, entries, file: Arc::new(file) }
    }

    /// The same with three experts of one feed-forward part each, two of them for a row.
    pub(crate) fn with_experts(&self) -> Self {
        let mut tiny = self.clone();
        let experts = Experts { count: 3, used: 2, normalise: true, shared_ffn: 0 };
        tiny.config.features.experts = Some(experts);
        let mut entries = Vec::new();
        for entry in std::mem::take(&mut tiny.entries) {
            match entry.name.strip_suffix(".weight").filter(|n| n.contains("ffn_")) {
                Some(stem) if !stem.ends_with("norm") => {
                    let one =
                        |i| TensorEntry { name: format!("{stem}.{i}.weight"), ..entry.clone() };
                    entries.extend((0..3).map(one));
                }
                _ => entries.push(entry),
            }
        }
        // The router is the first rows of some matrix.
        for layer in 0..tiny.config.layers {
            let rows = format!("blk.{layer}.attn_q.weight");
            let mut router = entries.iter().find(|e| e.name == rows).unwrap().clone();
            router.name = format!("blk.{layer}.ffn_gate_inp.weight");
            router.bytes = router.bytes / router.dims[1] * 3;
            router.dims[1] = 3;
            entries.push(router);
        }
        Self { entries, ..tiny }
    }

    pub(crate) fn stage(
        &self,
        layers: Range<u32>,
        embed: bool,
        head: bool,
        threads: usize,
        isa: Isa,
    ) -> (StageSpec, Vec<TensorSource>) {
        let spec = StageSpec {
            config: self.config.clone(),
            layers,
            embed,
            head,
            settings: self.settings.clone(),
            threads,
            host_threads: threads,
            isa,
            packed_cache: None,
        };
        let source = |e: &TensorEntry| TensorSource {
            entry: e.clone(),
            path: self.file.path().to_owned(),
            offset: e.offset,
        };
        (spec, self.entries.iter().map(source).collect())
    }

    /// Stages that end at the given layers.
    pub(crate) fn pipeline(&self, ends: &[u32], threads: usize, isa: Isa) -> Pipeline {
        let mut stages = Vec::new();
        for (i, &end) in ends.iter().enumerate() {
            let first = if i == 0 { 0 } else { ends[i - 1] };
            let last = i + 1 == ends.len();
            let (spec, sources) = self.stage(first..end, i == 0, last, threads, isa);
            let mut engine = CpuEngine::new();
            engine.load(&spec, &sources, &mut |_| {}).unwrap();
            stages.push(Box::new(engine) as Box<dyn Engine>);
        }
        let block_size = self.settings.kv_block_size;
        Pipeline { stages, hidden: self.config.hidden as usize, block_size }
    }
}

/// Stages in one process.
pub(crate) struct Pipeline {
    stages: Vec<Box<dyn Engine>>,
    hidden: usize,
    pub(crate) block_size: u32,
}

/// Row index, position, bits of the logits.
pub(crate) type Logits = (usize, u32, Vec<u32>);

impl Pipeline {
    /// A pipeline over engines that are loaded.
    pub(crate) fn of(stages: Vec<Box<dyn Engine>>, hidden: usize, block_size: u32) -> Self {
        Self { stages, hidden, block_size }
    }

    pub(crate) fn step(
        &mut self,
        meta: &StepMeta,
        tokens: &[u32],
    ) -> Result<Vec<Logits>, StepError> {
        let mut hidden = Vec::new();
        let mut out = Vec::new();
        let count = self.stages.len();
        for (i, stage) in self.stages.iter_mut().enumerate() {
            let input =
                if i == 0 { StageInput::Tokens(tokens) } else { StageInput::Hidden(&hidden) };
            if i + 1 == count {
                let mut sink = |l: millrace_engine::LogitsRow<'_>| {
                    out.push((l.row, l.position, l.logits.iter().map(|x| x.to_bits()).collect()));
                };
                stage.step(meta, input, StageOutput::Logits(&mut sink))?;
            } else {
                let mut next = vec![0f32; meta.positions() * self.hidden];
                stage.step(meta, input, StageOutput::Hidden(&mut next))?;
                hidden = next;
            }
        }
        Ok(out)
    }
}
