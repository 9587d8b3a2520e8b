//! Whether the stages of a pipeline take the same time, for long enough to do something about it.
//!
//! Looks at the time of each stage per micro-batch, window by window. A window without enough work
//! says nothing. Windows over [`UNEVEN`] in a row for [`PATIENCE`] are reported once; the count then
//! begins anew, so that what nobody mended is reported again. Pure: time is an argument.

use std::time::Duration;

/// The slowest stage over the mean, less one, from which a new cut may be worth it.
pub const UNEVEN: f64 = 0.15;
/// For this long.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// One look.
const WINDOW: Duration = Duration::from_secs(2);
/// Fewest micro-batches in a window that say something.
const ENOUGH: u32 = 20;

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Balance {
    sums: Vec<Duration>,
    seen: u32,
    /// Of the window; `None` before the first micro-batch.
    since: Option<Duration>,
    /// Time in uneven windows without an even one between them, and the sums over it.
    uneven: Duration,
    total: Vec<Duration>,
    total_seen: u32,
}

impl Balance {
    /// A micro-batch came back: what it took in each stage. Where the stages have been uneven for
    /// [`PATIENCE`], the mean seconds of each over that time.
    pub fn handle_times(&mut self, stages: &[Duration], now: Duration) -> Option<Vec<f64>> {
        if stages.len() != self.sums.len() {
            *self = Self { sums: vec![Duration::ZERO; stages.len()], ..Self::default() };
            self.total.clone_from(&self.sums);
        }
        let since = *self.since.get_or_insert(now);
        for (sum, time) in self.sums.iter_mut().zip(stages) {
            *sum += *time;
        }
        self.seen += 1;
        let length = now.saturating_sub(since);
        if length < WINDOW {
            return None;
        }
        self.close_window(length.min(2 * WINDOW));
        self.since = Some(now);
        if self.uneven < PATIENCE {
            return None;
        }
        let count = f64::from(self.total_seen.max(1));
        let means = self.total.iter().map(|t| t.as_secs_f64() / count).collect();
        self.forget();
        Some(means)
    }

    fn close_window(&mut self, length: Duration) {
        let slowest = self.sums.iter().max().copied().unwrap_or_default().as_secs_f64();
        let sum: f64 = self.sums.iter().map(Duration::as_secs_f64).sum();
        let mean = sum / self.sums.len().max(1) as f64;
        if self.seen >= ENOUGH && slowest > (1.0 + UNEVEN) * mean {
            self.uneven += length;
            self.total_seen += self.seen;
            for (total, sum) in self.total.iter_mut().zip(&self.sums) {
                *total += *sum;
            }
        } else if self.seen >= ENOUGH {
            self.forget();
        }
        self.seen = 0;
        self.sums.fill(Duration::ZERO);
    }

    fn forget(&mut self) {
        self.uneven = Duration::ZERO;
        self.total_seen = 0;
        self.total.fill(Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(20);

    /// Feeds micro-batches of these times for so long; what was reported, and when.
    fn feed(
        balance: &mut Balance,
        millis: [u64; 2],
        from: u64,
        seconds: u64,
    ) -> Vec<(u64, Vec<f64>)> {
        let times = millis.map(Duration::from_millis);
        let start = Duration::from_secs(from);
        (0..seconds * 50)
            .filter_map(|i| {
                let now = start + STEP * i as u32;
                Some((now.as_secs(), balance.handle_times(&times, now)?))
            })
            .collect()
    }

    #[test]
    fn uneven_stages_are_reported_after_half_a_minute_and_again() {
        let mut balance = Balance::default();
        assert_eq!(feed(&mut balance, [10, 12], 0, 60), [], "a tenth over the mean is even enough");
        let reports = feed(&mut balance, [10, 20], 60, 70);
        assert_eq!(reports.len(), 2, "{reports:?}");
        assert!((90..=94).contains(&reports[0].0), "{reports:?}");
        let means = &reports[0].1;
        assert!((means[0] - 0.010).abs() < 1e-6 && (means[1] - 0.020).abs() < 1e-6, "{means:?}");
    }

    #[test]
    fn an_even_moment_begins_the_count_anew_and_an_idle_one_does_not() {
        let mut balance = Balance::default();
        assert_eq!(feed(&mut balance, [10, 20], 0, 20), []);
        assert_eq!(feed(&mut balance, [10, 10], 20, 4), []);
        assert_eq!(feed(&mut balance, [10, 20], 24, 20), []);
        // A long silence counts for little.
        assert_eq!(feed(&mut balance, [10, 20], 500, 2), []);
        assert_eq!(feed(&mut balance, [10, 20], 502, 16).len(), 1);
    }
}
