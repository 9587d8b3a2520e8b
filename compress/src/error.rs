//! What can go wrong, by what the caller can do about it.

use millrace_engine::quantize::BadWeight;
use millrace_engine::target::TargetError;
use millrace_engine::{LoadError, StepError};
use millrace_shared::model::ModelFileError;
use millrace_shared::model::gguf::GgufError;

/// Why a model cannot be made smaller, or judged.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// There is no sound model at the path.
    #[error(transparent)]
    Model(#[from] ModelFileError),
    /// The result cannot be laid out.
    #[error(transparent)]
    File(#[from] GgufError),
    /// The engine cannot load the model.
    #[error("the model cannot be computed: {0}")]
    Load(#[from] LoadError),
    /// The engine cannot compute with it.
    #[error("the model cannot be computed: {0}")]
    Step(#[from] StepError),
    /// A value of the model that cannot be stored, NaN for example.
    #[error("tensor '{tensor}', row {row}: {source}")]
    Weight {
        /// Which.
        tensor: String,
        /// From 0.
        row: usize,
        /// What is wrong.
        source: BadWeight,
    },
    /// A setting, recipe or input that cannot work; says what to change.
    #[error("{0}")]
    Settings(String),
    /// The result cannot be written, or a file not be read.
    #[error(transparent)]
    Target(#[from] TargetError),
}

impl CompressError {
    /// Of a setting.
    pub fn settings(what: impl Into<String>) -> Self {
        Self::Settings(what.into())
    }
}
