//! What the stages of a pipeline take while it serves answers: by it, measured profiles are brought
//! up to date.
//!
//! Only micro-batches count that hold one position of each of their sequences, as those do that were
//! profiled. Pure: time is an argument.

use std::time::Duration;

/// A report covers at least so long: the mood of a minute is no property of a machine.
const PERIOD: Duration = Duration::from_secs(30);
/// And so many micro-batches.
const ENOUGH: u32 = 500;

/// What stages took on average.
#[derive(Clone, Debug, PartialEq)]
pub struct Pace {
    /// Rows of a micro-batch.
    pub rows: f64,
    /// Seconds of each stage.
    pub seconds: Vec<f64>,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Paces {
    sums: Vec<Duration>,
    rows: u64,
    seen: u32,
    since: Option<Duration>,
}

impl Paces {
    /// A micro-batch of so many answers came back: what it took in each stage. From time to time,
    /// what was usual since the last report.
    pub fn handle_times(&mut self, rows: u32, stages: &[Duration], now: Duration) -> Option<Pace> {
        if stages.len() != self.sums.len() {
            *self = Self { sums: vec![Duration::ZERO; stages.len()], ..Self::default() };
        }
        let since = *self.since.get_or_insert(now);
        for (sum, time) in self.sums.iter_mut().zip(stages) {
            *sum += *time;
        }
        self.rows += u64::from(rows);
        self.seen += 1;
        if self.seen < ENOUGH || now.saturating_sub(since) < PERIOD {
            return None;
        }
        let count = f64::from(self.seen);
        let seconds = self.sums.iter().map(|s| s.as_secs_f64() / count).collect();
        let pace = Pace { rows: self.rows as f64 / count, seconds };
        *self = Self::default();
        Some(pace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_reported_after_enough_of_both() {
        let times = [Duration::from_millis(10), Duration::from_millis(20)];
        let feed =
            |paces: &mut Paces, from_ms: u64, every_ms: u64, count: u64| -> Vec<(u64, Pace)> {
                let at = |i| from_ms + i * every_ms;
                let one = |i| {
                    let now = Duration::from_millis(at(i));
                    Some((at(i), paces.handle_times(4 + 2 * (i % 2) as u32, &times, now)?))
                };
                (0..count).filter_map(one).collect()
            };
        let mut paces = Paces::default();
        assert_eq!(feed(&mut paces, 0, 10, 2000), [], "many, but not for long");
        let reports = feed(&mut paces, 20_000, 10, 2000);
        assert_eq!(reports.len(), 1);
        let (at, pace) = &reports[0];
        assert_eq!(*at, 30_000);
        assert!((pace.rows - 5.0).abs() < 0.01, "{pace:?}");
        assert!((pace.seconds[0] - 0.010).abs() < 1e-9 && (pace.seconds[1] - 0.020).abs() < 1e-9);
        assert_eq!(feed(&mut Paces::default(), 0, 1000, 100), [], "long, but few");
    }

    #[test]
    fn another_number_of_stages_begins_anew() {
        let mut paces = Paces::default();
        let ms = Duration::from_millis;
        for i in 0..600 {
            assert_eq!(paces.handle_times(1, &[ms(1)], ms(i)), None);
        }
        assert_eq!(paces.handle_times(1, &[ms(1), ms(1)], ms(60_000)), None);
        for i in 0..498 {
            assert_eq!(paces.handle_times(1, &[ms(1), ms(3)], ms(60_001 + i)), None);
        }
        let pace = paces.handle_times(1, &[ms(1), ms(3)], ms(95_000)).expect("enough");
        assert_eq!(pace.seconds.len(), 2);
    }
}
