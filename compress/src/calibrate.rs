//! What a model's matrices see when it reads a text.
//!
//! Layer by layer: only one layer's weights are in memory, beside the hidden states of the whole text.
//! The forward pass is the engine's own, of the model as it is in its file, so inputs are those that a
//! served model has.

use std::collections::HashMap;

use millrace_engine::cpu::CpuBackend;
use millrace_engine::model::observed::Observed;
use millrace_engine::model::weights::Sources;
use millrace_engine::model::{Batch, BlockTables, Decoder, Source as EngineSource};
use millrace_engine::{Isa, LoadError, StageInput, StageOutput, StageSpec, TensorSource};
use millrace_shared::id::SequenceId;
use millrace_shared::model::{Dtype, ModelConfig, ModelFiles, StageTensors, stage_tensors};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

use crate::hessian::Moments;
use crate::watch::Watch;
use crate::{CompressError, Needs, Settings, Source};

/// Positions of a text that are computed together; its parts are sequences of their own.
pub const CALIBRATION_WINDOW: usize = 256;
/// Fewer tokens than this say too little about the inputs of a matrix.
pub const LEAST_TOKENS: usize = 256;
/// Positions of a KV block.
const BLOCK: u32 = 16;

/// What calibration found.
#[derive(Clone, Debug, Default)]
pub struct Calibration {
    /// By the name of the first matrix that shares the inputs.
    moments: HashMap<String, Moments>,
    first: HashMap<String, String>,
    /// For each layer, how much it turns the residual stream: one minus the mean cosine of what comes
    /// in and what goes out (Men et al., ShortGPT, 2024).
    pub influence: Vec<f64>,
    /// Tokens read.
    pub tokens: usize,
}

impl Calibration {
    /// The moments of a matrix's inputs, if they are known.
    pub fn moments(&self, tensor: &str) -> Option<&Moments> {
        self.moments.get(self.key(tensor)?)
    }

    /// The first matrix that sees the same as this one.
    pub fn key(&self, tensor: &str) -> Option<&str> {
        // Matrices that lie in one tensor see the same.
        let name = tensor.replace("attn_qkv", "attn_q").replace("ffn_gate_up", "ffn_gate");
        [tensor, &name].into_iter().find_map(|n| self.first.get(n)).map(String::as_str)
    }
}

/// The hidden states of a text, on their way through a model's layers.
#[derive(Debug)]
pub struct Calibrator {
    files: ModelFiles,
    hidden: Vec<f32>,
    tokens: usize,
    next: u32,
    threads: usize,
    full: bool,
}

/// Tokens of a text that a model sees together: fewer if it cannot see so many.
fn window_of(config: &ModelConfig) -> usize {
    CALIBRATION_WINDOW.min(config.context.max(1) as usize)
}

impl Calibrator {
    /// Embeds a text. With `full`, products of inputs are kept, as error compensation and activation
    /// aware factors need them; else only squares.
    ///
    /// # Errors
    /// If the text is shorter than [`LEAST_TOKENS`], or the model cannot be computed.
    pub fn new(
        source: &Source,
        tokens: &[u32],
        threads: usize,
        full: bool,
    ) -> Result<Self, CompressError> {
        if tokens.len() < LEAST_TOKENS {
            return Err(CompressError::Settings(format!(
                "the calibration text has {} tokens, {LEAST_TOKENS} are the least that tells \
                 anything about a matrix's inputs: give a longer one",
                tokens.len()
            )));
        }
        let files = source.files()?;
        let width = files.config.hidden as usize;
        let mut hidden = vec![0f32; tokens.len() * width];
        let mut stage = Stage::load(&files, Part::Embedding, threads, false)?;
        let window = window_of(&files.config);
        for (tokens, out) in tokens.chunks(window).zip(hidden.chunks_mut(window * width)) {
            stage.step(StageInput::Tokens(tokens), tokens.len(), out)?;
        }
        Ok(Self { files, hidden, tokens: tokens.len(), next: 0, threads, full })
    }

    /// As a step needs it; `None` where it needs nothing, or all is known.
    ///
    /// # Errors
    /// As [`Calibrator::new`].
    pub fn of(
        source: &Source,
        settings: &Settings<'_>,
        needs: Needs,
    ) -> Result<Option<Self>, CompressError> {
        if needs == Needs::Nothing || settings.known.is_some() {
            return Ok(None);
        }
        let full = needs == Needs::Products;
        Self::new(source, settings.calibration, settings.threads, full).map(Some)
    }

