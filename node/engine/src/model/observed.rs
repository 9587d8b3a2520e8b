//! A backend over another, with somebody who looks on: what is computed, with which matrices, from
//! which inputs.
//!
//! [`Observed`] passes every operation on and changes nothing; an [`Observer`] stands around each of
//! them. The decoder knows nothing of it, so every family can be timed, or calibrated. Which experts a
//! row goes to is chosen inside the backend: of those there is one operation for all, and the backend
//! may tell afterwards what went where.

use std::ops::Range;

use millrace_shared::model::{Activation, Dtype, Experts, ModelConfig};
use millrace_shared::wire::control::EngineSettings;

use super::{Backend, BlockTables, LoadedPart, LoadedParts, Part, Piece, Span};
use crate::{LoadError, TopLogits};

/// What a backend does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Rows of the embedding, their positions and scale.
    Embed,
    /// To the backend, or from it.
    Copy,
    /// Any norm.
    Norm,
    /// A product of matrices.
    Product,
    /// The same, of the head.
    Head,
    /// An activation on its own.
    Activate,
    /// Experts.
    Experts,
    /// What a gated branch adds.
    AddGated,
    /// A bias.
    Bias,
    /// Rotation, and keys and values stored.
    WriteKv,
    /// Attention.
    Attention,
    /// Rounding between layers.
    Settle,
    /// Rows that go on.
    Gather,
}

/// What is known of matrices that share their input.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Names of their tensors.
    pub names: Vec<String>,
    /// Inputs.
    pub cols: usize,
    /// Weights.
    pub elements: u64,
    /// Bytes as they are stored in the file.
    pub bytes: u64,
}

/// An operation that is about to be done.
#[derive(Debug)]
pub struct Work<'a, B: Backend> {
    /// Which.
    pub operation: Operation,
    /// Of products: the matrices, what they are applied to, and how many rows of that.
    pub product: Option<(&'a About, &'a B::Tensor, usize)>,
    /// Of experts, by number: the matrices that see a row, and the one that sees what they make of it.
    pub experts: Vec<[&'a About; 2]>,
}

impl<'a, B: Backend> Work<'a, B> {
    fn of(operation: Operation, product: Option<(&'a About, &'a B::Tensor, usize)>) -> Self {
        Self { operation, product, experts: Vec::new() }
    }
}

/// Somebody who looks on.
pub trait Observer<B: Backend> {
    /// Calls `run`, once, and returns what it returns.
    fn around<R>(&mut self, backend: &mut B, work: Work<'_, B>, run: impl FnOnce(&mut B) -> R)
    -> R;
}

/// A backend that is looked on.
#[derive(Debug)]
pub struct Observed<B, O> {
    /// Computes.
    pub inner: B,
    /// Looks on.
    pub observer: O,
}

/// Matrices that are known by name.
#[derive(Debug)]
pub struct Named<W> {
    inner: W,
    about: About,
}

/// Activations that know how many rows they have, as [`Backend`] does not say.
#[derive(Debug)]
pub struct Counted<T> {
    inner: T,
    rows: usize,
    width: usize,
}

impl<B: Backend, O: Observer<B>> Observed<B, O> {
    fn plain<R>(&mut self, operation: Operation, run: impl FnOnce(&mut B) -> R) -> R {
        self.observer.around(&mut self.inner, Work::of(operation, None), run)
    }

    fn product(
        &mut self,
        x: &Counted<B::Tensor>,
        w: &Named<B::Weight>,
        run: impl FnOnce(&mut B, &B::Tensor, &B::Weight),
    ) {
        let product = Some((&w.about, &x.inner, x.rows));
        let work = Work::of(Operation::Product, product);
        self.observer.around(&mut self.inner, work, |b| run(b, &x.inner, &w.inner));
    }
}

/// What is known of a part.
fn about(part: &Part<'_>) -> About {
    let (sources, cols): (&[_], _) = match part {
        Part::Matrices(all) => (&all[..], 0),
        Part::Transposed(one) => (std::slice::from_ref(one), 1),
        Part::Vector(one, _) => (std::slice::from_ref(one), 0),
    };
    let entries = || sources.iter().map(|s| s.entry());
    About {
        names: entries().map(|e| e.name.clone()).collect(),
        cols: entries().next().and_then(|e| e.dims.get(cols)).map_or(0, |&n| n as usize),
        elements: entries().map(|e| e.elements()).sum(),
        bytes: entries().map(|e| e.bytes).sum(),
    }
}

impl<B: Backend, O: Observer<B>> Backend for Observed<B, O> {
    type Tensor = Counted<B::Tensor>;
    type Weight = Named<B::Weight>;
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
        Ok(Counted { inner: self.inner.tensor(rows, width, input)?, rows: 0, width })
    }

