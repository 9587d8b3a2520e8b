//! Logging of the binaries: to standard error, filtered by `RUST_LOG`, as text or JSON.
//!
//! Standard output belongs to results. Colours are used on a terminal only, and not where
//! `NO_COLOR` is set. Libraries only emit; nothing but a `main` calls this.

use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;

/// Without `RUST_LOG`: life cycle of our own parts, warnings of everybody else's.
const DEFAULT_FILTER: &str = "warn,millrace=info";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For collectors.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("unknown log format {other:?}: use `text` or `json`")),
        }
    }
}

/// Sets logging up for the whole program; a second call changes nothing.
///
/// # Errors
/// If `RUST_LOG` is not a filter.
pub fn init(format: LogFormat) -> Result<(), String> {
    init_with(format, DEFAULT_FILTER)
}

/// As [`init`], with another filter where `RUST_LOG` is not set.
///
/// # Errors
/// If `RUST_LOG` (or `default_filter`) is not a filter.
pub fn init_with(format: LogFormat, default_filter: &str) -> Result<(), String> {
    let text = std::env::var("RUST_LOG").unwrap_or_else(|_| default_filter.to_owned());
    let filter = EnvFilter::try_new(&text).map_err(|e| format!("RUST_LOG={text}: {e}"))?;
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(!plain && std::io::stderr().is_terminal());
    let _already_set = match format {
        LogFormat::Text => builder.try_init().is_err(),
        LogFormat::Json => builder.json().try_init().is_err(),
    };
    Ok(())
}
