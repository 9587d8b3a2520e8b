//! How long work tells how far it is: a bar on a terminal, else one line per tenth.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Receives the progress of one piece of work after another.
pub trait Progress {
    /// Work begins: what it is, and its bytes where they are known.
    fn begin(&mut self, what: &str, total: Option<u64>);
    /// Bytes done so far (not since the last call).
    fn advance(&mut self, done: u64);
    /// The work is over, well or badly.
    fn end(&mut self);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn begin(&mut self, _: &str, _: Option<u64>) {}
    fn advance(&mut self, _: u64) {}
    fn end(&mut self) {}
}

/// Tells on standard error.
#[derive(Debug, Default)]
pub struct ConsoleProgress {
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Bar(ProgressBar),
    Lines {
        what: String,
        total: u64,
        /// Next tenth to tell.
        next: u64,
    },
}

impl ConsoleProgress {
    /// Nothing to tell yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Progress for ConsoleProgress {
    fn begin(&mut self, what: &str, total: Option<u64>) {
        self.end();
        if std::io::stderr().is_terminal() {
            let bar = match total {
                Some(total) => ProgressBar::new(total).with_style(bar_style()),
                None => {
                    let bar = ProgressBar::new_spinner();
                    bar.enable_steady_tick(Duration::from_millis(120));
                    bar
                }
            };
            bar.set_message(what.to_owned());
            self.state = State::Bar(bar);
        } else {
            line(&match total {
                Some(total) => format!("{what}: {}", megabytes(total)),
                None => format!("{what} …"),
            });
            let total = total.unwrap_or(0);
            self.state = State::Lines { what: what.to_owned(), total, next: 1 };
        }
    }

    fn advance(&mut self, done: u64) {
        match &mut self.state {
            State::Idle => {}
            State::Bar(bar) => bar.set_position(done),
            State::Lines { what, total, next } => {
                let Some(tenths) = done.saturating_mul(10).checked_div(*total) else { return };
                if tenths >= *next {
                    *next = tenths + 1;
                    line(&format!("{what}: {} % of {}", tenths * 10, megabytes(*total)));
                }
            }
        }
    }

    fn end(&mut self) {
        if let State::Bar(bar) = std::mem::take(&mut self.state) {
            bar.finish_and_clear();
        }
    }
}

impl Drop for ConsoleProgress {
    fn drop(&mut self) {
        self.end();
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A closed standard error is no reason to fail.
fn line(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
