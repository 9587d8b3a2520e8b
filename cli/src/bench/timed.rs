//! Where the time of a step goes: a [`Clock`] looks on while the decoder computes; [`ProfiledEngine`] is
//! an engine with one.
//!
//! Products never run through this. The sum of the phases is less than the step: the rest is what the
//! decoder itself does, and the clock (about 40 ns for each operation).

use std::time::{Duration, Instant};

use millrace_engine::cpu::{self, CpuBackend, CpuEngine};
use millrace_engine::model::observed::{About, Observed, Observer, Operation, Work};
use millrace_engine::model::weights::Sources;
use millrace_engine::model::{Backend, Batch, BlockTables, Decoder, Source};
use millrace_engine::{
    Engine, LoadError, LoadedStage, StageInput, StageOutput, StageSpec, StepError, TensorSource,
};
use millrace_shared::wire::control::{ProfileSpec, StageProfile};
use millrace_shared::wire::data::StepMeta;
use serde::Serialize;

/// Operations of a step, in the order of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    Embed,
    RmsNorm,
    Qkv,
    WriteKv,
    Attention,
    AttnOutput,
    GateUp,
    Down,
    Settle,
    Gather,
    Head,
    Copy,
    Rest,
}

const PHASES: [Phase; 13] = {
    use Phase::{
        Attention, AttnOutput, Copy, Down, Embed, GateUp, Gather, Head, Qkv, Rest, RmsNorm, Settle,
        WriteKv,
    };
    [
        Embed, RmsNorm, Qkv, WriteKv, Attention, AttnOutput, GateUp, Down, Settle, Gather, Head,
        Copy, Rest,
    ]
};

impl Phase {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::RmsNorm => "rms_norm",
            Self::Qkv => "qkv",
            Self::WriteKv => "write_kv",
            Self::Attention => "attention",
            Self::AttnOutput => "attn_output",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Settle => "settle",
            Self::Gather => "gather",
            Self::Head => "head",
            Self::Copy => "copy",
            Self::Rest => "rest",
        }
    }

    /// Which experts were read is the backend's: their products are not counted.
    fn of(operation: Operation, about: Option<&About>) -> Self {
        match operation {
            Operation::Embed => Self::Embed,
            Operation::Copy => Self::Copy,
            Operation::Norm => Self::RmsNorm,
            Operation::Product | Operation::Head => {
                about.and_then(|a| a.names.first()).map_or(Self::Head, |n| Self::of_matrix(n))
            }
            Operation::Activate | Operation::Experts => Self::GateUp,
            Operation::AddGated => Self::Down,
            Operation::Bias => Self::Qkv,
            Operation::WriteKv => Self::WriteKv,
            Operation::Attention => Self::Attention,
            Operation::Settle => Self::Settle,
            Operation::Gather => Self::Gather,
        }
    }

    /// What a matrix is for, by the name of its (first) tensor.
    fn of_matrix(name: &str) -> Self {
        let part = name.split('.').nth(2).map(|p| p.strip_suffix("_in").unwrap_or(p));
        match part {
            Some("attn_q" | "attn_qkv") => Self::Qkv,
            Some("attn_output") => Self::AttnOutput,
            Some("ffn_gate" | "ffn_up" | "ffn_gate_shexp" | "ffn_gate_inp") => Self::GateUp,
            Some("ffn_down" | "ffn_down_shexp") => Self::Down,
            _ => Self::Head,
        }
    }
}

/// What one phase took, over all steps that were timed.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    calls: u64,
    time: Duration,
    /// Multiplications with additions, of products.
    macs: u64,
    /// Bytes of weights read, of products, as stored in the file.
    bytes: u64,
}

/// A phase's part of the average step.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PhaseShare {
    pub(super) phase: Phase,
    pub(super) calls: f64,
    pub(super) micros: f64,
    pub(super) share: f64,
    pub(super) gmac_per_s: Option<f64>,
    pub(super) gb_per_s: Option<f64>,
}

/// Times operations.
#[derive(Debug, Default)]
struct Clock {
    spent: [Spent; PHASES.len()],
}

impl<B: Backend> Observer<B> for Clock {
    fn around<R>(
        &mut self,
        backend: &mut B,
        work: Work<'_, B>,
        run: impl FnOnce(&mut B) -> R,
    ) -> R {
        let start = Instant::now();
        let result = run(backend);
        let time = start.elapsed();
        let about = work.product.map(|(about, ..)| about);
        let spent = &mut self.spent[Phase::of(work.operation, about) as usize];
        spent.calls += 1;
        spent.time += time;
        if let Some((about, _, rows)) = work.product {
            spent.macs += about.elements * rows as u64;
            spent.bytes += about.bytes;
        }
        result
    }
}

