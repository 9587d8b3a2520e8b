//! What can be wrong with a GGUF file.

use std::path::PathBuf;

/// Why a file is not a usable GGUF model. Each message names the place in the file or the key.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// An error in a file that was opened by path.
    #[error("{path}: {source}")]
    InFile {
        /// File.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<GgufError>,
    },
    /// The system cannot read it.
    #[error("cannot read at byte {at}: {source}")]
    Io {
        /// Offset in the file.
        at: u64,
        /// Cause.
        source: std::io::Error,
    },
    /// Not a GGUF file at all.
    #[error("not a GGUF file: it looks like {looks_like}")]
    Magic {
        /// What the first bytes look like.
        looks_like: &'static str,
    },
    /// A version this reader does not know.
    #[error("GGUF version {0} is not supported (supported: 2 and 3, little-endian)")]
    Version(u32),
    /// The file ends early.
    #[error(
        "truncated at byte {at} while reading {what}: {needed} more bytes are needed, {left} are left"
    )]
    Truncated {
        /// Offset in the file.
        at: u64,
        /// What was being read.
        what: String,
        /// Bytes needed at least.
        needed: u64,
        /// Bytes left.
        left: u64,
    },
    /// A count or length beyond every plausible model.
    #[error("{what}: {field} is {value}, more than the limit of {limit}")]
    Limit {
        /// What was being read.
        what: String,
        /// Which number.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// Bytes that mean nothing.
    #[error("{what} (byte {at}): {problem}")]
    Malformed {
        /// What was being read.
        what: String,
        /// Offset in the file.
        at: u64,
        /// What is wrong.
        problem: String,
    },
    /// Something is wrong with one tensor's entry.
    #[error("tensor '{tensor}': {problem}")]
    Tensor {
        /// Name.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A key that is needed is absent.
    #[error("the file has no key '{0}'")]
    MissingKey(String),
    /// A key has another type than it must have.
    #[error("key '{key}' is {found}, expected {expected}")]
    WrongType {
        /// Key.
        key: String,
        /// Type in the file.
        found: String,
        /// Type it must have.
        expected: &'static str,
    },
    /// A key has a value that makes no sense, or that this engine cannot do.
    #[error("key '{key}': {problem}")]
    BadValue {
        /// Key.
        key: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// A model family without a definition.
    #[error("model architecture '{found}' is not supported (supported: {known})")]
    Architecture {
        /// In the file.
        found: String,
        /// All known ones.
        known: String,
    },
}
