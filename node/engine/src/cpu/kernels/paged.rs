//! Attention split over threads: the safe face of `attention`.
//!
//! An item of attention is one KV head of a run of positions. Where those are too few to keep the
//! threads busy, the items of single positions are parts of the sequence, merged afterwards; the
//! result is the same.

use super::attention::{self, Attend, parts, record_len};
use super::elementwise as ew;
use super::rows::{Compute, QuantRows};
use crate::Isa;
use crate::cpu::buffer::{Buf, Shared};
use crate::cpu::kv::Kv;
use crate::cpu::tensor::Tensor;
use crate::model::{BlockTables, Span};

/// Below so many items per thread, parts are items.
const SPLIT: usize = 4;

/// Floats of scratch for a call's members, and for the records of parts that are items.
pub(crate) fn scratch_len(
    threads: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    max_positions: usize,
) -> usize {
    threads * attention::scratch_len(group, dim)
        + split_items(threads, kv_heads, max_positions) * group * record_len(dim)
}

/// The most items there are when parts are items.
fn split_items(threads: usize, kv_heads: usize, max_positions: usize) -> usize {
    if threads == 1 { 0 } else { (SPLIT * threads).max(kv_heads) * parts(max_positions) }
}

/// What a layer's attention does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// Of scores.
    pub(crate) scale: f32,
    /// Scores are `c * tanh(x / c)`; 0 for none.
    pub(crate) softcap: f32,
    /// Positions that are seen, the own one included.
    pub(crate) window: usize,
    /// Which of the angles' tables.
    pub(crate) rope: usize,
}

/// Part of a batch.
#[derive(Clone, Copy)]
struct Item {
    span: usize,
    /// First position of the span's, and how many.
    start: usize,
    count: usize,
    kv_head: usize,
    /// Which part, and which of how many that are seen, if the item is not all of them.
    part: Option<(usize, usize, usize)>,
}

/// How a batch is cut into items.
#[derive(Clone, Copy)]
struct Cut<'a> {
    spans: &'a [Span],
    per_call: usize,
    kv_heads: usize,
    window: usize,
    split: bool,
}

impl Cut<'_> {
    /// Runs and parts of one span.
    fn pieces(&self, span: &Span) -> (usize, usize) {
        let runs = span.count.div_ceil(self.per_call);
        let end = span.position as usize + span.count;
        let split = self.split && span.count == 1;
        (runs, if split { parts(end) - self.first_part(end) } else { 1 })
    }

    /// The first part that the position before `end` sees.
    fn first_part(&self, end: usize) -> usize {
        end.saturating_sub(self.window) / attention::PART
    }

    fn items(&self) -> usize {
        let of = |s| {
            let (runs, parts) = self.pieces(s);
            runs * parts * self.kv_heads
        };
        self.spans.iter().map(of).sum()
    }

    fn item(&self, mut index: usize) -> Item {
        for (span, s) in self.spans.iter().enumerate() {
            let (runs, parts) = self.pieces(s);
            let items = runs * parts * self.kv_heads;
            if index >= items {
                index -= items;
                continue;
            }
            // The last run, which sees most, then the first, and so on: so that the ranges with which
            // threads begin cost about the same.
            let nth = index / parts / self.kv_heads;
            let run = if nth.is_multiple_of(2) { runs - 1 - nth / 2 } else { nth / 2 };
            let start = run * self.per_call;
            return Item {
                span,
                start,
                count: self.per_call.min(s.count - start),
                kv_head: index / parts % self.kv_heads,
                part: (parts > 1).then(|| {
                    let first = self.first_part(s.position as usize + s.count);
                    (first + index % parts, index % parts, parts)
                }),
            };
        }
        unreachable!("invariant: items are counted")
    }
}

