//! Carries a plan out: reads by offset, converts rows on several threads, writes in order.
//!
//! Into a [`Target`]. Memory use is a batch of rows, whatever the size of the model.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use millrace_shared::model::{FolderSource, TensorType};

use super::blocks::{BadWeight, quantise_row};
use super::plan::{Plan, Planned};
use super::{QuantizeError, Rounding};
use crate::cpu::dequantise_row;
use crate::target::{Target, io_error};

/// Weights converted between two writes: 32 MiB of f32.
const BATCH_WEIGHTS: u64 = 8 << 20;
/// Bytes copied between two reports of progress.
const COPY_BYTES: usize = 4 << 20;

/// What became of a tensor.
#[derive(Clone, Debug)]
pub struct TensorReport {
    /// Name.
    pub name: String,
    /// Type in the source.
    pub from: TensorType,
    /// Type in the new file.
    pub to: TensorType,
    /// Elements.
    pub elements: u64,
    /// Bytes in the source.
    pub bytes_before: u64,
    /// Bytes in the new file.
    pub bytes_after: u64,
    /// What was lost.
    pub loss: Loss,
}

/// Sums over weights before and after; zeros for tensors that were copied. Every sum is over rows
/// in order, so it does not depend on threads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Of the squares of the weights.
    pub squares: f64,
    /// Of the squares of the differences.
    pub squared_error: f64,
    /// Greatest difference.
    pub max_error: f32,
}

impl Loss {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            squares: self.squares + other.squares,
            squared_error: self.squared_error + other.squared_error,
            max_error: self.max_error.max(other.max_error),
        }
    }

    /// Root of the mean squared error, relative to that of the weights.
    pub fn relative_rmse(&self) -> f64 {
        if self.squares == 0.0 { 0.0 } else { (self.squared_error / self.squares).sqrt() }
    }

    fn of_row(before: &[f32], after: &[f32]) -> Self {
        let mut loss = Self::default();
        for (&x, &y) in before.iter().zip(after) {
            let e = x - y;
            loss.squares += f64::from(x) * f64::from(x);
            loss.squared_error += f64::from(e) * f64::from(e);
            loss.max_error = loss.max_error.max(e.abs());
        }
        loss
    }
}

impl Plan {
    /// Writes the copy to `target`, a file or, of a folder, a folder, on `threads` threads. `progress`
    /// gets the bytes of the source done so far.
    ///
    /// # Errors
    /// If a file cannot be used, `target` is there and `overwrite` is not set (a folder is replaced only
    /// if it is such a copy), both are the same, the disk is too small, or a weight does not fit its
    /// type. Then nothing is left behind.
    pub fn write(
        &self,
        target: &Path,
        overwrite: bool,
        threads: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<TensorReport>, QuantizeError> {
        let open = |path: &PathBuf| File::open(path).map_err(io_error("open", path));
        let inputs = self.sources.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let needed = self.target_len();
        let part = match &self.folder {
            None => Target::file(&self.sources[0], target, overwrite, needed)?,
            Some((source, config)) => {
                let replace = (overwrite, &FolderSource::is_copy as &dyn Fn(&Path) -> bool);
                Target::folder(source, target, replace, config, needed)?
            }
        };
        let mut job =
            Job { plan: self, target, inputs, threads: threads.max(1), done: 0, progress };
        let reports = job.run(&mut part.weights())?;
        part.finish()?;
        Ok(reports)
    }
}

struct Job<'a> {
    plan: &'a Plan,
    target: &'a Path,
    inputs: Vec<File>,
    threads: usize,
    /// Bytes of the source.
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

/// Why a run of rows was not converted.
enum RowError {
    Read(io::Error),
    /// Row of the tensor, and what is wrong in it.
    Weight(u64, BadWeight),
}

impl Job<'_> {
    fn run(&mut self, out: &mut &File) -> Result<Vec<TensorReport>, QuantizeError> {
        let plan = self.plan;
        let mut at = self.put(out, &plan.head)?;
        let mut reports = Vec::new();
        for tensor in &plan.tensors {
            at += self.put(out, &vec![0; (tensor.to.offset - at) as usize])?;
            let loss = if tensor.is_copy() {
                self.copy(tensor, out)?;
                Loss::default()
            } else {
                self.convert(tensor, plan.rounding, out)?
            };
            at += tensor.to.bytes;
            reports.push(TensorReport {
                name: tensor.from.name.clone(),
                from: tensor.from.dtype,
                to: tensor.to.dtype,
                elements: tensor.from.elements(),
                bytes_before: tensor.from.bytes,
                bytes_after: tensor.to.bytes,
                loss,
            });
        }
        self.put(out, &vec![0; (plan.target_len() - at) as usize])?;
        Ok(reports)
    }

