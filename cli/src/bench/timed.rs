//! Where the time of a step goes: [`Timed`] stands between the decoder and a backend and times each
//! operation; [`ProfiledEngine`] is an engine over it.
//!
//! Products never run through this. The sum of the phases is less than the step: the rest is what the
//! decoder itself does, and the clock (about 40 ns for each operation).

use std::ops::Range;
use std::time::{Duration, Instant};

use millrace_engine::cpu::{self, CpuBackend, CpuEngine};
use millrace_engine::model::weights::Sources;
use millrace_engine::model::{
    Backend, Batch, BlockTables, Decoder, LoadedPart, LoadedParts, Part, Piece, Source, Span,
};
use millrace_engine::{
    Engine, LoadError, LoadedStage, StageInput, StageOutput, StageSpec, StepError, TensorSource,
    TopLogits,
};
use millrace_shared::model::{Activation, Dtype, Experts, ModelConfig};
use millrace_shared::wire::control::{EngineSettings, ProfileSpec, StageProfile};
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

    /// What a matrix is for, by the name of its (first) tensor.
    fn of_matrix(name: &str) -> Self {
        match name.split('.').nth(2) {
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

/// A backend whose operations are timed.
#[derive(Debug)]
struct Timed<B> {
    inner: B,
    spent: [Spent; PHASES.len()],
}

/// A weight that knows what it is for.
#[derive(Debug)]
struct TimedWeight<W> {
    inner: W,
    phase: Phase,
    elements: u64,
    bytes: u64,
}

/// Activations that know how many rows they have, as `Backend` does not say.
#[derive(Debug)]
struct TimedTensor<T> {
    inner: T,
    rows: usize,
    width: usize,
}

impl<B: Backend> Timed<B> {
    fn time<R>(&mut self, phase: Phase, f: impl FnOnce(&mut B) -> R) -> R {
        let start = Instant::now();
        let result = f(&mut self.inner);
        self.add(phase, start.elapsed());
        result
    }

    fn add(&mut self, phase: Phase, time: Duration) {
        let spent = &mut self.spent[phase as usize];
        spent.calls += 1;
        spent.time += time;
    }

    fn product(&mut self, w: &TimedWeight<B::Weight>, rows: usize) {
        let spent = &mut self.spent[w.phase as usize];
        spent.macs += w.elements * rows as u64;
        spent.bytes += w.bytes;
    }
}

impl<B: Backend> Backend for Timed<B> {
    type Tensor = TimedTensor<B::Tensor>;
    type Weight = TimedWeight<B::Weight>;
    type Vector = B::Vector;
    type Kv = B::Kv;
    type Best = B::Best;
    type Routes = B::Routes;

    fn tensor(
        &mut self,
        rows: usize,
        width: usize,
        input: bool,
    ) -> Result<Self::Tensor, LoadError> {
        Ok(TimedTensor { inner: self.inner.tensor(rows, width, input)?, rows: 0, width })
    }

    fn weights(
        &mut self,
        pieces: &[Piece<'_>],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedParts<Self::Weight, Self::Vector>, LoadError> {
        let loaded = self.inner.weights(pieces, progress)?;
        let timed = |(part, loaded): (&Part<'_>, _)| match (part, loaded) {
            (part, LoadedPart::Matrices(inner)) => {
                let sources = match part {
                    Part::Matrices(sources) => &sources[..],
                    Part::Transposed(source) | Part::Vector(source, _) => {
                        std::slice::from_ref(source)
                    }
                };
                let entries = || sources.iter().map(|s| s.entry());
                LoadedPart::Matrices(TimedWeight {
                    inner,
                    phase: entries().next().map_or(Phase::Head, |e| Phase::of_matrix(&e.name)),
                    elements: entries().map(|e| e.elements()).sum(),
                    bytes: entries().map(|e| e.bytes).sum(),
                })
            }
            (_, LoadedPart::Vector(vector)) => LoadedPart::Vector(vector),
        };
        Ok(pieces.iter().flatten().zip(loaded).map(timed).collect())
    }

    fn touch(&mut self) -> Result<(), LoadError> {
        self.inner.touch()
    }

    fn kv(
        &mut self,
        layers: Range<u32>,
        config: &ModelConfig,
        settings: &EngineSettings,
        factors: Option<&[f32]>,
    ) -> Result<Self::Kv, LoadError> {
        self.inner.kv(layers, config, settings, factors)
    }

    fn routes(
        &mut self,
        rows: usize,
        hidden: usize,
        ffn: usize,
        experts: &Experts,
    ) -> Result<Self::Routes, LoadError> {
        self.inner.routes(rows, hidden, ffn, experts)
    }

    fn embed(&mut self, table: &Self::Weight, tokens: &[u32], out: &mut Self::Tensor) {
        out.rows = tokens.len();
        self.time(Phase::Embed, |b| b.embed(&table.inner, tokens, &mut out.inner));
    }

    fn add_positions(&mut self, table: &Self::Vector, spans: &[Span], out: &mut Self::Tensor) {
        self.time(Phase::Embed, |b| b.add_positions(table, spans, &mut out.inner));
    }

    fn upload(&mut self, rows: &[f32], out: &mut Self::Tensor) {
        out.rows = rows.len() / out.width;
        self.time(Phase::Copy, |b| b.upload(rows, &mut out.inner));
    }

    fn download(&mut self, x: &Self::Tensor, out: &mut [f32]) {
        self.time(Phase::Copy, |b| b.download(&x.inner, out));
    }

    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        gain: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) {
        out.rows = x.rows;
        self.time(Phase::RmsNorm, |b| b.rms_norm(&x.inner, gain, eps, &mut out.inner));
    }

    fn layer_norm(
        &mut self,
        x: &Self::Tensor,
        gain: &Self::Vector,
        bias: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) {
        out.rows = x.rows;
        self.time(Phase::RmsNorm, |b| b.layer_norm(&x.inner, gain, bias, eps, &mut out.inner));
    }

    fn linear(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor) {
        out.rows = x.rows;
        self.time(w.phase, |b| b.linear(&x.inner, &w.inner, &mut out.inner));
        self.product(w, x.rows);
    }

    fn linear_add(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor) {
        self.time(w.phase, |b| b.linear_add(&x.inner, &w.inner, &mut out.inner));
        self.product(w, x.rows);
    }

    fn gated(
        &mut self,
        x: &Self::Tensor,
        w: &Self::Weight,
        activation: Activation,
        out: &mut Self::Tensor,
    ) {
        out.rows = x.rows;
        self.time(w.phase, |b| b.gated(&x.inner, &w.inner, activation, &mut out.inner));
        self.product(w, x.rows);
    }

    fn activate(
        &mut self,
        x: &mut Self::Tensor,
        bias: Option<&Self::Vector>,
        activation: Activation,
    ) {
        self.time(Phase::GateUp, |b| b.activate(&mut x.inner, bias, activation));
    }

    // Which experts were read is the backend's: products are not counted.
    fn experts<'w>(
        &mut self,
        x: &Self::Tensor,
        scores: &Self::Tensor,
        weights: &dyn Fn(usize) -> [&'w Self::Weight; 2],
        rule: (&Experts, Activation),
        routes: &mut Self::Routes,
        out: &mut Self::Tensor,
    ) where
        Self::Weight: 'w,
    {
        let weights = |expert: usize| weights(expert).map(|w| &w.inner);
        self.time(Phase::GateUp, |b| {
            b.experts(&x.inner, &scores.inner, &weights, rule, routes, &mut out.inner);
        });
    }

    fn add_gated(
        &mut self,
        x: &Self::Tensor,
        scores: &Self::Tensor,
        column: usize,
        out: &mut Self::Tensor,
    ) {
        self.time(Phase::Down, |b| {
            b.add_gated(&x.inner, &scores.inner, column, &mut out.inner);
        });
    }

    fn rms_norm_add(
        &mut self,
        x: &Self::Tensor,
        gain: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) {
        self.time(Phase::RmsNorm, |b| b.rms_norm_add(&x.inner, gain, eps, &mut out.inner));
    }

    fn norm_heads(
        &mut self,
        x: &mut Self::Tensor,
        first: usize,
        count: usize,
        gain: &Self::Vector,
        eps: f32,
    ) {
        self.time(Phase::RmsNorm, |b| b.norm_heads(&mut x.inner, first, count, gain, eps));
    }

    fn add_bias(&mut self, x: &mut Self::Tensor, first: usize, bias: &Self::Vector) {
        self.time(Phase::Qkv, |b| b.add_bias(&mut x.inner, first, bias));
    }

    fn scale(&mut self, x: &mut Self::Tensor, factor: f32) {
        self.time(Phase::Embed, |b| b.scale(&mut x.inner, factor));
    }

    fn write_kv(
        &mut self,
        qkv: &mut Self::Tensor,
        kv: &mut Self::Kv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
    ) {
        self.time(Phase::WriteKv, |b| b.write_kv(&mut qkv.inner, kv, layer, spans, tables));
    }

    fn attention(
        &mut self,
        qkv: &Self::Tensor,
        kv: &Self::Kv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
        out: &mut Self::Tensor,
    ) {
        out.rows = qkv.rows;
        self.time(Phase::Attention, |b| {
            b.attention(&qkv.inner, kv, layer, spans, tables, &mut out.inner);
        });
    }

    fn settle(&mut self, x: &mut Self::Tensor, dtype: Dtype) -> Option<usize> {
        self.time(Phase::Settle, |b| b.settle(&mut x.inner, dtype))
    }

    fn gather_rows(&mut self, rows: &[usize], x: &mut Self::Tensor) {
        x.rows = rows.len();
        self.time(Phase::Gather, |b| b.gather_rows(rows, &mut x.inner));
    }

    fn logits<'t>(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        head: &Self::Weight,
        softcap: f32,
        out: &'t mut Self::Tensor,
    ) -> &'t mut [f32] {
        self.product(head, rows.len());
        let start = Instant::now();
        let logits = self.inner.logits(&x.inner, rows, &head.inner, softcap, &mut out.inner);
        let spent = &mut self.spent[Phase::Head as usize];
        spent.calls += 1;
        spent.time += start.elapsed();
        logits
    }

    fn best(&mut self, rows: usize) -> Result<Self::Best, LoadError> {
        self.inner.best(rows)
    }

    fn top_logits(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        head: &Self::Weight,
        k: &[usize],
        best: &mut Self::Best,
        take: &mut dyn FnMut(usize, TopLogits<'_>),
    ) {
        self.product(head, rows.len());
        self.time(Phase::Head, |b| b.top_logits(&x.inner, rows, &head.inner, k, best, take));
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
    backend: Timed<CpuBackend>,
    model: Decoder<Timed<CpuBackend>>,
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
        let mut backend = Timed { inner, spent: Default::default() };
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
        let mut spent = std::mem::take(&mut stage.backend.spent);
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
