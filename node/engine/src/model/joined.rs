//! Matrices that checkpoints keep as several tensors: quants, scales, zeros, an order of groups.
//!
//! A [`Joined`] reads as if the matrix lay row by row in one of the engine's types
//! (`TensorType::read_as`), so that what comes after knows nothing of it. Conventions: GPTQ packs
//! eight inputs of an output into a word, AWQ (GEMM) eight outputs of an input, in an order of its
//! own; zeros are packed as AWQ's quants in both, in GPTQ's plain order. FP8 rows are as they are.
//! Nothing is kept in memory but the rows that are asked for.

use std::fs::File;
use std::os::unix::fs::FileExt;

use half::f16;
use millrace_shared::model::{TensorEntry, TensorType};

use super::source::floats;
use crate::{LoadError, TensorSource};

/// Inputs of a block.
const BLOCK: usize = 32;
/// Bytes of a block of INT4: scale, minimum, nibbles.
const BLOCK_BYTES: usize = 24;
/// Rows and columns that share a scale of FP8 in blocks.
const TILE: usize = 128;
/// Which nibble of a word AWQ keeps an output in.
const AWQ_ORDER: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A matrix and what makes it one.
#[derive(Clone, Debug)]
pub struct Joined {
    /// As it reads.
    entry: TensorEntry,
    matrix: TensorSource,
    scales: TensorSource,
    /// Of integers alone.
    zeros: Option<TensorSource>,
    /// The group of each input, where groups are scattered or might be.
    order: Option<TensorSource>,
}

impl Joined {
    /// A matrix among `tensors` that have its parts.
    ///
    /// # Errors
    /// If one is missing.
    pub(super) fn new(
        matrix: &TensorSource,
        find: impl Fn(&str) -> Option<TensorSource>,
    ) -> Result<Self, LoadError> {
        let dtype = matrix.entry.dtype;
        let stem = matrix.entry.name.strip_suffix("weight").unwrap_or(&matrix.entry.name);
        let part = |part: &str| {
            let Some((_, needed)) = dtype.parts().iter().find(|(name, _)| *name == part) else {
                return Ok(None);
            };
            let name = format!("{stem}{part}");
            match find(&name) {
                None if *needed => Err(LoadError::MissingTensor(name)),
                found => Ok(found),
            }
        };
        let scales = part("scales")?.ok_or_else(|| LoadError::MissingTensor(stem.to_owned()))?;
        let (zeros, order) = (part("qzeros")?, part("g_idx")?);
        let entry = TensorEntry { dtype: dtype.read_as(), ..matrix.entry.clone() };
        Ok(Self { entry, matrix: matrix.clone(), scales, zeros, order })
    }

    /// Name, type as it reads, dimensions.
    pub fn entry(&self) -> &TensorEntry {
        &self.entry
    }

    /// All its tensors as files have them.
    pub fn parts(&self) -> impl Iterator<Item = &TensorSource> {
        [Some(&self.matrix), Some(&self.scales), self.zeros.as_ref(), self.order.as_ref()]
            .into_iter()
            .flatten()
    }

