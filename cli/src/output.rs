//! Writing results: data on stdout, remarks on stderr.
//!
//! Never `println!`: it panics when the reader of a pipe has left, which for this program is a clean
//! end.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;
use time::OffsetDateTime;

/// How a command prints its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TextOrJson {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

/// How a measurement prints its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TableOrJson {
    /// For people.
    Table,
    /// One JSON object.
    Json,
}

/// Stdout cannot be written to.
#[derive(Debug)]
pub(crate) struct StdoutError(pub(crate) io::Error);

impl fmt::Display for StdoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write to stdout: {}", self.0)
    }
}

impl std::error::Error for StdoutError {}

/// Writes text to stdout as it is.
///
/// # Errors
/// If stdout is closed; a reader that left ends the program cleanly.
pub(crate) fn write(text: impl fmt::Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").map_err(StdoutError)?;
    Ok(())
}

/// A day and a minute, UTC, of Unix seconds; the number itself where no calendar has it.
pub(crate) fn date(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    let Some(at) = at else { return seconds.to_string() };
    let (year, month, day) = at.to_calendar_date();
    let (month, hour, minute) = (u8::from(month), at.hour(), at.minute());
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}Z")
}

/// Writes a piece of a streamed answer and shows it at once.
///
/// # Errors
/// As [`write()`].
pub(crate) fn stream(text: &str) -> anyhow::Result<()> {
    write(text)?;
    flush()
}

/// Pushes out what is buffered.
///
/// # Errors
/// As [`write()`].
pub(crate) fn flush() -> anyhow::Result<()> {
    Ok(io::stdout().lock().flush().map_err(StdoutError)?)
}

/// Writes a value as one line of JSON.
///
/// # Errors
/// As [`write()`].
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    write(format_args!("{}\n", serde_json::to_string(value)?))
}

/// A remark for people, dimmed where stderr is a terminal that shows colours.
pub(crate) fn remark(text: &str) {
    let colours = io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
    if colours {
        eprintln!("\x1b[2m{text}\x1b[0m");
    } else {
        eprintln!("{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00Z"),
            (1_709_251_199, "2024-02-29 23:59Z"),
            (4_102_444_800, "2100-01-01 00:00Z"),
            (u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
