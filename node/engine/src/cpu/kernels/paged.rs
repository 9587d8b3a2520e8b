//! Writing keys and values and attending to them, split over threads: the safe face of `store` and
//! `attention`.

use super::attention::{self, Attend};
use super::elementwise as ew;
use super::rows::{Compute, QuantRows};
use super::store::{Store, store};
use crate::cpu::buffer::{Buf, Shared};
use crate::cpu::kv::Kv;
use crate::cpu::tensor::Tensor;
use crate::model::{BlockTables, Span};

impl Compute {
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
        let positions: usize = spans.iter().map(|s| s.count).sum();
        let one_head = |head: usize| {
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
        };
        if positions < 8 {
            (0..s.heads).for_each(one_head);
        } else {
            self.pool.each(s.heads, &|_, head| one_head(head));
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
        self.pool.each(threads, &|_, member| {
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
