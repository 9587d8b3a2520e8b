//! Sixteen f32 lanes, three ways: an array, two AVX2 registers, one AVX-512 register.
//!
//! Every float kernel but the quantised matrix products is written once over [`Lanes`] and compiled
//! once per instruction set. Each operation is either correctly rounded or pure bit movement, and a
//! lane never meets another but in [`Lanes::sum`], whose tree is the same for all three; so the
//! three give the same bits. Nothing here chooses an instruction set: `dispatch!` does.

/// Sixteen lanes of f32.
///
/// # Safety
/// Every method needs the instruction set of the implementor, and pointers valid for 16 elements.
pub(crate) trait Lanes: Copy {
    /// Whether 32 registers of 16 lanes exist, so that tiles may be twice as wide.
    const WIDE: bool;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn load_f16(p: *const u16) -> Self;
    unsafe fn load_bf16(p: *const u16) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn store_f16(self, p: *mut u16);
    unsafe fn add(self, o: Self) -> Self;
    unsafe fn sub(self, o: Self) -> Self;
    unsafe fn mul(self, o: Self) -> Self;
    unsafe fn div(self, o: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// `self > o ? self : o`: `o` where either is NaN.
    unsafe fn max(self, o: Self) -> Self;
    /// `self < o ? self : o`: `o` where either is NaN.
    unsafe fn min(self, o: Self) -> Self;
    /// To the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `2^self` of integers in the range of normal exponents.
    unsafe fn pow2(self) -> Self;
    /// Whether every lane is finite.
    unsafe fn finite(self) -> bool;
    /// Sum in the one order: lanes `i` and `i + 8`, then 4, 2, 1.
    unsafe fn sum(self) -> f32;
    /// Quantises 32 values; see `quantise32`.
    unsafe fn quantise(a: Self, b: Self, q: *mut i8) -> Quantised;
}

/// Scale and half sums of 32 quantised values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quantised {
    pub(crate) scale: f32,
    pub(crate) sums: [i32; 2],
}

/// Scale and its inverse from the largest magnitude. NaN and infinity survive in the scale.
#[inline(always)]
pub(crate) fn scales(absmax: f32) -> (f32, f32) {
    if absmax < 1e-30 { (0.0, 0.0) } else { (absmax / 127.0, 127.0 / absmax) }
}

/// The plain implementation.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Plain(pub(super) [f32; 16]);

macro_rules! zip {
    ($a:expr, $b:expr, $f:expr) => {{
        let (a, b, f) = ($a, $b, $f);
        let mut out = [0f32; 16];
        for i in 0..16 {
            out[i] = f(a.0[i], b.0[i]);
        }
        Plain(out)
    }};
}

