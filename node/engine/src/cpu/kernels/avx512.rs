//! Quantised matrix tiles with AVX-512 VNNI: 16 rows times up to 8 columns.
//!
//! No prefetch instructions: groups lie one after the other, and the processor's own prefetching of
//! such a stream is faster alone (measured on Zen 4: up to a quarter for one column).

use std::arch::x86_64::*;

use super::Tile;
use super::format::Format;

/// Rows of a group.
pub(super) const ROWS: usize = 16;
/// Most columns of a tile.
pub(super) const COLS: usize = 8;

/// One group of rows times `cols` columns.
///
/// # Safety
/// As [`Tile`] says; AVX-512 F, BW, VL, DQ and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn tile<F: Format>(t: &Tile<'_>, cols: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match cols {
            1 => column::<F>(t),
            2 => columns::<F, 2>(t),
            3 => columns::<F, 3>(t),
            4 => columns::<F, 4>(t),
            5 => columns::<F, 5>(t),
            6 => columns::<F, 6>(t),
            7 => columns::<F, 7>(t),
            _ => columns::<F, 8>(t),
        }
    }
}

#[inline(always)]
unsafe fn scale<F: Format>(p: *const u8) -> __m512 {
    // SAFETY: 16 scales at `p`.
    unsafe {
        if F::WIDE_SCALE {
            _mm512_loadu_ps(p.cast())
        } else {
            _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
        }
    }
}

/// The eight quads of a block as unsigned bytes.
#[inline(always)]
unsafe fn quads<F: Format>(w: *const u8) -> [__m512i; 8] {
    // SAFETY: `w` holds the quants of a block.
    unsafe {
        let mut quads = [_mm512_setzero_si512(); 8];
        let load = |v: usize| _mm512_loadu_si512(w.add(v * 64).cast());
        let right = |x, bits: usize| _mm512_srl_epi16(x, _mm_cvtsi32_si128(bits as i32));
        for (v, quad) in quads.iter_mut().enumerate() {
            let low = _mm512_set1_epi8(15);
            let nibble = || _mm512_and_si512(right(load(v % 4), v / 4 * 4), low);
            *quad = match (F::BITS, F::TABLE) {
                (2, _) => _mm512_and_si512(right(load(v % 2), v / 2 * 2), _mm512_set1_epi8(3)),
                (4, None) => nibble(),
                (4, Some(table)) => {
                    let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
                    _mm512_shuffle_epi8(table, nibble())
                }
                (5, _) => {
                    let high = match v {
                        0..4 => _mm512_sll_epi16(load(4), _mm_cvtsi32_si128(4 - v as i32)),
                        _ => right(load(4), v - 4),
                    };
                    _mm512_or_si512(nibble(), _mm512_and_si512(high, _mm512_set1_epi8(16)))
                }
                _ => load(v),
            };
        }
        quads
    }
}

/// `start` plus the dot products of four quads from `first`.
#[inline(always)]
unsafe fn dot4(start: __m512i, w: &[__m512i; 8], x: *const i8, first: usize) -> __m512i {
    let mut sum = start;
    for v in first..first + 4 {
        // SAFETY: the block has 8 quads.
        unsafe {
            let x = _mm512_set1_epi32(x.add(v * 4).cast::<i32>().read_unaligned());
            sum = _mm512_dpbusd_epi32(sum, w[v], x);
        }
    }
    sum
}

/// As the one of AVX2.
#[inline(always)]
unsafe fn times_sub<F: Format>(sums: __m512i, sub: __m512i) -> __m512i {
    // SAFETY: register arithmetic; the caller has AVX-512.
    unsafe {
        if F::BITS == 8 {
            return _mm512_mullo_epi32(sums, sub);
        }
        let low = _mm512_set1_epi32(0xffff);
        _mm512_madd_epi16(sums, if F::MIN { sub } else { _mm512_and_si512(sub, low) })
    }
}

