//! The CPU's [`Backend`]: tensors, weights and the KV cache in the engine's own memory.

use std::ops::Range;
use std::path::{Path, PathBuf};

use millrace_shared::model::{Activation, Dtype, Experts, ModelConfig};
use millrace_shared::wire::control::EngineSettings;

use super::buffer::{Arena, Buf, Frozen, Shared};
use super::experts::{self, Routed, Routes};
use super::kernels::best::{self, Best};
use super::kernels::elementwise;
use super::kernels::paged::Rule;
use super::kernels::rows::Compute;
use super::kernels::{group_rows, matmul, paged};
use super::kv::{Kv, KvShape};
use super::load;
use super::pack::Packed;
use super::pool::Pool;
use super::rope::Rope;
use super::store::{Saver, Store};
use super::tensor::Tensor;
use crate::cache::InUse;
use crate::model::{Backend, BlockTables, LoadedParts, Piece, Span};
use crate::{Isa, LoadError, LoadedStage, PackingReport, TopLogits};

/// Matrices that share their input, one below the other.
#[derive(Debug)]
pub struct Matrices(pub(super) Vec<Packed>);

/// A vector of f32.
#[derive(Debug)]
pub struct Vector(pub(super) Frozen<f32>);

/// The KV cache and what goes with it.
#[derive(Debug)]
pub struct CpuKv {
    store: Kv,
    /// Of layers that see everything, and of local ones where they differ.
    ropes: Vec<Rope>,
    /// What each layer sees.
    rules: Vec<Rule>,
    heads: usize,
}

/// Largest logits as each thread sees them.
#[derive(Debug)]
pub struct Bests(Buf<Best>);

/// Arithmetic and memory of one stage.
#[derive(Debug)]
pub struct CpuBackend {
    pub(crate) compute: Compute,
    weights: Arena,
    cache: Arena,
    scratch: Arena,
    /// Attention's scratch.
    attention: Option<Buf<f32>>,
    packed_cache: Option<PathBuf>,
    weight_bytes: u64,
    packing: PackingReport,
    /// Keeps packed weights.
    saver: Option<Saver>,
    held: InUse,
    /// What experts were applied to, where somebody wants to know.
    routed: Option<Vec<Routed>>,
}

impl CpuBackend {
    /// An empty backend with its own threads. `host_threads` are the compute threads of all stages on
    /// this host, this one's included.
    pub fn new(isa: Isa, threads: usize, host_threads: usize) -> Self {
        Self {
            compute: Compute { pool: Pool::new(threads, host_threads), isa },
            weights: Arena::new("weights"),
            cache: Arena::new("the KV cache"),
            scratch: Arena::new("activations"),
            attention: None,
            packed_cache: None,
            weight_bytes: 0,
            packing: PackingReport::default(),
            saver: None,
            held: InUse::default(),
            routed: None,
        }
    }

    /// Remembers what experts are applied to from now on, for [`CpuBackend::take_routed`].
    pub fn remember_routed(&mut self) {
        self.routed = Some(Vec::new());
    }

    /// What experts were applied to since the last time, if that is remembered.
    pub fn take_routed(&mut self) -> Vec<Routed> {
        self.routed.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Keeps packed weights in this folder, and finds them there.
    #[must_use]
    pub fn with_packed_cache(mut self, dir: Option<&Path>) -> Self {
        self.packed_cache = dir.map(Path::to_owned);
        self
    }

    /// What was loaded.
    pub fn loaded(&self) -> LoadedStage {
        LoadedStage {
            weight_bytes: self.weight_bytes,
            kv_bytes: self.cache.taken(),
            packing: self.packing,
        }
    }

    /// Bytes of weights loaded so far.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of the KV cache.
    pub fn kv_bytes(&self) -> u64 {
        self.cache.taken()
    }

    /// A step begins: every operation is called between this and [`CpuBackend::end_step`].
    pub fn begin_step(&mut self) {
        self.compute.pool.begin_step();
    }

    /// The step is over.
    pub fn end_step(&mut self) {
        self.compute.pool.end_step();
    }

    fn product(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        w: &Matrices,
        out: &mut Tensor,
        add: bool,
    ) {
        let stride = out.width;
        let out = matmul::Output { data: Shared::new(&mut out.data), stride, add };
        let Compute { pool, isa } = &mut self.compute;
        matmul::matmul(pool, *isa, &w.0, x, rows, out);
    }
}

/// Rounds in place.
fn round(x: &mut [f32], dtype: Dtype) {
    match dtype {
        Dtype::F32 | Dtype::U32 | Dtype::Int8 => {}
        Dtype::F16 => x.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
        Dtype::Bf16 => x.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32()),
    }
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Weight = Matrices;
    type Vector = Vector;
    type Kv = CpuKv;
    type Best = Bests;
    type Routes = Routes;

