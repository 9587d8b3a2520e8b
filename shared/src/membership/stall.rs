//! A pipeline that is alive and does not answer: an engine that hangs, a link that swallows.
//!
//! Heartbeats come from outside the compute thread, so they say nothing about it. What does is the
//! oldest micro-batch: nothing has come back for many times as long as it should take. A busy node
//! is not a dead one: the limit follows the predicted time, it doubles with every stall that led to
//! nothing, and a time in which the owner itself was held up does not count. Pure: time is an
//! argument.

use std::time::Duration;

/// Nothing is stalled before so much silence: as much as a lease.
pub const STALL: Duration = Duration::from_millis(1500);
/// Times the predicted time of the oldest micro-batch.
const TIMES: f64 = 10.0;
/// Where nothing is predicted: far above the slowest step of a machine that is worth having.
pub const STALL_UNKNOWN: Duration = Duration::from_secs(60);
/// Most doublings.
const MOST: u32 = 6;
/// Answers in a row after which a stall is forgotten.
const SOUND: u32 = 200;
/// A look that comes so late says that the owner was held up.
const LATE: Duration = Duration::from_millis(400);

/// See the module's documentation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stalls {
    /// When the last answer came, or the owner was last held up.
    heard: Duration,
    looked: Duration,
    doublings: u32,
    answers: u32,
}

impl Stalls {
    /// A micro-batch came back.
    pub fn handle_answer(&mut self, now: Duration) {
        self.heard = now;
        self.answers += 1;
        if self.answers >= SOUND {
            self.doublings = 0;
        }
    }

    /// Whether the pipeline is stalled. `issued`: the oldest micro-batch in flight; `predicted`: the
    /// seconds that all stages together should take for it, 0 where that is not known. Once `true`,
    /// the owner ends the epoch.
    pub fn is_stalled(&mut self, issued: Option<Duration>, predicted: f64, now: Duration) -> bool {
        if now.saturating_sub(self.looked) >= LATE {
            self.heard = now;
        }
        self.looked = now;
        let Some(issued) = issued else { return false };
        let least = match predicted > 0.0 && predicted.is_finite() {
            true => STALL.max(Duration::from_secs_f64((TIMES * predicted).min(3600.0))),
            false => STALL_UNKNOWN,
        };
        let stalled = now.saturating_sub(issued.max(self.heard)) > least * 2u32.pow(self.doublings);
        if stalled {
            self.doublings = (self.doublings + 1).min(MOST);
            self.answers = 0;
            self.heard = now;
        }
        stalled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Looks every 25 ms; when it was first stalled.
    fn look(stalls: &mut Stalls, from: u64, issued: u64, predicted: f64) -> Option<u64> {
        let ticks = (0..8000).map(|i| from + 25 * i);
        ticks.into_iter().find(|t| stalls.is_stalled(Some(ms(issued)), predicted, ms(*t)))
    }

    #[test]
    fn silence_is_a_stall_and_slowness_is_not() {
        let mut stalls = Stalls::default();
        assert_eq!(look(&mut stalls, 0, 0, 0.02), Some(1525));
        assert!(
            look(&mut Stalls::default(), 0, 0, 0.5).unwrap() > 5000,
            "it should take half a second"
        );
        assert!(look(&mut Stalls::default(), 0, 0, 0.0).unwrap() > 60_000, "nobody knows");
        // Answers put it off.
        let mut stalls = Stalls::default();
        assert!(!stalls.is_stalled(Some(ms(0)), 0.02, ms(0)));
        for t in 0..400 {
            stalls.handle_answer(ms(t * 25));
            assert!(!stalls.is_stalled(Some(ms(0)), 0.02, ms(t * 25)));
        }
        assert!(!stalls.is_stalled(None, 0.02, ms(100_000)), "nothing is in flight");
    }

    #[test]
    fn who_was_held_up_counts_no_silence() {
        let mut stalls = Stalls::default();
        assert!(!stalls.is_stalled(Some(ms(0)), 0.02, ms(0)));
        assert!(!stalls.is_stalled(Some(ms(0)), 0.02, ms(5000)));
        assert_eq!(look(&mut stalls, 5000, 0, 0.02), Some(6525));
    }

    #[test]
    fn stalls_that_lead_to_nothing_are_believed_less_and_less() {
        let mut stalls = Stalls::default();
        let first = look(&mut stalls, 0, 0, 0.02).unwrap();
        let second = look(&mut stalls, first, first, 0.02).unwrap() - first;
        assert!(second >= 2 * 1500, "{second}");
        (0..SOUND).for_each(|_| stalls.handle_answer(ms(10_000)));
        assert!(look(&mut stalls, 10_000, 10_000, 0.02).unwrap() < 11_600);
    }
}
