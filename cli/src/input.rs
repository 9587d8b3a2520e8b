//! Reading what commands are given: texts, lists of token ids, models.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use millrace_coordinator::models::{self, ModelError, ModelOptions};
use millrace_shared::model::ModelFiles;
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
    models::resolve_as(name, options, &mut progress).map_err(failed)
}

/// [`model`], as its source has it now.
///
/// # Errors
/// As [`model`].
pub(crate) fn pull(name: &str) -> anyhow::Result<PathBuf> {
    models::pull(name, &mut models::ConsoleProgress::new()).map_err(failed)
}

/// The directory of a model; of one that is not on this machine only that is fetched.
///
/// # Errors
/// As [`model`].
pub(crate) fn header(name: &str) -> anyhow::Result<ModelFiles> {
    models::header(name, &mut models::ConsoleProgress::new()).map_err(failed)
}

/// What no other try can mend exits as wrong usage.
pub(crate) fn failed(error: ModelError) -> anyhow::Error {
    match error {
        ModelError::Unknown(_)
        | ModelError::NoCache
        | ModelError::Setting { .. }
        | ModelError::NothingToQuantize { .. } => usage(error.to_string()),
        other => other.into(),
    }
}

/// How long ago something was, roughly.
pub(crate) fn ago(age: Duration) -> String {
    match age.as_secs() {
        0..60 => "now".to_owned(),
        s @ 60..3600 => format!("{} min ago", s / 60),
        s @ 3600..86_400 => format!("{} h ago", s / 3600),
        s => {
            format!("{} days ago", s / 86_400).replacen("1 days", "1 day", usize::from(s < 172_800))
        }
    }
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
    fn times_ago() {
        let hours = |n| ago(Duration::from_hours(n));
        assert_eq!(ago(Duration::from_secs(59)), "now");
        assert_eq!(ago(Duration::from_secs(150)), "2 min ago");
        assert_eq!((hours(5), hours(30)), ("5 h ago".into(), "1 day ago".into()));
        assert_eq!((hours(48), hours(504)), ("2 days ago".into(), "21 days ago".into()));
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
