//! The CPU backend, watched: which matrix sees which inputs.
//!
//! [`Watch`] is a [`Backend`] that passes everything on to the CPU's, and before each product adds its
//! inputs to the moments of the matrices that are multiplied. The decoder knows nothing of it, so
//! every family can be calibrated. Experts are left out: their inputs are chosen inside the backend.

use std::collections::HashMap;
use std::ops::Range;

use millrace_engine::cpu::CpuBackend;
use millrace_engine::model::{Backend, BlockTables, LoadedPart, LoadedParts, Part, Piece, Span};
use millrace_engine::{LoadError, TopLogits};
use millrace_shared::model::{Activation, Dtype, Experts, ModelConfig};
use millrace_shared::wire::control::EngineSettings;

use crate::hessian::Moments;

/// Activations: the CPU's.
type Tensor = <CpuBackend as Backend>::Tensor;
/// A vector: the CPU's.
type Vector = <CpuBackend as Backend>::Vector;
/// The cache: the CPU's.
type Kv = <CpuBackend as Backend>::Kv;
/// Largest logits: the CPU's.
type Best = <CpuBackend as Backend>::Best;
/// Ways to experts: the CPU's.
type Routes = <CpuBackend as Backend>::Routes;

/// Matrices that share their input.
pub(crate) struct Named {
    inner: <CpuBackend as Backend>::Weight,
    /// Their tensors' names.
    names: Vec<String>,
    cols: usize,
}

/// The backend.
pub(crate) struct Watch {
    pub(crate) inner: CpuBackend,
    /// By the name of each matrix's first one.
    pub(crate) moments: HashMap<String, Moments>,
    /// The first name of those that share inputs, by each name.
    pub(crate) first: HashMap<String, String>,
    /// Positions in the step.
    pub(crate) positions: usize,
    full: bool,
    room: Vec<f32>,
}

impl Watch {
    /// With `full`, products of inputs are kept, not only squares.
    pub(crate) fn new(inner: CpuBackend, full: bool) -> Self {
        let (moments, first) = (HashMap::new(), HashMap::new());
        Self { inner, moments, first, positions: 0, full, room: Vec::new() }
    }

    fn see(&mut self, x: &Tensor, w: &Named) {
        if self.positions == 0 || !w.names[0].starts_with("blk.") {
            return;
        }
        self.room.resize(self.positions * w.cols, 0.0);
        self.inner.download(x, &mut self.room);
        let full = self.full;
        let new = || Moments::new(w.cols, full);
        self.moments.entry(w.names[0].clone()).or_insert_with(new).add(&self.room);
        for name in &w.names {
            self.first.insert(name.clone(), w.names[0].clone());
        }
    }
}

impl Backend for Watch {
    type Tensor = Tensor;
    type Weight = Named;
    type Vector = Vector;
    type Kv = Kv;
    type Best = Best;
    type Routes = Routes;

    fn tensor(&mut self, rows: usize, width: usize, input: bool) -> Result<Tensor, LoadError> {
        self.inner.tensor(rows, width, input)
    }