    fn tensor(&mut self, rows: usize, width: usize, input: bool) -> Result<Tensor, LoadError> {
        Tensor::new(&mut self.scratch, rows, width, input)
    }

    fn weights(
        &mut self,
        pieces: &[Piece<'_>],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedParts<Matrices, Vector>, LoadError> {
        let Compute { pool, isa } = &mut self.compute;
        let store = self.packed_cache.as_deref().map(Store::new);
        let what = (pieces, group_rows(*isa));
        let loaded = load::load(pool, &mut self.weights, store, what, progress)?;
        // Writing has done so but for what is padding.
        self.weights.touch(pool)?;
        self.weight_bytes += loaded.bytes;
        self.packing = loaded.report;
        self.saver = loaded.saver;
        self.held = loaded.held;
        Ok(loaded.parts)
    }

    fn touch(&mut self) -> Result<(), LoadError> {
        for arena in [&mut self.cache, &mut self.scratch] {
            arena.touch(&mut self.compute.pool)?;
        }
        Ok(())
    }

    fn kv(
        &mut self,
        layers: Range<u32>,
        config: &ModelConfig,
        settings: &EngineSettings,
        factors: Option<&[f32]>,
    ) -> Result<CpuKv, LoadError> {
        let (heads, dim) = (config.heads as usize, config.head_dim as usize);
        let shape = KvShape {
            layers: layers.len(),
            blocks: settings.kv_blocks as usize,
            block_size: settings.kv_block_size as usize,
            heads: config.kv_heads as usize,
            dim,
        };
        let store = Kv::new(&mut self.cache, shape, settings.kv_dtype)?;
        let positions = if layers.is_empty() { 0 } else { settings.max_model_len as usize };
        let scratch = &mut self.scratch;
        let mut ropes = vec![Rope::new(scratch, &config.rope, dim, positions, factors)?];
        if let Some(local) = layers.clone().find_map(|i| config.window(i)?.rope) {
            ropes.push(Rope::new(scratch, &local, dim, positions, None)?);
        }
        let (threads, group) = (self.compute.pool.threads(), heads / shape.heads);
        let len = paged::scratch_len(threads, shape.heads, group, dim, positions);
        self.attention = Some(scratch.take(len)?);
        let f = &config.features;
        let rule = |layer| {
            let window = config.window(layer);
            Rule {
                scale: f.attention_scale.unwrap_or_else(|| 1.0 / (dim as f32).sqrt()),
                softcap: f.attention_softcap,
                window: window.map_or(usize::MAX, |w| w.size as usize),
                rope: usize::from(window.is_some_and(|w| w.rope.is_some())),
            }
        };
        Ok(CpuKv { store, ropes, rules: layers.map(rule).collect(), heads })
    }

    fn routes(
        &mut self,
        rows: usize,
        hidden: usize,
        ffn: usize,
        experts: &Experts,
    ) -> Result<Routes, LoadError> {
        Routes::new(&mut self.scratch, rows, (hidden, ffn), experts)
    }

    fn embed(&mut self, table: &Matrices, tokens: &[u32], out: &mut Tensor) {
        out.rows = tokens.len();
        let width = out.width;
        let data = Shared::new(&mut out.data);
        self.compute.each_row(tokens.len(), |i| {
            // SAFETY: each row with one thread.
            table.0[0].unpack(tokens[i] as usize, unsafe { data.slice(i * width, width) });
        });
    }

    fn add_positions(&mut self, table: &Vector, spans: &[Span], out: &mut Tensor) {
        let width = out.width;
        for span in spans {
            let first = span.position as usize * width;
            let table = &table.0[first..first + span.count * width];
            let rows = &mut out.data[span.start * width..][..table.len()];
            rows.iter_mut().zip(table).for_each(|(x, p)| *x += p);
        }
    }

    fn upload(&mut self, rows: &[f32], out: &mut Tensor) {
        out.rows = rows.len() / out.width;
        out.data[..rows.len()].copy_from_slice(rows);
    }

    fn download(&mut self, x: &Tensor, out: &mut [f32]) {
        out.copy_from_slice(&x.data[..x.rows * x.width]);
    }

    fn read_rows(&mut self, x: &Tensor, rows: Range<usize>, take: &mut dyn FnMut(usize, &[f32])) {
        rows.enumerate().for_each(|(i, row)| take(i, x.row(row)));
    }

    fn rms_norm(&mut self, x: &Tensor, gain: &Vector, eps: f32, out: &mut Tensor) {
        self.compute.rms_norm(x, &gain.0, eps, out);
    }

    fn layer_norm(&mut self, x: &Tensor, gain: &Vector, bias: &Vector, eps: f32, out: &mut Tensor) {
        self.compute.layer_norm(x, (&gain.0, &bias.0), eps, out);
    }

    fn linear(&mut self, x: &Tensor, w: &Matrices, out: &mut Tensor) {
        out.rows = x.rows;
        self.product(x, 0..x.rows, w, out, false);
    }

    fn linear_input(&mut self, x: &Tensor, w: &Matrices, out: &mut Tensor) {
        self.linear(x, w, out);
        self.compute.quantise(out);
    }

    fn linear_add(&mut self, x: &Tensor, w: &Matrices, out: &mut Tensor) {
        self.product(x, 0..x.rows, w, out, true);
    }

    fn gated(&mut self, x: &Tensor, w: &Matrices, activation: Activation, out: &mut Tensor) {
        let Compute { pool, isa } = &mut self.compute;
        matmul::gated(pool, *isa, &w.0, x, activation, out);
    }

    fn activate(&mut self, x: &mut Tensor, bias: Option<&Vector>, activation: Activation) {
        self.compute.activate(x, bias.map(|b| &b.0[..]), activation);
    }

    fn experts<'w>(
        &mut self,
        x: &Tensor,
        scores: &Tensor,
        weights: &dyn Fn(usize) -> [&'w Matrices; 2],
        rule: (&Experts, Activation),
        routes: &mut Routes,
        out: &mut Tensor,
    ) where
        Matrices: 'w,
    {
        let routed = self.routed.as_mut();
        experts::mix(&mut self.compute, (x, scores), weights, rule, routes, routed, out);
    }

    fn add_gated(&mut self, x: &Tensor, scores: &Tensor, column: usize, out: &mut Tensor) {
        experts::add_gated(&mut self.compute, x, (scores, column), out);
    }

    fn rms_norm_add(&mut self, x: &Tensor, gain: &Vector, eps: f32, out: &mut Tensor) {
        self.compute.rms_norm_add(x, &gain.0, eps, out);
    }

    fn norm_heads(&mut self, x: &mut Tensor, first: usize, count: usize, gain: &Vector, eps: f32) {
        self.compute.norm_heads(x, first, count, &gain.0, eps);
    }

    fn add_bias(&mut self, x: &mut Tensor, first: usize, bias: &Vector) {
        let rows = x.data.chunks_exact_mut(x.width).take(x.rows);
        for row in rows {
            row[first..].iter_mut().zip(bias.0.iter()).for_each(|(x, b)| *x += b);
        }
    }

    fn scale(&mut self, x: &mut Tensor, factor: f32) {
        let used = x.rows * x.width;
        x.data[..used].iter_mut().for_each(|x| *x *= factor);
    }

    fn write_kv(
        &mut self,
        qkv: &mut Tensor,
        kv: &mut CpuKv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
    ) {
        let CpuKv { store, ropes, rules, heads } = kv;
        let rope = &ropes[rules[layer].rope];
        self.compute.write_kv(qkv, (store, layer), *heads, rope, spans, tables);
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        kv: &CpuKv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
        out: &mut Tensor,
    ) {
        let scratch = self.attention.as_mut().expect("invariant: set with the KV cache");
        let to = (&kv.store, layer, &kv.rules[layer]);
        self.compute.attention(qkv, to, kv.heads, spans, tables, out, scratch);
    }

    fn settle(&mut self, x: &mut Tensor, dtype: Dtype) -> Option<usize> {
        let used = x.rows * x.width;
        round(&mut x.data[..used], dtype);
        self.compute.first_not_finite(x)
    }

    fn gather_rows(&mut self, rows: &[usize], x: &mut Tensor) {
        let width = x.width;
        for (to, &from) in rows.iter().enumerate() {
            x.data.copy_within(from * width..(from + 1) * width, to * width);
        }
        x.rows = rows.len();
    }

    fn logits<'t>(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        head: &Matrices,
        softcap: f32,
        out: &'t mut Tensor,
    ) -> &'t mut [f32] {
        out.rows = rows.len();
        self.product(x, rows, head, out, false);
        let used = out.rows * out.width;
        let logits = &mut out.data[..used];
        if softcap > 0.0 {
            elementwise::soft_cap(self.compute.isa, logits, softcap);
        }
        logits
    }

    fn best(&mut self, rows: usize) -> Result<Bests, LoadError> {
        Ok(Bests(self.scratch.take(self.compute.pool.threads() * rows)?))
    }

    fn top_logits(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        head: &Matrices,
        k: &[usize],
        best: &mut Bests,
        take: &mut dyn FnMut(usize, TopLogits<'_>),
    ) {
        let Compute { pool, isa } = &mut self.compute;
        let [head] = &head.0[..] else { unreachable!("invariant: the head is one matrix") };
        let lists = &mut best.0[..pool.threads() * rows.len()];
        let n = rows.len();
        lists.iter_mut().zip(k.iter().cycle()).for_each(|(list, &k)| list.reset(k));
        matmul::largest(pool, *isa, head, x, rows, lists);
        best::merged(lists, n, take);
    }
}
