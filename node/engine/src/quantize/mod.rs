//! Quantising models: from one GGUF file, or one folder, to another whose matrices take fewer bytes.
//!
//! [`plan()`] decides what each tensor becomes, [`Plan::write`] streams them into a new file, a run
//! of rows per thread at a time, so a model may be larger than memory. The result depends on the
//! source, the options and [`REVISION`] alone: a row is quantised by itself, in plain f32 arithmetic
//! without fused operations, so neither threads nor the processor change a bit.
//!
//! What stays as it is: everything but matrices (vectors become F32, exactly: the engine computes
//! with nothing else), matrices whose rows do not fill the type's blocks, and matrices that have
//! the type already. Embedding and output matrix can have a type of their own.

mod blocks;
mod file;
mod plan;
mod search;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

pub use blocks::{BadWeight, quantise_row};
pub use file::{Loss, TensorReport};
use millrace_shared::model::gguf::GgufError;
use millrace_shared::model::{ModelFileError, TensorType};
pub use plan::{Plan, Planned, plan, plan_folder, plan_of};

use crate::target::TargetError;

/// Raise with any change that may change a bit of a quantised file: names of kept copies have it.
pub const REVISION: u32 = 1;

/// How scales are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// As GGUF's reference quantisers do: from the extreme values of each block.
    Reference,
    /// Q4_0 and Q4_1: the scale (and minimum) of least squared error among those that a small
    /// search finds; never worse than the reference. Other types have nothing to search.
    #[default]
    Search,
}

/// What is done with a matrix that is quantised already, but not as wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Requantise {
    /// An error: each rounding adds its own loss.
    #[default]
    Refuse,
    /// It stays as it is.
    Leave,
    /// It is dequantised, exactly, and quantised again.
    Allow,
}

/// What to make of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Type of matrices: one of [`TYPES`].
    pub to: TensorType,
    /// Type of embedding and output matrix; `None` for [`default_output`].
    pub output: Option<TensorType>,
    /// How scales are chosen.
    pub rounding: Rounding,
    /// What is done with matrices that are quantised already.
    pub requantise: Requantise,
}

/// Types that a matrix can be given.
pub const TYPES: [TensorType; 6] = [
    TensorType::Q8_0,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
];

/// Type of embedding and output matrix where nothing else is said. Four bits hurt the choice among
/// tokens, so there it is Q8_0.
pub fn default_output(to: TensorType) -> TensorType {
    match to {
        TensorType::Q4_0 | TensorType::Q4_1 => TensorType::Q8_0,
        other => other,
    }
}

/// A type of `allowed` by its name, in any case.
///
/// # Errors
/// Names what there is.
pub fn parse_type(name: &str, allowed: &[TensorType]) -> Result<TensorType, String> {
    let found = allowed.iter().find(|t| t.as_str().eq_ignore_ascii_case(name));
    found.copied().ok_or_else(|| {
        let names: Vec<String> = allowed.iter().map(|t| t.as_str().to_ascii_lowercase()).collect();
        format!("'{name}' is no type to quantise to: use {}", names.join(", "))
    })
}

impl Options {
    /// With the defaults for everything but the type.
    pub fn new(to: TensorType) -> Self {
        Self { to, output: None, rounding: Rounding::default(), requantise: Requantise::default() }
    }
}

/// Why a model cannot be quantised.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// The source cannot be laid out again.
    #[error(transparent)]
    File(#[from] GgufError),
    /// There is no sound model at the path.
    #[error(transparent)]
    Model(#[from] ModelFileError),
    /// A folder whose matrices cannot be given other types.
    #[error("{path} cannot be quantised: {why}")]
    Fixed {
        /// The folder.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The wanted type is none of [`TYPES`].
    #[error("cannot quantise to {}: use q8_0, q4_0, q4_1, f32, f16 or bf16", .0.as_str())]
    Type(TensorType),
    /// A matrix is quantised and [`Requantise::Refuse`] was asked for.
    #[error("tensor '{tensor}' is quantised already, as {}", .dtype.as_str())]
    Quantised {
        /// The first such tensor.
        tensor: String,
        /// Its type.
        dtype: TensorType,
    },
    /// A matrix has a type that cannot be read.
    #[error("tensor '{tensor}' has type {}, which cannot be dequantised here", .dtype.as_str())]
    Unreadable {
        /// The first such tensor.
        tensor: String,
        /// Its type.
        dtype: TensorType,
    },
    /// A value that the type cannot hold.
    #[error("tensor '{tensor}', row {row}: {source}")]
    Weight {
        /// Which.
        tensor: String,
        /// Row, from 0.
        row: u64,
        /// What is wrong.
        source: BadWeight,
    },
    /// It cannot be written.
    #[error(transparent)]
    Target(#[from] TargetError),
}
