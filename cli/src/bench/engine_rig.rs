//! A stage with the whole model, driven by hand: what the scheduler and the block manager would do,
//! in the simplest form that exercises the engine the same way.
//!
//! Every sequence has KV blocks of its own, as in a cluster, so that the caches hold no more of them
//! than there. Positions of `depth` are not computed for each: what a timing reads is whatever lies in
//! the blocks (zeros, or what an earlier run left), which takes as long.

use std::path::PathBuf;
use std::time::Instant;

use millrace_coordinator::models::ModelOptions;
use millrace_coordinator::models::{NoProgress, cache_dir, hash_manifest};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::{
    HeadRow, HeadWant, Isa, LoadedStage, LogitsRow, StageInput, StageOutput, StageSpec,
    TensorSource,
};
use millrace_shared::id::SequenceId;
use millrace_shared::model::ModelFiles;
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

use super::engine::EngineArgs;
use super::pseudo_tokens;
use super::timed::{Measured, PhaseShare, ProfiledEngine};
use crate::error::usage;
use crate::input;

/// Positions per block.
const BLOCK: u32 = 64;

/// A model and where its packed weights are kept.
pub(super) struct Model {
    pub(super) files: ModelFiles,
    cache: Option<PathBuf>,
}

impl Model {
    pub(super) fn open(name: &str, options: ModelOptions) -> anyhow::Result<Self> {
        let path = input::model_as(name, options)?;
        let mut files = ModelFiles::open(&path)?;
        let cache = cache_dir().ok();
        // Hashes, by which packed weights are found.
        files.tensors = hash_manifest(&files, name, cache.as_deref(), &mut NoProgress)?.tensors;
        Ok(Self { files, cache })
    }

    fn sources(&self) -> Vec<TensorSource> {
        let source = |entry: &millrace_shared::model::TensorEntry| TensorSource {
            entry: entry.clone(),
            path: self.files.path_of(entry).to_owned(),
            offset: entry.offset,
        };
        self.files.tensors.iter().map(source).collect()
    }
}

/// What has to fit for every measurement that is asked for.
#[derive(Clone, Debug)]
pub(super) struct RigSize {
    settings: EngineSettings,
    prefill_chunk: u32,
}

impl RigSize {
    /// `scored` is the length of the longest window of text to score.
    ///
    /// # Errors
    /// If a measurement would not fit in the model's context.
    pub(super) fn for_runs(args: &EngineArgs, context: u32, scored: u32) -> anyhow::Result<Self> {
        let most = |list: &[u32]| list.iter().copied().max().unwrap_or(0);
        let (depth, batch) = (most(&args.depth), most(&args.batch));
        let longest = depth.saturating_add(most(&args.prefill).max(args.decode));
        if longest > context {
            return Err(usage(format!(
                "depth and tokens make {longest} positions, the model's context is {context}: lower --depth, --prefill or --decode"
            )));
        }
        let per_sequence = |tokens: u32| u64::from((depth + tokens).div_ceil(BLOCK));
        let window = u64::from(scored.div_ceil(BLOCK));
        let blocks = (u64::from(batch) * per_sequence(args.decode))
            .max(per_sequence(most(&args.prefill)))
            .max(window)
            .max(1);
        let kv_blocks = u32::try_from(blocks).map_err(|_| {
            usage("--batch, --depth and --decode need more KV blocks than can be numbered")
        })?;
        Ok(Self {
            settings: EngineSettings {
                kv_blocks,
                kv_block_size: BLOCK,
                kv_dtype: args.kv_cache_dtype,
                activation_dtype: args.activation_dtype,
                max_batch_tokens: args.prefill_chunk.max(batch),
                max_num_seqs: batch + 1,
                max_model_len: longest.max(scored),
            },
            prefill_chunk: args.prefill_chunk,
        })
    }
}

/// A run of positions of one sequence to compute.
struct Span {
    sequence: SequenceId,
    position: u32,
    tokens: Vec<u32>,
}

/// The loaded stage and its block tables.
pub(super) struct Rig {
    engine: Box<dyn Measured>,
    size: RigSize,
    loaded: LoadedStage,
    vocab: u32,
    sequences: u64,
    /// Changes to tell the engine with the next step.
    pending: StepMeta,
    /// First block that is not dealt out.
    next_block: u32,
}

impl Rig {
    /// Loads the model; with `profile` each operation is timed.
    ///
    /// # Errors
    /// If the engine refuses it or memory runs out.
    pub(super) fn load(
        model: &Model,
        size: &RigSize,
        threads: usize,
        profile: bool,
    ) -> anyhow::Result<Self> {
        let spec = StageSpec {
            config: model.files.config.clone(),
            layers: 0..model.files.config.layers,
            embed: true,
            head: true,
            settings: size.settings.clone(),
            threads,
            host_threads: threads,
            isa: Isa::detect().map_err(anyhow::Error::msg)?,
            packed_cache: model.cache.as_ref().map(|cache| cache.join("packed")),
        };
        let load = || -> anyhow::Result<_> {
            let mut engine: Box<dyn Measured> = match profile {
                true => Box::new(ProfiledEngine::default()),
                false => Box::new(CpuEngine::new()),
            };
            let loaded = engine.load(&spec, &model.sources(), &mut |_| {})?;
            Ok((engine, loaded))
        };
        let (mut engine, mut loaded) = load()?;
        if spec.packed_cache.is_some() && loaded.packing.cached_bytes == 0 {
            // Packed weights are being written: not while something is measured.
            drop(engine);
            (engine, loaded) = load()?;
        }
        Ok(Self {
            engine,
            size: size.clone(),
            loaded,
            vocab: model.files.config.vocab,
            sequences: 0,
            pending: StepMeta::default(),
            next_block: 0,
        })
    }

