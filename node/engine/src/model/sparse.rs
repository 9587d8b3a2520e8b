//! Matrices without their zeros, see [`millrace_shared::model::SparseForm`].
//!
//! A [`Sparse`] reads as if its zeros were there, so that what comes after knows nothing of it; whoever
//! can leave whole tiles out asks for [`Sparse::tiles`]. Files and peers are not trusted: what says where
//! values lie is checked as it is read.

use std::ops::Range;

use millrace_shared::model::{SparseForm, TILE_ROWS, TensorEntry, TensorType};

use super::joined::Part;
use crate::{LoadError, TensorSource};

/// Rows of a tile.
const ROWS: usize = TILE_ROWS as usize;

/// A matrix and what says where its values lie.
#[derive(Clone, Debug)]
pub struct Sparse {
    /// As it reads; its bytes are those of all its tensors.
    entry: TensorEntry,
    form: SparseForm,
    values: TensorSource,
    index: TensorSource,
    starts: TensorSource,
}

/// Which tiles of a matrix there are.
#[derive(Clone, Debug)]
pub struct Tiles {
    /// Columns of a tile.
    pub width: usize,
    /// Numbers of the columns of tiles that are there, row of tiles by row of tiles, ascending.
    pub columns: Vec<u32>,
    /// Where each row of tiles begins in them, and where the last one ends.
    pub starts: Vec<u32>,
}

impl Sparse {
    /// A matrix of that form among tensors.
    ///
    /// # Errors
    /// If one is missing.
    pub(super) fn new(
        values: &TensorSource,
        form: SparseForm,
        find: impl Fn(&str) -> Option<TensorSource>,
    ) -> Result<Self, LoadError> {
        let name = &values.entry.name;
        let stem = name.strip_suffix("weight").unwrap_or(name);
        let part = |part: &str| {
            let name = format!("{stem}{part}");
            find(&name).ok_or(LoadError::MissingTensor(name))
        };
        let [index, starts] = form.parts();
        let (index, starts) = (part(index)?, part(starts)?);
        let bytes = values.entry.bytes + index.entry.bytes + starts.entry.bytes;
        let entry = TensorEntry { bytes, ..values.entry.clone() };
        Ok(Self { entry, form, values: values.clone(), index, starts })
    }

    /// Name, type, dimensions with its zeros; bytes of all its tensors.
    pub fn entry(&self) -> &TensorEntry {
        &self.entry
    }

    /// All its tensors as files have them.
    pub fn parts(&self) -> impl Iterator<Item = &TensorSource> {
        [&self.values, &self.index, &self.starts].into_iter()
    }

    /// Columns, rows, and bytes of a row with its zeros.
    fn shape(&self) -> Result<(usize, usize, usize), LoadError> {
        let (dims, dtype) = (&self.entry.dims, self.entry.dtype);
        let bytes = dims.first().and_then(|&cols| dtype.bytes_of(cols));
        match (&dims[..], bytes) {
            (&[cols, rows], Some(bytes)) if cols > 0 && rows > 0 && cols < 1 << 31 => {
                Ok((cols as usize, rows as usize, bytes as usize))
            }
            _ => Err(self.wrong("it is no matrix of whole blocks")),
        }
    }

    fn wrong(&self, problem: &str) -> LoadError {
        LoadError::Settings(format!("tensor '{}': {problem}", self.entry.name))
    }

