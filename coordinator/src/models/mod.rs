//! Model files: the catalogue of known ones, those of the hub, fetching and caching them, hashing
//! them.
//!
//! A name resolves to a verified file on this machine; half-fetched files are never taken for models,
//! because a download is checked and made durable under another name before it is renamed.

mod catalogue;
mod fetch;
mod header;
mod hub;
mod kept;
mod manifest;
mod progress;
mod quantized;
mod resolve;

pub use catalogue::{CATALOGUE, CatalogueEntry, HubSource, PypiSource};
pub use fetch::Source;
pub use header::{header, header_with};
pub use hub::HubName;
pub use kept::{KeptModel, Place, kept, kept_by, named, on_this_machine};
pub use manifest::hash_manifest;
pub use progress::{ConsoleProgress, NoProgress, Progress};
pub use quantized::{ModelOptions, quantized, resolve_as};
pub use resolve::{Settings, Token, cache_dir, pull, pull_with, resolve, resolve_with};

use std::path::PathBuf;

use millrace_engine::quantize::QuantizeError;
use millrace_shared::model::ModelFileError;
use millrace_shared::model::gguf::GgufError;

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Neither a file nor a name.
    #[error("{0}")]
    Unknown(String),
    /// Neither variable names a place for the cache.
    #[error("no cache folder: set MILLRACE_CACHE, XDG_CACHE_HOME or HOME")]
    NoCache,
    /// A wrong value of a variable.
    #[error("{name}: {problem}")]
    Setting {
        /// Variable.
        name: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A file or folder cannot be used.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// No source gave the file.
    #[error("cannot fetch {name}: {attempts}")]
    Fetch {
        /// Model.
        name: String,
        /// Each source and what went wrong there.
        attempts: String,
    },
    /// The file is no usable model.
    #[error(transparent)]
    File(#[from] GgufError),
    /// What is there is no usable model.
    #[error(transparent)]
    Files(#[from] ModelFileError),
    /// `--quantize` was given for a model without float matrices.
    #[error(
        "--quantize {to}: {path} has no F32, F16 or BF16 matrices to quantise, they are {types}; leave --quantize out, or quantise again with 'millrace quantize --allow-requantize'"
    )]
    NothingToQuantize {
        /// Model file.
        path: PathBuf,
        /// Types of its matrices.
        types: String,
        /// The wanted type.
        to: String,
    },
    /// A model cannot be quantised.
    #[error("cannot quantise the model: {0}")]
    Quantize(#[from] QuantizeError),
}

impl ModelError {
    fn io(what: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}
