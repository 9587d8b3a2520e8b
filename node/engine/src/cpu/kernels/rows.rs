//! Row-wise operations over tensors, split over threads: the safe face of `elementwise`.
//!
//! A single row is computed by the caller alone: waking the others costs more.

use std::ops::Range;

use millrace_shared::model::Activation;

use super::elementwise::{self as ew, QuantOut, Rotation};
use super::store::{Store, store};
use crate::Isa;
use crate::cpu::buffer::Shared;
use crate::cpu::kv::Kv;
use crate::cpu::pool::Pool;
use crate::cpu::rope::Rope;
use crate::cpu::tensor::{Quant, Tensor};
use crate::model::{BlockTables, Span};

/// Rows that a thread takes at once.
const ITEM_ROWS: usize = 4;

/// The compute threads and what they run.
#[derive(Debug)]
pub(crate) struct Compute {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
}

/// The int8 form of a tensor, written row by row from several threads.
#[derive(Clone, Copy)]
pub(crate) struct QuantRows<'a> {
    q: Shared<'a, i8>,
    scale: Shared<'a, f32>,
    scaled_sum: Shared<'a, f32>,
    sums: Shared<'a, [i32; 2]>,
    blocks: usize,
}

impl<'a> QuantRows<'a> {
    pub(crate) fn new(quant: &'a mut Quant, width: usize) -> Self {
        Self {
            q: Shared::new(&mut quant.q),
            scale: Shared::new(&mut quant.scale),
            scaled_sum: Shared::new(&mut quant.scaled_sum),
            sums: Shared::new(&mut quant.sums),
            blocks: width / 32,
        }
    }

    /// # Safety
    /// No other thread has this row.
    pub(crate) unsafe fn row(&self, i: usize) -> QuantOut {
        // SAFETY: the caller's promise.
        unsafe { self.blocks(i, 0..self.blocks) }
    }

    /// Some blocks of row `i`.
    ///
    /// # Safety
    /// No other thread has these blocks.
    pub(super) unsafe fn blocks(&self, i: usize, blocks: Range<usize>) -> QuantOut {
        let (at, n) = (i * self.blocks + blocks.start, blocks.len());
        // SAFETY: the caller's promise.
        unsafe {
            QuantOut {
                q: self.q.slice(at * 32, n * 32).as_mut_ptr(),
                scale: self.scale.slice(at, n).as_mut_ptr(),
                scaled_sum: self.scaled_sum.slice(at, n).as_mut_ptr(),
                sums: self.sums.slice(at, n).as_mut_ptr(),
            }
        }
    }
}

impl Compute {
    /// Calls `f(row)` for every row, each once.
    pub(crate) fn each_row(&mut self, rows: usize, f: impl Fn(usize) + Sync) {
        if rows <= 1 {
            (0..rows).for_each(f);
            return;
        }
        self.pool.each(rows.div_ceil(ITEM_ROWS), &|_, item| {
            (item * ITEM_ROWS..rows.min((item + 1) * ITEM_ROWS)).for_each(&f);
        });
    }

