//! Load-time repacking: from the rows of a model file to the layout of `kernels::format`.
//!
//! Values do not change: quants and scales are moved, and for Q4_K the products of scales, exact in
//! f32, are formed once. Types without a kernel of their own are packed as one that holds each of
//! their values exactly (`converted`); types of which none does are not packed at all. Also unpacks
//! single rows, for the embedding.

mod blocks;
mod converted;
#[cfg(test)]
mod golden;
mod kept;
#[cfg(test)]
mod revision;
mod rows;

use millrace_shared::model::TensorType;

#[cfg(test)]
use super::buffer::Arena;
use super::buffer::Frozen;
use super::kernels::format::{Format, Kind, with_format};
#[cfg(test)]
use crate::LoadError;
pub(crate) use kept::{Kept, Run};
pub use kept::{ZERO_TILE, ZEROS_WORTH, ZEROS_WORTH_FEW};
use rows::{Stored, pack_floats, pack_quants, with_stored};

/// Rows of a float matrix that lie interleaved, whatever the instruction set.
pub(crate) const FLOAT_ROWS: usize = 16;

/// Fills a buffer with whole rows of the file, from the given row on.
#[cfg(test)]
type ReadRows<'a> = dyn FnMut(usize, &mut [u8]) -> Result<(), LoadError> + 'a;

/// A file's type and what its matrices are packed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    from: TensorType,
    kind: Kind,
}

/// How a matrix `rows x cols` is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// As in the file.
    from: TensorType,
    pub(crate) kind: Kind,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Rows per group.
    pub(crate) r: usize,
    /// Bytes of one group of rows.
    pub(crate) group_bytes: usize,
}

/// A matrix `rows x cols`, packed.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) kind: Kind,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Rows per group.
    pub(crate) r: usize,
    /// Bytes of one group of rows; a mean where zeros are left out.
    pub(crate) group_bytes: usize,
    pub(crate) data: Frozen<u8>,
    /// Blocks that are not zeros, where many are.
    kept: Option<Kept>,
    /// Bytes of a block.
    block_bytes: usize,
}

/// What matrices of a file's type are packed as; `None` where the engine has nothing for it.
pub(crate) fn kind_of(dtype: TensorType) -> Option<Packing> {
    let kind = match dtype.computed_as()? {
        TensorType::F32 => Kind::F32,
        TensorType::F16 => Kind::F16,
        TensorType::BF16 => Kind::Bf16,
        TensorType::Q4_0 => Kind::Q4_0,
        TensorType::Q4_1 => Kind::Q4_1,
        TensorType::Q8_0 => Kind::Q8_0,
        TensorType::Q4_K | TensorType::INT4 => Kind::Q4K,
        TensorType::Q5_0 => Kind::Q5_0,
        TensorType::Q5_1 => Kind::Q5_1,
        TensorType::Q5_K => Kind::Q5K,
        TensorType::Q2_K => Kind::Q2K,
        TensorType::Q3_K => Kind::Q3K,
        TensorType::Q6_K => Kind::Q6K,
        TensorType::IQ4_NL => Kind::Iq4Nl,
        TensorType::IQ4_XS => Kind::Iq4Xs,
        TensorType::MXFP4 => Kind::Mxfp4,
        _ => return None,
    };
    Some(Packing { from: dtype.read_as(), kind })
}

/// Bytes of a matrix of `rows x cols` in memory, on the instruction set with the largest groups of
/// rows; `None` where the engine has nothing for the type, or a row is no whole number of blocks.
pub fn packed_bytes(dtype: TensorType, rows: u64, cols: u64) -> Option<u64> {
    let size = (usize::try_from(rows).ok()?, usize::try_from(cols).ok()?);
    if !cols.is_multiple_of(dtype.block_elements()) {
        return None;
    }
    Some(Layout::new(kind_of(dtype)?, size, FLOAT_ROWS).bytes())
}

fn block_bytes<F: Format>(r: usize) -> usize {
    F::block_bytes(r)
}