    fn weights(
        &mut self,
        pieces: &[Piece<'_>],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedParts<Named, Vector>, LoadError> {
        let loaded = self.inner.weights(pieces, progress)?;
        let named = |(part, loaded): (&Part<'_>, _)| match loaded {
            LoadedPart::Vector(v) => LoadedPart::Vector(v),
            LoadedPart::Matrices(inner) => {
                let (names, cols) = match part {
                    Part::Matrices(all) => (
                        all.iter().map(|s| s.entry().name.clone()).collect(),
                        all[0].entry().dims[0],
                    ),
                    Part::Transposed(one) => (vec![one.entry().name.clone()], one.entry().dims[1]),
                    Part::Vector(..) => unreachable!("a vector was loaded as matrices"),
                };
                LoadedPart::Matrices(Named { inner, names, cols: cols as usize })
            }
        };
        Ok(pieces.iter().flatten().zip(loaded).map(named).collect())
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
    ) -> Result<Kv, LoadError> {
        self.inner.kv(layers, config, settings, factors)
    }

    fn routes(
        &mut self,
        rows: usize,
        hidden: usize,
        ffn: usize,
        experts: &Experts,
    ) -> Result<Routes, LoadError> {
        self.inner.routes(rows, hidden, ffn, experts)
    }

    fn embed(&mut self, table: &Named, tokens: &[u32], out: &mut Tensor) {
        self.inner.embed(&table.inner, tokens, out);
    }

    fn add_positions(&mut self, table: &Vector, spans: &[Span], out: &mut Tensor) {
        self.inner.add_positions(table, spans, out);
    }

    fn upload(&mut self, rows: &[f32], out: &mut Tensor) {
        self.inner.upload(rows, out);
    }

    fn download(&mut self, x: &Tensor, out: &mut [f32]) {
        self.inner.download(x, out);
    }

    fn rms_norm(&mut self, x: &Tensor, gain: &Vector, eps: f32, out: &mut Tensor) {
        self.inner.rms_norm(x, gain, eps, out);
    }

    fn layer_norm(&mut self, x: &Tensor, gain: &Vector, bias: &Vector, eps: f32, out: &mut Tensor) {
        self.inner.layer_norm(x, gain, bias, eps, out);
    }

    fn linear(&mut self, x: &Tensor, w: &Named, out: &mut Tensor) {
        self.see(x, w);
        self.inner.linear(x, &w.inner, out);
    }

    fn linear_add(&mut self, x: &Tensor, w: &Named, out: &mut Tensor) {
        self.see(x, w);
        self.inner.linear_add(x, &w.inner, out);
    }

    fn gated(&mut self, x: &Tensor, w: &Named, activation: Activation, out: &mut Tensor) {
        self.see(x, w);
        self.inner.gated(x, &w.inner, activation, out);
    }

    fn activate(&mut self, x: &mut Tensor, bias: Option<&Vector>, activation: Activation) {
        self.inner.activate(x, bias, activation);
    }

    fn experts<'w>(
        &mut self,
        x: &Tensor,
        scores: &Tensor,
        weights: &dyn Fn(usize) -> [&'w Named; 2],
        rule: (&Experts, Activation),
        routes: &mut Routes,
        out: &mut Tensor,
    ) where
        Named: 'w,
    {
        let inner = |expert: usize| weights(expert).map(|named| &named.inner);
        self.inner.experts(x, scores, &inner, rule, routes, out);
    }

    fn add_gated(&mut self, x: &Tensor, scores: &Tensor, column: usize, out: &mut Tensor) {
        self.inner.add_gated(x, scores, column, out);
    }

    fn rms_norm_add(&mut self, x: &Tensor, gain: &Vector, eps: f32, out: &mut Tensor) {
        self.inner.rms_norm_add(x, gain, eps, out);
    }

    fn norm_heads(&mut self, x: &mut Tensor, first: usize, count: usize, gain: &Vector, eps: f32) {
        self.inner.norm_heads(x, first, count, gain, eps);
    }

    fn add_bias(&mut self, x: &mut Tensor, first: usize, bias: &Vector) {
        self.inner.add_bias(x, first, bias);
    }

    fn scale(&mut self, x: &mut Tensor, factor: f32) {
        self.inner.scale(x, factor);
    }

    fn write_kv(
        &mut self,
        qkv: &mut Tensor,
        kv: &mut Kv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
    ) {
        self.inner.write_kv(qkv, kv, layer, spans, tables);
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        kv: &Kv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
        out: &mut Tensor,
    ) {
        self.inner.attention(qkv, kv, layer, spans, tables, out);
    }

    fn settle(&mut self, x: &mut Tensor, dtype: Dtype) -> Option<usize> {
        self.inner.settle(x, dtype)
    }

    fn gather_rows(&mut self, rows: &[usize], x: &mut Tensor) {
        self.inner.gather_rows(rows, x);
    }

    fn logits<'t>(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        head: &Named,
        softcap: f32,
        out: &'t mut Tensor,
    ) -> &'t mut [f32] {
        self.inner.logits(x, rows, &head.inner, softcap, out)
    }

    fn best(&mut self, rows: usize) -> Result<Best, LoadError> {
        self.inner.best(rows)
    }

    fn top_logits(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        head: &Named,
        k: &[usize],
        best: &mut Best,
        take: &mut dyn FnMut(usize, TopLogits<'_>),
    ) {
        self.inner.top_logits(x, rows, &head.inner, k, best, take);
    }
}
