//! Measuring a model's layers and head on made-up weights.
//!
//! Several layers are measured together, and layers and head by turns, so that neither finds its
//! weights in a cache where a real step would not. Every batch is measured on the same weights, each
//! row at position [`PROFILE_CONTEXT`] of a sequence of its own, so that attention counts as it does
//! in the middle of a usual answer; what lies in the cache (zeros) takes as long as anything.

use std::time::{Duration, Instant};

use millrace_shared::id::SequenceId;
use millrace_shared::model::{Dtype, ModelConfig, RopeScaling, TensorEntry, TensorType, head_name};
use millrace_shared::wire::control::{
    EngineSettings, PROFILE_CONTEXT, PROFILE_ROWS, ProfileSpec, StageProfile,
};
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

use crate::model::Source;
use crate::{Engine, HeadWant, Isa, LoadError, StageInput, StageOutput, StageSpec};

/// Weights to run through, so that caches do not flatter.
const LAYER_BYTES: u64 = 16 << 20;
/// Measurements for each of [`PROFILE_ROWS`]; the fastest counts. The plan is kept for long, so that
/// it must not rest on chance; large batches take long, and vary less.
const RUNS: [u32; PROFILE_ROWS.len()] = [8, 8, 6, 4];
/// For one batch size: the coordinator waits for four of them, and for loading the weights.
const PATIENCE: Duration = Duration::from_secs(2);
/// Rows of the largest batch.
const MOST_ROWS: u32 = PROFILE_ROWS[PROFILE_ROWS.len() - 1];
/// Positions per block, as plans have them.
const BLOCK: u32 = 64;
/// Blocks of each sequence.
const BLOCKS: u32 = PROFILE_CONTEXT.div_ceil(BLOCK);

/// Loads a stage of such sources into an engine of its own.
pub type LoadStage<'a> =
    dyn FnMut(&StageSpec, &[Source]) -> Result<Box<dyn Engine>, LoadError> + 'a;

/// Seconds of one layer and of the head for decodes of each of [`PROFILE_ROWS`], by the engines that
/// `load` makes.
///
/// # Errors
/// If the instruction set asked for is not there, or a stage cannot be loaded.
pub fn profile(
    spec: &ProfileSpec,
    threads: usize,
    load: &mut LoadStage<'_>,
) -> Result<StageProfile, LoadError> {
    let one: u64 =
        layer_entries(&spec.config, spec.layer_type.read_as(), 0).iter().map(|t| t.bytes).sum();
    let layers = (LAYER_BYTES / one.max(1)).clamp(1, 8) as u32;
    let mut config = ModelConfig { layers, rope_factors: false, ..spec.config.clone() };
    // What takes no time, and needs tensors or an order of its own.
    config.rope.scaling = RopeScaling::Linear(1.0);
    config.features.transposed = false;
    let mut entries: Vec<TensorEntry> = Vec::new();
    for layer in 0..layers {
        entries.extend(layer_entries(&config, spec.layer_type.read_as(), layer));
    }
    let width = u64::from(config.hidden);
    for name in ["output_norm.weight", "output_norm.bias"] {
        entries.push(entry(name.to_owned(), TensorType::F32, &[width]));
    }
    let head_dims = [width, u64::from(config.vocab)];
    entries.push(entry(head_name(&config).to_owned(), spec.head_type.read_as(), &head_dims));
    let sources: Vec<Source> = entries.into_iter().map(Source::Synthetic).collect();
    let isa = Isa::detect().map_err(LoadError::Settings)?;
    let mut rig = |layers: u32, head: bool| {
        let host_threads = threads * spec.sharing.max(1) as usize;
        let stage = stage_spec(&config, layers, head, (threads, host_threads), isa);
        Ok::<_, LoadError>(Rig::new(load(&stage, &sources)?, &stage))
    };
    let (mut stage, mut head) = (rig(layers, false)?, rig(0, true)?);
    let mut profile = StageProfile::default();
    for (i, &rows) in PROFILE_ROWS.iter().enumerate() {
        if let Some(last) = i.checked_sub(1) {
            let factor = f64::from(rows) / f64::from(PROFILE_ROWS[last]);
            let [layer, head] =
                [profile.layer_seconds, profile.head_seconds].map(|s| s[last] * factor);
            if f64::from(layers) * layer + head > PATIENCE.as_secs_f64() {
                // A slow machine has nothing to gain from more rows: each takes as long as before.
                (profile.layer_seconds[i], profile.head_seconds[i]) = (layer, head);
                continue;
            }
        }
        let [mut layer_time, mut head_time] = [Duration::MAX; 2];
        let began = Instant::now();
        for run in 0..RUNS[i] {
            if run > 0 && began.elapsed() > PATIENCE {
                break;
            }
            layer_time = layer_time.min(stage.run(rows));
            head_time = head_time.min(head.run(rows));
        }
        profile.layer_seconds[i] = layer_time.as_secs_f64() / f64::from(layers);
        profile.head_seconds[i] = head_time.as_secs_f64();
    }
    Ok(profile)
}

