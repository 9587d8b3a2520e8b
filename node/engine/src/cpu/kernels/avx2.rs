//! Quantised matrix tiles with AVX2: 8 rows times up to 4 columns.

use std::arch::x86_64::*;

use super::Tile;
use super::format::Format;

/// Rows of a group.
pub(super) const ROWS: usize = 8;
/// Most columns of a tile: 8 x 4 fills the 16 registers without spilling.
pub(super) const COLS: usize = 4;

/// One group of rows times `cols` columns.
///
/// # Safety
/// As [`Tile`] says; AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile<F: Format>(t: &Tile<'_>, cols: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match cols {
            1 => columns::<F, 1>(t),
            2 => columns::<F, 2>(t),
            3 => columns::<F, 3>(t),
            _ => columns::<F, 4>(t),
        }
    }
}

#[inline(always)]
unsafe fn scale<F: Format>(p: *const u8) -> __m256 {
    // SAFETY: 8 scales at `p`.
    unsafe {
        if F::WIDE_SCALE {
            _mm256_loadu_ps(p.cast())
        } else {
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
        }
    }
}

/// Four consecutive activations in every lane.
#[inline(always)]
unsafe fn quad(x: *const i8, i: usize) -> __m256i {
    // SAFETY: the block has 8 quads.
    unsafe { _mm256_set1_epi32(x.add(i * 4).cast::<i32>().read_unaligned()) }
}

/// Quad `v` of eight rows as unsigned bytes, bias included; vectors are `stride` bytes apart.
#[inline(always)]
pub(super) unsafe fn quad_of<F: Format>(w: *const u8, v: usize, stride: usize) -> __m256i {
    // SAFETY: `w` holds the quants of a block.
    unsafe {
        let load = |v: usize| _mm256_loadu_si256(w.add(v * stride).cast());
        let right = |x, bits: usize| _mm256_srl_epi16(x, _mm_cvtsi32_si128(bits as i32));
        let low = _mm256_set1_epi8(15);
        let nibble = || _mm256_and_si256(right(load(v % 4), v / 4 * 4), low);
        match (F::BITS, F::TABLE) {
            (2, _) => _mm256_and_si256(right(load(v % 2), v / 2 * 2), _mm256_set1_epi8(3)),
            (4, None) => nibble(),
            (4, Some(table)) => {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
                _mm256_shuffle_epi8(table, nibble())
            }
            (5, _) => {
                let high = load(4);
                let high = match v {
                    0..4 => _mm256_sll_epi16(high, _mm_cvtsi32_si128(4 - v as i32)),
                    _ => right(high, v - 4),
                };
                _mm256_or_si256(nibble(), _mm256_and_si256(high, _mm256_set1_epi8(16)))
            }
            _ => load(v),
        }
    }
}

/// Sums of 16 products times factors of eight bits. Sums of small quants fit i16, and that product
/// is the faster one.
#[inline(always)]
pub(super) unsafe fn times_sub<F: Format>(sums: __m256i, sub: __m256i) -> __m256i {
    // SAFETY: register arithmetic; the caller has AVX2.
    unsafe {
        if F::BITS == 8 {
            return _mm256_mullo_epi32(sums, sub);
        }
        // The high halves of negative factors would be multiplied too; beside minima none are.
        let low = _mm256_set1_epi32(0xffff);
        _mm256_madd_epi16(sums, if F::MIN { sub } else { _mm256_and_si256(sub, low) })
    }
}

