//! Row-wise operations over tensors, split over threads: the safe face of `elementwise`.
//!
//! A single row is computed by the caller alone: waking the others costs more.

use super::elementwise::{self as ew, QuantOut, Rotation};
use crate::Isa;
use crate::cpu::buffer::Shared;
use crate::cpu::pool::Pool;
use crate::cpu::rope::Rope;
use crate::cpu::tensor::{Quant, Tensor};
use crate::model::Span;

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
pub(super) struct QuantRows<'a> {
    q: Shared<'a, i8>,
    scale: Shared<'a, f32>,
    scaled_sum: Shared<'a, f32>,
    sums: Shared<'a, [i32; 2]>,
    blocks: usize,
}

impl<'a> QuantRows<'a> {
    pub(super) fn new(quant: &'a mut Quant, width: usize) -> Self {
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
    pub(super) unsafe fn row(&self, i: usize) -> QuantOut {
        let n = self.blocks;
        // SAFETY: the caller's promise.
        unsafe {
            QuantOut {
                q: self.q.slice(i * n * 32, n * 32).as_mut_ptr(),
                scale: self.scale.slice(i * n, n).as_mut_ptr(),
                scaled_sum: self.scaled_sum.slice(i * n, n).as_mut_ptr(),
                sums: self.sums.slice(i * n, n).as_mut_ptr(),
            }
        }
    }
}

impl Compute {
    /// Calls `f(row)` for every row, each once.
    pub(super) fn each_row(&mut self, rows: usize, f: impl Fn(usize) + Sync) {
        if rows <= 1 {
            (0..rows).for_each(f);
            return;
        }
        self.pool.each(rows.div_ceil(ITEM_ROWS), &|_, item| {
            (item * ITEM_ROWS..rows.min((item + 1) * ITEM_ROWS)).for_each(&f);
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

    /// `out = silu(gate) * up`, and its int8 form.
    pub(crate) fn silu_mul(&mut self, gate_up: &Tensor, out: &mut Tensor) {
        let (isa, width) = (self.isa, out.width);
        assert!(gate_up.width == 2 * width, "invariant: gate and up are of the output's width");
        out.rows = gate_up.rows;
        let quant = QuantRows::new(&mut out.quant, width);
        let data = Shared::new(&mut out.data);
        self.each_row(gate_up.rows, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe {
                let y = data.slice(i * width, width).as_mut_ptr();
                let (gate, up) = gate_up.row(i).split_at(width);
                ew::silu_mul(isa, gate.as_ptr(), up.as_ptr(), y, width, quant.row(i));
            }
        });
    }

    /// The first row that is not finite.
    pub(crate) fn first_not_finite(&self, x: &Tensor) -> Option<usize> {
        // SAFETY: rows of `width` elements, a multiple of 32.
        (0..x.rows).find(|&i| unsafe { !ew::finite(self.isa, x.row(i).as_ptr(), x.width) })
    }

    /// Rotates the first `heads` heads of every row by the position of the row.
    pub(crate) fn rope(&mut self, qkv: &mut Tensor, heads: usize, rope: &Rope, spans: &[Span]) {
        let (isa, width, dim) = (self.isa, qkv.width, rope.head_dim);
        let data = Shared::new(&mut qkv.data);
        let rows = spans.last().map_or(0, |s| s.start + s.count);
        self.each_row(rows, |i| {
            let span = &spans[spans.partition_point(|s| s.start + s.count <= i)];
            let position = span.position as usize + (i - span.start);
            let (cos, sin) = rope.at(position);
            let rotation = Rotation { cos, sin, interleaved: rope.interleaved };
            // SAFETY: each row with one thread.
            unsafe { ew::rotate(isa, data.slice(i * width, heads * dim), dim, rotation) };
        });
    }
}