    /// Fills `out` with whole rows from byte `offset` of the matrix as it reads.
    ///
    /// # Errors
    /// If a file cannot be read, or places of values are not as they are to be.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), LoadError> {
        let (cols, rows, row_bytes) = self.shape()?;
        let first = offset as usize / row_bytes;
        let some = first..first + out.len() / row_bytes;
        let whole =
            (offset as usize).is_multiple_of(row_bytes) && out.len().is_multiple_of(row_bytes);
        if !whole || some.end > rows {
            return Err(self.wrong("it is kept without its zeros, and cannot be read by columns"));
        }
        out.fill(0);
        match self.form {
            SparseForm::Csr => self.read_csr(some, cols, out),
            SparseForm::Bitmask => self.read_bitmask(some, cols, out),
            SparseForm::Tiles => self.read_tiles(some, (rows, row_bytes), out),
        }
    }

    /// Where these rows (or rows of tiles) begin, and where the last one ends; they ascend.
    fn starts(&self, some: &Range<usize>) -> Result<Vec<usize>, LoadError> {
        let words = Part::open(&self.starts)?.words(some.start, some.len() + 1)?;
        let ascend = words.is_sorted() && (some.start > 0 || words.first() == Some(&0));
        // What is beyond the values is seen when they are read.
        match ascend {
            true => Ok(words.into_iter().map(|w| w as usize).collect()),
            false => Err(self.wrong("its rows do not follow each other")),
        }
    }

    /// Numbers of columns, of rows that begin so: below `width`, ascending in each row.
    fn columns(&self, starts: &[usize], width: usize) -> Result<Vec<u32>, LoadError> {
        let (first, end) = (starts[0], starts[starts.len() - 1]);
        let part = Part::open(&self.index)?;
        let columns: Vec<u32> = match self.index.entry.dtype {
            TensorType::I16 => {
                let bytes = part.bytes(first * 2, (end - first) * 2)?;
                let pairs = bytes.as_chunks::<2>().0.iter();
                pairs.map(|&b| u32::from(u16::from_le_bytes(b))).collect()
            }
            _ => part.words(first, end - first)?,
        };
        for row in starts.windows(2) {
            let row = &columns[row[0] - first..row[1] - first];
            let ascend = row.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascend || row.last().is_some_and(|&last| last as usize >= width) {
                return Err(
                    self.wrong("columns of its values do not ascend, or are beyond its width")
                );
            }
        }
        Ok(columns)
    }

    fn read_csr(&self, some: Range<usize>, cols: usize, out: &mut [u8]) -> Result<(), LoadError> {
        let starts = self.starts(&some)?;
        let columns = self.columns(&starts, cols)?;
        let size = self.entry.dtype.block_bytes() as usize;
        let values = Part::open(&self.values)?.bytes(starts[0] * size, columns.len() * size)?;
        for (row, ends) in starts.windows(2).enumerate() {
            for i in ends[0] - starts[0]..ends[1] - starts[0] {
                let at = (row * cols + columns[i] as usize) * size;
                out[at..at + size].copy_from_slice(&values[i * size..][..size]);
            }
        }
        Ok(())
    }

    fn read_bitmask(
        &self,
        some: Range<usize>,
        cols: usize,
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        let starts = self.starts(&some)?;
        let line = cols.div_ceil(8);
        let mask = Part::open(&self.index)?.bytes(some.start * line, some.len() * line)?;
        let size = self.entry.dtype.block_bytes() as usize;
        let count = starts[starts.len() - 1] - starts[0];
        let values = Part::open(&self.values)?.bytes(starts[0] * size, count * size)?;
        for (row, (mask, ends)) in mask.chunks_exact(line).zip(starts.windows(2)).enumerate() {
            let mut values = values[(ends[0] - starts[0]) * size..(ends[1] - starts[0]) * size]
                .chunks_exact(size);
            let there = (0..cols).filter(|col| mask[col / 8] >> (col % 8) & 1 == 1);
            for col in there {
                let value =
                    values.next().ok_or_else(|| self.wrong("its mask has too many bits"))?;
                out[(row * cols + col) * size..][..size].copy_from_slice(value);
            }
            if values.next().is_some() {
                return Err(self.wrong("its mask has too few bits"));
            }
        }
        Ok(())
    }

    fn read_tiles(
        &self,
        some: Range<usize>,
        (rows, row_bytes): (usize, usize),
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        let tiles = some.start / ROWS..some.end.div_ceil(ROWS);
        let starts = self.starts(&tiles)?;
        let dtype = self.entry.dtype;
        let line = self.form.width(dtype) / dtype.block_elements() * dtype.block_bytes();
        let line = line as usize;
        let columns = self.columns(&starts, row_bytes / line)?;
        let part = Part::open(&self.values)?;
        for (tile_row, ends) in tiles.zip(starts.windows(2)) {
            // Only the last ones have fewer rows.
            let height = (rows - tile_row * ROWS).min(ROWS);
            let count = (ends[1] - ends[0]) * height;
            let values = part.bytes(ends[0] * ROWS * line, count * line)?;
            for row in some.start.max(tile_row * ROWS)..some.end.min(tile_row * ROWS + height) {
                let columns = &columns[ends[0] - starts[0]..ends[1] - starts[0]];
                for (tile, &column) in columns.iter().enumerate() {
                    let from = (tile * height + row - tile_row * ROWS) * line;
                    let to = (row - some.start) * row_bytes + column as usize * line;
                    out[to..to + line].copy_from_slice(&values[from..from + line]);
                }
            }
        }
        Ok(())
    }

    /// Which tiles there are, where it is kept in tiles.
    ///
    /// # Errors
    /// As [`Sparse::read`].
    pub fn tiles(&self) -> Result<Option<Tiles>, LoadError> {
        if self.form != SparseForm::Tiles {
            return Ok(None);
        }
        let (cols, rows, _) = self.shape()?;
        let width = self.form.width(self.entry.dtype) as usize;
        let starts = self.starts(&(0..rows.div_ceil(ROWS)))?;
        let columns = self.columns(&starts, cols / width)?;
        Ok(Some(Tiles { width, columns, starts: starts.into_iter().map(|s| s as u32).collect() }))
    }
}
