//! Progress of fetching and loading: a bar on a terminal, a line per tenth elsewhere, nothing where
//! another program embeds the node.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use millrace_shared::wire::control::LoadReport;

/// A bar, or lines, or nothing.
#[derive(Debug)]
pub(crate) struct LoadProgress {
    what: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    lines: bool,
    tenths: AtomicU64,
}

impl LoadProgress {
    /// Begins to show `total` bytes.
    pub(crate) fn new(show: bool, what: &'static str, total: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (show && terminal).then(|| {
            let template =
                "{msg:10} [{bar:32}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left";
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(what)
        });
        Self { what, total, bar, lines: show && !terminal, tenths: AtomicU64::new(0) }
    }

    /// Bytes done so far.
    pub(crate) fn set(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if self.lines && self.total > 0 {
            let tenth = done * 10 / self.total;
            if self.tenths.fetch_max(tenth, Ordering::Relaxed) < tenth {
                tracing::info!("{} {}% of {}", self.what, tenth * 10, HumanBytes(self.total));
            }
        }
    }

    /// Ends the bar and says where the bytes came from.
    pub(crate) fn finish(&self, report: &LoadReport) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.bar.is_some() || self.lines {
            let rate = |bytes: u64| {
                format!(
                    "{} at {}/s",
                    HumanBytes(bytes),
                    HumanBytes((bytes as f64 / report.seconds.max(1e-9)) as u64)
                )
            };
            tracing::info!(
                file = %rate(report.from_file),
                cache = %rate(report.from_cache),
                coordinator = %rate(report.from_coordinator),
                "tensors are here"
            );
        }
    }
}

impl Drop for LoadProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
