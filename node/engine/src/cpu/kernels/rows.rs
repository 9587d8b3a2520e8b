//! Row-wise operations over tensors, split over threads: the safe face of `elementwise`,
//! `attention` and `store`.
//!
//! A single row is computed by the caller alone: waking the others costs more.

use super::attention::{self, Attend};
use super::elementwise::{self as ew, QuantOut, Rotation};
use super::store::{Store, store};
use crate::Isa;
use crate::cpu::buffer::{Buf, Shared};
use crate::cpu::kv::Kv;
use crate::cpu::pool::Pool;
use crate::cpu::rope::Rope;
use crate::cpu::tensor::{Quant, Tensor};
use crate::model::{BlockTables, Span};

/// The compute threads and what they run.
#[derive(Debug)]
pub(crate) struct Compute {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
}

/// The int8 form of a tensor, written row by row from several threads.
#[derive(Clone, Copy)]
struct QuantRows<'a> {
    q: Shared<'a, i8>,
    scale: Shared<'a, f32>,
    scaled_sum: Shared<'a, f32>,
    sums: Shared<'a, [i32; 2]>,
    blocks: usize,
}

impl<'a> QuantRows<'a> {
    fn new(quant: &'a mut Quant, width: usize) -> Self {
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
    unsafe fn row(&self, i: usize) -> QuantOut {
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
    fn each_row(&mut self, rows: usize, f: impl Fn(usize) + Sync) {
        if rows <= 1 {
            (0..rows).for_each(f);
            return;
        }
        let threads = self.pool.threads();
        self.pool.run(&|member| {
            for row in rows * member / threads..rows * (member + 1) / threads {
                f(row);
            }
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

    /// Stores key and value heads of every row; `heads` query heads come first.
    pub(crate) fn write_kv(
        &mut self,
        qkv: &Tensor,
        kv: &mut Kv,
        layer: usize,
        heads: usize,
        spans: &[Span],
        tables: &BlockTables,
    ) {
        let (isa, s, half, bytes) = (self.isa, kv.shape, kv.half, kv.element_bytes());
        let layer_at = kv.layer_at(layer);
        let keys = Shared::new(&mut kv.keys);
        let values = Shared::new(&mut kv.values);
        let threads = self.pool.threads();
        let positions: usize = spans.iter().map(|s| s.count).sum();
        let some_heads = |member: usize, members: usize| {
            for head in s.heads * member / members..s.heads * (member + 1) / members {
                for span in spans {
                    for i in 0..span.count {
                        let (block, offset) = tables.place(span.slot, span.position + i as u32);
                        let row = qkv.row(span.start + i);
                        let len = s.block_size * s.dim * bytes;
                        let at = layer_at + (block as usize * s.heads + head) * len;
                        let key = &row[(heads + head) * s.dim..][..s.dim];
                        let value = &row[(heads + s.heads + head) * s.dim..][..s.dim];
                        // SAFETY: one thread has this head of all blocks; the slices are a head's
                        // whole block and `dim` elements.
                        unsafe {
                            store(
                                isa,
                                &Store {
                                    key: key.as_ptr(),
                                    value: value.as_ptr(),
                                    keys: keys.slice(at, len).as_mut_ptr(),
                                    values: values.slice(at, len).as_mut_ptr(),
                                    half,
                                    dim: s.dim,
                                    block_size: s.block_size,
                                    offset,
                                },
                            );
                        }
                    }
                }
            }
        };
        if positions < 8 {
            some_heads(0, 1);
        } else {
            self.pool.run(&|member| some_heads(member, threads));
        }
    }

    /// Causal attention of `heads` query heads; `scratch` has room for every thread.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attention(
        &mut self,
        qkv: &Tensor,
        kv: &Kv,
        layer: usize,
        heads: usize,
        spans: &[Span],
        tables: &BlockTables,
        out: &mut Tensor,
        scratch: &mut Buf<f32>,
    ) {
        let (isa, s) = (self.isa, kv.shape);
        let (group, width) = (heads / s.heads, out.width);
        let per_call = attention::positions_per_call(group);
        let scratch_len = attention::scratch_len(group, s.dim);
        assert!(qkv.width == (heads + 2 * s.heads) * s.dim && width == heads * s.dim);
        let rows = qkv.rows;
        assert!(rows * width <= out.data.len() && rows * qkv.width <= qkv.data.len());
        assert!(spans.iter().all(|s| s.start + s.count <= rows), "invariant: spans are of rows");
        out.rows = rows;
        let layer_at = kv.layer_at(layer);
        let keys = kv.keys[layer_at..].as_ptr() as usize;
        let values = kv.values[layer_at..].as_ptr() as usize;
        let data = Shared::new(&mut out.data);
        let scratch = Shared::new(scratch);
        let threads = self.pool.threads();
        self.pool.run(&|member| {
            let mut item = 0;
            for span in spans {
                for start in (0..span.count).step_by(per_call) {
                    for kv_head in 0..s.heads {
                        item += 1;
                        if item % threads != member {
                            continue;
                        }
                        let count = per_call.min(span.count - start);
                        let row = span.start + start;
                        let head_at = kv_head * group * s.dim;
                        let call = Attend {
                            q: qkv.row(row)[head_at..].as_ptr(),
                            q_stride: qkv.width,
                            // SAFETY: rows of the output, by the assertions above. No slice: other
                            // heads of the same rows belong to other threads.
                            out: unsafe { data.as_mut_ptr().add(row * width + head_at) },
                            out_stride: width,
                            keys: keys as *const u8,
                            values: values as *const u8,
                            half: kv.half,
                            blocks: tables.blocks(span.slot),
                            block_size: s.block_size,
                            kv_heads: s.heads,
                            kv_head,
                            group,
                            dim: s.dim,
                            first: span.position as usize + start,
                            count,
                            scale: 1.0 / (s.dim as f32).sqrt(),
                            // SAFETY: each member has its own part.
                            scratch: unsafe { scratch.slice(member * scratch_len, scratch_len) }
                                .as_mut_ptr(),
                        };
                        // SAFETY: rows exist, and blocks (`model::Batch` checked the tables); only
                        // this item writes these heads of these rows.
                        unsafe { attention::attend(isa, &call) };
                    }
                }
            }
        });
        let quant = QuantRows::new(&mut out.quant, width);
        let data = &out.data;
        self.each_row(out.rows, |i| {
            // SAFETY: rows of `width` elements, each with one thread.
            unsafe { ew::quantise(isa, data[i * width..].as_ptr(), width, quant.row(i)) };
        });
    }
}