impl Layout {
    /// Of a matrix; `r` is the rows per group of quantised kinds.
    pub(crate) fn new(packing: Packing, (rows, cols): (usize, usize), r: usize) -> Self {
        let Packing { from, kind } = packing;
        let (r, group_bytes) = match kind {
            Kind::F32 => (FLOAT_ROWS, FLOAT_ROWS * cols * 4),
            Kind::F16 | Kind::Bf16 => (FLOAT_ROWS, FLOAT_ROWS * cols * 2),
            _ => (r, cols / 32 * with_format!(kind, block_bytes(r), 0)),
        };
        Self { from, kind, rows, cols, r, group_bytes }
    }

    /// Groups of rows.
    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(self.r)
    }

    /// Bytes of 32 columns of one group of rows.
    pub(crate) fn block_bytes(&self) -> usize {
        self.group_bytes / (self.cols / 32).max(1)
    }

    /// Bytes of the packed matrix; the greatest number where they overflow.
    pub(crate) fn bytes(&self) -> u64 {
        (self.groups() as u64).saturating_mul(self.group_bytes as u64)
    }

    /// Bytes of a row in the file.
    pub(crate) fn row_bytes(&self) -> usize {
        self.cols / self.from.block_elements() as usize * self.from.block_bytes() as usize
    }

    /// Packs whole groups (the last one of the matrix may have fewer rows): `rows` as in the file
    /// into `out`, which is zero.
    pub(crate) fn pack(&self, rows: &[u8], out: &mut [u8]) {
        let groups = rows.chunks(self.r * self.row_bytes());
        for (rows, out) in groups.zip(out.chunks_exact_mut(self.group_bytes)) {
            match self.kind {
                Kind::F32 => pack_floats::<4>(rows, FLOAT_ROWS, self.cols, out),
                Kind::F16 | Kind::Bf16 => pack_floats::<2>(rows, FLOAT_ROWS, self.cols, out),
                _ => with_stored!(self.from, pack_quants(rows, self.r, self.cols, out), {}),
            }
        }
    }
}

fn u16_at(b: &[u8], i: usize) -> u16 {
    u16::from_le_bytes([b[i], b[i + 1]])
}

fn f16_at(b: &[u8], i: usize) -> f32 {
    half::f16::from_bits(u16_at(b, i)).to_f32()
}

/// 6-bit scale and minimum `j` of a Q4_K block.
fn q4k_scales(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    }
}

/// Reads lane `lane` of a packed block back: dequantised values.
fn unpack_block<F: Format>(data: &[u8], r: usize, lane: usize, out: &mut [f32]) {
    let value = |at: usize| {
        if F::WIDE_SCALE {
            let at = at + lane * 4;
            f32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]])
        } else {
            f16_at(data, at + lane * 2)
        }
    };
    let scale = value(0);
    let quants = &data[F::quants_at(r)..];
    for (j, out) in out.iter_mut().enumerate() {
        let q = (i32::from(F::quant(|i| quants[i], r, lane, j)) - F::BIAS) as f32;
        let sub = |at: usize| f32::from(data[at + (j / 16) * r + lane] as i8);
        *out = if F::MIN && F::HALVES {
            (scale * sub(F::sub_at(r))).mul_add(q, value(F::min_at(r)) * sub(F::sub_min_at(r)))
        } else if F::MIN {
            scale.mul_add(q, value(F::min_at(r)))
        } else if F::HALVES {
            (scale * sub(F::sub_at(r))) * q
        } else {
            scale * q
        };
    }
}

fn unpack_row<F: Format>(group: &[u8], r: usize, lane: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        unpack_block::<F>(&group[i * F::block_bytes(r)..], r, lane, out);
    }
}

