//! Integer products in the lanes of [`Lanes`]: sixteen i32, each the sum of products of pairs of i8
//! and i16; and what else attention needs of lanes.
//!
//! Integer sums are exact, so any instruction may form them: AVX-512 has one for the whole step,
//! AVX2 two. Callers see to it that no sum leaves an i32.

use super::lanes::{Lanes, Plain};

/// Lanes that also multiply integers.
///
/// # Safety
/// As of [`Lanes`]: every method needs the instruction set of the implementor.
pub(crate) trait Pairs: Lanes {
    /// Sixteen i32.
    type Sums: Copy;
    /// Sixteen pairs of i16.
    type Row: Copy;
    unsafe fn zero() -> Self::Sums;
    /// Sixteen pairs of i8 at `p`.
    unsafe fn row(p: *const i8) -> Self::Row;
    /// The pair of i16 at `p` in every lane.
    unsafe fn pair(p: *const i16) -> Self::Row;
    /// Adds to each lane the sum of the products of its two pairs.
    unsafe fn dot(sums: Self::Sums, a: Self::Row, b: Self::Row) -> Self::Sums;
    /// The nearest f32, ties to even.
    unsafe fn float(sums: Self::Sums) -> Self;
    /// Stores the nearest integers (ties to even) as i16; they must fit.
    unsafe fn store_i16(self, p: *mut i16);
    /// Stores the nearest integers (ties to even) as i8; they must fit.
    unsafe fn store_i8(self, p: *mut i8);
    /// The largest lane; which of two zeros, and what of NaN, is open.
    unsafe fn top(self) -> f32;
    /// Asks for the cache line at any address, which need not be mapped, to come to the second level:
    /// what is asked into the first keeps loads out of its few miss buffers (half the speed, measured).
    unsafe fn prefetch(p: *const u8);
}

impl Pairs for Plain {
    type Sums = [i32; 16];
    type Row = [[i16; 2]; 16];
    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn row(p: *const i8) -> Self::Row {
        // SAFETY: the caller gives 32 readable bytes.
        let bytes = unsafe { p.cast::<[[i8; 2]; 16]>().read_unaligned() };
        bytes.map(|[a, b]| [i16::from(a), i16::from(b)])
    }
    #[inline(always)]
    unsafe fn pair(p: *const i16) -> Self::Row {
        // SAFETY: the caller gives two readable elements.
        [unsafe { p.cast::<[i16; 2]>().read_unaligned() }; 16]
    }
    #[inline(always)]
    unsafe fn dot(sums: Self::Sums, a: Self::Row, b: Self::Row) -> Self::Sums {
        let mut out = sums;
        for i in 0..16 {
            let [x, y] = [0, 1].map(|j| i32::from(a[i][j]) * i32::from(b[i][j]));
            out[i] = out[i].wrapping_add(x.wrapping_add(y));
        }
        out
    }
    #[inline(always)]
    unsafe fn float(sums: Self::Sums) -> Self {
        Self(sums.map(|x| x as f32))
    }
    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16) {
        let n = self.0.map(|x| x.round_ties_even() as i16);
        // SAFETY: the caller gives 16 writable elements.
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
    use super::Pairs;

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

    impl Pairs for Ymm2 {
        type Sums = (__m256i, __m256i);
        type Row = (__m256i, __m256i);
        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
        }
        #[inline(always)]
        unsafe fn row(p: *const i8) -> Self::Row {
            // SAFETY: the caller has AVX2 and gives 32 readable bytes.
            unsafe {
                let low = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()));
                (low, _mm256_cvtepi8_epi16(_mm_loadu_si128(p.add(16).cast())))
            }
        }
        #[inline(always)]
        unsafe fn pair(p: *const i16) -> Self::Row {
            // SAFETY: the caller has AVX2 and gives two readable elements.
            unsafe {
                let x = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
                (x, x)
            }
        }
        #[inline(always)]
        unsafe fn dot(sums: Self::Sums, a: Self::Row, b: Self::Row) -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe {
                (
                    _mm256_add_epi32(sums.0, _mm256_madd_epi16(a.0, b.0)),
                    _mm256_add_epi32(sums.1, _mm256_madd_epi16(a.1, b.1)),
                )
            }
        }
        #[inline(always)]
        unsafe fn float(sums: Self::Sums) -> Self {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe { Self(_mm256_cvtepi32_ps(sums.0), _mm256_cvtepi32_ps(sums.1)) }
        }
        #[inline(always)]
        unsafe fn store_i16(self, p: *mut i16) {
            // SAFETY: the caller has AVX2 and gives 16 writable elements.
            unsafe {
                let n = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
                _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(n));
            }
        }
        #[inline(always)]
        unsafe fn store_i8(self, p: *mut i8) {
            // SAFETY: the caller has AVX2 and gives 16 writable elements.
            unsafe {
                let n = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
                let n = _mm256_permute4x64_epi64::<0b11_01_10_00>(n);
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

    impl Pairs for Zmm {
        type Sums = __m512i;
        type Row = __m512i;
        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX-512.
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn row(p: *const i8) -> Self::Row {
            // SAFETY: the caller has AVX-512 and gives 32 readable bytes.
            unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn pair(p: *const i16) -> Self::Row {
            // SAFETY: the caller has AVX-512 and gives two readable elements.
            unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn dot(sums: Self::Sums, a: Self::Row, b: Self::Row) -> Self::Sums {
            // SAFETY: register arithmetic; the caller has AVX-512 with VNNI.
            unsafe { _mm512_dpwssd_epi32(sums, a, b) }
        }
        #[inline(always)]
        unsafe fn float(sums: Self::Sums) -> Self {
            // SAFETY: register arithmetic; the caller has AVX-512.
            unsafe { Self(_mm512_cvtepi32_ps(sums)) }
        }
        #[inline(always)]
        unsafe fn store_i16(self, p: *mut i16) {
            // SAFETY: the caller has AVX-512 and gives 16 writable elements.
            unsafe {
                let n = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self.0));
                _mm256_storeu_si256(p.cast(), n);
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