impl Compute {
    /// Causal attention of `heads` query heads; `scratch` has [`scratch_len`] floats.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attention(
        &mut self,
        qkv: &Tensor,
        (kv, layer, rule): (&Kv, usize, &Rule),
        heads: usize,
        spans: &[Span],
        tables: &BlockTables,
        out: &mut Tensor,
        scratch: &mut Buf<f32>,
    ) {
        let (isa, s) = (self.isa, kv.shape);
        let (group, width) = (heads / s.heads, out.width);
        assert!(qkv.width == (heads + 2 * s.heads) * s.dim && width == heads * s.dim);
        let rows = qkv.rows;
        assert!(rows * width <= out.data.len() && rows * qkv.width <= qkv.data.len());
        assert!(spans.iter().all(|s| s.start + s.count <= rows), "invariant: spans are of rows");
        out.rows = rows;
        let data = Shared::new(&mut out.data);
        let (scratch, records) =
            scratch.split_at_mut(self.pool.threads() * attention::scratch_len(group, s.dim));
        let batch = Batch {
            qkv,
            kv,
            layer_at: kv.layer_at(layer),
            group,
            rule,
            isa,
            spans,
            tables,
            data,
            width,
            scratch: Shared::new(scratch),
        };
        let per_call = attention::positions_per_call(group);
        let mut cut = Cut { spans, per_call, kv_heads: s.heads, window: rule.window, split: false };
        let (items, threads) = (cut.items(), self.pool.threads());
        cut.split = threads > 1 && items <= (SPLIT * threads).max(s.heads);
        let each = group * record_len(s.dim);
        let items = if cut.split { cut.items() } else { items };
        let records = Shared::new(records);
        let quant = QuantRows::new(&mut out.quant, width);
        // Where heads of an item are whole blocks, it makes their int8 form, else all of a row is made
        // at the end.
        let whole = (group * s.dim).is_multiple_of(32);
        let quantise = |item: &Item| {
            let (n, row) = (group * s.dim / 32, batch.spans[item.span].start + item.start);
            for i in if whole { row..row + item.count } else { 0..0 } {
                let at = item.kv_head * n;
                // SAFETY: these heads of this row belong to the item, which has written them.
                unsafe {
                    let from = data.as_mut_ptr().add(i * width + at * 32);
                    ew::quantise(isa, from, n * 32, quant.blocks(i, at..at + n));
                }
            }
        };
        self.pool.each(items, &|member, index| {
            let item = cut.item(index);
            let call = batch.call(member, &item);
            // SAFETY: rows exist, and blocks (`model::Batch` checked the tables); only this item
            // writes these heads of these rows, or this record.
            unsafe {
                match item.part {
                    None => {
                        attention::attend(isa, &call);
                        quantise(&item);
                    }
                    Some((part, ..)) => {
                        let record = records.slice(index * each, each);
                        attention::attend_part(isa, &call, part, record.as_mut_ptr());
                    }
                }
            }
        });
        for index in if cut.split { 0..items } else { 0..0 } {
            let item = cut.item(index);
            let Some((_, 0, parts)) = item.part else { continue };
            let call = batch.call(0, &item);
            // SAFETY: `group` records of each part, one part after the other; no thread runs.
            unsafe {
                let all = records.slice(index * each, parts * each).as_mut_ptr();
                for i in 0..group {
                    let (from, to) = (all.add(i * record_len(s.dim)), call.out.add(i * s.dim));
                    attention::join(isa, from, each, parts, to, s.dim);
                }
            }
            quantise(&item);
        }
        self.each_row(if whole { 0 } else { rows }, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe {
                let from = data.as_mut_ptr().add(i * width);
                ew::quantise(isa, from, width, quant.row(i));
            }
        });
    }
}

/// What all items of a batch share.
struct Batch<'a> {
    qkv: &'a Tensor,
    kv: &'a Kv,
    layer_at: usize,
    group: usize,
    rule: &'a Rule,
    isa: Isa,
    spans: &'a [Span],
    tables: &'a BlockTables,
    data: Shared<'a, f32>,
    width: usize,
    scratch: Shared<'a, f32>,
}

impl Batch<'_> {
    /// An item as the kernel takes it, with the scratch of a member.
    fn call(&self, member: usize, item: &Item) -> Attend<'_> {
        let (s, span) = (self.kv.shape, &self.spans[item.span]);
        let row = span.start + item.start;
        let head_at = item.kv_head * self.group * s.dim;
        let scratch_len = attention::scratch_len(self.group, s.dim);
        Attend {
            q: self.qkv.row(row)[head_at..].as_ptr(),
            q_stride: self.qkv.width,
            // SAFETY: rows of the output, as `attention` asserts. No slice: other heads of the same
            // rows belong to other threads.
            out: unsafe { self.data.as_mut_ptr().add(row * self.width + head_at) },
            out_stride: self.width,
            keys: self.kv.keys[self.layer_at..].as_ptr(),
            values: self.kv.values[self.layer_at..].as_ptr(),
            kind: self.kv.kind,
            blocks: self.tables.blocks(span.slot),
            block_size: s.block_size,
            kv_heads: s.heads,
            kv_head: item.kv_head,
            group: self.group,
            dim: s.dim,
            first: span.position as usize + item.start,
            count: item.count,
            scale: self.rule.scale,
            softcap: self.rule.softcap,
            isa: self.isa,
            window: self.rule.window,
            // SAFETY: each member has its own part.
            scratch: unsafe { self.scratch.slice(member * scratch_len, scratch_len) }.as_mut_ptr(),
        }
    }
}