/// An engine that can say where its time went.
pub(super) trait Measured: Engine {
    /// What the steps since the last call were made of; empty if this engine does not tell.
    fn take_phases(&mut self) -> Vec<PhaseShare> {
        Vec::new()
    }
}

impl Measured for CpuEngine {}

/// The CPU engine with a clock around each operation.
#[derive(Debug, Default)]
pub(super) struct ProfiledEngine {
    stage: Option<Stage>,
    steps: u64,
    wall: Duration,
}

#[derive(Debug)]
struct Stage {
    backend: Observed<CpuBackend, Clock>,
    model: Decoder<Observed<CpuBackend, Clock>>,
    tables: BlockTables,
    batch: Batch,
}

impl Engine for ProfiledEngine {
    fn numerics_revision(&self) -> String {
        cpu::numerics_revision()
    }

    fn load(
        &mut self,
        spec: &StageSpec,
        tensors: &[TensorSource],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedStage, LoadError> {
        let sources = Source::of_tensors(tensors)?;
        let sources = Sources::new(&spec.config, &sources)?;
        let inner = CpuBackend::new(spec.isa, spec.threads, spec.host_threads)
            .with_packed_cache(spec.packed_cache.as_deref());
        let mut backend = Observed { inner, observer: Clock::default() };
        let model = Decoder::load(&mut backend, spec, &sources, progress)?;
        let loaded = backend.inner.loaded();
        let (tables, batch) = (BlockTables::new(&spec.settings), Batch::new(&spec.settings));
        self.stage = Some(Stage { backend, model, tables, batch });
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
        let start = Instant::now();
        tables.apply(meta);
        batch.fill(meta, tables)?;
        backend.inner.begin_step();
        let result = model.step(backend, meta, batch, tables, input, output);
        backend.inner.end_step();
        result?;
        self.wall += start.elapsed();
        self.steps += 1;
        Ok(())
    }

    fn skip(&mut self, meta: &StepMeta) {
        if let Some(stage) = &mut self.stage {
            stage.tables.apply(meta);
        }
    }

    fn profile(&mut self, spec: &ProfileSpec, threads: usize) -> Result<StageProfile, LoadError> {
        CpuEngine::new().profile(spec, threads)
    }

    fn busy(&self) -> Duration {
        self.wall
    }
}

impl Measured for ProfiledEngine {
    fn take_phases(&mut self) -> Vec<PhaseShare> {
        let (steps, wall) = (std::mem::take(&mut self.steps), std::mem::take(&mut self.wall));
        let Some(stage) = &mut self.stage else { return Vec::new() };
        let mut spent = std::mem::take(&mut stage.backend.observer.spent);
        let timed: Duration = spent.iter().map(|s| s.time).sum();
        spent[Phase::Rest as usize] =
            Spent { calls: steps, time: wall.saturating_sub(timed), ..Spent::default() };
        shares(&spent, steps, wall)
    }
}

fn shares(spent: &[Spent; PHASES.len()], steps: u64, wall: Duration) -> Vec<PhaseShare> {
    let steps = steps.max(1) as f64;
    let used = PHASES.iter().zip(spent).filter(|(_, s)| s.calls > 0);
    used.map(|(&phase, s)| {
        let seconds = s.time.as_secs_f64();
        let rate = |n: u64| (n > 0 && seconds > 0.0).then(|| n as f64 / seconds / 1e9);
        PhaseShare {
            phase,
            calls: s.calls as f64 / steps,
            micros: seconds * 1e6 / steps,
            share: seconds / wall.as_secs_f64().max(f64::MIN_POSITIVE),
            gmac_per_s: rate(s.macs),
            gb_per_s: rate(s.bytes),
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_are_known_by_name() {
        assert_eq!(Phase::of_matrix("blk.3.attn_q.weight"), Phase::Qkv);
        assert_eq!(Phase::of_matrix("blk.3.ffn_gate.weight"), Phase::GateUp);
        assert_eq!(Phase::of_matrix("token_embd.weight"), Phase::Head);
    }

    #[test]
    fn phases_index_themselves() {
        for (i, phase) in PHASES.iter().enumerate() {
            assert_eq!(*phase as usize, i, "{}", phase.name());
        }
    }

    #[test]
    fn shares_are_of_the_average_step() {
        let mut spent = [Spent::default(); PHASES.len()];
        spent[Phase::Qkv as usize] =
            Spent { calls: 4, time: Duration::from_millis(1), macs: 2_000_000, bytes: 1_000_000 };
        let shares = shares(&spent, 2, Duration::from_millis(4));
        assert_eq!(shares.len(), 1);
        let qkv = &shares[0];
        assert_eq!((qkv.calls, qkv.micros, qkv.share), (2.0, 500.0, 0.25));
        assert_eq!((qkv.gmac_per_s, qkv.gb_per_s), (Some(2.0), Some(1.0)));
    }
}
