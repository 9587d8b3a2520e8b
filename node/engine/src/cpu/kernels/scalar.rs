//! Quantised matrix tiles in plain Rust: the reference that the others reproduce bit by bit.

use super::Tile;
use super::format::Format;

fn f16_at(p: *const u8, i: usize) -> f32 {
    // SAFETY: called with offsets inside a packed block only (see `tile`).
    let bits = unsafe { p.cast::<u16>().add(i).read_unaligned() };
    half::f16::from_bits(bits).to_f32()
}

/// One group of rows times `cols` columns.
///
/// # Safety
/// As [`Tile`] says; `r` is the group size that the weights were packed for, at most 16.
pub(super) unsafe fn tile<F: Format>(t: &Tile<'_>, cols: usize, r: usize) {
    for c in 0..cols {
        let mut acc = [0f32; 16];
        for (b, at) in t.runs.iter().flat_map(|run| run.blocks().zip(run.at as usize..)) {
            // SAFETY: block `b` of column `c` exists, and what the group has for it at `at`.
            unsafe {
                let x = t.q.add((c * t.blocks + b) * 32);
                let i = c * t.blocks + b;
                let w = t.w.add(at * F::block_bytes(r));
                block::<F>(
                    w,
                    r,
                    x,
                    *t.sums.add(i),
                    *t.scale.add(i),
                    *t.scaled_sum.add(i),
                    &mut acc,
                );
            }
        }
        for (lane, acc) in acc.iter().enumerate().take(t.rows) {
            // SAFETY: the caller gives `rows` writable outputs per column.
            unsafe {
                let out = t.out.add(c * t.stride + lane);
                *out = if t.add { *out + acc } else { *acc };
            }
        }
    }
}

/// Adds one block of 32 inputs to `acc`, one lane per row.
#[inline(always)]
unsafe fn block<F: Format>(
    w: *const u8,
    r: usize,
    x: *const i8,
    sums: [i32; 2],
    scale: f32,
    scaled_sum: f32,
    acc: &mut [f32; 16],
) {
    // SAFETY: all offsets lie in this block and the 32 activations.
    unsafe {
        let scale_of = |at: usize, lane: usize| {
            if F::WIDE_SCALE {
                w.add(at).cast::<f32>().add(lane).read_unaligned()
            } else {
                f16_at(w.add(at), lane)
            }
        };
        let quants = w.add(F::quants_at(r));
        for (lane, acc) in acc.iter_mut().enumerate().take(r) {
            let mut dot = [0i32; 2];
            for j in 0..32usize {
                let q = F::quant(|i| *quants.add(i), r, lane, j);
                dot[j / 16] += i32::from(q) * i32::from(*x.add(j));
            }
            let half = |h: usize| dot[h] - F::BIAS * sums[h];
            let dot = if F::HALVES {
                let sub = |h: usize| i32::from(*w.add(F::sub_at(r) + h * r + lane).cast::<i8>());
                half(0) * sub(0) + half(1) * sub(1)
            } else {
                half(0) + half(1)
            };
            *acc = (scale_of(0, lane) * dot as f32).mul_add(scale, *acc);
            if F::MIN && F::HALVES {
                let sub = |h: usize| {
                    i32::from(*w.add(F::sub_min_at(r) + h * r + lane).cast::<i8>()) * sums[h]
                };
                let min = scale_of(F::min_at(r), lane) * (sub(0) + sub(1)) as f32;
                *acc = min.mul_add(scale, *acc);
            } else if F::MIN {
                *acc = scale_of(F::min_at(r), lane).mul_add(scaled_sum, *acc);
            }
        }
    }
}
