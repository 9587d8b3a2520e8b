//! The packed layout of quantised matrices, shared by packer and kernels.
//!
//! Rows come in groups of R (8, or 16 for AVX-512). A group holds, for each block of 32 inputs:
//! R scales, R minima (some formats), two times R sub-scales (Q6_K), then the quants. One vector of
//! quants is R rows times four consecutive inputs (a *quad*); where quants are nibbles, vector `v`
//! holds quad `v` in the low and quad `v + 4` in the high halves. Rows are padded with zeros to
//! whole groups.

/// Revision of the packed layout, of floats too: to be raised with any change of it, because packed
/// matrices are kept in files. A test of the packers fails until it is.
pub(crate) const LAYOUT_REVISION: u32 = 1;

/// How a block of 32 inputs is stored and what is done with its integer dot product.
pub(crate) trait Format {
    /// Two quants a byte.
    const NIBBLES: bool;
    /// Scales and minima are f32, else f16.
    const WIDE_SCALE: bool;
    /// Has minima: `w = scale * q + min`.
    const MIN: bool;
    /// What the stored unsigned quant exceeds the true one by.
    const BIAS: i32;
    /// Has an i8 sub-scale for each 16 inputs.
    const HALVES: bool;

    /// Bytes of one scale.
    const SCALE_BYTES: usize = if Self::WIDE_SCALE { 4 } else { 2 };

    /// Offset of the minima in a block.
    fn min_at(r: usize) -> usize {
        r * Self::SCALE_BYTES
    }
    /// Offset of the sub-scales in a block: R for the first 16 inputs, R for the others.
    fn sub_at(r: usize) -> usize {
        r * Self::SCALE_BYTES * if Self::MIN { 2 } else { 1 }
    }
    /// Offset of the quants in a block.
    fn quants_at(r: usize) -> usize {
        Self::sub_at(r) + if Self::HALVES { 2 * r } else { 0 }
    }
    /// Bytes of a block.
    fn block_bytes(r: usize) -> usize {
        Self::quants_at(r) + r * if Self::NIBBLES { 16 } else { 32 }
    }
}

macro_rules! formats {
    ($($(#[$doc:meta])* $name:ident: $nib:literal $wide:literal $min:literal $bias:literal $halves:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub(crate) struct $name;
        impl Format for $name {
            const NIBBLES: bool = $nib;
            const WIDE_SCALE: bool = $wide;
            const MIN: bool = $min;
            const BIAS: i32 = $bias;
            const HALVES: bool = $halves;
        }
    )*};
}

formats! {
    /// `d * (q - 8)`.
    Q4_0: true false false 8 false;
    /// `d * q + m`.
    Q4_1: true false true 0 false;
    /// `(d * sc) * q - dmin * m`, both products exact in f32.
    Q4K: true true true 0 false;
    /// `d * q`, stored as `q + 128`.
    Q8_0: false false false 128 false;
    /// `d * sc * (q - 32)`, sc per 16.
    Q6K: false false false 32 true;
}

/// Which format, at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Q4_0,
    Q4_1,
    Q4K,
    Q8_0,
    Q6K,
    F32,
    F16,
    Bf16,
}

/// Calls `$f::<F>` with the quantised format of a [`Kind`]; `$else` for the float kinds.
macro_rules! with_format {
    ($kind:expr, $f:ident ( $($arg:expr),* ), $else:expr) => {
        match $kind {
            $crate::cpu::kernels::format::Kind::Q4_0 =>
                $f::<$crate::cpu::kernels::format::Q4_0>($($arg),*),
            $crate::cpu::kernels::format::Kind::Q4_1 =>
                $f::<$crate::cpu::kernels::format::Q4_1>($($arg),*),
            $crate::cpu::kernels::format::Kind::Q4K =>
                $f::<$crate::cpu::kernels::format::Q4K>($($arg),*),
            $crate::cpu::kernels::format::Kind::Q8_0 =>
                $f::<$crate::cpu::kernels::format::Q8_0>($($arg),*),
            $crate::cpu::kernels::format::Kind::Q6K =>
                $f::<$crate::cpu::kernels::format::Q6K>($($arg),*),
            _ => $else,
        }
    };
}
pub(crate) use with_format;