    /// Takes the hidden states through the next layer; what its matrices saw. `None` after the last.
    ///
    /// # Errors
    /// If the layer cannot be computed.
    pub fn next_layer(&mut self) -> Result<Option<Calibration>, CompressError> {
        if self.next == self.files.config.layers {
            return Ok(None);
        }
        let mut stage = Stage::load(&self.files, Part::Layer(self.next), self.threads, self.full)?;
        self.next += 1;
        let width = self.files.config.hidden as usize;
        let positions = window_of(&self.files.config);
        let mut out = vec![0f32; positions * width];
        let mut turned = 0f64;
        for window in self.hidden.chunks_mut(positions * width) {
            let out = &mut out[..window.len()];
            stage.step(StageInput::Hidden(window), window.len() / width, out)?;
            let rows = window.chunks_exact(width).zip(out.chunks_exact(width));
            turned += rows.map(|(a, b)| 1.0 - cosine(a, b)).sum::<f64>();
            window.copy_from_slice(out);
        }
        let Watch { moments, first, .. } = stage.backend.observer.finish();
        let influence = vec![turned / self.tokens as f64];
        Ok(Some(Calibration { moments, first, influence, tokens: self.tokens }))
    }
}

/// Calibrates all layers at once: for models whose moments fit in memory, and steps that look at more
/// than one layer. `progress` gets the layers done.
///
/// # Errors
/// As those of [`Calibrator`].
pub fn calibrate(
    source: &Source,
    tokens: &[u32],
    threads: usize,
    full: bool,
    progress: &mut dyn FnMut(u32),
) -> Result<Calibration, CompressError> {
    let mut calibrator = Calibrator::new(source, tokens, threads, full)?;
    let mut all = Calibration { tokens: tokens.len(), ..Calibration::default() };
    while let Some(layer) = calibrator.next_layer()? {
        all.moments.extend(layer.moments);
        all.first.extend(layer.first);
        all.influence.extend(layer.influence);
        progress(calibrator.next);
    }
    Ok(all)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

/// What of a model is loaded.
#[derive(Clone, Copy)]
enum Part {
    Embedding,
    Layer(u32),
}

/// A part of a model over the watched backend.
struct Stage {
    backend: Observed<CpuBackend, Watch>,
    model: Decoder<Observed<CpuBackend, Watch>>,
    tables: BlockTables,
    batch: Batch,
    sequences: u64,
}

impl Stage {
    fn load(files: &ModelFiles, part: Part, threads: usize, full: bool) -> Result<Self, LoadError> {
        let (layers, embed) = match part {
            Part::Embedding => (0..0, true),
            Part::Layer(layer) => (layer..layer + 1, false),
        };
        let window = window_of(&files.config) as u32;
        let settings = EngineSettings {
            kv_blocks: window.div_ceil(BLOCK),
            kv_block_size: BLOCK,
            kv_dtype: Dtype::F32,
            activation_dtype: Dtype::F32,
            max_batch_tokens: window,
            max_num_seqs: 1,
            max_model_len: window,
        };
        let isa = Isa::detect().map_err(LoadError::Settings)?;
        let spec = StageSpec {
            config: files.config.clone(),
            layers: layers.clone(),
            embed,
            head: false,
            settings,
            threads,
            host_threads: threads,
            isa,
            packed_cache: None,
        };
        spec.check()?;
        let needed = StageTensors { layers, embed, head: false };
        let tensors: Vec<TensorSource> = stage_tensors(&files.config, &files.tensors, &needed)
            .into_iter()
            .map(|t| TensorSource {
                entry: t.clone(),
                path: files.path_of(t).to_owned(),
                offset: t.offset,
            })
            .collect();
        let sources = EngineSource::of_tensors(&tensors)?;
        let sources = Sources::new(&files.config, &sources)?;
        let mut inner = CpuBackend::new(isa, threads, threads);
        inner.remember_routed();
        let mut backend = Observed { inner, observer: Watch::new(full, threads) };
        let model = Decoder::load(&mut backend, &spec, &sources, &mut |_| {})?;
        let (tables, batch) = (BlockTables::new(&spec.settings), Batch::new(&spec.settings));
        Ok(Self { backend, model, tables, batch, sequences: 0 })
    }

    /// A sequence from its beginning.
    fn step(
        &mut self,
        input: StageInput<'_>,
        positions: usize,
        out: &mut [f32],
    ) -> Result<(), CompressError> {
        let sequence = SequenceId(self.sequences);
        let released = self.sequences.checked_sub(1).map(SequenceId);
        self.sequences += 1;
        let count = positions as u32;
        let row = Row { sequence, sequence_epoch: 0, position: 0, count, want: Want::None };
        let blocks = (0..count.div_ceil(BLOCK)).collect();
        let meta = StepMeta {
            rows: vec![row],
            tables: vec![TableUpdate { sequence, first: 0, blocks }],
            released: released.into_iter().collect(),
            ..StepMeta::default()
        };
        self.tables.apply(&meta);
        self.batch.fill(&meta, &self.tables)?;
        self.backend.inner.begin_step();
        let (batch, tables) = (&self.batch, &self.tables);
        let output = StageOutput::Hidden(out);
        let done = self.model.step(&mut self.backend, &meta, batch, tables, input, output);
        self.backend.inner.end_step();
        Ok(done?)
    }
}
