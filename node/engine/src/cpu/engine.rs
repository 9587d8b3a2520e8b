//! [`CpuEngine`]: the engine seam over [`Decoder`] and [`CpuBackend`].

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use millrace_shared::model::{ModelConfig, StageTensors, TensorEntry, stage_tensors};
use millrace_shared::wire::control::{EngineSettings, ProfileSpec, StageProfile};
use millrace_shared::wire::data::StepMeta;

use super::backend::CpuBackend;
use super::experts::Routes;
use super::kernels::best::Best;
use super::kernels::{group_rows, paged};
use super::load::MatrixPlan;
use super::store::cache_of;
use super::{memory, numerics_revision};
use crate::cache::InUse;
use crate::model::weights::Sources;
use crate::model::{Batch, BlockTables, Decoder, Source, TOP_ROWS};
use crate::profile;
use crate::{
    Engine, LoadError, LoadedStage, StageInput, StageOutput, StageSpec, StepError, TensorSource,
};

/// Left to the rest of the machine when checking whether a stage fits.
const MEMORY_RESERVE: u64 = 64 << 20;

/// Largest logits of a thread.
const BEST_BYTES: u64 = (TOP_ROWS * size_of::<Best>()) as u64;

/// Computes a stage on the processor.
#[derive(Debug, Default)]
pub struct CpuEngine {
    stage: Option<Stage>,
    /// Of stages loaded before.
    busy: Duration,
    /// Keeps the files of the stage's tensors from being removed.
    held: InUse,
}

/// What is loaded.
#[derive(Debug)]
struct Stage {
    backend: CpuBackend,
    model: Decoder<CpuBackend>,
    tables: BlockTables,
    batch: Batch,
}

impl CpuEngine {
    /// An engine with nothing loaded.
    pub fn new() -> Self {
        Self::default()
    }

    fn unload(&mut self) {
        if let Some(stage) = self.stage.take() {
            self.busy += stage.backend.compute.pool.busy();
        }
        self.held = InUse::default();
    }

    /// As [`Engine::load`], for tensors of any source.
    pub(super) fn load_sources(
        &mut self,
        spec: &StageSpec,
        sources: &[Source],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError> {
        self.unload();
        spec.check()?;
        let checked = Sources::new(&spec.config, sources)?;
        check_memory(spec, sources)?;
        let mut backend = CpuBackend::new(spec.isa, spec.threads, spec.host_threads)
            .with_packed_cache(spec.packed_cache.as_deref());
        let model = Decoder::load(&mut backend, spec, &checked, progress)?;
        let loaded = backend.loaded();
        let tables = BlockTables::new(&spec.settings);
        let batch = Batch::new(&spec.settings);
        self.stage = Some(Stage { backend, model, tables, batch });
        Ok(loaded)
    }
}

impl Engine for CpuEngine {
    fn numerics_revision(&self) -> String {
        numerics_revision()
    }

