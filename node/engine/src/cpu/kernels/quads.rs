//! Integer products in the lanes of [`Lanes`]: sixteen i32, each the sum of products of quads of u8
//! and small integers; and what else attention needs of lanes.
//!
//! Integer sums are exact modulo 2^32, so any instruction may form them. AVX-512 has one that takes
//! four bytes with four bytes: a factor is two of them, `256 * high + low`, both signed, which is why
//! [`MAX_FACTOR`] is less than an i16 holds, and why stored numbers are unsigned. AVX2 multiplies
//! pairs of i16. Callers see to it that no sum, less its excess, leaves an i32.

use super::lanes::{Lanes, Plain};

/// The largest magnitude of a factor.
pub(crate) const MAX_FACTOR: f32 = 32639.0;
/// What stored bytes are more than the numbers they stand for.
pub(crate) const OFFSET: u8 = 128;
/// Bytes of four factors.
pub(crate) const FACTOR_BYTES: usize = 8;

/// Lanes that also multiply integers.
///
/// # Safety
/// As of [`Lanes`]: every method needs the instruction set of the implementor.
pub(crate) trait Quads: Lanes {
    /// Sixteen i32, in any form.
    type Sums: Copy;
    /// Sixteen quads of u8, in any form.
    type Row: Copy;
    /// Four factors, in any form.
    type Factor: Copy;
    unsafe fn zero() -> Self::Sums;
    /// Sixteen quads of u8 at `p`.
    unsafe fn quads(p: *const u8) -> Self::Row;
    /// Four factors at `p`, for every lane.
    unsafe fn factor(p: *const u8) -> Self::Factor;
    /// Adds to each lane the products of its quad and the factors.
    unsafe fn dot(sums: Self::Sums, row: Self::Row, factor: Self::Factor) -> Self::Sums;
    /// The nearest f32 to each sum less `excess`, ties to even.
    unsafe fn float(sums: Self::Sums, excess: i32) -> Self;
    /// Stores sixteen integers, at most [`MAX_FACTOR`] in magnitude, as four times four factors.
    unsafe fn store_factors(self, p: *mut u8);
    /// Stores the nearest integers (ties to even) as i8; they must fit.
    unsafe fn store_i8(self, p: *mut i8);
    /// The largest lane; which of two zeros, and what of NaN, is open.
    unsafe fn top(self) -> f32;
    /// Asks for the cache line at any address, which need not be mapped, to come to the second level:
    /// what is asked into the first keeps loads out of its few miss buffers (half the speed, measured).
    unsafe fn prefetch(p: *const u8);
}

