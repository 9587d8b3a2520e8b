//! [`TorchEngine`]: the engine seam over the decoder and [`TorchBackend`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use millrace_engine::model::weights::Sources;
use millrace_engine::model::{Batch, BlockTables, Decoder, Source};
use millrace_engine::profile::profile;
use millrace_engine::{
    Engine, LoadError, LoadedStage, PackingReport, StageInput, StageOutput, StageSpec, StepError,
    TensorSource,
};
use millrace_shared::model::{StageTensors, TensorEntry, stage_tensors};
use millrace_shared::options::{Device, TorchOptions};
use millrace_shared::wire::control::{EngineSettings, ProfileSpec, StageProfile};
use millrace_shared::wire::data::StepMeta;

use crate::graphs::Rehearsal;
use crate::shim::{CudaRecorder, Shim};
use crate::{Place, TorchBackend};

/// Revision of what this engine computes, and in what. Its results are approximate: another build of
/// libtorch, another GPU or another batch may round otherwise, whatever stands here.
pub fn numerics_revision(options: &TorchOptions) -> String {
    let device = if options.device() == Device::Cpu { "cpu" } else { "cuda" };
    format!("torch/1;approximate;{device};{}", options.dtype().as_str())
}

/// Whether decode steps are graphs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Graphing {
    /// On a GPU, where the shim is there.
    #[default]
    Auto,
    /// Never.
    Off,
    /// They have a graph's sizes and inputs, and run each time: what can be tested without a GPU.
    Rehearsed,
}

/// Computes a stage by libtorch.
#[derive(Debug)]
pub struct TorchEngine {
    options: TorchOptions,
    graphing: Graphing,
    stage: Option<Stage>,
    busy: Duration,
}

/// What is loaded.
#[derive(Debug)]
struct Stage {
    backend: TorchBackend,
    model: Decoder<TorchBackend>,
    tables: BlockTables,
    batch: Batch,
    threads: u32,
}

impl TorchEngine {
    /// An engine with nothing loaded.
    pub fn new(options: TorchOptions) -> Self {
        Self { options, graphing: Graphing::default(), stage: None, busy: Duration::ZERO }
    }

    /// The same, whose decode steps are graphs or not.
    pub fn graphing(self, graphing: Graphing) -> Self {
        Self { graphing, ..self }
    }

    /// Whether the device is there.
    ///
    /// # Errors
    /// If it is not: what to type instead.
    pub fn check(options: &TorchOptions) -> Result<(), LoadError> {
        Place::open(options.device(), options.dtype()).map(drop)
    }