/// A row in the file's layout as numbers, exactly as rows that are packed read back; `out` has the
/// row's elements. `false` where the engine does not know the type.
pub fn dequantise_row(dtype: TensorType, row: &[u8], out: &mut [f32]) -> bool {
    let Some(Packing { from, kind }) = kind_of(dtype).filter(|p| p.from == dtype) else {
        return false;
    };
    let halves = row.chunks_exact(2).map(|b| u16_at(b, 0));
    match kind {
        Kind::F32 => {
            for (out, b) in out.iter_mut().zip(row.chunks_exact(4)) {
                *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Kind::F16 => {
            out.iter_mut().zip(halves).for_each(|(o, b)| *o = half::f16::from_bits(b).to_f32());
        }
        Kind::Bf16 => {
            out.iter_mut().zip(halves).for_each(|(o, b)| *o = half::bf16::from_bits(b).to_f32());
        }
        _ => with_stored!(from, dequantise_blocks(row, out), {}),
    }
    true
}

fn dequantise_blocks<S: Stored>(row: &[u8], out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let block = &row[i / S::PARTS * S::FILE_BYTES..][..S::FILE_BYTES];
        S::read(block, i % S::PARTS).dequantise::<S::Packed>(out);
    }
}

impl Packed {
    /// A matrix that was packed so.
    pub(crate) fn new(layout: Layout, data: Frozen<u8>) -> Self {
        assert_eq!(data.len() as u64, layout.bytes(), "invariant: all groups");
        let kept = Kept::find(&layout, &data);
        Self::of(layout, data, kept)
    }

    /// A matrix of which only `kept` was packed.
    pub(crate) fn without_zeros(layout: Layout, data: Frozen<u8>, kept: Kept) -> Self {
        assert_eq!(data.len() as u64, kept.bytes(&layout), "invariant: all that is kept");
        let group_bytes = (data.len() / layout.groups().max(1)).max(1);
        Self { group_bytes, ..Self::of(layout, data, Some(kept)) }
    }

    fn of(layout: Layout, data: Frozen<u8>, kept: Option<Kept>) -> Self {
        let Layout { kind, rows, cols, r, group_bytes, .. } = layout;
        let block_bytes = layout.block_bytes();
        Self { kind, rows, cols, r, group_bytes, data, kept, block_bytes }
    }

    /// Where a group of rows begins.
    pub(crate) fn group_at(&self, group: usize) -> usize {
        let start = self.kept.as_ref().and_then(|kept| kept.start(group));
        start.map_or(group * self.group_bytes, |blocks| blocks as usize * self.block_bytes)
    }

    /// The runs of blocks of a group that products with so many columns read; `all` are those of a
    /// matrix without zeros.
    pub(crate) fn runs<'a>(&'a self, group: usize, columns: usize, all: &'a [Run]) -> &'a [Run] {
        let kept = self.kept.as_ref().filter(|kept| kept.pays(columns));
        kept.map_or(all, |kept| kept.group(group))
    }

    /// The same matrix, of which products read every block.
    #[cfg(test)]
    pub(crate) fn with_zeros(mut self) -> Self {
        let kept = self.kept.take();
        assert!(kept.is_some_and(|kept| kept.start(0).is_none()), "it has blocks of zeros");
        self
    }

    /// Packs a matrix of a supported type whose rows, as in the file, `read(first_row, bytes)` gives.
    #[cfg(test)]
    pub(crate) fn pack(
        dtype: TensorType,
        size: (usize, usize),
        r: usize,
        arena: &mut Arena,
        read: &mut ReadRows<'_>,
    ) -> Result<Self, LoadError> {
        let layout = Layout::new(kind_of(dtype).unwrap(), size, r);
        let mut data = arena.take::<u8>(layout.bytes() as usize)?;
        let mut rows = vec![0u8; layout.rows * layout.row_bytes()];
        read(0, &mut rows)?;
        layout.pack(&rows, &mut data);
        Ok(Self::new(layout, data.freeze()))
    }

    /// Groups of rows.
    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(self.r)
    }

    /// Row `row`, dequantised, into `out` of `cols`; all of its blocks are in memory.
    pub(crate) fn unpack(&self, row: usize, out: &mut [f32]) {
        let (r, lane) = (self.r, row % self.r);
        let group = &self.data[row / r * self.group_bytes..][..self.group_bytes];
        let half = |k: usize| u16_at(group, (k * r + lane) * 2);
        match self.kind {
            Kind::F32 => {
                for (k, out) in out.iter_mut().enumerate() {
                    let b = &group[(k * r + lane) * 4..][..4];
                    *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Kind::F16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = half::f16::from_bits(half(k)).to_f32();
                }
            }
            Kind::Bf16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = half::bf16::from_bits(half(k)).to_f32();
                }
            }
            _ => with_format!(self.kind, unpack_row(group, r, lane, out), {}),
        }
    }
}
