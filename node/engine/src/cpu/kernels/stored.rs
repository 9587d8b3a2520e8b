//! How keys and values lie in the cache, and products with them as they lie.
//!
//! A block holds `block_size` positions of each KV head in one slice: first the elements, then (int8
//! alone) an f32 scale per position. Elements come in rows of sixteen columns. Keys: columns are
//! positions, `[position / 16][dim / step][16][step]`, so that a score is one lane. Values: columns
//! are dimensions, `[position / step][dim][step]`. `step` is 4 for int8, so that a row is quads for
//! integer products, else 1; integers are stored 128 too large, as u8. Smaller blocks have as many
//! columns of keys as positions, and the smallest shorter steps of values; [`super::part`] copies
//! those together.

use millrace_shared::model::Dtype;

use super::quads::{FACTOR_BYTES, Quads};

/// Stored type of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvType {
    F32,
    F16,
    /// With a scale per position and head: `x ~ scale * q`, `scale = absmax / 127`.
    Int8,
}

impl KvType {
    /// What the cache can be; `None` for other types.
    pub(crate) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::Int8 => Some(Self::Int8),
            Dtype::Bf16 | Dtype::U32 => None,
        }
    }

    /// Bytes of one element.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Elements of a column that lie together.
    pub(crate) fn step(self) -> usize {
        if self == Self::Int8 { 4 } else { 1 }
    }

    /// Bytes of the elements of one head of a block; scales follow.
    pub(crate) fn element_bytes(self, block_size: usize, dim: usize) -> usize {
        block_size * dim * self.bytes()
    }

    /// Bytes of one head of a block, scales included.
    pub(crate) fn head_bytes(self, block_size: usize, dim: usize) -> usize {
        let scales = if self == Self::Int8 { block_size * 4 } else { 0 };
        self.element_bytes(block_size, dim) + scales
    }
}

/// A stored type as the kernels see it.
///
/// # Safety
/// As of [`Quads`]; pointers are valid for what is read.
pub(crate) trait Stored<V: Quads> {
    /// Elements of a column in a row.
    const STEP: usize;
    /// Bytes of a row of sixteen columns.
    const ROW: usize;
    /// Bytes of the other factor of a row.
    const FACTOR: usize;
    /// Whether rows are worth asking for in advance: four bytes an element are in the first cache.
    const AHEAD: bool;
    /// Whether it has scales and takes the other factor as integers.
    const INTEGER: bool;
    type Row: Copy;
    type Factor: Copy;
    type Sums: Copy;
    unsafe fn zero() -> Self::Sums;
    unsafe fn row(p: *const u8) -> Self::Row;
    /// The other factor, for every column: an f32, or four integers.
    unsafe fn factor(p: *const u8) -> Self::Factor;
    unsafe fn dot(sums: Self::Sums, row: Self::Row, factor: Self::Factor) -> Self::Sums;
    /// Sums as floats; `excess` is what integer ones are too large by.
    unsafe fn float(sums: Self::Sums, excess: i32) -> V;
    /// Sums to go on from. Integer sums never are.
    unsafe fn resume(from: V) -> Self::Sums;
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct F32;
#[derive(Clone, Copy, Debug)]
pub(crate) struct F16;
#[derive(Clone, Copy, Debug)]
pub(crate) struct Int8;

macro_rules! float {
    ($name:ident, $bytes:literal, |$p:ident| $load:expr) => {
        impl<V: Quads> Stored<V> for $name {
            const STEP: usize = 1;
            const ROW: usize = 16 * $bytes;
            const FACTOR: usize = 4;
            const AHEAD: bool = $bytes == 2;
            const INTEGER: bool = false;
            type Row = V;
            type Factor = V;
            type Sums = V;
            #[inline(always)]
            unsafe fn zero() -> V {
                // SAFETY: the caller has the instruction set.
                unsafe { V::splat(0.0) }
            }
            #[inline(always)]
            unsafe fn row($p: *const u8) -> V {
                // SAFETY: the caller gives a row.
                unsafe { $load }
            }
            #[inline(always)]
            unsafe fn factor(p: *const u8) -> V {
                // SAFETY: the caller gives an f32.
                unsafe { V::splat(p.cast::<f32>().read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn dot(sums: V, row: V, factor: V) -> V {
                // SAFETY: the caller has the instruction set.
                unsafe { row.fma(factor, sums) }
            }
            #[inline(always)]
            unsafe fn float(sums: V, _: i32) -> V {
                sums
            }
            #[inline(always)]
            unsafe fn resume(from: V) -> V {
                from
            }
        }
    };
}
float!(F32, 4, |p| V::load(p.cast()));
float!(F16, 2, |p| V::load_f16(p.cast()));

impl<V: Quads> Stored<V> for Int8 {
    const STEP: usize = 4;
    const ROW: usize = 64;
    const FACTOR: usize = FACTOR_BYTES;
    const AHEAD: bool = true;
    const INTEGER: bool = true;
    type Row = V::Row;
    type Factor = V::Factor;
    type Sums = V::Sums;
    #[inline(always)]
    unsafe fn zero() -> V::Sums {
        // SAFETY: the caller has the instruction set.
        unsafe { V::zero() }
    }
    #[inline(always)]
    unsafe fn row(p: *const u8) -> V::Row {
        // SAFETY: the caller gives a row.
        unsafe { V::quads(p) }
    }
    #[inline(always)]
    unsafe fn factor(p: *const u8) -> V::Factor {
        // SAFETY: the caller gives four factors.
        unsafe { V::factor(p) }
    }
    #[inline(always)]
    unsafe fn dot(sums: V::Sums, row: V::Row, factor: V::Factor) -> V::Sums {
        // SAFETY: the caller has the instruction set.
        unsafe { V::dot(sums, row, factor) }
    }
    #[inline(always)]
    unsafe fn float(sums: V::Sums, excess: i32) -> V {
        // SAFETY: the caller has the instruction set.
        unsafe { V::float(sums, excess) }
    }
    #[inline(always)]
    unsafe fn resume(_: V) -> V::Sums {
        unreachable!("integer products never go on from a float")
    }
}