impl Lanes for Plain {
    const WIDE: bool = false;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 16])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller gives 16 readable elements.
        Self(unsafe { p.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: the caller gives 16 readable elements.
        let h = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        Self(h.map(|b| half::f16::from_bits(b).to_f32()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the caller gives 16 readable elements.
        let h = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        Self(h.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller gives 16 writable elements.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        let h = self.0.map(|x| half::f16::from_f32(x).to_bits());
        // SAFETY: the caller gives 16 writable elements.
        unsafe { p.cast::<[u16; 16]>().write_unaligned(h) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        zip!(self, o, |a: f32, b: f32| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        zip!(self, o, |a: f32, b: f32| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        zip!(self, o, |a: f32, b: f32| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        zip!(self, o, |a: f32, b: f32| a / b)
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        let mut out = [0f32; 16];
        for i in 0..16 {
            out[i] = self.0[i].mul_add(b.0[i], c.0[i]);
        }
        Self(out)
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        zip!(self, o, |a: f32, b: f32| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        zip!(self, o, |a: f32, b: f32| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn pow2(self) -> Self {
        Self(self.0.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23)))
    }
    #[inline(always)]
    unsafe fn finite(self) -> bool {
        self.0.iter().all(|x| x.is_finite())
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut v = self.0;
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                v[i] += v[i + width];
            }
        }
        v[0]
    }
    #[inline(always)]
    unsafe fn quantise(a: Self, b: Self, q: *mut i8) -> Quantised {
        let bits = |v: &[f32; 16]| v.iter().fold(0u32, |m, x| m.max(x.to_bits() & 0x7fff_ffff));
        let (scale, inverse) = scales(f32::from_bits(bits(&a.0).max(bits(&b.0))));
        let mut sums = [0i32; 2];
        for (half, v) in [a.0, b.0].iter().enumerate() {
            for (i, x) in v.iter().enumerate() {
                let n = (x * inverse).round_ties_even() as i32 as i8;
                sums[half] += i32::from(n);
                // SAFETY: the caller gives 32 writable elements.
                unsafe { *q.add(half * 16 + i) = n };
            }
        }
        Quantised { scale, sums }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Ymm2, Zmm};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, Quantised, scales};

    /// Two AVX2 registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Ymm2(pub(in super::super) __m256, pub(in super::super) __m256);

    /// One AVX-512 register.
    #[derive(Clone, Copy)]
    pub(crate) struct Zmm(pub(in super::super) __m512);

    /// Sum of 8 lanes: 4, 2, 1 apart.
    #[inline(always)]
    unsafe fn sum8(v: __m256) -> f32 {
        // SAFETY: register arithmetic; the caller has AVX.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }

    /// Sum of 8 i32 lanes (exact, so the order is free).
    #[inline(always)]
    unsafe fn isum8(v: __m256i) -> i32 {
        // SAFETY: register arithmetic; the caller has AVX2.
        unsafe {
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
            _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
        }
    }

    /// One operation on both halves.
    macro_rules! both {
        ($op:ident, $($arg:expr),+) => {
            // SAFETY: register arithmetic; the caller has AVX2, FMA and F16C.
            unsafe { Ymm2($op($($arg.0),+), $op($($arg.1),+)) }
        };
    }

    impl Lanes for Ymm2 {
        const WIDE: bool = false;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller has AVX2.
            unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: the caller gives 16 readable elements.
            unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self {
            // SAFETY: the caller gives 16 readable elements.
            unsafe {
                Self(
                    _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self {
            // SAFETY: the caller gives 16 readable elements.
            unsafe {
                let wide = |p: *const u16| {
                    let w = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w))
                };
                Self(wide(p), wide(p.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: the caller gives 16 writable elements.
            unsafe {
                _mm256_storeu_ps(p, self.0);
                _mm256_storeu_ps(p.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn store_f16(self, p: *mut u16) {
            // SAFETY: the caller gives 16 writable elements.
            unsafe {
                _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<0>(self.0));
                _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<0>(self.1));
            }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            both!(_mm256_add_ps, self, o)
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            both!(_mm256_sub_ps, self, o)
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            both!(_mm256_mul_ps, self, o)
        }
        #[inline(always)]
        unsafe fn div(self, o: Self) -> Self {
            both!(_mm256_div_ps, self, o)
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            both!(_mm256_fmadd_ps, self, b, c)
        }
        #[inline(always)]
        unsafe fn max(self, o: Self) -> Self {
            both!(_mm256_max_ps, self, o)
        }
        #[inline(always)]
        unsafe fn min(self, o: Self) -> Self {
            both!(_mm256_min_ps, self, o)
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe { Self(_mm256_round_ps::<8>(self.0), _mm256_round_ps::<8>(self.1)) }
        }
        #[inline(always)]
        unsafe fn pow2(self) -> Self {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe {
                let one = |n| {
                    let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
                };
                Self(one(self.0), one(self.1))
            }
        }
        #[inline(always)]
        unsafe fn finite(self) -> bool {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe {
                let e = _mm256_set1_epi32(0x7f80_0000);
                let bad = |v| _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(v), e), e);
                let any = _mm256_or_si256(bad(self.0), bad(self.1));
                _mm256_testz_si256(any, any) == 1
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: register arithmetic; the caller has AVX2.
            unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
        }
        #[inline(always)]
        unsafe fn quantise(a: Self, b: Self, q: *mut i8) -> Quantised {
            // SAFETY: the caller has AVX2 and gives 32 writable elements.
            unsafe {
                let mask = _mm256_set1_epi32(0x7fff_ffff);
                let abs = |v| _mm256_and_si256(_mm256_castps_si256(v), mask);
                let m = _mm256_max_epu32(
                    _mm256_max_epu32(abs(a.0), abs(a.1)),
                    _mm256_max_epu32(abs(b.0), abs(b.1)),
                );
                let m = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256::<1>(m));
                let m = _mm_max_epu32(m, _mm_shuffle_epi32::<0b01_00_11_10>(m));
                let m = _mm_max_epu32(m, _mm_shuffle_epi32::<0b10_11_00_01>(m));
                let (scale, inverse) = scales(f32::from_bits(_mm_cvtsi128_si32(m) as u32));
                let i = _mm256_set1_ps(inverse);
                let n = |v| _mm256_cvtps_epi32(_mm256_mul_ps(v, i));
                let (a0, a1, b0, b1) = (n(a.0), n(a.1), n(b.0), n(b.1));
                let sums = [isum8(_mm256_add_epi32(a0, a1)), isum8(_mm256_add_epi32(b0, b1))];
                let p = _mm256_packs_epi16(_mm256_packs_epi32(a0, a1), _mm256_packs_epi32(b0, b1));
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                _mm256_storeu_si256(q.cast(), _mm256_permutevar8x32_epi32(p, order));
                Quantised { scale, sums }
            }
        }
    }

    impl Lanes for Zmm {
        const WIDE: bool = true;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller has AVX-512.
            unsafe { Self(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: the caller gives 16 readable elements.
            unsafe { Self(_mm512_loadu_ps(p)) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self {
            // SAFETY: the caller gives 16 readable elements.
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self {
            // SAFETY: the caller gives 16 readable elements.
            unsafe {
                let w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: the caller gives 16 writable elements.
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn store_f16(self, p: *mut u16) {
            // SAFETY: the caller gives 16 writable elements.
            unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<0>(self.0)) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            // SAFETY: register arithmetic; the caller has AVX-512.
            unsafe { Self(_mm512_add_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_sub_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_mul_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, o: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_div_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, o: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_max_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn min(self, o: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_min_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm512_roundscale_ps::<0>(self.0)) }
        }
        #[inline(always)]
        unsafe fn pow2(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let n = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(n)))
            }
        }
        #[inline(always)]
        unsafe fn finite(self) -> bool {
            // SAFETY: as above.
            unsafe {
                let e = _mm512_set1_epi32(0x7f80_0000);
                let v = _mm512_and_si512(_mm512_castps_si512(self.0), e);
                _mm512_cmpeq_epi32_mask(v, e) == 0
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                sum8(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
            }
        }
        #[inline(always)]
        unsafe fn quantise(a: Self, b: Self, q: *mut i8) -> Quantised {
            // SAFETY: the caller has AVX-512 and gives 32 writable elements.
            unsafe {
                let mask = _mm512_set1_epi32(0x7fff_ffff);
                let abs = |v| _mm512_and_si512(_mm512_castps_si512(v), mask);
                let m = _mm512_reduce_max_epu32(_mm512_max_epu32(abs(a.0), abs(b.0)));
                let (scale, inverse) = scales(f32::from_bits(m));
                let i = _mm512_set1_ps(inverse);
                let na = _mm512_cvtps_epi32(_mm512_mul_ps(a.0, i));
                let nb = _mm512_cvtps_epi32(_mm512_mul_ps(b.0, i));
                _mm_storeu_si128(q.cast(), _mm512_cvtepi32_epi8(na));
                _mm_storeu_si128(q.add(16).cast(), _mm512_cvtepi32_epi8(nb));
                Quantised {
                    scale,
                    sums: [_mm512_reduce_add_epi32(na), _mm512_reduce_add_epi32(nb)],
                }
            }
        }
    }
}