    fn put(&self, out: &mut &File, bytes: &[u8]) -> Result<u64, QuantizeError> {
        out.write_all(bytes).map_err(io_error("write", self.target))?;
        Ok(bytes.len() as u64)
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done);
    }

    fn copy(&mut self, tensor: &Planned, out: &mut &File) -> Result<(), QuantizeError> {
        let mut buffer = vec![0u8; COPY_BYTES.min(tensor.from.bytes as usize)];
        let end = tensor.from.offset + tensor.from.bytes;
        let mut at = tensor.from.offset;
        while at < end {
            let n = (end - at).min(buffer.len() as u64) as usize;
            let input = &self.inputs[usize::from(tensor.from.file)];
            let read = input.read_exact_at(&mut buffer[..n], at);
            read.map_err(io_error("read", self.source(tensor)))?;
            at += self.put(out, &buffer[..n])?;
            self.advance(n as u64);
        }
        Ok(())
    }

    fn convert(
        &mut self,
        tensor: &Planned,
        rounding: Rounding,
        out: &mut &File,
    ) -> Result<Loss, QuantizeError> {
        let cols = tensor.from.dims[0];
        let rows = tensor.from.elements() / cols;
        let shape = Rows {
            tensor,
            rounding,
            cols: cols as usize,
            from: (tensor.from.bytes / rows) as usize,
            to: (tensor.to.bytes / rows) as usize,
        };
        let batch = (BATCH_WEIGHTS / cols).clamp(1, rows);
        let mut bytes = vec![0u8; batch as usize * shape.to];
        let mut loss = Loss::default();
        for first in (0..rows).step_by(batch as usize) {
            let count = batch.min(rows - first) as usize;
            let bytes = &mut bytes[..count * shape.to];
            let input = &self.inputs[usize::from(tensor.from.file)];
            let converted = shape.convert_on(self.threads, input, first, bytes);
            loss = converted
                .map_err(|e| self.row_error(tensor, e))?
                .into_iter()
                .fold(loss, Loss::plus);
            self.put(out, bytes)?;
            self.advance((count * shape.from) as u64);
        }
        Ok(loss)
    }

    fn source(&self, tensor: &Planned) -> &Path {
        &self.plan.sources[usize::from(tensor.from.file)]
    }

    fn row_error(&self, tensor: &Planned, error: RowError) -> QuantizeError {
        match error {
            RowError::Read(e) => io_error("read", self.source(tensor))(e).into(),
            RowError::Weight(row, source) => {
                QuantizeError::Weight { tensor: tensor.from.name.clone(), row, source }
            }
        }
    }
}

/// How the rows of a tensor lie in both files.
struct Rows<'a> {
    tensor: &'a Planned,
    rounding: Rounding,
    cols: usize,
    /// Bytes of a row in the source.
    from: usize,
    /// Bytes of a row in the target.
    to: usize,
}

impl Rows<'_> {
    /// Converts the rows from `first` on that fill `out`; what each lost, in order. Of several
    /// errors, the first in the file.
    fn convert_on(
        &self,
        threads: usize,
        input: &File,
        first: u64,
        out: &mut [u8],
    ) -> Result<Vec<Loss>, RowError> {
        let share = (out.len() / self.to).div_ceil(threads);
        std::thread::scope(|scope| {
            let mut running = Vec::new();
            for (i, out) in out.chunks_mut(share * self.to).enumerate() {
                let first = first + (i * share) as u64;
                running.push(scope.spawn(move || self.convert(input, first, out)));
            }
            let mut losses = Vec::new();
            for thread in running {
                let part = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                losses.extend(part?);
            }
            Ok(losses)
        })
    }

    fn convert(&self, input: &File, first: u64, out: &mut [u8]) -> Result<Vec<Loss>, RowError> {
        let count = out.len() / self.to;
        let mut source = vec![0u8; count * self.from];
        let offset = self.tensor.from.offset + first * self.from as u64;
        input.read_exact_at(&mut source, offset).map_err(RowError::Read)?;
        let (mut before, mut after) = (vec![0f32; self.cols], vec![0f32; self.cols]);
        let (from, to) = (self.tensor.from.dtype, self.tensor.to.dtype);
        let rows = source.chunks_exact(self.from).zip(out.chunks_exact_mut(self.to));
        let convert = |(i, (source, out)): (usize, (&[u8], &mut [u8]))| {
            let read = dequantise_row(from, source, &mut before);
            debug_assert!(read, "a plan names readable types only");
            let done = quantise_row(to, self.rounding, &before, out);
            done.map_err(|e| RowError::Weight(first + i as u64, e))?;
            dequantise_row(to, out, &mut after);
            Ok(Loss::of_row(&before, &after))
        };
        rows.enumerate().map(convert).collect()
    }
}
