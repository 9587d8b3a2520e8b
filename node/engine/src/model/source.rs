//! Where the bytes of a tensor come from.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use half::{bf16, f16};
use millrace_shared::model::{SparseForms, TensorEntry, TensorType};

use super::joined::Joined;
use super::sparse::{Sparse, Tiles};
use crate::{LoadError, TensorSource};

/// Bytes of one tensor.
#[derive(Clone, Debug)]
pub enum Source {
    /// In a file.
    File(TensorSource),
    /// Made up, for measurements: never NaN, never denormal.
    Synthetic(TensorEntry),
    /// In several tensors.
    Joined(Box<Joined>),
    /// Without its zeros.
    Sparse(Box<Sparse>),
}

impl Source {
    /// The sources in the tensors of a stage: each is one, but for parts of others.
    ///
    /// # Errors
    /// If a part of a matrix is missing.
    pub fn of_tensors(tensors: &[TensorSource]) -> Result<Vec<Self>, LoadError> {
        let parts: HashMap<&str, &TensorSource> = tensors
            .iter()
            .filter(|t| t.entry.is_part())
            .map(|t| (t.entry.name.as_str(), t))
            .collect();
        let forms = SparseForms::of_tensors(tensors.iter().map(|t| &t.entry));
        let whole = tensors.iter().filter(|t| !t.entry.is_part());
        whole
            .map(|tensor| {
                let find = |name: &str| parts.get(name).map(|&part| part.clone());
                if let Some(form) = forms.of(&tensor.entry) {
                    return Ok(Self::Sparse(Box::new(Sparse::new(tensor, form, find)?)));
                }
                if tensor.entry.dtype.parts().is_empty() {
                    return Ok(Self::File(tensor.clone()));
                }
                Ok(Self::Joined(Box::new(Joined::new(tensor, find)?)))
            })
            .collect()
    }

    /// The tensors of the model that it is made of; `None` where it is made up.
    pub fn tensors(&self) -> Option<Vec<&TensorEntry>> {
        match self {
            Self::File(source) => Some(vec![&source.entry]),
            Self::Synthetic(_) => None,
            Self::Joined(joined) => Some(joined.parts().map(|part| &part.entry).collect()),
            Self::Sparse(sparse) => Some(sparse.parts().map(|part| &part.entry).collect()),
        }
    }

    /// Name, type, dimensions.
    pub fn entry(&self) -> &TensorEntry {
        match self {
            Self::File(source) => &source.entry,
            Self::Synthetic(entry) => entry,
            Self::Joined(joined) => joined.entry(),
            Self::Sparse(sparse) => sparse.entry(),
        }
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn open(&self) -> Result<Reader<'_>, LoadError> {
        Ok(match self {
            Self::File(source) => {
                let file = File::open(&source.path)
                    .map_err(|e| LoadError::Io { path: source.path.clone(), source: e })?;
                Reader::File(file, source)
            }
            Self::Synthetic(_) => Reader::Synthetic(0x9e37_79b9_7f4a_7c15),
            Self::Joined(joined) => Reader::Joined(joined),
            Self::Sparse(sparse) => Reader::Sparse(sparse),
        })
    }

    /// All elements of a tensor of floats.
    ///
    /// # Errors
    /// If the file ends first or cannot be read.
    pub fn floats(&self) -> Result<Vec<f32>, LoadError> {
        let mut floats = vec![0.0; self.entry().elements() as usize];
        self.open()?.read_floats(self.entry().dtype, &mut floats)?;
        Ok(floats)
    }

    /// Which tiles there are, of a matrix that is kept in tiles.
    ///
    /// # Errors
    /// If the file cannot be read, or places of tiles are not as they are to be.
    pub fn tiles(&self) -> Result<Option<Tiles>, LoadError> {
        match self {
            Self::Sparse(sparse) => sparse.tiles(),
            _ => Ok(None),
        }
    }

