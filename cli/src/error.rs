//! How failures become messages and exit codes. The only place that knows both.

use std::fmt;
use std::io;

use millrace_shared::error::Status;

/// Clean, or nobody reads any more.
const OK: i32 = 0;
/// Something failed at run time.
const FAILURE: i32 = 1;
/// Wrong flags, files or configuration: the same command cannot succeed.
const USAGE: i32 = 2;
/// As shells report a process that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// The command as given cannot work; the message says what to type instead.
#[derive(Debug)]
struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// The user asked to stop.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// An error that exits with 2.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    UsageError(message.into()).into()
}

/// Prints the error of a command, if any, on stderr; returns the exit code.
pub(crate) fn report(result: anyhow::Result<()>) -> i32 {
    let Err(error) = result else { return OK };
    let code = exit_code(&error);
    if matches!(code, FAILURE | USAGE) {
        eprintln!("millrace: error: {}{}", told(&error), retry_hint(&error));
    }
    code
}

/// An error and its causes; what a message has told already is not told again.
fn told(error: &anyhow::Error) -> String {
    let mut all = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if all.contains(&cause) {
            continue;
        }
        if !all.is_empty() {
            all += ": ";
        }
        all += &cause;
    }
    all
}

fn exit_code(error: &anyhow::Error) -> i32 {
    let broken_pipe = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    if error.is::<Interrupted>() {
        INTERRUPTED
    } else if error.is::<UsageError>() {
        USAGE
    } else if error.downcast_ref::<crate::output::StdoutError>().is_some_and(|e| broken_pipe(&e.0))
    {
        OK
    } else {
        FAILURE
    }
}

fn retry_hint(error: &anyhow::Error) -> String {
    let status = error.chain().find_map(|e| e.downcast_ref::<Status>());
    match status.and_then(|s| s.retry_after_ms) {
        Some(ms) => format!(" (try again in {:.1} s)", f64::from(ms) / 1e3),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::StdoutError;

    #[test]
    fn codes() {
        let code = |e: anyhow::Error| exit_code(&e);
        assert_eq!(code(usage("no")), USAGE);
        assert_eq!(code(usage("no").context("while")), USAGE);
        assert_eq!(code(anyhow::anyhow!("broke")), FAILURE);
        assert_eq!(code(Interrupted.into()), INTERRUPTED);
        let pipe = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(code(StdoutError(pipe()).into()), OK);
        // A broken connection is a failure, only stdout's reader may leave.
        assert_eq!(code(pipe().into()), FAILURE);
    }

    #[test]
    fn causes_are_told_once() {
        let full = || io::Error::other("no space");
        assert_eq!(told(&anyhow::Error::from(full()).context("while")), "while: no space");
        assert_eq!(told(&anyhow::Error::from(full()).context("a: no space")), "a: no space");
    }

    #[test]
    fn a_retry_hint_is_shown() {
        let error = anyhow::Error::from(Status::unavailable("no pipeline", 1500)).context("x");
        assert_eq!(retry_hint(&error), " (try again in 1.5 s)");
    }
}
