//! Reading what commands are given: texts, lists of token ids, models.

use std::io::Read;
use std::path::{Path, PathBuf};

use millrace_coordinator::models::{self, ModelError, ModelOptions};
use serde::Deserialize;

use crate::error::usage;

/// A short text of this program's, scored where none is given.
const SAMPLE: &str = include_str!("sample.txt");

/// [`text`] of a file, or the sample.
///
/// # Errors
/// As [`text`].
pub(crate) fn text_or_sample(path: Option<&Path>) -> anyhow::Result<String> {
    path.map_or_else(|| Ok(SAMPLE.to_owned()), text)
}

/// Reads a file of UTF-8 text; `-` is stdin.
///
/// # Errors
/// If it cannot be read or is not UTF-8; names the file and the first bad byte.
pub(crate) fn text(path: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().read_to_end(&mut bytes).map(|_| ())
    } else {
        std::fs::read(path).map(|b| bytes = b)
    };
    read.map_err(|e| usage(format!("cannot read {}: {e}", path.display())))?;
    String::from_utf8(bytes).map_err(|e| {
        usage(format!(
            "{} is not UTF-8 text: the first bad byte is at offset {}; convert it first, for example with iconv",
            path.display(),
            e.utf8_error().valid_up_to()
        ))
    })
}

/// Accepted forms of a list of ids: bare, or what `tokenize` and `generate` print.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    Bare(Vec<u32>),
    Tokenized { ids: Vec<u32> },
    Named { token_ids: Vec<u32> },
}

/// Reads a JSON file of token ids: `[1, 2]`, `{"ids": [1, 2]}` or `{"token_ids": [1, 2]}`.
///
/// # Errors
/// If it cannot be read or has another form.
pub(crate) fn token_ids(path: &Path) -> anyhow::Result<Vec<u32>> {
    match serde_json::from_str(&text(path)?) {
        Ok(Ids::Bare(ids) | Ids::Tokenized { ids } | Ids::Named { token_ids: ids }) => Ok(ids),
        Err(_) => Err(usage(format!(
            "{} is no JSON list of token ids: write [1, 2, 3], or the output of 'millrace tokenize --output json'",
            path.display()
        ))),
    }
}

/// Finds a model on this machine, fetching it first if the catalogue knows it.
///
/// # Errors
/// If there is no such model or it cannot be fetched.
pub(crate) fn model(name: &str) -> anyhow::Result<PathBuf> {
    model_as(name, ModelOptions::default())
}

/// [`model`], prepared as the options say.
///
/// # Errors
/// As [`model`], and if it cannot be prepared so.
pub(crate) fn model_as(name: &str, options: ModelOptions) -> anyhow::Result<PathBuf> {
    let mut progress = models::ConsoleProgress::new();
    models::resolve_as(name, options, &mut progress).map_err(|e| match e {
        ModelError::Unknown(_)
        | ModelError::NoCache
        | ModelError::Setting { .. }
        | ModelError::NothingToQuantize { .. }
        | ModelError::NotQuantisable { .. } => usage(e.to_string()),
        other => other.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn lists_of_ids() {
        for good in ["[1, 2]", r#"{"ids":[1,2]}"#, r#"{"text":"x","token_ids":[1,2]}"#] {
            assert_eq!(token_ids(file(good.as_bytes()).path()).unwrap(), [1, 2]);
        }
        for bad in ["", "[-1]", "[1.5]", "{}", "\"1\""] {
            let error = token_ids(file(bad.as_bytes()).path()).unwrap_err().to_string();
            assert!(error.contains("no JSON list of token ids"), "{error}");
        }
    }

    #[test]
    fn text_must_be_utf8() {
        let error = text(file(b"good \xff").path()).unwrap_err().to_string();
        assert!(error.contains("offset 5"), "{error}");
    }
}