    /// Inputs and outputs of a matrix.
    ///
    /// # Errors
    /// If it is no matrix or too large to address.
    pub fn matrix(&self) -> Result<(usize, usize), LoadError> {
        let dims = &self.entry().dims;
        match dims.as_slice() {
            &[cols, rows] if cols.checked_mul(rows).is_some_and(|n| n < 1 << 40) => {
                Ok((cols as usize, rows as usize))
            }
            _ => Err(LoadError::Settings(format!(
                "tensor '{}' of shape {dims:?} is no matrix that fits in memory",
                self.entry().name
            ))),
        }
    }
}

/// The elements of a tensor of floats from their bytes.
pub(super) fn floats(dtype: TensorType, bytes: &[u8]) -> impl Iterator<Item = f32> {
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    bytes.chunks_exact(dtype.block_bytes() as usize).map(move |b| match dtype {
        TensorType::F16 => f16::from_bits(half(b)).to_f32(),
        TensorType::BF16 => bf16::from_bits(half(b)).to_f32(),
        _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
    })
}

/// An open tensor.
#[derive(Debug)]
pub enum Reader<'a> {
    /// A file, and where in it.
    File(File, &'a TensorSource),
    /// State of the generator.
    Synthetic(u64),
    /// Whole rows can be read, no columns.
    Joined(&'a Joined),
    /// The same.
    Sparse(&'a Sparse),
}

impl Reader<'_> {
    /// The first elements of a tensor of floats, as f32.
    ///
    /// # Errors
    /// If the file ends first or cannot be read.
    pub fn read_floats(&mut self, dtype: TensorType, out: &mut [f32]) -> Result<(), LoadError> {
        let mut bytes = vec![0; out.len() * dtype.block_bytes() as usize];
        self.read(0, &mut bytes)?;
        out.iter_mut().zip(floats(dtype, &bytes)).for_each(|(x, float)| *x = float);
        Ok(())
    }

    /// Columns of a matrix of floats as rows: from column `first` of `width` on, each of `height`
    /// elements, as many as fill `bytes`.
    ///
    /// # Errors
    /// If the file ends first or cannot be read.
    pub fn read_columns(
        &mut self,
        (first, width): (usize, usize),
        height: usize,
        bytes: &mut [u8],
    ) -> Result<(), LoadError> {
        let element = match self {
            Self::File(_, source) => source.entry.dtype.block_bytes() as usize,
            Self::Synthetic(_) => return self.read(0, bytes),
            Self::Joined(joined) => joined.entry().dtype.block_bytes() as usize,
            Self::Sparse(sparse) => sparse.entry().dtype.block_bytes() as usize,
        };
        let columns = bytes.len() / (height * element).max(1);
        let mut line = vec![0; columns * element];
        for row in 0..height {
            self.read(((row * width + first) * element) as u64, &mut line)?;
            for (column, one) in line.chunks_exact(element).enumerate() {
                bytes[(column * height + row) * element..][..element].copy_from_slice(one);
            }
        }
        Ok(())
    }

    /// Fills `bytes` from `offset` of the tensor on.
    ///
    /// # Errors
    /// If the file ends first or cannot be read.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), LoadError> {
        match self {
            Self::File(file, source) => file
                .read_exact_at(bytes, source.offset.saturating_add(offset))
                .map_err(|e| LoadError::Io { path: source.path.clone(), source: e }),
            Self::Joined(joined) => joined.read(offset, bytes),
            Self::Sparse(sparse) => sparse.read(offset, bytes),
            Self::Synthetic(state) => {
                for chunk in bytes.chunks_mut(8) {
                    *state ^= *state << 13;
                    *state ^= *state >> 7;
                    *state ^= *state << 17;
                    // No exponent of all ones, whatever the type.
                    let bits = (*state & 0x0f0f_0f0f_0f0f_0f0f) | 0x2020_2020_2020_2020;
                    chunk.copy_from_slice(&bits.to_le_bytes()[..chunk.len()]);
                }
                Ok(())
            }
        }
    }
}
