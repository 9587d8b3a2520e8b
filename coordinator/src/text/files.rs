//! Bounded reading of the small files of a model folder.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::de::DeserializeOwned;

use super::TextError;

/// Largest of the other files; those of today have up to some megabytes.
const MAX_JSON: u64 = 32 << 20;

/// The bytes of a file, `None` where there is none.
///
/// # Errors
/// If it cannot be read, or has more than `limit` bytes.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(unusable(path, e.to_string())),
    };
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|e| unusable(path, e.to_string()))?;
    if bytes.len() as u64 > limit {
        return Err(unusable(path, format!("it has more than {limit} bytes")));
    }
    Ok(Some(bytes))
}

/// A file of JSON, `None` where there is none.
///
/// # Errors
/// As [`read`], or if the JSON is not as expected.
pub(super) fn json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TextError> {
    let Some(bytes) = read(path, MAX_JSON)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| unusable(path, e.to_string()))
}

/// A file of text, `None` where there is none.
///
/// # Errors
/// As [`read`], or if it is no UTF-8.
pub(super) fn text(path: &Path) -> Result<Option<String>, TextError> {
    let Some(bytes) = read(path, MAX_JSON)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).map_err(|e| unusable(path, e.to_string()))
}

/// The error for a file that cannot be used.
pub(super) fn unusable(path: &Path, why: String) -> TextError {
    TextError::Folder { path: path.to_owned(), why }
}