    /// The int8 form.
    pub(crate) fn quantise(&mut self, x: &mut Tensor) {
        let (isa, width, rows) = (self.isa, x.width, x.rows);
        let quant = QuantRows::new(&mut x.quant, width);
        let data = &x.data;
        self.each_row(rows, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe { ew::quantise(isa, data[i * width..][..width].as_ptr(), width, quant.row(i)) };
        });
    }

    /// `out = x / rms(x) * gain`, and its int8 form.
    pub(crate) fn rms_norm(&mut self, x: &Tensor, gain: &[f32], eps: f32, out: &mut Tensor) {
        let (isa, width) = (self.isa, x.width);
        assert!(gain.len() == width && out.width == width, "invariant: widths agree");
        out.rows = x.rows;
        let quant = QuantRows::new(&mut out.quant, width);
        let data = Shared::new(&mut out.data);
        self.each_row(x.rows, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe {
                let y = data.slice(i * width, width).as_mut_ptr();
                let x = x.row(i).as_ptr();
                ew::rms_norm(isa, x, gain.as_ptr(), y, width, eps, quant.row(i));
            }
        });
    }

    /// `out = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias`, and its int8 form.
    pub(crate) fn layer_norm(
        &mut self,
        x: &Tensor,
        (gain, bias): (&[f32], &[f32]),
        eps: f32,
        out: &mut Tensor,
    ) {
        let (isa, width) = (self.isa, x.width);
        assert!(gain.len() == width && bias.len() == width && out.width == width);
        out.rows = x.rows;
        let quant = QuantRows::new(&mut out.quant, width);
        let data = Shared::new(&mut out.data);
        self.each_row(x.rows, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe {
                let y = data.slice(i * width, width).as_mut_ptr();
                let factors = (gain.as_ptr(), bias.as_ptr());
                ew::layer_norm(isa, x.row(i).as_ptr(), factors, y, width, eps, quant.row(i));
            }
        });
    }

    /// `x = activation(x + bias)`, and its int8 form.
    pub(crate) fn activate(
        &mut self,
        x: &mut Tensor,
        bias: Option<&[f32]>,
        activation: Activation,
    ) {
        let (isa, width, rows) = (self.isa, x.width, x.rows);
        assert!(bias.is_none_or(|b| b.len() == width), "invariant: widths agree");
        let quant = QuantRows::new(&mut x.quant, width);
        let data = Shared::new(&mut x.data);
        self.each_row(rows, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe {
                let x = data.slice(i * width, width).as_mut_ptr();
                ew::activate(isa, x, bias, width, activation, quant.row(i));
            }
        });
    }

    /// `out += x / rms(x) * gain`.
    pub(crate) fn rms_norm_add(&mut self, x: &Tensor, gain: &[f32], eps: f32, out: &mut Tensor) {
        let (isa, width) = (self.isa, x.width);
        assert!(gain.len() == width && out.width == width && out.rows == x.rows);
        let data = Shared::new(&mut out.data);
        self.each_row(x.rows, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe {
                let y = data.slice(i * width, width).as_mut_ptr();
                ew::rms_norm_add(isa, x.row(i).as_ptr(), gain.as_ptr(), y, width, eps, true);
            }
        });
    }

    /// `x / rms(x) * gain` of each of `count` heads from element `first` on.
    pub(crate) fn norm_heads(
        &mut self,
        x: &mut Tensor,
        first: usize,
        count: usize,
        gain: &[f32],
        eps: f32,
    ) {
        let (isa, width, dim) = (self.isa, x.width, gain.len());
        assert!(first + count * dim <= width && dim.is_multiple_of(16), "invariant: whole heads");
        let data = Shared::new(&mut x.data);
        self.each_row(x.rows, |i| {
            // SAFETY: each row with one thread.
            let heads = unsafe { data.slice(i * width + first, count * dim) };
            for head in heads.chunks_exact_mut(dim) {
                let at = head.as_mut_ptr();
                // SAFETY: `dim` elements, read before they are written.
                unsafe { ew::rms_norm_add(isa, at, gain.as_ptr(), at, dim, eps, false) };
            }
        });
    }

    /// The first row that is not finite.
    pub(crate) fn first_not_finite(&self, x: &Tensor) -> Option<usize> {
        // SAFETY: rows of `width` elements, a multiple of 32.
        (0..x.rows).find(|&i| unsafe { !ew::finite(self.isa, x.row(i).as_ptr(), x.width) })
    }

    /// Rotates query and key heads of every row by its position, and stores key and value heads;
    /// `heads` query heads come first.
    pub(crate) fn write_kv(
        &mut self,
        qkv: &mut Tensor,
        (kv, layer): (&mut Kv, usize),
        heads: usize,
        rope: &Rope,
        spans: &[Span],
        tables: &BlockTables,
    ) {
        let (isa, width, s, kind) = (self.isa, qkv.width, kv.shape, kv.kind);
        let (len, layer_at) = (kv.head_bytes(), kv.layer_at(layer));
        assert!(rope.head_dim == s.dim && width == (heads + 2 * s.heads) * s.dim);
        let (keys, values) = (Shared::new(&mut kv.keys), Shared::new(&mut kv.values));
        let data = Shared::new(&mut qkv.data);
        let rows = spans.last().map_or(0, |s| s.start + s.count);
        self.each_row(rows, |i| {
            let span = &spans[spans.partition_point(|s| s.start + s.count <= i)];
            let position = span.position + (i - span.start) as u32;
            let (cos, sin) = rope.at(position as usize);
            let rotation = Rotation { cos, sin, interleaved: rope.interleaved };
            // SAFETY: each row with one thread.
            let row = unsafe { data.slice(i * width, width) };
            let (turned, value) = row.split_at_mut((heads + s.heads) * s.dim);
            // SAFETY: whole heads.
            unsafe { ew::rotate(isa, turned, s.dim, rotation) };
            let key = &turned[heads * s.dim..];
            let (block, offset) = tables.place(span.slot, position);
            for head in 0..s.heads {
                let at = layer_at + (block as usize * s.heads + head) * len;
                assert!(at + len <= keys.len() && at + len <= values.len(), "invariant: a block");
                // SAFETY: a head of a block; no other row has this position of it, and positions
                // share no element.
                unsafe {
                    let (keys, values) = (keys.as_mut_ptr().add(at), values.as_mut_ptr().add(at));
                    let (key, value) = (&key[head * s.dim..], &value[head * s.dim..]);
                    let (key, value) = (key.as_ptr(), value.as_ptr());
                    let (dim, block_size) = (s.dim, s.block_size);
                    store(isa, &Store { key, value, keys, values, kind, dim, block_size, offset });
                }
            }
        });
    }
}
