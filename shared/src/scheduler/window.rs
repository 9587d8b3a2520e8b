//! How many micro-batches are in flight, from measurements.
//!
//! A stage never waits if, while it computes one micro-batch, the others fill the rest of the round:
//! `m = ceil((stage times + link times + scheduling) / slowest stage)`. The link's share is what is
//! left of a round trip after every stage's computing and queueing, so that queues which too large
//! an `m` makes do not make it larger. Grows at once, shrinks only when clearly too large.
//!
//! Invariant: between 1 and the limit it was given.

use std::time::Duration;

use crate::wire::data::StageTime;

/// Weight of a new measurement: some ten micro-batches set the value.
const NEW: f64 = 0.1;
/// A measurement counts as at most this many times the value so far.
const OUTLIER: f64 = 4.0;
/// Added to the ratio before rounding up: stage times vary, and a bubble costs more than a
/// micro-batch that waits.
const SLACK: f64 = 0.25;
/// The ratio must be this much below the next smaller number before it shrinks.
const STICKY: f64 = 0.35;
/// Measurements before the first change.
const WARM: u32 = 4;

/// A moving average in seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Average(f64);

impl Average {
    fn add(&mut self, seconds: f64, first: bool) {
        if first {
            self.0 = seconds;
        } else {
            self.0 += NEW * (seconds.min(OUTLIER * self.0.max(1e-6)) - self.0);
        }
    }
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Window {
    stages: Vec<Average>,
    link: Average,
    seen: u32,
    current: u32,
    limit: u32,
    /// Whether measurements decide.
    measured: bool,
}

impl Window {
    /// `from`: where measurements decide, the number to begin with.
    pub(super) fn new(limit: u32, from: Option<u32>) -> Self {
        let current = from.unwrap_or(limit).clamp(1, limit);
        Self {
            stages: Vec::new(),
            link: Average::default(),
            seen: 0,
            current,
            limit,
            measured: from.is_some(),
        }
    }

    /// Micro-batches that may be in flight.
    pub(super) fn size(&self) -> u32 {
        self.current
    }

    /// Seconds on the links of a round trip.
    pub(super) fn link(&self) -> Duration {
        Duration::from_secs_f64(self.link.0.clamp(0.0, 1e6))
    }

    /// Usual seconds of a stage's step, in order.
    pub(super) fn stages(&self) -> impl Iterator<Item = f64> + '_ {
        self.stages.iter().map(|s| s.0)
    }

    pub(super) fn observe(&mut self, times: &[StageTime], round_trip: Duration) {
        if times.is_empty() {
            return;
        }
        if times.len() != self.stages.len() {
            self.stages = vec![Average::default(); times.len()];
            self.seen = 0;
        }
        let first = self.seen == 0;
        self.seen = self.seen.saturating_add(1);
        let mut at_stages = 0.0;
        for (average, time) in self.stages.iter_mut().zip(times) {
            average.add(time.step().as_secs_f64(), first);
            at_stages += (time.step() + time.wait()).as_secs_f64();
        }
        self.link.add((round_trip.as_secs_f64() - at_stages).max(0.0), first);
        if self.measured && self.seen >= WARM {
            self.adapt();
        }
    }

    fn adapt(&mut self) {
        let sum: f64 = self.stages().sum();
        let slowest = self.stages().fold(0.0, f64::max);
        if slowest <= 0.0 {
            return;
        }
        let ratio = (sum + self.link.0) / slowest + SLACK;
        let wanted = ratio.ceil().clamp(1.0, f64::from(self.limit)) as u32;
        if wanted > self.current {
            self.current = wanted;
        } else if ratio + STICKY < f64::from(self.current - 1) {
            self.current -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: f64) -> Duration {
        Duration::from_secs_f64(n / 1e3)
    }

    fn settle(window: &mut Window, steps: &[f64], wait: f64, link: f64) -> u32 {
        for _ in 0..200 {
            let times: Vec<_> = steps.iter().map(|&s| StageTime::new(ms(wait), ms(s))).collect();
            let round = steps.iter().map(|s| s + wait).sum::<f64>() + link;
            window.observe(&times, ms(round));
        }
        window.size()
    }

    #[test]
    fn grows_with_links_and_shrinks_again() {
        let mut window = Window::new(12, Some(3));
        assert_eq!(settle(&mut window, &[10.0, 10.0], 0.0, 0.4), 3);
        assert_eq!(settle(&mut window, &[10.0, 10.0], 0.0, 60.0), 9);
        assert_eq!(settle(&mut window, &[10.0, 10.0], 0.0, 1000.0), 12, "the limit holds");
        assert_eq!(settle(&mut window, &[10.0, 10.0], 0.0, 0.4), 3);
        assert_eq!(settle(&mut window, &[20.0, 1.0], 0.0, 0.4), 2, "a slow stage needs fewer");
    }

    #[test]
    fn its_own_queues_do_not_make_it_larger() {
        let mut window = Window::new(64, Some(3));
        assert_eq!(settle(&mut window, &[10.0, 10.0], 300.0, 0.4), 3);
    }

    #[test]
    fn a_fixed_number_stays() {
        let mut window = Window::new(5, None);
        assert_eq!(settle(&mut window, &[1.0; 20], 0.0, 500.0), 5);
    }
}