    /// Fills `out` with whole rows from byte `offset` of the matrix as it reads.
    ///
    /// # Errors
    /// If a file cannot be read, a value is beyond F16, or groups are not as the type says.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), LoadError> {
        let &[cols, rows] = &self.entry.dims[..] else {
            return Err(self.wrong("it is no matrix"));
        };
        let (cols, rows) = (cols as usize, rows as usize);
        let dtype = self.entry.dtype;
        let row_bytes = cols / dtype.block_elements() as usize * dtype.block_bytes() as usize;
        let some = Rows { first: offset as usize / row_bytes, count: out.len() / row_bytes, rows };
        let whole =
            (offset as usize).is_multiple_of(row_bytes) && out.len().is_multiple_of(row_bytes);
        assert!(whole && some.first + some.count <= rows, "invariant: whole rows are read");
        match self.matrix.entry.dtype {
            TensorType::F8_E4M3 | TensorType::F8_E4M3_B128 => self.read_floats(some, cols, out),
            _ => self.read_integers(some, cols, out),
        }
    }

    fn wrong(&self, problem: &str) -> LoadError {
        LoadError::Settings(format!("tensor '{}': {problem}", self.entry.name))
    }

    fn read_floats(&self, some: Rows, cols: usize, out: &mut [u8]) -> Result<(), LoadError> {
        let mut bytes = vec![0; some.count * cols];
        Part::open(&self.matrix)?.read(some.first * cols, &mut bytes)?;
        let scales = Part::open(&self.scales)?;
        let blocks = self.matrix.entry.dtype == TensorType::F8_E4M3_B128;
        let first = some.first / TILE;
        let scales = if blocks {
            let lines = (some.first + some.count).div_ceil(TILE) - first;
            let width = cols.div_ceil(TILE);
            scales.floats(first * width, lines * width)?
        } else if self.scales.entry.elements() == 1 {
            vec![scales.floats(0, 1)?[0]; some.count]
        } else {
            scales.floats(some.first, some.count)?
        };
        let table: [f32; 256] = std::array::from_fn(|b| e4m3(b as u8));
        for (i, byte) in bytes.into_iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let scale = match blocks {
                true => {
                    let tile = (some.first + row) / TILE - first;
                    scales[tile * cols.div_ceil(TILE) + col / TILE]
                }
                false => scales[row],
            };
            self.put(table[usize::from(byte)] * scale, &mut out[i * 2..][..2])?;
        }
        Ok(())
    }

    /// Stores a value as F16.
    fn put(&self, value: f32, out: &mut [u8]) -> Result<(), LoadError> {
        let value = f16::from_f32(value);
        if !value.is_finite() {
            return Err(self.wrong("a weight is no number, or beyond F16, which it is kept as"));
        }
        out.copy_from_slice(&value.to_bits().to_le_bytes());
        Ok(())
    }

    fn read_integers(&self, some: Rows, cols: usize, out: &mut [u8]) -> Result<(), LoadError> {
        let quants = self.quants(some, cols)?;
        let (groups, scales) = self.scales(some)?;
        let zeros = self.zeros(some, groups)?;
        let order = self.order(cols, groups)?;
        if let (TensorType::F16, Some(order)) = (self.entry.dtype, &order) {
            for (i, quant) in quants.iter().enumerate() {
                let (row, col) = (i / cols, i % cols);
                let at = order[col] * some.count + row;
                let value = scales[at] * f32::from(i16::from(*quant) - i16::from(zeros[at]));
                self.put(value, &mut out[i * 2..][..2])?;
            }
            return Ok(());
        }
        let blocks = quants.chunks_exact(BLOCK).zip(out.chunks_exact_mut(BLOCK_BYTES));
        for (i, (quants, out)) in blocks.enumerate() {
            let (row, block) = (i / (cols / BLOCK), i % (cols / BLOCK));
            let at = block * BLOCK / (cols / groups) * some.count + row;
            // At most 16 times a number of 11 bits: exact.
            let min = -(scales[at] * f32::from(zeros[at]));
            out[..4].copy_from_slice(&scales[at].to_le_bytes());
            out[4..8].copy_from_slice(&min.to_le_bytes());
            for (j, out) in out[8..].iter_mut().enumerate() {
                *out = quants[j] | (quants[j + 16] << 4);
            }
        }
        Ok(())
    }

    /// Quants of some rows, a byte each, row by row.
    fn quants(&self, some: Rows, cols: usize) -> Result<Vec<u8>, LoadError> {
        let file = Part::open(&self.matrix)?;
        let mut out = vec![0u8; some.count * cols];
        if self.matrix.entry.dtype == TensorType::AWQ_4 {
            let words = some.words();
            for col in 0..cols {
                let line = file.words(col * some.rows / 8 + words.start, words.len())?;
                for row in 0..some.count {
                    out[row * cols + col] = some.nibble(&line, row, &AWQ_ORDER);
                }
            }
            return Ok(out);
        }
        for eight in 0..cols / 8 {
            let line = file.words(eight * some.rows + some.first, some.count)?;
            for (row, word) in line.into_iter().enumerate() {
                let out = &mut out[row * cols + eight * 8..][..8];
                out.iter_mut().enumerate().for_each(|(j, q)| *q = (word >> (j * 4)) as u8 & 15);
            }
        }
        Ok(out)
    }

    /// How many groups there are, and their scales for some rows, group by group.
    fn scales(&self, some: Rows) -> Result<(usize, Vec<f32>), LoadError> {
        let groups = self.scales.entry.dims.get(1).map_or(0, |&g| g as usize);
        let cols = self.entry.dims[0] as usize;
        let alike =
            self.zeros.as_ref().is_none_or(|z| z.entry.dims.get(1) == Some(&(groups as u64)));
        if groups == 0 || !cols.is_multiple_of(groups) || !alike {
            return Err(self.wrong("its scales and zeros are not of the same groups of its inputs"));
        }
        let file = Part::open(&self.scales)?;
        let mut all = Vec::with_capacity(groups * some.count);
        for group in 0..groups {
            all.extend(file.floats(group * some.rows + some.first, some.count)?);
        }
        Ok((groups, all))
    }

    /// Zeros of some rows, group by group, 0 to 16.
    fn zeros(&self, some: Rows, groups: usize) -> Result<Vec<u8>, LoadError> {
        const PLAIN: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
        let Some(zeros) = &self.zeros else { return Err(self.wrong("it has no zeros")) };
        let (order, plus) = match self.matrix.entry.dtype {
            TensorType::AWQ_4 => (&AWQ_ORDER, 0),
            TensorType::GPTQ_4 | TensorType::GPTQ_4_ACT => (&PLAIN, 1),
            _ => (&PLAIN, 0),
        };
        let file = Part::open(zeros)?;
        let mut all = Vec::with_capacity(groups * some.count);
        let words = some.words();
        for group in 0..groups {
            let line = file.words(group * some.rows / 8 + words.start, words.len())?;
            all.extend((0..some.count).map(|row| some.nibble(&line, row, order) + plus));
        }
        Ok(all)
    }

    /// The group of each input, checked; `None` where they follow each other.
    fn order(&self, cols: usize, groups: usize) -> Result<Option<Vec<usize>>, LoadError> {
        let Some(order) = &self.order else { return Ok(None) };
        let words = Part::open(order)?.words(0, cols)?;
        let order: Vec<usize> = words.into_iter().map(|g| g as usize).collect();
        if order.iter().any(|&group| group >= groups) {
            return Err(self.wrong("an input is in a group that is not there"));
        }
        let plain = order.iter().enumerate().all(|(i, &group)| group == i / (cols / groups));
        if self.entry.dtype == TensorType::INT4 && !plain {
            return Err(self.wrong("its groups are scattered, but 'desc_act' is not true"));
        }
        Ok(Some(order))
    }
}