/// Dot products of one block for `N` columns, bias not yet subtracted (but one of 128); two halves
/// where asked for.
#[inline(always)]
unsafe fn dots<F: Format, const N: usize>(
    w: *const u8,
    x: *const i8,
    stride: usize,
) -> [[__m256i; 2]; N] {
    // SAFETY: `w` holds the quants of a block, `x` 32 activations per column.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let zero = _mm256_setzero_si256();
        let mut dot = [[zero; 2]; N];
        if F::BIAS == 128 {
            // Signed weights: magnitudes times activations that take the weights' signs. At most
            // 2 x 128 x 127 = 32512: fits i16.
            for v in 0..8 {
                let a = _mm256_xor_si256(quad_of::<F>(w, v, 32), _mm256_set1_epi8(-128));
                let magnitude = _mm256_abs_epi8(a);
                for c in 0..N {
                    let x = _mm256_sign_epi8(quad(x.add(c * stride), v), a);
                    let s = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones);
                    dot[c][0] = _mm256_add_epi32(dot[c][0], s);
                }
            }
        } else if F::BITS == 4 && !F::HALVES {
            // At most 8 x 2 x 15 x 127 = 30480: fits i16.
            let low = _mm256_set1_epi8(15);
            let mut sum = [zero; N];
            for v in 0..4 {
                let packed = _mm256_loadu_si256(w.add(v * 32).cast());
                let a = _mm256_and_si256(packed, low);
                let b = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low);
                for c in 0..N {
                    let x = x.add(c * stride);
                    let p = _mm256_maddubs_epi16(a, quad(x, v));
                    let q = _mm256_maddubs_epi16(b, quad(x, v + 4));
                    sum[c] = _mm256_add_epi16(sum[c], _mm256_add_epi16(p, q));
                }
            }
            for c in 0..N {
                dot[c][0] = _mm256_madd_epi16(sum[c], ones);
            }
        } else {
            // At most 2 x 2 x 63 x 127 = 32004 or 4 x 2 x 31 x 127 = 31496: fits i16.
            let run = if F::BITS == 8 { 2 } else { 4 };
            for first in (0..8).step_by(run) {
                let mut sum = [zero; N];
                for v in first..first + run {
                    let a = quad_of::<F>(w, v, 32);
                    for c in 0..N {
                        let p = _mm256_maddubs_epi16(a, quad(x.add(c * stride), v));
                        sum[c] = _mm256_add_epi16(sum[c], p);
                    }
                }
                let half = if F::HALVES { first / 4 } else { 0 };
                for c in 0..N {
                    let s = _mm256_madd_epi16(sum[c], ones);
                    dot[c][half] = _mm256_add_epi32(dot[c][half], s);
                }
            }
        }
        dot
    }
}

#[inline(always)]
unsafe fn columns<F: Format, const N: usize>(t: &Tile<'_>) {
    // SAFETY: the blocks of all runs of the group and of `N` columns exist; outputs as `Tile` says.
    unsafe {
        let mut acc = [_mm256_setzero_ps(); N];
        for run in t.runs {
            let mut w = t.w.add(run.at as usize * F::block_bytes(ROWS));
            for b in run.blocks() {
                let dot = dots::<F, N>(w.add(F::quants_at(ROWS)), t.q.add(b * 32), t.blocks * 32);
                let d = scale::<F>(w);
                for c in 0..N {
                    let i = c * t.blocks + b;
                    let sums = *t.sums.add(i);
                    let sub = |at: usize| _mm256_cvtepi8_epi32(_mm_loadl_epi64(w.add(at).cast()));
                    let dot = if F::HALVES {
                        let half = |h: usize| {
                            let bias = _mm256_set1_epi32(F::BIAS * sums[h]);
                            let sub = sub(F::sub_at(ROWS) + h * ROWS);
                            times_sub::<F>(_mm256_sub_epi32(dot[c][h], bias), sub)
                        };
                        _mm256_add_epi32(half(0), half(1))
                    } else if F::BIAS != 0 && F::BIAS != 128 {
                        let bias = _mm256_set1_epi32(F::BIAS * (sums[0] + sums[1]));
                        _mm256_sub_epi32(dot[c][0], bias)
                    } else {
                        dot[c][0]
                    };
                    let scaled = _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot));
                    acc[c] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(*t.scale.add(i)), acc[c]);
                    if F::MIN && F::HALVES {
                        let part = |h: usize| {
                            let sub = sub(F::sub_min_at(ROWS) + h * ROWS);
                            times_sub::<F>(_mm256_set1_epi32(sums[h]), sub)
                        };
                        let part = _mm256_cvtepi32_ps(_mm256_add_epi32(part(0), part(1)));
                        let min = _mm256_mul_ps(scale::<F>(w.add(F::min_at(ROWS))), part);
                        acc[c] = _mm256_fmadd_ps(min, _mm256_set1_ps(*t.scale.add(i)), acc[c]);
                    } else if F::MIN {
                        let m = scale::<F>(w.add(F::min_at(ROWS)));
                        acc[c] = _mm256_fmadd_ps(m, _mm256_set1_ps(*t.scaled_sum.add(i)), acc[c]);
                    }
                }
                w = w.add(F::block_bytes(ROWS));
            }
        }
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(t.rows as i32), lanes);
        for (c, &acc) in acc.iter().enumerate() {
            let out = t.out.add(c * t.stride);
            let sum = if t.add { _mm256_add_ps(_mm256_maskload_ps(out, mask), acc) } else { acc };
            _mm256_maskstore_ps(out, mask, sum);
        }
    }
}
