//! How far a run is: a bar on a terminal, else a line for each tenth.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::tally::Tally;
use crate::output;

/// What ends the sending of requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Total {
    Seconds(f64),
    Requests(u64),
}

impl Total {
    /// Whether one more is sent after so many, so many seconds after the start.
    pub(super) fn allows(self, sent: u64, at: f64) -> bool {
        match self {
            Self::Seconds(seconds) => at < seconds,
            Self::Requests(requests) => sent < requests,
        }
    }

    /// From 0 to 1.
    fn done(self, tally: &Tally) -> f64 {
        let done = match self {
            Self::Seconds(seconds) => tally.start().elapsed().as_secs_f64() / seconds,
            Self::Requests(requests) => tally.sent as f64 / requests.max(1) as f64,
        };
        done.min(1.0)
    }
}

/// Tells on standard error.
#[derive(Debug)]
pub(super) struct Progress {
    total: Total,
    bar: Option<ProgressBar>,
    /// Next tenth to tell.
    next: u32,
    /// Tokens at the last look, and when that was.
    last: (u64, Instant),
}

impl Progress {
    pub(super) fn new(total: Total) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}");
            let bar = ProgressBar::new(1000);
            style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
        });
        Self { total, bar, next: 1, last: (0, Instant::now()) }
    }

    pub(super) fn show(&mut self, tally: &Tally) {
        let done = self.total.done(tally);
        let late = !self.last.1.elapsed().is_zero() && self.bar.is_some();
        let tenth = (done * 10.0) as u32 >= self.next;
        if !late && !tenth {
            return;
        }
        let line = self.line(tally);
        match &self.bar {
            Some(bar) => {
                bar.set_position((done * 1000.0) as u64);
                bar.set_message(line);
            }
            None => output::remark(&format!("{:3.0}%  {line}", done * 100.0)),
        }
        self.next = (done * 10.0) as u32 + 1;
    }

    fn line(&mut self, tally: &Tally) -> String {
        let (tokens, since) = std::mem::replace(&mut self.last, (tally.tokens, Instant::now()));
        let rate = (tally.tokens - tokens) as f64 / since.elapsed().as_secs_f64().max(1e-3);
        format!(
            "{} under way, {} answered, {} refused, {} failed, {rate:.0} tokens/s",
            tally.in_flight, tally.answered, tally.refused, tally.failed
        )
    }

    pub(super) fn end(&mut self, tally: &Tally) {
        self.show(tally);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_by_time_or_number() {
        let time = Total::Seconds(2.0);
        assert!(time.allows(1000, 1.9) && !time.allows(0, 2.0));
        let number = Total::Requests(3);
        assert!(number.allows(2, 1e9) && !number.allows(3, 0.0));
    }
}
