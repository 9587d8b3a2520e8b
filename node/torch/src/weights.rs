//! Reads the weights of a stage: rows of any type that the engine knows, as floats, and from there to
//! what the device keeps.
//!
//! A matrix is read in parts of a few million elements, each by several threads, so that no more than
//! one part of it lies on the host as floats. Where the device keeps int4, the 4-bit types of files that
//! have the same grid (Q4_0, Q4_1, GPTQ's and AWQ's) are repacked as they are, and nothing is rounded
//! but, on a GPU, scales and zeros to bf16.

use half::f16;
use millrace_engine::LoadError;
use millrace_engine::cpu::dequantise_row;
use millrace_engine::model::{LoadedPart, LoadedParts, Part, Piece, Source};
use millrace_shared::model::TensorType;
use millrace_shared::options::Role;
use tch::{Kind, Tensor};

use crate::Place;
use crate::backend::load_error;
use crate::matrix::{Builder, Matrix};

/// Elements that are read together.
const PART: usize = 4 << 20;

/// Loads `pieces`; `progress` gets the bytes done so far, as they are in the model's file.
///
/// # Errors
/// If memory runs out, a type is unsupported or a file cannot be read.
pub(crate) fn load(
    place: Place,
    threads: usize,
    pieces: &[Piece<'_>],
    progress: &mut dyn FnMut(u64),
) -> Result<LoadedParts<Matrix, Tensor>, LoadError> {
    let mut parts = Vec::new();
    let mut done = 0;
    for part in pieces.iter().flatten() {
        parts.push(match part {
            Part::Vector(source, plus) => {
                let mut floats = source.floats()?;
                floats.iter_mut().for_each(|x| *x += plus);
                done += source.entry().bytes;
                let what = || format!("'{}'", source.entry().name);
                let vector = Tensor::f_from_slice(&floats)
                    .and_then(|v| v.f_to_device(place.device))
                    .map_err(|e| load_error(&e, &what(), floats.len() as u64 * 4))?;
                LoadedPart::Vector(vector)
            }
            Part::Matrices(sources) => {
                let matrix = matrices(place, threads, sources, &mut |bytes| {
                    done += bytes;
                    progress(done);
                })?;
                LoadedPart::Matrices(matrix)
            }
            Part::Transposed(source) => {
                done += source.entry().bytes;
                LoadedPart::Matrices(transposed(place, source)?)
            }
        });
        progress(done);
    }
    Ok(parts)
}

/// Matrices that share their input, as one.
fn matrices(
    place: Place,
    threads: usize,
    sources: &[&Source],
    progress: &mut dyn FnMut(u64),
) -> Result<Matrix, LoadError> {
    let mut shapes = Vec::with_capacity(sources.len());
    for source in sources {
        shapes.push(source.matrix()?);
    }
    let cols = shapes.first().map_or(0, |s| s.0);
    let rows: usize = shapes.iter().map(|s| s.1).sum();
    let name = sources.first().map_or("", |s| s.entry().name.as_str());
    let failed = |e: &tch::TchError| {
        let needed = place.kept().matrix_bytes(Role::of(name), rows as u64, cols as u64);
        load_error(e, &format!("'{name}'"), needed)
    };
    let mut builder =
        Builder::new(place, Role::of(name), rows as i64, cols as i64).map_err(|e| failed(&e))?;
    let at_once = (PART / cols.max(1)).max(1);
    let mut floats = vec![0f32; at_once.min(rows) * cols];
    for (source, &(_, rows)) in sources.iter().zip(&shapes) {
        let grid = Grid::of(source.entry().dtype).filter(|_| builder.takes_groups());
        for first in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - first);
            if let Some(grid) = grid {
                let row_bytes = cols / 32 * grid.bytes;
                let mut bytes = vec![0; count * row_bytes];
                source.open()?.read((first * row_bytes) as u64, &mut bytes)?;
                let (steps, pairs) = grid.split(&bytes);
                builder.push_groups(&steps, &pairs).map_err(|e| failed(&e))?;
                progress(bytes.len() as u64);
                continue;
            }
            let part = &mut floats[..count * cols];
            let bytes = read_rows(source, cols, first, threads, part)?;
            builder.push(part).map_err(|e| failed(&e))?;
            progress(bytes);
        }
    }
    builder.finish().map_err(|e| failed(&e))
}

