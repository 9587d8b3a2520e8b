//! What the system's limits mean to a program that serves: it opens as many files as it is given, and
//! a file that may not grow is an error like a full disk, not the end.

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

/// Every connection over TCP is a file, and so is much else.
const FILES: u64 = 65_536;

/// Raises the limit of open files as far as the system allows, within reason, and makes writes beyond a
/// limit of file sizes (`ulimit -f`) errors: unheard, their signal would end the process. Must be
/// called inside a tokio runtime; calling it again changes nothing.
pub fn prepare() {
    if let Err(e) = rlimit::increase_nofile_limit(FILES) {
        tracing::warn!("the limit of open files stays as it is: {e}");
    }
    if let Err(e) = signal(SignalKind::from_raw(Signal::SIGXFSZ as i32)) {
        tracing::warn!("a limit of file sizes would end this process: {e}");
    }
}