#[inline(always)]
unsafe fn columns<F: Format, const N: usize>(t: &Tile<'_>) {
    // SAFETY: the blocks of all runs of the group and of `N` columns exist; outputs as `Tile` says.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); N];
        for run in t.runs {
            let mut w = t.w.add(run.at as usize * F::block_bytes(ROWS));
            for b in run.blocks() {
                let quads = quads::<F>(w.add(F::quants_at(ROWS)));
                let d = scale::<F>(w);
                for c in 0..N {
                    let i = c * t.blocks + b;
                    let x = t.q.add(i * 32);
                    let start = |h: usize| {
                        if F::BIAS == 0 {
                            _mm512_setzero_si512()
                        } else {
                            _mm512_set1_epi32(-F::BIAS * (*t.sums.add(i))[h])
                        }
                    };
                    let (low, high) = (dot4(start(0), &quads, x, 0), dot4(start(1), &quads, x, 4));
                    let dot = if F::HALVES {
                        let sub = |h: usize| {
                            let p = w.add(F::sub_at(ROWS) + h * ROWS);
                            _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))
                        };
                        _mm512_add_epi32(times_sub::<F>(low, sub(0)), times_sub::<F>(high, sub(1)))
                    } else {
                        _mm512_add_epi32(low, high)
                    };
                    let scaled = _mm512_mul_ps(d, _mm512_cvtepi32_ps(dot));
                    acc[c] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(*t.scale.add(i)), acc[c]);
                    if F::MIN && F::HALVES {
                        let part = |h: usize| {
                            let p = w.add(F::sub_min_at(ROWS) + h * ROWS);
                            let sub = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
                            times_sub::<F>(_mm512_set1_epi32((*t.sums.add(i))[h]), sub)
                        };
                        let part = _mm512_cvtepi32_ps(_mm512_add_epi32(part(0), part(1)));
                        let min = _mm512_mul_ps(scale::<F>(w.add(F::min_at(ROWS))), part);
                        acc[c] = _mm512_fmadd_ps(min, _mm512_set1_ps(*t.scale.add(i)), acc[c]);
                    } else if F::MIN {
                        let m = scale::<F>(w.add(F::min_at(ROWS)));
                        acc[c] = _mm512_fmadd_ps(m, _mm512_set1_ps(*t.scaled_sum.add(i)), acc[c]);
                    }
                }
                w = w.add(F::block_bytes(ROWS));
            }
        }
        let mask = ((1u32 << t.rows) - 1) as __mmask16;
        for (c, &acc) in acc.iter().enumerate() {
            let out = t.out.add(c * t.stride);
            let sum =
                if t.add { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), acc) } else { acc };
            _mm512_mask_storeu_ps(out, mask, sum);
        }
    }
}

/// Eight scales.
#[inline(always)]
unsafe fn half_scale<F: Format>(p: *const u8) -> __m256 {
    // SAFETY: 8 scales at `p`.
    unsafe {
        if F::WIDE_SCALE {
            _mm256_loadu_ps(p.cast())
        } else {
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
        }
    }
}

/// One column, in 256-bit registers: as fast where the weights are in a cache, and faster where they
/// stream from memory.
#[inline(always)]
unsafe fn column<F: Format>(t: &Tile<'_>) {
    // SAFETY: the blocks of all runs of the group and of the column exist; outputs as `Tile` says.
    unsafe {
        let mut acc = [_mm256_setzero_ps(); 2];
        for run in t.runs {
            let mut w = t.w.add(run.at as usize * F::block_bytes(ROWS));
            for b in run.blocks() {
                let x = t.q.add(b * 32);
                let sums = *t.sums.add(b);
                let start = |h: usize| {
                    if F::BIAS == 0 {
                        _mm256_setzero_si256()
                    } else {
                        _mm256_set1_epi32(-F::BIAS * sums[h])
                    }
                };
                let quants = w.add(F::quants_at(ROWS));
                let mut dots = [[start(0), start(1)]; 2];
                for v in 0..8 {
                    let xs = _mm256_set1_epi32(x.add(v * 4).cast::<i32>().read_unaligned());
                    for h in 0..2 {
                        let q = super::avx2::quad_of::<F>(quants.add(h * 32), v, 64);
                        dots[h][v / 4] = _mm256_dpbusd_epi32(dots[h][v / 4], q, xs);
                    }
                }
                for h in 0..2 {
                    let dot = if F::HALVES {
                        let sub = |s: usize| {
                            let p = w.add(F::sub_at(ROWS) + s * ROWS + h * 8);
                            _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))
                        };
                        _mm256_add_epi32(
                            super::avx2::times_sub::<F>(dots[h][0], sub(0)),
                            super::avx2::times_sub::<F>(dots[h][1], sub(1)),
                        )
                    } else {
                        _mm256_add_epi32(dots[h][0], dots[h][1])
                    };
                    let d = half_scale::<F>(w.add(h * 8 * F::SCALE_BYTES));
                    let scaled = _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot));
                    acc[h] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(*t.scale.add(b)), acc[h]);
                    if F::MIN && F::HALVES {
                        let part = |s: usize| {
                            let p = w.add(F::sub_min_at(ROWS) + s * ROWS + h * 8);
                            let sub = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
                            super::avx2::times_sub::<F>(_mm256_set1_epi32(sums[s]), sub)
                        };
                        let part = _mm256_cvtepi32_ps(_mm256_add_epi32(part(0), part(1)));
                        let m = half_scale::<F>(w.add(F::min_at(ROWS) + h * 8 * F::SCALE_BYTES));
                        let min = _mm256_mul_ps(m, part);
                        acc[h] = _mm256_fmadd_ps(min, _mm256_set1_ps(*t.scale.add(b)), acc[h]);
                    } else if F::MIN {
                        let m = half_scale::<F>(w.add(F::min_at(ROWS) + h * 8 * F::SCALE_BYTES));
                        acc[h] = _mm256_fmadd_ps(m, _mm256_set1_ps(*t.scaled_sum.add(b)), acc[h]);
                    }
                }
                w = w.add(F::block_bytes(ROWS));
            }
        }
        let mask = ((1u32 << t.rows) - 1) as __mmask16;
        let acc = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(acc[0]), acc[1]);
        let sum = if t.add { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, t.out), acc) } else { acc };
        _mm512_mask_storeu_ps(t.out, mask, sum);
    }
}