/// A type of files whose blocks of 32 are `step * scale + minimum`, as int4 has them.
#[derive(Clone, Copy)]
struct Grid {
    dtype: TensorType,
    /// Of a block.
    bytes: usize,
}

impl Grid {
    fn of(dtype: TensorType) -> Option<Self> {
        let known = matches!(dtype, TensorType::Q4_0 | TensorType::Q4_1 | TensorType::INT4);
        known.then(|| Self { dtype, bytes: dtype.block_bytes() as usize })
    }

    /// Integers in order, and a scale and a zero (the value of 8) for each block.
    fn split(self, bytes: &[u8]) -> (Vec<i32>, Vec<f32>) {
        let blocks = bytes.chunks_exact(self.bytes);
        let mut steps = Vec::with_capacity(blocks.len() * 32);
        let mut pairs = Vec::with_capacity(blocks.len() * 2);
        for block in blocks {
            let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
            let float = |at: usize| {
                f32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
            };
            let (scale, zero) = match self.dtype {
                TensorType::Q4_0 => (half(0), 0.0),
                TensorType::Q4_1 => (half(0), half(0).mul_add(8.0, half(2))),
                _ => (float(0), float(0).mul_add(8.0, float(4))),
            };
            pairs.extend([scale, zero]);
            let quants = &block[self.bytes - 16..];
            steps.extend(quants.iter().map(|q| i32::from(q & 15)));
            steps.extend(quants.iter().map(|q| i32::from(q >> 4)));
        }
        (steps, pairs)
    }
}

/// Rows of a matrix from row `first` on, as floats; returns their bytes in the file.
fn read_rows(
    source: &Source,
    cols: usize,
    first: usize,
    threads: usize,
    out: &mut [f32],
) -> Result<u64, LoadError> {
    let dtype = source.entry().dtype;
    let row_bytes = cols / dtype.block_elements() as usize * dtype.block_bytes() as usize;
    let rows = out.len() / cols;
    let each = rows.div_ceil(threads.max(1)).max(1);
    let read = |first: usize, out: &mut [f32]| {
        let mut bytes = vec![0u8; out.len() / cols * row_bytes];
        source.open()?.read((first * row_bytes) as u64, &mut bytes)?;
        let lines = bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(cols));
        for (bytes, out) in lines {
            if !dequantise_row(dtype, bytes, out) {
                let (tensor, dtype) = (source.entry().name.clone(), dtype.as_str().to_owned());
                return Err(LoadError::UnsupportedType { tensor, dtype });
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let read = &read;
        let parts = out.chunks_mut(each * cols).enumerate();
        let running: Vec<_> =
            parts.map(|(i, part)| scope.spawn(move || read(first + i * each, part))).collect();
        running.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    Ok((rows * row_bytes) as u64)
}

/// A matrix of floats that lies column by column.
fn transposed(place: Place, source: &Source) -> Result<Matrix, LoadError> {
    let (rows, cols) = source.matrix()?;
    let floats = source.floats()?;
    let [rows, cols] = [rows as i64, cols as i64];
    let build = || {
        let lying = Tensor::f_from_slice(&floats)?.f_view([cols, rows])?;
        let x = lying.f_to_device(place.device)?.f_transpose(0, 1)?.f_contiguous()?;
        let mut builder = Builder::new(place, Role::Layer, rows, cols)?;
        builder.push_tensor(&x.f_to_kind(Kind::Float)?)?;
        builder.finish()
    };
    let needed = floats.len() as u64 * 4;
    build().map_err(|e| load_error(&e, &format!("'{}'", source.entry().name), needed))
}
