//! A pipeline that is alive and does not answer: an engine that hangs, a link that swallows.
//!
//! Heartbeats come from outside the compute thread, so they say nothing about it. What does is the
//! oldest micro-batch: nothing has come back for a lease, and for many times as long as it should
//! take. A busy node is not a dead one, nor is a slow link: the limit follows the predicted time of
//! the stages and of the bytes between them, it doubles with every stall that led to nothing, and a
//! time in which the owner itself was held up does not count. Pure: time is an argument.

use std::time::Duration;

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

/// What the links of a pipeline take for a micro-batch, one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkTimes {
    /// Seconds for the bytes of one position.
    pub per_position: f64,
    /// Seconds on the way, whatever the bytes.
    pub fixed: f64,
}

impl LinkTimes {
    /// Bytes a second of a link that nobody could measure: no faster than a bad radio link, for a
    /// link that is called stalled and is not costs a pause, again and again.
    pub const UNKNOWN: f64 = 1e6;

    /// One more link: its bytes a second, where known, and its round trip in seconds; positions have
    /// so many bytes.
    pub fn add(&mut self, bytes_per_second: Option<f64>, round_trip: f64, position_bytes: u64) {
        self.per_position += position_bytes as f64 / bytes_per_second.unwrap_or(Self::UNKNOWN);
        self.fixed += round_trip / 2.0;
    }

    fn seconds(&self, positions: u32) -> f64 {
        self.fixed + self.per_position * f64::from(positions)
    }
}

/// The oldest micro-batch in flight.
#[derive(Clone, Copy, Debug)]
pub struct Oldest {
    /// When it was issued.
    pub issued: Duration,
    /// Seconds that all stages together should take for it; 0 where that is not known.
    pub predicted: f64,
    /// How many positions it has.
    pub positions: u32,
}

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

    /// Whether the pipeline is stalled. `lease`: nothing is before so much silence. Once `true`, the
    /// owner ends the epoch.
    pub fn is_stalled(
        &mut self,
        oldest: Option<Oldest>,
        links: &LinkTimes,
        lease: Duration,
        now: Duration,
    ) -> bool {
        if now.saturating_sub(self.looked) >= LATE {
            self.heard = now;
        }
        self.looked = now;
        let Some(Oldest { issued, predicted, positions }) = oldest else { return false };
        let known = predicted > 0.0 && predicted.is_finite();
        let seconds = links.seconds(positions) + if known { predicted } else { 0.0 };
        let least = lease.max(Duration::from_secs_f64((TIMES * seconds).clamp(0.0, 3600.0)));
        let least = if known { least } else { least.max(STALL_UNKNOWN) };
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

    const LEASE: Duration = crate::membership::LEASE;
    const NEAR: LinkTimes = LinkTimes { per_position: 0.0, fixed: 0.0 };

    fn oldest(issued: u64, predicted: f64) -> Option<Oldest> {
        Some(Oldest { issued: ms(issued), predicted, positions: 512 })
    }

    fn is_stalled(stalls: &mut Stalls, predicted: f64, now: u64) -> bool {
        stalls.is_stalled(oldest(0, predicted), &NEAR, LEASE, ms(now))
    }

    /// Looks every 25 ms; when it was first stalled.
    fn look_at(
        stalls: &mut Stalls,
        from: u64,
        of: Option<Oldest>,
        links: &LinkTimes,
        lease: u64,
    ) -> Option<u64> {
        let mut ticks = (0..8000).map(|i| from + 25 * i);
        ticks.find(|t| stalls.is_stalled(of, links, ms(lease), ms(*t)))
    }

    fn look(stalls: &mut Stalls, from: u64, issued: u64, predicted: f64) -> Option<u64> {
        look_at(stalls, from, oldest(issued, predicted), &NEAR, 1500)
    }

    #[test]
    fn the_limit_is_the_lease_and_follows_the_links() {
        let of = oldest(0, 0.02);
        assert_eq!(look_at(&mut Stalls::default(), 0, of, &NEAR, 400), Some(425));
        assert_eq!(look_at(&mut Stalls::default(), 0, of, &NEAR, 6000), Some(6025));
        // 512 positions of 16 KiB over 100 Mbit/s take 0.67 s: that is no stall.
        let mut slow = LinkTimes::default();
        slow.add(Some(12.5e6), 0.01, 16 << 10);
        let at = look_at(&mut Stalls::default(), 0, of, &slow, 1500).unwrap();
        assert!((6_900..7_100).contains(&at), "{at}");
        // One position is.
        let one = of.map(|o| Oldest { positions: 1, ..o });
        assert_eq!(look_at(&mut Stalls::default(), 0, one, &slow, 1500), Some(1525));
        let mut unknown = LinkTimes::default();
        unknown.add(None, 0.1, 16 << 10);
        assert!(look_at(&mut Stalls::default(), 0, of, &unknown, 1500).unwrap() > 80_000);
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
        assert!(!is_stalled(&mut stalls, 0.02, 0));
        for t in 0..400 {
            stalls.handle_answer(ms(t * 25));
            assert!(!is_stalled(&mut stalls, 0.02, t * 25));
        }
        assert!(!stalls.is_stalled(None, &NEAR, LEASE, ms(100_000)), "nothing is in flight");
    }

    #[test]
    fn who_was_held_up_counts_no_silence() {
        let mut stalls = Stalls::default();
        assert!(!is_stalled(&mut stalls, 0.02, 0));
        assert!(!is_stalled(&mut stalls, 0.02, 5000));
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
