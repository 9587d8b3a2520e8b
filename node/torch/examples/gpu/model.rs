//! Models of made-up weights, loaded whole, and steps over them.

use std::time::Instant;

use millrace_engine::{
    Engine, HeadWant, Isa, LoadError, StageInput, StageOutput, StageSpec, TensorSource,
};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{
    Dtype, Family, Features, ModelConfig, RopeConfig, RopeScaling, RopeStyle, TensorEntry,
    TensorType,
};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

/// Positions before those that are decoded.
const CONTEXT: u32 = 512;
const BLOCK: u32 = 64;
const BATCH: u32 = 64;

/// A loaded model.
pub(crate) struct Loaded {
    engine: Box<dyn Engine>,
    /// Of weights on the device.
    pub(crate) bytes: u64,
    /// Of one row.
    pub(crate) multiply_adds: f64,
    prefill: u32,
    vocab: u32,
}

fn config(shape: &str) -> ModelConfig {
    let [layers, hidden, heads, kv_heads, head_dim, ffn, vocab] = match shape {
        "8b" => [32, 4096, 32, 8, 128, 14336, 128_256],
        "135m" => [30, 576, 9, 3, 64, 1536, 49_152],
        "tiny" => [2, 256, 4, 2, 64, 512, 1024],
        other => panic!("no shape '{other}': tiny, 135m, 8b"),
    };
    let scaling = RopeScaling::Linear(1.0);
    ModelConfig {
        family: Family::Llama,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        context: 8192,
        rms_eps: 1e-5,
        rope: RopeConfig { base: 5e5, dim: head_dim, style: RopeStyle::Halves, scaling },
        tied_head: shape != "8b",
        rope_factors: false,
        features: Features::default(),
    }
}

fn entries(c: &ModelConfig) -> Vec<TensorEntry> {
    let entry = |name: String, dtype: TensorType, dims: &[u64]| {
        let bytes = dtype.bytes_of(dims.iter().product()).unwrap();
        TensorEntry { name, dtype, dims: dims.to_vec(), file: 0, offset: 0, bytes, hash: [0; 32] }
    };
    let [hidden, vocab] = [c.hidden, c.vocab].map(u64::from);
    let mut all = vec![
        entry("token_embd.weight".into(), TensorType::BF16, &[hidden, vocab]),
        entry("output_norm.weight".into(), TensorType::F32, &[hidden]),
    ];
    if !c.tied_head {
        all.push(entry("output.weight".into(), TensorType::BF16, &[hidden, vocab]));
    }
    for layer in 0..c.layers {
        for (name, dims) in c.layer_matrices() {
            all.push(entry(format!("blk.{layer}.{name}.weight"), TensorType::BF16, &dims));
        }
        for (name, len) in c.layer_vectors() {
            all.push(entry(format!("blk.{layer}.{name}"), TensorType::F32, &[len]));
        }
    }
    all
}

impl Loaded {
    /// # Errors
    /// If it does not fit.
    pub(crate) fn new(shape: &str, mut engine: Box<dyn Engine>) -> Result<Self, LoadError> {
        let config = config(shape);
        let prefill = if shape == "tiny" { 128 } else { 2048 };
        let per_sequence = (CONTEXT + BLOCK).div_ceil(BLOCK);
        let spec = StageSpec {
            layers: 0..config.layers,
            embed: true,
            head: true,
            settings: EngineSettings {
                kv_blocks: (BATCH * per_sequence).max(prefill / BLOCK),
                kv_block_size: BLOCK,
                kv_dtype: Dtype::F16,
                activation_dtype: Dtype::F32,
                max_batch_tokens: prefill.max(BATCH),
                max_num_seqs: BATCH + 1,
                max_model_len: prefill.max(CONTEXT + BLOCK),
            },
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            host_threads: 1,
            isa: Isa::best(),
            packed_cache: None,
            config: config.clone(),
        };
        let entries = entries(&config);
        let multiplied = entries.iter().filter(|e| e.dims.len() == 2);
        let elements: u64 = multiplied.map(TensorEntry::elements).sum();
        // Of an embedding only rows are read.
        let table = u64::from(config.hidden) * u64::from(config.vocab);
        let unread = if config.tied_head { 0 } else { table };
        let folder = tempfile::tempdir().unwrap();
        let tensors = written(&entries, folder.path());
        let loaded = engine.load(&spec, &tensors, &mut |_| {})?;
        let share = (elements - unread) as f64 / elements as f64;
        Ok(Self {
            engine,
            bytes: (loaded.weight_bytes as f64 * share) as u64,
            multiply_adds: (elements - unread) as f64,
            prefill,
            vocab: config.vocab,
        })
    }