    fn load(
        &mut self,
        spec: &StageSpec,
        tensors: &[TensorSource],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError> {
        let cache = spec.packed_cache.as_deref().and_then(cache_of);
        let files: Vec<PathBuf> = tensors.iter().map(|t| t.path.clone()).collect();
        let held = cache.map(|cache| cache.hold(&files)).unwrap_or_default();
        let sources = Source::of_tensors(tensors)?;
        let loaded = self.load_sources(spec, &sources, progress)?;
        self.held = held;
        Ok(loaded)
    }

    fn step(
        &mut self,
        meta: &StepMeta,
        input: StageInput<'_>,
        output: StageOutput<'_>,
    ) -> Result<(), StepError> {
        let Some(Stage { backend, model, tables, batch }) = &mut self.stage else {
            return Err(StepError::Invalid("no stage is loaded".to_owned()));
        };
        tables.apply(meta);
        batch.fill(meta, tables)?;
        if batch.positions == 0 {
            return Ok(());
        }
        backend.begin_step();
        let result = model.step(backend, meta, batch, tables, input, output);
        backend.end_step();
        result
    }

    fn skip(&mut self, meta: &StepMeta) {
        if let Some(stage) = &mut self.stage {
            stage.tables.apply(meta);
        }
    }

    fn profile(&mut self, spec: &ProfileSpec, threads: usize) -> Result<StageProfile, LoadError> {
        profile::profile(spec, threads, &mut |stage, sources| {
            let mut engine = Self::new();
            engine.load_sources(stage, sources, &mut |_| {})?;
            Ok(Box::new(engine))
        })
    }

    fn busy(&self) -> Duration {
        let now = self.stage.as_ref().map_or(Duration::ZERO, |s| s.backend.compute.pool.busy());
        self.busy + now
    }
}

/// Whether everything the stage will allocate fits in what is free, before any of it is touched.
fn check_memory(spec: &StageSpec, sources: &[Source]) -> Result<(), LoadError> {
    let weights = weight_bytes(spec, sources);
    let kv = kv_bytes(&spec.config, &spec.settings, spec.layers.len() as u64);
    let needed = weights.saturating_add(kv).saturating_add(scratch_bytes(spec));
    match memory::available_bytes() {
        Some(free) if needed.saturating_add(MEMORY_RESERVE) > free => Err(LoadError::OutOfMemory {
            what: "weights, KV cache and activations",
            needed_bytes: needed,
            cause: format!(
                "{free} bytes are free ({weights} for weights, {kv} for the KV cache); use more \
                     stages, fewer KV blocks or a smaller model"
            ),
        }),
        _ => Ok(()),
    }
}

/// Weights of a stage in memory. What cannot be loaded is said when it is.
fn weight_bytes(spec: &StageSpec, sources: &[Source]) -> u64 {
    let entries: Vec<TensorEntry> = sources.iter().map(|s| s.entry().clone()).collect();
    let part = StageTensors { layers: spec.layers.clone(), embed: spec.embed, head: spec.head };
    let needed = stage_tensors(&spec.config, &entries, &part);
    let needed: HashSet<&str> = needed.iter().map(|t| t.name.as_str()).collect();
    let r = group_rows(spec.isa);
    let bytes = |source: &Source| match MatrixPlan::new(source, r) {
        Ok(matrix) => matrix.bytes(),
        Err(_) => source.entry().dims.iter().fold(4, |n: u64, &d| n.saturating_mul(d)),
    };
    let needed = sources.iter().filter(|s| needed.contains(s.entry().name.as_str()));
    needed.map(bytes).fold(0, u64::saturating_add)
}

fn kv_bytes(config: &ModelConfig, settings: &EngineSettings, layers: u64) -> u64 {
    [layers, u64::from(settings.kv_blocks), u64::from(settings.kv_block_size)]
        .into_iter()
        .fold(config.kv_bytes_per_position(settings.kv_dtype), u64::saturating_mul)
}

/// Activations of the largest step, attention's scratch, logits, RoPE and block tables; a little more
/// than is taken, and the greatest number where it overflows.
fn scratch_bytes(spec: &StageSpec) -> u64 {
    let c = &spec.config;
    let [hidden, heads, kv_heads, dim, ffn, vocab] =
        [c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab].map(u64::from);
    let rows = u64::from(spec.settings.max_batch_tokens);
    let (shared, mixture) = match &c.features.experts {
        Some(experts) => {
            let scores = (u64::from(experts.count) + 1).saturating_mul(rows * 4);
            let routes = Routes::bytes(rows, (hidden, ffn), experts);
            (u64::from(experts.shared_ffn), routes.saturating_add(scores))
        }
        None => (0, 0),
    };
    let act = if c.features.experts.is_some() { shared } else { ffn };
    let branch = if c.features.post_norms || shared > 0 { hidden } else { 0 };
    let plain = hidden + branch + (heads + 2 * kv_heads) * dim;
    let quantised = hidden + heads * dim + act;
    let local_angles = spec.layers.clone().any(|i| c.window(i).is_some_and(|w| w.rope.is_some()));
    let angles = u64::from(c.rope.dim) * 4 * (1 + u64::from(local_angles));
    let group = (c.heads / c.kv_heads.max(1)) as usize;
    let positions = spec.settings.max_model_len as usize;
    let attention = paged::scratch_len(
        spec.threads,
        c.kv_heads as usize,
        group,
        c.head_dim as usize,
        positions,
    ) as u64;
    [
        rows.saturating_mul(plain * 4 + quantised * 6),
        mixture,
        attention.saturating_mul(4),
        u64::from(spec.settings.max_model_len).saturating_mul(angles),
        if spec.head { vocab * 64 + spec.threads as u64 * BEST_BYTES } else { 0 },
        BlockTables::bytes(&spec.settings),
        Batch::bytes(&spec.settings),
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}