    pub(super) fn numerics(&self) -> String {
        self.engine.numerics_revision()
    }

    pub(super) fn weight_bytes(&self) -> u64 {
        self.loaded.weight_bytes
    }

    /// What the steps since the last call were made of, where each operation is timed.
    pub(super) fn take_phases(&mut self) -> Vec<PhaseShare> {
        self.engine.take_phases()
    }

    /// Seconds to prefill `tokens` positions after `depth`.
    ///
    /// # Errors
    /// If a step fails.
    pub(super) fn prefill(&mut self, depth: u32, tokens: u32) -> anyhow::Result<f64> {
        let sequence = self.open(depth + tokens);
        let start = Instant::now();
        self.prefill_span(sequence, depth, tokens)?;
        let seconds = start.elapsed().as_secs_f64();
        self.close_all(&[sequence]);
        Ok(seconds)
    }

    /// Seconds to decode `steps` positions of `batch` sequences after `depth`.
    ///
    /// # Errors
    /// If a step fails.
    pub(super) fn decode(&mut self, depth: u32, batch: u32, steps: u32) -> anyhow::Result<f64> {
        let sequences: Vec<SequenceId> = (0..batch).map(|_| self.open(depth + steps)).collect();
        let tokens = pseudo_tokens(u64::from(batch), (batch * steps) as usize, self.vocab);
        let start = Instant::now();
        for (step, tokens) in tokens.chunks(batch as usize).enumerate() {
            let spans: Vec<Span> = sequences
                .iter()
                .zip(tokens)
                .map(|(&sequence, &token)| Span {
                    sequence,
                    position: depth + step as u32,
                    tokens: vec![token],
                })
                .collect();
            self.step(&spans, Want::Sample)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        self.close_all(&sequences);
        Ok(seconds)
    }

    /// Negative log-likelihoods of all tokens of a window but the first.
    ///
    /// # Errors
    /// If a step fails.
    pub(super) fn score(&mut self, window: &[u32]) -> anyhow::Result<Vec<f64>> {
        let sequence = self.open(window.len() as u32);
        let mut nll = Vec::with_capacity(window.len());
        for (i, chunk) in window.chunks(BLOCK.min(self.size.prefill_chunk) as usize).enumerate() {
            let position = i as u32 * BLOCK.min(self.size.prefill_chunk);
            let span = Span { sequence, position, tokens: chunk.to_vec() };
            let mut sink = |row: LogitsRow<'_>| {
                if let Some(&next) = window.get(row.position as usize + 1) {
                    nll.push(surprise(row.logits, next as usize));
                }
            };
            self.step_with(&[span], Want::Score { top_k: 0 }, StageOutput::Logits(&mut sink))?;
        }
        self.close_all(&[sequence]);
        Ok(nll)
    }

    /// Opens a sequence with blocks for `positions`.
    fn open(&mut self, positions: u32) -> SequenceId {
        self.sequences += 1;
        let sequence = SequenceId(self.sequences);
        let end = self.next_block + positions.div_ceil(BLOCK);
        let blocks = (self.next_block..end).collect();
        self.next_block = end;
        self.pending.tables.push(TableUpdate { sequence, first: 0, blocks });
        sequence
    }

    /// Closes all sequences; their blocks are free again.
    fn close_all(&mut self, sequences: &[SequenceId]) {
        self.pending.released.extend(sequences);
        self.next_block = 0;
    }

    fn prefill_span(
        &mut self,
        sequence: SequenceId,
        position: u32,
        count: u32,
    ) -> anyhow::Result<()> {
        let tokens = pseudo_tokens(u64::from(position), count as usize, self.vocab);
        let chunks = tokens.chunks(self.size.prefill_chunk as usize);
        let last = chunks.len() - 1;
        for (i, chunk) in chunks.enumerate() {
            let span = Span {
                sequence,
                position: position + i as u32 * self.size.prefill_chunk,
                tokens: chunk.to_vec(),
            };
            self.step(&[span], if i == last { Want::Sample } else { Want::None })?;
        }
        Ok(())
    }

    /// A step whose tokens are chosen greedily, as a last stage asks for them.
    fn step(&mut self, spans: &[Span], want: Want) -> anyhow::Result<()> {
        let wants = vec![HeadWant::Top(1); spans.len()];
        let mut sink = |row: HeadRow<'_>| {
            std::hint::black_box(&row.logits);
        };
        self.step_with(spans, want, StageOutput::Head { want: &wants, sink: &mut sink })
    }

    fn step_with(
        &mut self,
        spans: &[Span],
        want: Want,
        output: StageOutput<'_>,
    ) -> anyhow::Result<()> {
        let mut meta = std::mem::take(&mut self.pending);
        meta.rows.extend(spans.iter().map(|s| Row {
            sequence: s.sequence,
            sequence_epoch: 0,
            position: s.position,
            count: s.tokens.len() as u32,
            want,
        }));
        let tokens: Vec<u32> = spans.iter().flat_map(|s| s.tokens.iter().copied()).collect();
        self.engine.step(&meta, StageInput::Tokens(&tokens), output)?;
        Ok(())
    }
}

/// Nats by which a token surprises: log-sum-exp of all logits less its own.
fn surprise(logits: &[f32], token: usize) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - most).exp()).sum();
    sum.ln() - f64::from(logits.get(token).copied().unwrap_or(f32::NEG_INFINITY) - most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certainty_surprises_nobody() {
        assert!(surprise(&[0.0, 100.0], 1).abs() < 1e-9);
        assert!((surprise(&[1.0, 1.0, 1.0, 1.0], 2) - 4f64.ln()).abs() < 1e-9);
    }
}
