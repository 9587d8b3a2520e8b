//! The packed layout of quantised matrices, shared by packer and kernels.
//!
//! Rows come in groups of R (8, or 16 for AVX-512). A group holds, for each block of 32 inputs:
//! R scales, R minima (some formats), two times R sub-scales (Q6_K, Q3_K, Q2_K), as many factors of the
//! minima (Q2_K), then the quants. One vector of quants is R rows times four consecutive inputs (a
//! *quad*); where quants are nibbles, vector `v` holds quad `v` in the low and quad `v + 4` in the high
//! halves. A fifth bit lies in a vector behind those, bit `v` of quad `v`. Where quants have two bits,
//! vector `v` holds quads `v`, `v + 2`, `v + 4` and `v + 6`, from the low bits on. Rows are padded with
//! zeros to whole groups.

/// Revision of the packed layout, of floats too: to be raised with any change of it, because packed
/// matrices are kept in files. A test of the packers fails until it is.
pub(crate) const LAYOUT_REVISION: u32 = 3;

/// How a block of 32 inputs is stored and what is done with its integer dot product.
pub(crate) trait Format {
    /// Bits of a stored quant: 2, 4, 5 or 8.
    const BITS: usize;
    /// Scales and minima are f32, else f16.
    const WIDE_SCALE: bool;
    /// Has minima: `w = scale * q + min`; with an i8 factor for each 16 inputs where scales have one.
    const MIN: bool;
    /// What the unsigned quant exceeds the true one by; at 128 quants take all eight bits.
    const BIAS: i32;
    /// Has an i8 sub-scale for each 16 inputs.
    const HALVES: bool;
    /// What the four stored bits stand for, bias included.
    const TABLE: Option<&'static [u8; 16]>;

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
    /// Offset of the factors of minima, where scales have some: as sub-scales lie.
    fn sub_min_at(r: usize) -> usize {
        Self::sub_at(r) + 2 * r
    }
    /// Offset of the quants in a block.
    fn quants_at(r: usize) -> usize {
        match (Self::HALVES, Self::MIN) {
            (false, _) => Self::sub_at(r),
            (true, false) => Self::sub_at(r) + 2 * r,
            (true, true) => Self::sub_at(r) + 4 * r,
        }
    }
    /// Bytes of a block.
    fn block_bytes(r: usize) -> usize {
        Self::quants_at(r) + r * Self::BITS * 4
    }
    /// Quant `j` of lane `lane`, bias included; `byte(i)` is byte `i` of the block's quants.
    #[inline(always)]
    fn quant(byte: impl Fn(usize) -> u8, r: usize, lane: usize, j: usize) -> u8 {
        let (quad, at) = (j / 4, lane * 4 + j % 4);
        let nibble = || (byte((quad % 4) * r * 4 + at) >> (quad / 4 * 4)) & 15;
        match (Self::BITS, Self::TABLE) {
            (2, _) => (byte((quad % 2) * r * 4 + at) >> (quad / 2 * 2)) & 3,
            (4, Some(table)) => table[usize::from(nibble())],
            (4, None) => nibble(),
            (5, _) => nibble() | (((byte(r * 16 + at) >> quad) & 1) << 4),
            _ => byte(quad * r * 4 + at),
        }
    }
}

/// A table of i8 with a bias of 128.
const fn biased(table: [i8; 16]) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = table[i] as u8 ^ 0x80;
        i += 1;
    }
    out
}

/// The values of IQ4_NL and IQ4_XS.
static IQ4: [u8; 16] =
    biased([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]);
/// Twice the values of E2M1.
static E2M1: [u8; 16] = biased([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]);

macro_rules! formats {
    ($($(#[$doc:meta])* $name:ident: $bits:literal $wide:literal $min:literal $bias:literal $halves:literal $table:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub(crate) struct $name;
        impl Format for $name {
            const BITS: usize = $bits;
            const WIDE_SCALE: bool = $wide;
            const MIN: bool = $min;
            const BIAS: i32 = $bias;
            const HALVES: bool = $halves;
            const TABLE: Option<&'static [u8; 16]> = $table;
        }
    )*};
}

formats! {
    /// `d * (q - 8)`.
    Q4_0: 4 false false 8 false None;
    /// `d * q + m`.
    Q4_1: 4 false true 0 false None;
    /// `(d * sc) * q - dmin * m`, both products exact in f32.
    Q4K: 4 true true 0 false None;
    /// `d * (q - 16)`.
    Q5_0: 5 false false 16 false None;
    /// `d * q + m`.
    Q5_1: 5 false true 0 false None;
    /// As [`Q4K`].
    Q5K: 5 true true 0 false None;
    /// `d * q`, stored as `q + 128`.
    Q8_0: 8 false false 128 false None;
    /// `d * sc * q - dmin * m`, sc and m per 16.
    Q2K: 2 false true 0 true None;
    /// `d * sc * (q - 4)`, sc per 16.
    Q3K: 4 false false 4 true None;
    /// `d * sc * (q - 32)`, sc per 16.
    Q6K: 8 false false 32 true None;
    /// `d * table[q]`.
    Iq4Nl: 4 false false 128 false Some(&IQ4);
    /// `(d * sc) * table[q]`, the first product exact in f32.
    Iq4Xs: 4 true false 128 false Some(&IQ4);
    /// `2^e * table[q]`.
    Mxfp4: 4 true false 128 false Some(&E2M1);
}

/// Which format, at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Q4_0,
    Q4_1,
    Q4K,
    Q5_0,
    Q5_1,
    Q5K,
    Q8_0,
    Q2K,
    Q3K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
    F32,
    F16,
    Bf16,
}

/// Calls `$f::<F>` with the quantised format of a [`Kind`]; `$else` for the float kinds.
macro_rules! with_format {
    ($kind:expr, $f:ident ( $($arg:expr),* ), $else:expr) => {{
        use $crate::cpu::kernels::format::{self as formats, Kind};
        match $kind {
            Kind::Q4_0 => $f::<formats::Q4_0>($($arg),*),
            Kind::Q4_1 => $f::<formats::Q4_1>($($arg),*),
            Kind::Q4K => $f::<formats::Q4K>($($arg),*),
            Kind::Q5_0 => $f::<formats::Q5_0>($($arg),*),
            Kind::Q5_1 => $f::<formats::Q5_1>($($arg),*),
            Kind::Q5K => $f::<formats::Q5K>($($arg),*),
            Kind::Q8_0 => $f::<formats::Q8_0>($($arg),*),
            Kind::Q2K => $f::<formats::Q2K>($($arg),*),
            Kind::Q3K => $f::<formats::Q3K>($($arg),*),
            Kind::Q6K => $f::<formats::Q6K>($($arg),*),
            Kind::Iq4Nl => $f::<formats::Iq4Nl>($($arg),*),
            Kind::Iq4Xs => $f::<formats::Iq4Xs>($($arg),*),
            Kind::Mxfp4 => $f::<formats::Mxfp4>($($arg),*),
            Kind::F32 | Kind::F16 | Kind::Bf16 => $else,
        }
    }};
}
pub(crate) use with_format;