    fn weights(
        &mut self,
        pieces: &[Piece<'_>],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedParts<Self::Weight, Self::Vector>, LoadError> {
        let loaded = self.inner.weights(pieces, progress)?;
        let named = |(part, loaded): (&Part<'_>, _)| match loaded {
            LoadedPart::Vector(vector) => LoadedPart::Vector(vector),
            LoadedPart::Matrices(inner) => {
                LoadedPart::Matrices(Named { inner, about: about(part) })
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
        self.plain(Operation::Embed, |b| b.embed(&table.inner, tokens, &mut out.inner));
    }

    fn add_positions(&mut self, table: &Self::Vector, spans: &[Span], out: &mut Self::Tensor) {
        self.plain(Operation::Embed, |b| b.add_positions(table, spans, &mut out.inner));
    }

    fn upload(&mut self, rows: &[f32], out: &mut Self::Tensor) {
        out.rows = rows.len() / out.width;
        self.plain(Operation::Copy, |b| b.upload(rows, &mut out.inner));
    }

    fn download(&mut self, x: &Self::Tensor, out: &mut [f32]) {
        self.plain(Operation::Copy, |b| b.download(&x.inner, out));
    }

    fn read_rows(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        take: &mut dyn FnMut(usize, &[f32]),
    ) {
        self.plain(Operation::Copy, |b| b.read_rows(&x.inner, rows, take));
    }

    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        gain: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) {
        out.rows = x.rows;
        self.plain(Operation::Norm, |b| b.rms_norm(&x.inner, gain, eps, &mut out.inner));
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
        self.plain(Operation::Norm, |b| b.layer_norm(&x.inner, gain, bias, eps, &mut out.inner));
    }

    fn linear(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor) {
        out.rows = x.rows;
        self.product(x, w, |b, x, w| b.linear(x, w, &mut out.inner));
    }

    fn linear_input(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor) {
        out.rows = x.rows;
        self.product(x, w, |b, x, w| b.linear_input(x, w, &mut out.inner));
    }

    fn linear_add(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor) {
        self.product(x, w, |b, x, w| b.linear_add(x, w, &mut out.inner));
    }

    fn gated(
        &mut self,
        x: &Self::Tensor,
        w: &Self::Weight,
        activation: Activation,
        out: &mut Self::Tensor,
    ) {
        out.rows = x.rows;
        self.product(x, w, |b, x, w| b.gated(x, w, activation, &mut out.inner));
    }

    fn activate(
        &mut self,
        x: &mut Self::Tensor,
        bias: Option<&Self::Vector>,
        activation: Activation,
    ) {
        self.plain(Operation::Activate, |b| b.activate(&mut x.inner, bias, activation));
    }

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
        let experts = (0..rule.0.count as usize).map(|e| weights(e).map(|w| &w.about)).collect();
        let weights = |expert: usize| weights(expert).map(|w| &w.inner);
        let work = Work { experts, ..Work::of(Operation::Experts, None) };
        self.observer.around(&mut self.inner, work, |b| {
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
        self.plain(Operation::AddGated, |b| {
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
        self.plain(Operation::Norm, |b| b.rms_norm_add(&x.inner, gain, eps, &mut out.inner));
    }

    fn norm_heads(
        &mut self,
        x: &mut Self::Tensor,
        first: usize,
        count: usize,
        gain: &Self::Vector,
        eps: f32,
    ) {
        self.plain(Operation::Norm, |b| b.norm_heads(&mut x.inner, first, count, gain, eps));
    }

    fn add_bias(&mut self, x: &mut Self::Tensor, first: usize, bias: &Self::Vector) {
        self.plain(Operation::Bias, |b| b.add_bias(&mut x.inner, first, bias));
    }

    fn scale(&mut self, x: &mut Self::Tensor, factor: f32) {
        self.plain(Operation::Embed, |b| b.scale(&mut x.inner, factor));
    }

    fn write_kv(
        &mut self,
        qkv: &mut Self::Tensor,
        kv: &mut Self::Kv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
    ) {
        self.plain(Operation::WriteKv, |b| b.write_kv(&mut qkv.inner, kv, layer, spans, tables));
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
        self.plain(Operation::Attention, |b| {
            b.attention(&qkv.inner, kv, layer, spans, tables, &mut out.inner);
        });
    }

    fn settle(&mut self, x: &mut Self::Tensor, dtype: Dtype) -> Option<usize> {
        self.plain(Operation::Settle, |b| b.settle(&mut x.inner, dtype))
    }

    fn gather_rows(&mut self, rows: &[usize], x: &mut Self::Tensor) {
        x.rows = rows.len();
        self.plain(Operation::Gather, |b| b.gather_rows(rows, &mut x.inner));
    }

    fn logits<'t>(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        head: &Self::Weight,
        softcap: f32,
        out: &'t mut Self::Tensor,
    ) -> &'t mut [f32] {
        let product = Some((&head.about, &x.inner, rows.len()));
        let work = Work::of(Operation::Head, product);
        let run = |b: &mut B| b.logits(&x.inner, rows, &head.inner, softcap, &mut out.inner);
        self.observer.around(&mut self.inner, work, run)
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
        let product = Some((&head.about, &x.inner, rows.len()));
        let work = Work::of(Operation::Head, product);
        let run = |b: &mut B| b.top_logits(&x.inner, rows, &head.inner, k, best, take);
        self.observer.around(&mut self.inner, work, run);
    }
}