    /// Tests: their names, rows of a step, seconds of the fastest.
    pub(crate) fn measure(&mut self) -> Vec<(String, u32, f64)> {
        let mut all = Vec::new();
        for batch in [1, 8, BATCH] {
            all.push((
                format!("decode, batch {batch}, context {CONTEXT}"),
                batch,
                self.decode(batch),
            ));
        }
        let prefill = self.prefill;
        all.push((format!("prefill {prefill}"), prefill, self.fastest(|_| (0, 1, prefill))));
        all
    }

    fn decode(&mut self, batch: u32) -> f64 {
        self.fastest(|turn| (CONTEXT + turn, batch, 1))
    }

    /// Steps of `(position, sequences, positions of each)` by their turn.
    fn fastest(&mut self, step: impl Fn(u32) -> (u32, u32, u32)) -> f64 {
        let mut best = f64::MAX;
        for turn in 0..12 {
            let (position, sequences, count) = step(turn);
            let blocks = (position + count).div_ceil(BLOCK);
            let all = (0..u64::from(sequences)).map(SequenceId);
            let row =
                |sequence| Row { sequence, sequence_epoch: 0, position, count, want: Want::Sample };
            let table = |sequence: SequenceId| TableUpdate {
                sequence,
                first: 0,
                blocks: (0..blocks).map(|b| sequence.0 as u32 * blocks + b).collect(),
            };
            let meta = StepMeta {
                released: all.clone().collect(),
                rows: all.clone().map(row).collect(),
                tables: all.map(table).collect(),
                ..StepMeta::default()
            };
            let tokens: Vec<u32> =
                (0..sequences * count).map(|i| (i * 131 + turn) % self.vocab).collect();
            let want = vec![HeadWant::Top(1); sequences as usize];
            let output = StageOutput::Head { want: &want, sink: &mut |_| {} };
            let start = Instant::now();
            self.engine.step(&meta, StageInput::Tokens(&tokens), output).unwrap();
            if turn > 1 {
                best = best.min(start.elapsed().as_secs_f64());
            }
        }
        best
    }
}

/// Made-up weights in files, one for each shape of tensor: what an engine reads is what counts.
fn written(entries: &[TensorEntry], folder: &std::path::Path) -> Vec<TensorSource> {
    let one = |entry: &TensorEntry| {
        let dims: Vec<String> = entry.dims.iter().map(u64::to_string).collect();
        let path = folder.join(dims.join("x"));
        if !path.exists() {
            std::fs::write(&path, bytes(entry)).unwrap();
        }
        TensorSource { entry: entry.clone(), path, offset: 0 }
    };
    entries.iter().map(one).collect()
}

/// Uniform about nothing, such that products neither grow nor vanish; gains of 1.
fn bytes(entry: &TensorEntry) -> Vec<u8> {
    if entry.dims.len() == 1 {
        return (0..entry.dims[0]).flat_map(|_| 1f32.to_le_bytes()).collect();
    }
    let scale = 1.7 / (entry.dims[0] as f32).sqrt();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..entry.elements()).flat_map(|_| half::bf16::from_f32(next()).to_le_bytes()).collect()
}
