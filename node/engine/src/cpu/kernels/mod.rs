//! Kernels: the only arithmetic of the CPU engine, each in three instruction sets that give the
//! same bits.
//!
//! Quantised matrix products (`scalar`, `avx2`, `avx512`) are written per instruction set; all
//! else (`elementwise`, `attention`, float products in `matmul`) once over [`lanes::Lanes`].
//! `matmul` splits products over threads and tiles. Nothing here allocates.

// Tiles are small arrays of registers, walked in step.
#![allow(clippy::needless_range_loop)]

pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod best;
pub(crate) mod elementwise;
pub(crate) mod format;
pub(crate) mod lanes;
pub(crate) mod limits;
pub(crate) mod matmul;
pub(crate) mod mixture;
pub(crate) mod paged;
mod part;
mod products;
#[cfg(test)]
mod properties;
mod quads;
mod records;
pub(crate) mod rows;
mod scalar;
mod softmax;
mod store;
pub(crate) mod stored;
#[cfg(test)]
mod tests;

use crate::Isa;
use crate::cpu::pack::Run;

/// One group of rows times some columns. A tile kernel may read what `runs` name of the group at `w`,
/// and all of as many columns (`blocks` apart) as it is told, and writes `rows` outputs per column,
/// `stride` apart. It multiplies the blocks of `runs`; all others are zeros.
struct Tile<'a> {
    w: *const u8,
    runs: &'a [Run],
    blocks: usize,
    q: *const i8,
    scale: *const f32,
    scaled_sum: *const f32,
    sums: *const [i32; 2],
    out: *mut f32,
    stride: usize,
    /// Valid rows of the group.
    rows: usize,
    /// Add to the outputs instead of replacing them.
    add: bool,
}

/// Rows per group of quantised matrices.
pub(crate) fn group_rows(isa: Isa) -> usize {
    if isa == Isa::Avx512 { 16 } else { 8 }
}

/// Defines a function of `isa` that calls a kernel generic over [`lanes::Lanes`], compiled for each
/// instruction set.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident = $generic:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?;) => {
        $(#[$doc])*
        $vis unsafe fn $name(isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller's promise, and this function has the features.
                unsafe { $generic::<$crate::cpu::kernels::lanes::Ymm2>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller's promise, and this function has the features.
                unsafe { $generic::<$crate::cpu::kernels::lanes::Zmm>($($arg),*) }
            }
            // SAFETY: the caller's promise; an `Isa` above scalar is only used where the machine
            // has it (`CpuEngine::load` checks).
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::Isa::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::Isa::Avx2 => avx2($($arg),*),
                    _ => $generic::<$crate::cpu::kernels::lanes::Plain>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use dispatch;