/// Some rows of a matrix of `rows`.
#[derive(Clone, Copy)]
struct Rows {
    first: usize,
    count: usize,
    rows: usize,
}

impl Rows {
    /// The words that hold a nibble of each.
    fn words(self) -> std::ops::Range<usize> {
        self.first / 8..(self.first + self.count).div_ceil(8)
    }

    /// The nibble of the row `row` of these, in a line of [`Rows::words`].
    fn nibble(self, line: &[u32], row: usize, order: &[u32; 8]) -> u8 {
        let at = self.first + row;
        (line[at / 8 - self.first / 8] >> (order[at % 8] * 4)) as u8 & 15
    }
}

/// An open tensor.
pub(super) struct Part<'a> {
    file: File,
    source: &'a TensorSource,
}

impl<'a> Part<'a> {
    pub(super) fn open(source: &'a TensorSource) -> Result<Self, LoadError> {
        let file = File::open(&source.path)
            .map_err(|e| LoadError::Io { path: source.path.clone(), source: e })?;
        Ok(Self { file, source })
    }

    /// Reads inside the tensor alone: what lies beyond it in the file is somebody else's.
    fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), LoadError> {
        self.check(offset, bytes.len())?;
        self.file
            .read_exact_at(bytes, self.source.offset.saturating_add(offset as u64))
            .map_err(|e| LoadError::Io { path: self.source.path.clone(), source: e })
    }

    fn check(&self, offset: usize, count: usize) -> Result<(), LoadError> {
        let entry = &self.source.entry;
        if offset.checked_add(count).is_some_and(|end| end as u64 <= entry.bytes) {
            return Ok(());
        }
        Err(LoadError::Settings(format!(
            "tensor '{}' of {} bytes is too small for its matrix",
            entry.name, entry.bytes
        )))
    }

    /// Bytes of the tensor alone.
    pub(super) fn bytes(&self, offset: usize, count: usize) -> Result<Vec<u8>, LoadError> {
        // Looked at before memory is taken.
        self.check(offset, count)?;
        let mut bytes = vec![0; count];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn words(&self, first: usize, count: usize) -> Result<Vec<u32>, LoadError> {
        let bytes = self.bytes(first * 4, count * 4)?;
        let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(bytes.chunks_exact(4).map(word).collect())
    }

    fn floats(&self, first: usize, count: usize) -> Result<Vec<f32>, LoadError> {
        let dtype = self.source.entry.dtype;
        let size = dtype.block_bytes() as usize;
        Ok(floats(dtype, &self.bytes(first * size, count * size)?).collect())
    }
}

/// The value of an eight-bit float: four bits of exponent, three of mantissa, no infinities.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3) & 15, f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::e4m3;

    #[test]
    fn eight_bit_floats() {
        for (byte, value) in [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0)] {
            assert_eq!((e4m3(byte), e4m3(byte | 0x80)), (value, -value), "{byte}");
        }
        assert_eq!(e4m3(0x7e), 448.0);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }
}