impl Quads for Plain {
    type Sums = [i32; 16];
    type Row = [[u8; 4]; 16];
    type Factor = [i16; 4];
    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn quads(p: *const u8) -> Self::Row {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { p.cast::<[[u8; 4]; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn factor(p: *const u8) -> Self::Factor {
        // SAFETY: the caller gives what `store_factors` wrote.
        unsafe { p.cast::<[i16; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot(sums: Self::Sums, row: Self::Row, factor: Self::Factor) -> Self::Sums {
        let mut out = sums;
        for i in 0..16 {
            for j in 0..4 {
                out[i] = out[i].wrapping_add(i32::from(row[i][j]) * i32::from(factor[j]));
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn float(sums: Self::Sums, excess: i32) -> Self {
        Self(sums.map(|x| x.wrapping_sub(excess) as f32))
    }
    #[inline(always)]
    unsafe fn store_factors(self, p: *mut u8) {
        let n = self.0.map(|x| x as i16);
        // SAFETY: the caller gives 32 writable bytes.
        unsafe { p.cast::<[i16; 16]>().write_unaligned(n) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8) {
        let n = self.0.map(|x| x.round_ties_even() as i8);
        // SAFETY: the caller gives 16 writable elements.
        unsafe { p.cast::<[i8; 16]>().write_unaligned(n) }
    }
    #[inline(always)]
    unsafe fn top(self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::lanes::{Ymm2, Zmm};
    use super::Quads;

    /// The largest of 8 lanes.
    #[inline(always)]
    unsafe fn top8(v: __m256) -> f32 {
        // SAFETY: register arithmetic; the caller has AVX.
        unsafe {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }

    /// Sixteen nearest i16, in order.
    #[inline(always)]
    unsafe fn i16s(v: Ymm2) -> __m256i {
        // SAFETY: register arithmetic; the caller has AVX2.
        unsafe {
            let n = _mm256_packs_epi32(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
            _mm256_permute4x64_epi64::<0b11_01_10_00>(n)
        }
    }

    impl Quads for Ymm2 {
        type Sums = (__m256i, __m256i);
        /// Of eight lanes and the other eight: elements 0 and 2 of each quad, then 1 and 3.
        type Row = [[__m256i; 2]; 2];
        type Factor = [__m256i; 2];
        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
        }
        #[inline(always)]
        unsafe fn quads(p: *const u8) -> Self::Row {
            // SAFETY: the caller has AVX2 and gives 64 readable bytes.
            unsafe {
                let low = _mm256_set1_epi16(0xff);
                let split = |p: *const u8| {
                    let x = _mm256_loadu_si256(p.cast());
                    [_mm256_and_si256(x, low), _mm256_srli_epi16::<8>(x)]
                };
                [split(p), split(p.add(32))]
            }
        }
        #[inline(always)]
        unsafe fn factor(p: *const u8) -> Self::Factor {
            // SAFETY: the caller has AVX2 and gives what `store_factors` wrote.
            unsafe {
                let p = p.cast::<i32>();
                [p, p.add(1)].map(|p| _mm256_set1_epi32(p.read_unaligned()))
            }
        }
        #[inline(always)]
        unsafe fn dot(sums: Self::Sums, row: Self::Row, factor: Self::Factor) -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe {
                let add = |sums, row: [__m256i; 2]| {
                    let sums = _mm256_add_epi32(sums, _mm256_madd_epi16(row[0], factor[0]));
                    _mm256_add_epi32(sums, _mm256_madd_epi16(row[1], factor[1]))
                };
                (add(sums.0, row[0]), add(sums.1, row[1]))
            }
        }
        #[inline(always)]
        unsafe fn float(sums: Self::Sums, excess: i32) -> Self {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe {
                let excess = _mm256_set1_epi32(excess);
                let one = |sums| _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, excess));
                Self(one(sums.0), one(sums.1))
            }
        }
        #[inline(always)]
        unsafe fn store_factors(self, p: *mut u8) {
            // SAFETY: the caller has AVX2 and gives 32 writable bytes.
            unsafe {
                // Each quad as its elements 0, 2, 1, 3.
                let n = _mm256_shufflelo_epi16::<0b11_01_10_00>(i16s(self));
                _mm256_storeu_si256(p.cast(), _mm256_shufflehi_epi16::<0b11_01_10_00>(n));
            }
        }
        #[inline(always)]
        unsafe fn store_i8(self, p: *mut i8) {
            // SAFETY: the caller has AVX2 and gives 16 writable elements.
            unsafe {
                let n = i16s(self);
                let (low, high) = (_mm256_castsi256_si128(n), _mm256_extracti128_si256::<1>(n));
                _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high));
            }
        }
        #[inline(always)]
        unsafe fn top(self) -> f32 {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe { top8(_mm256_max_ps(self.0, self.1)) }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            // SAFETY: a hint; no address faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
    }

    impl Quads for Zmm {
        /// Of the high bytes of factors, and of the low ones.
        type Sums = (__m512i, __m512i);
        type Row = __m512i;
        type Factor = (__m512i, __m512i);
        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX-512.
            unsafe { (_mm512_setzero_si512(), _mm512_setzero_si512()) }
        }
        #[inline(always)]
        unsafe fn quads(p: *const u8) -> Self::Row {
            // SAFETY: the caller has AVX-512 and gives 64 readable bytes.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn factor(p: *const u8) -> Self::Factor {
            // SAFETY: the caller has AVX-512 and gives what `store_factors` wrote.
            unsafe {
                let p = p.cast::<i32>();
                let [high, low] = [p, p.add(1)].map(|p| _mm512_set1_epi32(p.read_unaligned()));
                (high, low)
            }
        }
        #[inline(always)]
        unsafe fn dot(sums: Self::Sums, row: Self::Row, factor: Self::Factor) -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX-512 with VNNI.
            unsafe {
                (
                    _mm512_dpbusd_epi32(sums.0, row, factor.0),
                    _mm512_dpbusd_epi32(sums.1, row, factor.1),
                )
            }
        }
        #[inline(always)]
        unsafe fn float(sums: Self::Sums, excess: i32) -> Self {
            // SAFETY: register arithmetic; the caller has AVX-512.
            unsafe {
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums.0), sums.1);
                Self(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(excess))))
            }
        }
        #[inline(always)]
        unsafe fn store_factors(self, p: *mut u8) {
            // SAFETY: the caller has AVX-512 and gives 32 writable bytes.
            unsafe {
                // The low byte is signed: where it is negative, the high one is one more.
                let half = _mm512_set1_epi32(128);
                let n = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), half);
                let n = _mm512_xor_si512(n, half);
                // Of each four, the second bytes and then the first.
                let bytes = _mm512_set4_epi32(0, 0, 0x0c08_0400, 0x0d09_0501);
                let n = _mm512_shuffle_epi8(n, bytes);
                let n = _mm512_permutexvar_epi64(_mm512_set_epi64(0, 0, 0, 0, 6, 4, 2, 0), n);
                _mm256_storeu_si256(p.cast(), _mm512_castsi512_si256(n));
            }
        }
        #[inline(always)]
        unsafe fn store_i8(self, p: *mut i8) {
            // SAFETY: the caller has AVX-512 and gives 16 writable elements.
            unsafe {
                let n = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0));
                _mm_storeu_si128(p.cast(), n);
            }
        }
        #[inline(always)]
        unsafe fn top(self) -> f32 {
            // SAFETY: register arithmetic; the caller has AVX-512.
            unsafe {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                top8(_mm256_max_ps(_mm512_castps512_ps256(self.0), high))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            // SAFETY: a hint; no address faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
    }
}
