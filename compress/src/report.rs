//! What steps did, for people and for programs.

use millrace_engine::cpu::{ZERO_TILE, ZEROS_WORTH, ZEROS_WORTH_FEW};
use millrace_shared::model::TensorType;
use serde::{Deserialize, Serialize};

/// What became of a matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Type before.
    pub from: String,
    /// Type in the file.
    pub to: String,
    /// Weights before.
    pub elements: u64,
    /// Bytes before.
    pub bytes_before: u64,
    /// Bytes in the file.
    pub bytes_stored: u64,
    /// Bytes that the method's own format would take; those in the file where it has none.
    pub bytes_format: u64,
    /// Error of weights, relative to them.
    pub error: f64,
    /// Error of outputs by the mean squares of inputs, relative to them; where inputs are known.
    pub output_error: Option<f64>,
    /// Part of the weights that are zero.
    pub sparsity: f64,
    /// Part of them that lies in tiles of zeros, which the engine passes over.
    #[serde(default)]
    pub zero_tiles: f64,
}

/// What became of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step as a line of TOML.
    pub step: String,
    /// Matrices that changed.
    pub tensors: Vec<TensorReport>,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors in the file.
    pub bytes_stored: u64,
    /// Bytes of all tensors if each were in the method's own format.
    pub bytes_format: u64,
    /// What a reader should know.
    pub notes: Vec<String>,
}

impl StepReport {
    /// Relative error of all matrices: root of the mean of its squares, by weights.
    pub fn error(&self) -> f64 {
        let total: f64 = self.tensors.iter().map(|t| t.elements as f64).sum();
        let sum: f64 = self.tensors.iter().map(|t| t.elements as f64 * t.error.powi(2)).sum();
        if total == 0.0 { 0.0 } else { (sum / total).sqrt() }
    }

    /// As [`StepReport::error`], of outputs, where they are known.
    pub fn output_error(&self) -> Option<f64> {
        let known: Vec<f64> = self.tensors.iter().filter_map(|t| t.output_error).collect();
        let mean = known.iter().map(|e| e * e).sum::<f64>() / known.len().max(1) as f64;
        (!known.is_empty()).then(|| mean.sqrt())
    }

    /// Part of the weights of changed matrices that are zero.
    pub fn sparsity(&self) -> f64 {
        let total: f64 = self.tensors.iter().map(|t| t.elements as f64).sum();
        let zeros: f64 = self.tensors.iter().map(|t| t.elements as f64 * t.sparsity).sum();
        if total == 0.0 { 0.0 } else { zeros / total }
    }
}

/// Bytes of formats that are not GGUF's: values of two bytes, indices of two.
pub(crate) mod formats {
    use millrace_engine::cpu::ZERO_TILE;

    /// A bit for each weight, and those that are not zero.
    pub(crate) fn bitmap(elements: u64, nonzero: u64) -> u64 {
        elements.div_ceil(8) + 2 * nonzero
    }

    /// Values, their columns, and where rows begin.
    pub(crate) fn csr(rows: u64, nonzero: u64) -> u64 {
        4 * nonzero + 4 * (rows + 1)
    }

    /// Of every four, two values and two bits each.
    pub(crate) fn two_of_four(elements: u64) -> u64 {
        elements + elements / 8
    }

    /// A bit for each tile, and the tiles that are not zero.
    pub(crate) fn tiles(elements: u64, nonzero: u64) -> u64 {
        let [rows, columns] = ZERO_TILE;
        elements.div_ceil(8 * (rows * columns) as u64) + 2 * nonzero
    }

    /// The least of those that any pattern has.
    pub(crate) fn sparse(rows: u64, elements: u64, nonzero: u64) -> u64 {
        bitmap(elements, nonzero).min(csr(rows, nonzero)).min(2 * elements)
    }
}

/// What the engine makes of zeros.
pub(crate) fn skipped(report: &StepReport) -> String {
    let [rows, columns] = ZERO_TILE;
    let part = |tensors: &mut dyn Iterator<Item = &TensorReport>| {
        tensors.map(|t| t.elements as f64 * t.zero_tiles).sum::<f64>()
            / report.tensors.iter().map(|t| t.elements as f64).sum::<f64>().max(1.0)
    };
    let of_all = part(&mut report.tensors.iter().filter(|t| t.zero_tiles >= ZEROS_WORTH));
    if of_all > 0.0 {
        return format!(
            "{:.1} % of the weights lie in tiles of {rows} rows and {columns} columns that are all \
             zeros, which the engine passes over: with prompts, and where they are {:.0} % of a \
             matrix with single tokens too",
            of_all * 100.0,
            ZEROS_WORTH_FEW * 100.0
        );
    }
    format!(
        "the engine is no faster for these zeros: it passes over tiles of {rows} rows and {columns} \
         columns, where {:.1} % of a matrix lie in such; here it is {:.2} % (pattern = 'tile' makes them)",
        ZEROS_WORTH * 100.0,
        part(&mut report.tensors.iter()) * 100.0
    )
}

/// A type as reports name it.
pub(crate) fn type_name(dtype: TensorType) -> String {
    dtype.as_str().to_owned()
}
