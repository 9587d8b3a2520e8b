//! Loops that do nothing but what a limit is about: read memory, multiply and add in registers.
//!
//! The arithmetic loops are assembly, so that no compiler takes them apart. `cpu::limits` runs and
//! times them.

use crate::Isa;

/// How far ahead of the reads lines are fetched.
const AHEAD: usize = 4096;

/// What a loop multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Product {
    /// Bytes, added up as integers.
    Int8,
    /// f32 by fused multiply-add.
    Float,
}

/// Reads all of `data`, fetching ahead by instruction or leaving that to the processor (which of the
/// two is faster differs); returns something that depends on every byte.
pub(crate) fn read(isa: Isa, ahead: bool, data: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Scalar {
        // SAFETY: an instruction set above scalar is one that this machine has.
        return unsafe { if ahead { x86::read::<true>(data) } else { x86::read::<false>(data) } };
    }
    let _ = (isa, ahead);
    data.iter().fold(0, |sum, &x| sum ^ x)
}

/// Runs `turns` of the product loop; returns how many multiplications with additions those are, or
/// `None` where the instruction set has no loop.
pub(crate) fn multiply(isa: Isa, product: Product, turns: u64) -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: an instruction set above scalar is one that this machine has.
        unsafe {
            match (isa, product) {
                (Isa::Scalar, _) => return None,
                (Isa::Avx2, Product::Int8) => x86::maddubs(turns),
                (Isa::Avx2, Product::Float) => x86::fma_ymm(turns),
                (Isa::Avx512, Product::Int8) => x86::dpbusd(turns),
                (Isa::Avx512, Product::Float) => x86::fma_zmm(turns),
            }
        }
        let lanes = match (isa, product) {
            (Isa::Avx512, Product::Int8) => 64,
            (Isa::Avx2, Product::Int8) => 32,
            (Isa::Avx512, Product::Float) => 16,
            _ => 8,
        };
        Some(turns.max(1) * x86::ACCUMULATORS * lanes)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (isa, product, turns);
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    use super::AHEAD;

    /// Independent sums: more than latency times rate on the processors known.
    pub(super) const ACCUMULATORS: u64 = 12;

    /// # Safety
    /// AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn read<const FETCH: bool>(data: &[u64]) -> u64 {
        let mut sums = [_mm256_setzero_si256(); 4];
        let mut chunks = data.chunks_exact(32);
        for chunk in &mut chunks {
            let p = chunk.as_ptr().cast::<i8>();
            for line in 0..if FETCH { 4 } else { 0 } {
                _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + line * 64));
            }
            for i in 0..8 {
                // SAFETY: 256 bytes at `p`.
                let x = unsafe { _mm256_loadu_si256(p.add(i * 32).cast()) };
                sums[i % 4] = _mm256_xor_si256(sums[i % 4], x);
            }
        }
        let sum = _mm256_xor_si256(
            _mm256_xor_si256(sums[0], sums[1]),
            _mm256_xor_si256(sums[2], sums[3]),
        );
        let rest = chunks.remainder().iter().fold(0, |sum, &x| sum ^ x);
        rest ^ (_mm256_extract_epi64::<0>(sum)
            ^ _mm256_extract_epi64::<1>(sum)
            ^ _mm256_extract_epi64::<2>(sum)
            ^ _mm256_extract_epi64::<3>(sum)) as u64
    }

    /// A function that runs one instruction on each of 12 accumulators, over and over.
    macro_rules! looped {
        ($(#[$doc:meta])* $name:ident, $features:literal, $clear:literal, $($line:literal),+) => {
            $(#[$doc])*
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(turns: u64) {
                // SAFETY: registers named here alone are written, and nothing in memory.
                unsafe {
                    asm!(
                        $clear,
                        "2:",
                        $($line,)+
                        "dec {n}",
                        "jnz 2b",
                        n = inout(reg) turns.max(1) => _,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                        out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                        out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                        out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                        options(nomem, nostack),
                    );
                }
            }
        };
    }

    looped!(
        /// # Safety
        /// AVX-512 VNNI.
        dpbusd, "avx512f,avx512vnni", "vzeroall",
        "vpdpbusd zmm0, zmm14, zmm15", "vpdpbusd zmm1, zmm14, zmm15",
        "vpdpbusd zmm2, zmm14, zmm15", "vpdpbusd zmm3, zmm14, zmm15",
        "vpdpbusd zmm4, zmm14, zmm15", "vpdpbusd zmm5, zmm14, zmm15",
        "vpdpbusd zmm6, zmm14, zmm15", "vpdpbusd zmm7, zmm14, zmm15",
        "vpdpbusd zmm8, zmm14, zmm15", "vpdpbusd zmm9, zmm14, zmm15",
        "vpdpbusd zmm10, zmm14, zmm15", "vpdpbusd zmm11, zmm14, zmm15"
    );

    looped!(
        /// # Safety
        /// AVX-512 F.
        fma_zmm, "avx512f", "vzeroall",
        "vfmadd231ps zmm0, zmm14, zmm15", "vfmadd231ps zmm1, zmm14, zmm15",
        "vfmadd231ps zmm2, zmm14, zmm15", "vfmadd231ps zmm3, zmm14, zmm15",
        "vfmadd231ps zmm4, zmm14, zmm15", "vfmadd231ps zmm5, zmm14, zmm15",
        "vfmadd231ps zmm6, zmm14, zmm15", "vfmadd231ps zmm7, zmm14, zmm15",
        "vfmadd231ps zmm8, zmm14, zmm15", "vfmadd231ps zmm9, zmm14, zmm15",
        "vfmadd231ps zmm10, zmm14, zmm15", "vfmadd231ps zmm11, zmm14, zmm15"
    );

    looped!(
        /// # Safety
        /// AVX2 and FMA.
        fma_ymm, "avx2,fma", "vzeroall",
        "vfmadd231ps ymm0, ymm14, ymm15", "vfmadd231ps ymm1, ymm14, ymm15",
        "vfmadd231ps ymm2, ymm14, ymm15", "vfmadd231ps ymm3, ymm14, ymm15",
        "vfmadd231ps ymm4, ymm14, ymm15", "vfmadd231ps ymm5, ymm14, ymm15",
        "vfmadd231ps ymm6, ymm14, ymm15", "vfmadd231ps ymm7, ymm14, ymm15",
        "vfmadd231ps ymm8, ymm14, ymm15", "vfmadd231ps ymm9, ymm14, ymm15",
        "vfmadd231ps ymm10, ymm14, ymm15", "vfmadd231ps ymm11, ymm14, ymm15"
    );

    looped!(
        /// Products of bytes into i16, each added once: what every kernel without VNNI must do.
        ///
        /// # Safety
        /// AVX2.
        maddubs, "avx2", "vzeroall",
        "vpmaddubsw ymm12, ymm14, ymm15", "vpaddw ymm0, ymm0, ymm12",
        "vpmaddubsw ymm13, ymm14, ymm15", "vpaddw ymm1, ymm1, ymm13",
        "vpmaddubsw ymm12, ymm14, ymm15", "vpaddw ymm2, ymm2, ymm12",
        "vpmaddubsw ymm13, ymm14, ymm15", "vpaddw ymm3, ymm3, ymm13",
        "vpmaddubsw ymm12, ymm14, ymm15", "vpaddw ymm4, ymm4, ymm12",
        "vpmaddubsw ymm13, ymm14, ymm15", "vpaddw ymm5, ymm5, ymm13",
        "vpmaddubsw ymm12, ymm14, ymm15", "vpaddw ymm6, ymm6, ymm12",
        "vpmaddubsw ymm13, ymm14, ymm15", "vpaddw ymm7, ymm7, ymm13",
        "vpmaddubsw ymm12, ymm14, ymm15", "vpaddw ymm8, ymm8, ymm12",
        "vpmaddubsw ymm13, ymm14, ymm15", "vpaddw ymm9, ymm9, ymm13",
        "vpmaddubsw ymm12, ymm14, ymm15", "vpaddw ymm10, ymm10, ymm12",
        "vpmaddubsw ymm13, ymm14, ymm15", "vpaddw ymm11, ymm11, ymm13"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_sees_every_byte() {
        let mut data: Vec<u64> = (0..101).collect();
        let all = data.iter().fold(0, |sum, &x| sum ^ x);
        for (isa, ahead) in [(Isa::Scalar, false), (Isa::best(), false), (Isa::best(), true)] {
            assert_eq!(read(isa, ahead, &data), all);
            for i in [0, 17, 63, 100] {
                data[i] ^= 1 << 40;
                assert_eq!(read(isa, ahead, &data), all ^ (1 << 40));
                data[i] ^= 1 << 40;
            }
        }
    }
}