fn stage_spec(
    config: &ModelConfig,
    layers: u32,
    head: bool,
    (threads, host_threads): (usize, usize),
    isa: Isa,
) -> StageSpec {
    StageSpec {
        config: config.clone(),
        layers: 0..layers,
        embed: false,
        head,
        settings: EngineSettings {
            kv_blocks: MOST_ROWS * BLOCKS,
            kv_block_size: BLOCK,
            kv_dtype: Dtype::F16,
            activation_dtype: Dtype::F32,
            max_batch_tokens: MOST_ROWS,
            max_num_seqs: MOST_ROWS,
            max_model_len: PROFILE_CONTEXT,
        },
        threads: threads.max(1),
        host_threads,
        isa,
        packed_cache: None,
    }
}

/// A stage on made-up weights, and steps for it.
struct Rig {
    engine: Box<dyn Engine>,
    meta: StepMeta,
    input: Vec<f32>,
    out: Vec<f32>,
    head: bool,
}

impl Rig {
    fn new(engine: Box<dyn Engine>, spec: &StageSpec) -> Self {
        let sequences = || (0..MOST_ROWS).map(|i| (SequenceId(u64::from(i)), i));
        let row = |(sequence, _)| Row {
            sequence,
            sequence_epoch: 0,
            position: PROFILE_CONTEXT - 1,
            count: 1,
            want: Want::Sample,
        };
        let table = |(sequence, i): (SequenceId, u32)| TableUpdate {
            sequence,
            first: 0,
            blocks: (i * BLOCKS..(i + 1) * BLOCKS).collect(),
        };
        let meta = StepMeta {
            rows: sequences().map(row).collect(),
            tables: sequences().map(table).collect(),
            ..StepMeta::default()
        };
        let width = spec.config.hidden as usize;
        let input: Vec<f32> =
            (0..meta.rows.len() * width).map(|i| (i % 13) as f32 / 13.0 - 0.5).collect();
        let out = vec![0f32; input.len()];
        Self { engine, meta, input, out, head: spec.head }
    }

    /// One step of the first `rows` sequences.
    fn run(&mut self, rows: u32) -> Duration {
        let meta = StepMeta {
            rows: self.meta.rows[..rows as usize].to_vec(),
            tables: std::mem::take(&mut self.meta.tables),
            ..StepMeta::default()
        };
        let elements = self.input.len() / MOST_ROWS as usize * rows as usize;
        // As greedy answers ask for it: the largest logit.
        let want = vec![HeadWant::Top(1); rows as usize];
        let start = Instant::now();
        let output = if self.head {
            StageOutput::Head { want: &want, sink: &mut |_| {} }
        } else {
            StageOutput::Hidden(&mut self.out[..elements])
        };
        // Made-up weights may overflow; the time is the same but for the error.
        let _ = self.engine.step(&meta, StageInput::Hidden(&self.input[..elements]), output);
        start.elapsed()
    }
}

fn entry(name: String, dtype: TensorType, dims: &[u64]) -> TensorEntry {
    let elements: u64 = dims.iter().product();
    let bytes = dtype.bytes_of(elements).unwrap_or(0);
    TensorEntry { name, dtype, dims: dims.to_vec(), file: 0, offset: 0, bytes, hash: [0; 32] }
}

fn layer_entries(c: &ModelConfig, dtype: TensorType, layer: u32) -> Vec<TensorEntry> {
    let vector = |(n, len)| entry(format!("blk.{layer}.{n}"), TensorType::F32, &[len]);
    // As in files: rows that are no whole blocks are of a type with shorter ones.
    let fitting = |cols: u64| match cols.is_multiple_of(dtype.block_elements()) {
        true => dtype,
        false => TensorType::Q8_0,
    };
    let matrix = |(n, dims): (String, [u64; 2])| {
        entry(format!("blk.{layer}.{n}.weight"), fitting(dims[0]), &dims)
    };
    let vectors = c.layer_vectors().into_iter().map(vector);
    c.layer_matrices().into_iter().map(matrix).chain(vectors).collect()
}
