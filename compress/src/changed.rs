//! What became of a matrix, or of a tensor with several.

use millrace_shared::model::{TensorEntry, TensorType};

use crate::Matrix;
use crate::matrix::Distance;
use crate::report::{TensorReport, type_name};

/// What changing a matrix told.
#[derive(Default)]
pub(crate) struct Changed {
    /// Bytes of the method's own format; 0: those of the file.
    pub(crate) bytes_format: u64,
    /// Weights that were out of range.
    pub(crate) beyond: u64,
    /// Of integers that are whole multiples of it: one, or one for each row.
    pub(crate) scales: Vec<f32>,
}

/// A changed matrix, or all of a tensor.
#[derive(Default)]
pub(crate) struct Done {
    pub(crate) bytes: Vec<u8>,
    pub(crate) bytes_format: u64,
    pub(crate) beyond: u64,
    pub(crate) error: Distance,
    pub(crate) output_error: Option<Distance>,
    /// Weights that are zero, and those of them that lie in tiles of zeros.
    pub(crate) zeros: f64,
    pub(crate) tiles: f64,
    /// The matrix itself, of the one that is timed as a sparse one.
    pub(crate) sample: Option<Matrix>,
}

impl Done {
    /// Another matrix of the same tensor.
    pub(crate) fn add(&mut self, next: Self) {
        self.bytes.extend(next.bytes);
        self.bytes_format += next.bytes_format;
        self.beyond += next.beyond;
        self.error += next.error;
        if let (Some(sum), Some(next)) = (&mut self.output_error, next.output_error) {
            *sum += next;
        }
        self.zeros += next.zeros;
        self.tiles += next.tiles;
    }

    pub(crate) fn report(&self, tensor: &TensorEntry, dtype: TensorType) -> TensorReport {
        let elements = tensor.elements();
        TensorReport {
            name: tensor.name.clone(),
            from: type_name(tensor.dtype),
            to: type_name(dtype),
            elements,
            bytes_before: tensor.bytes,
            bytes_stored: self.bytes.len() as u64,
            bytes_format: self.bytes_format,
            error: self.error.relative(),
            output_error: self.output_error.map(|e| e.relative()),
            sparsity: self.zeros / elements.max(1) as f64,
            zero_tiles: self.tiles / elements.max(1) as f64,
        }
    }
}