    /// As [`Engine::load`], for tensors of any source.
    ///
    /// # Errors
    /// The same.
    pub fn load_sources(
        &mut self,
        spec: &StageSpec,
        sources: &[Source],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError> {
        let started = Instant::now();
        self.stage = None;
        spec.check()?;
        let checked = Sources::new(&spec.config, sources)?;
        let place = Place::open(self.options.device(), self.options.dtype())?;
        self.check_memory(place, spec, sources)?;
        // Of this thread's work alone.
        tch::set_num_threads(spec.threads.clamp(1, 1024) as i32);
        let mut backend = TorchBackend::new(place, spec.threads);
        let shim = self.stream(place)?;
        let model = Decoder::load(&mut backend, spec, &checked, progress)?;
        match (self.graphing, shim) {
            (Graphing::Rehearsed, _) => backend.record(Box::new(Rehearsal)),
            (Graphing::Auto, Some(shim)) => {
                backend.record(Box::new(CudaRecorder::new(shim, place.device)));
            }
            _ => {}
        }
        let (weight_bytes, kv_bytes) = backend.bytes();
        let tables = BlockTables::new(&spec.settings);
        let batch = Batch::new(&spec.settings);
        let threads = spec.threads.clamp(1, 1024) as u32;
        self.stage = Some(Stage { backend, model, tables, batch, threads });
        let seconds = started.elapsed().as_secs_f64();
        let packing =
            PackingReport { packed_bytes: weight_bytes, seconds, ..PackingReport::default() };
        Ok(LoadedStage { weight_bytes, kv_bytes, packing })
    }

    /// Gives this thread a stream of its own on a GPU; needs the shim, and does without it.
    fn stream(&self, place: Place) -> Result<Option<Shim>, LoadError> {
        let tch::Device::Cuda(device) = place.device else { return Ok(None) };
        let Some(shim) = Shim::get() else { return Ok(None) };
        shim.own_stream(device).map_err(LoadError::Settings)?;
        Ok(Some(shim))
    }

    /// Whether weights and KV cache fit, before any of them is there.
    fn check_memory(
        &self,
        place: Place,
        spec: &StageSpec,
        sources: &[Source],
    ) -> Result<(), LoadError> {
        // What an earlier stage of this process has given up, libtorch keeps for the next one, and the
        // GPU calls it taken.
        static LOADED: AtomicBool = AtomicBool::new(false);
        if place.device.is_cuda() && LOADED.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let Some(memory) = place.memory() else { return Ok(()) };
        let fraction = self.options.memory_fraction;
        let weights = weight_bytes(place, spec, sources);
        let kv = kv_bytes(spec, &spec.settings);
        let needed = weights.saturating_add(kv);
        let (may, device) = (fraction.of(memory.free), self.options.device());
        if needed <= may {
            return Ok(());
        }
        Err(LoadError::OutOfMemory {
            what: "weights and KV cache",
            needed_bytes: needed,
            cause: format!(
                "of {} free bytes of {device} ({} in all) it may take {may} (--memory-fraction \
                 {fraction}); {weights} are for weights as {}, {kv} for the KV cache: use more \
                 stages, fewer KV blocks, a smaller --torch-dtype or a smaller model{}",
                memory.free,
                memory.total,
                self.options.dtype().as_str(),
                place.held()
            ),
        })
    }
}

/// The same output once more.
fn again<'a>(output: &'a mut StageOutput<'_>) -> StageOutput<'a> {
    match output {
        StageOutput::Hidden(out) => StageOutput::Hidden(out),
        StageOutput::Logits(sink) => StageOutput::Logits(&mut **sink),
        StageOutput::Head { want, sink } => StageOutput::Head { want, sink: &mut **sink },
    }
}

/// What the weights of a stage will take.
fn weight_bytes(place: Place, spec: &StageSpec, sources: &[Source]) -> u64 {
    let entries: Vec<TensorEntry> = sources.iter().map(|s| s.entry().clone()).collect();
    let part = StageTensors { layers: spec.layers.clone(), embed: spec.embed, head: spec.head };
    let tensors = stage_tensors(&spec.config, &entries, &part);
    tensors.into_iter().map(|t| place.kept().tensor_bytes(t)).fold(0, u64::saturating_add)
}

fn kv_bytes(spec: &StageSpec, settings: &EngineSettings) -> u64 {
    [spec.layers.len() as u64, u64::from(settings.kv_blocks), u64::from(settings.kv_block_size)]
        .into_iter()
        .fold(spec.config.kv_bytes_per_position(settings.kv_dtype), u64::saturating_mul)
}

impl Engine for TorchEngine {
    fn numerics_revision(&self) -> String {
        numerics_revision(&self.options)
    }

    fn load(
        &mut self,
        spec: &StageSpec,
        tensors: &[TensorSource],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError> {
        self.load_sources(spec, &Source::of_tensors(tensors)?, progress)
    }

    fn step(
        &mut self,
        meta: &StepMeta,
        input: StageInput<'_>,
        mut output: StageOutput<'_>,
    ) -> Result<(), StepError> {
        let Some(Stage { backend, model, tables, batch, threads }) = &mut self.stage else {
            return Err(StepError::Invalid("no stage is loaded".to_owned()));
        };
        // The stages of one process take turns on its processors, as those of the other engine do.
        static TURN: Mutex<()> = Mutex::new(());
        let processors = self.options.device() == Device::Cpu;
        let _turn = processors.then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner));
        let started = Instant::now();
        tables.apply(meta);
        batch.fill(meta, tables)?;
        if batch.positions == 0 {
            return Ok(());
        }
        let tokens = match &input {
            StageInput::Tokens(tokens) => *tokens,
            StageInput::Hidden(_) => &[],
        };
        let whole = !matches!(output, StageOutput::Hidden(_));
        backend.begin_step();
        backend.begin_graph(batch, tables, (tokens, whole));
        let mut result = model.step(backend, meta, batch, tables, input, again(&mut output));
        let recorded = !backend.end_graph();
        let mut failure = backend.end_step();
        if !recorded {
            // Nothing of it has left the stage.
            backend.begin_step();
            result = model.step(backend, meta, batch, tables, input, output);
            failure = backend.end_step();
        }
        self.busy += started.elapsed() * *threads;
        match failure {
            Some(failure) => Err(StepError::Engine(failure)),
            None => result,
        }
    }

    fn skip(&mut self, meta: &StepMeta) {
        if let Some(stage) = &mut self.stage {
            stage.tables.apply(meta);
        }
    }

    fn profile(&mut self, spec: &ProfileSpec, threads: usize) -> Result<StageProfile, LoadError> {
        profile(spec, threads, &mut |stage, sources| {
            let mut engine = Self::new(self.options);
            engine.load_sources(stage, sources, &mut |_| {})?;
            Ok(Box::new(engine))
        })
    }

    fn busy(&self) -> Duration {
        self.busy
    }
}
