//! What all clients of a run saw, counted as it comes, so that a long run takes no more memory than
//! a short one but for one entry a second.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Longest time a histogram can hold, microseconds: an hour.
const MAX_US: u64 = 3_600_000_000;
/// Kinds of failures that are told apart; more are counted together.
const KINDS: usize = 16;

/// What a request may take to count as good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Slo {
    /// To its first token.
    pub(super) ttft: Duration,
    /// Between two of its tokens, on average.
    pub(super) itl: Duration,
}

/// One second of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Second {
    pub(super) tokens: u64,
    pub(super) in_flight: u32,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Tally {
    slo: Slo,
    start: Instant,
    pub(super) sent: u64,
    pub(super) answered: u64,
    pub(super) refused: u64,
    pub(super) failed: u64,
    pub(super) good: u64,
    pub(super) tokens: u64,
    pub(super) in_flight: u32,
    pub(super) most_in_flight: u32,
    pub(super) ttft: Histogram<u64>,
    pub(super) gaps: Histogram<u64>,
    pub(super) whole: Histogram<u64>,
    /// What was said, and how often.
    pub(super) reasons: BTreeMap<String, u64>,
    pub(super) seconds: Vec<Second>,
}

impl Tally {
    pub(super) fn new(slo: Slo) -> anyhow::Result<Self> {
        let histogram = || Histogram::new_with_max(MAX_US, 3);
        Ok(Self {
            slo,
            start: Instant::now(),
            sent: 0,
            answered: 0,
            refused: 0,
            failed: 0,
            good: 0,
            tokens: 0,
            in_flight: 0,
            most_in_flight: 0,
            ttft: histogram()?,
            gaps: histogram()?,
            whole: histogram()?,
            reasons: BTreeMap::new(),
            seconds: Vec::new(),
        })
    }

    /// When the run began.
    pub(super) fn start(&self) -> Instant {
        self.start
    }

    /// A request is sent.
    pub(super) fn send(&mut self) {
        self.sent += 1;
        self.in_flight += 1;
        self.most_in_flight = self.most_in_flight.max(self.in_flight);
    }

    pub(super) fn token(&mut self) {
        self.more_tokens(1);
    }

    pub(super) fn more_tokens(&mut self, count: u64) {
        self.tokens += count;
        let second = self.start.elapsed().as_secs() as usize;
        let in_flight = self.in_flight;
        if self.seconds.len() <= second {
            self.seconds.resize(second + 1, Second { tokens: 0, in_flight });
        }
        self.seconds[second].tokens += count;
        self.seconds[second].in_flight = self.seconds[second].in_flight.max(in_flight);
    }

    pub(super) fn gap(&mut self, gap: Duration) {
        self.gaps.saturating_record(micros(gap));
    }

    /// A whole answer: time to its first token, mean time between its tokens, time to its last.
    pub(super) fn answered(&mut self, ttft: Duration, pace: Duration, whole: Duration) {
        self.end();
        self.answered += 1;
        self.good += u64::from(ttft <= self.slo.ttft && pace <= self.slo.itl);
        self.ttft.saturating_record(micros(ttft));
        self.whole.saturating_record(micros(whole));
    }

    pub(super) fn refused(&mut self, why: String) {
        self.end();
        self.refused += 1;
        self.reason(format!("refused: {why}"));
    }

    pub(super) fn failed(&mut self, why: String) {
        self.end();
        self.failed += 1;
        self.reason(format!("failed: {why}"));
    }

    fn end(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    fn reason(&mut self, why: String) {
        let known = self.reasons.len() < KINDS || self.reasons.contains_key(&why);
        *self.reasons.entry(if known { why } else { "others".to_owned() }).or_default() += 1;
    }
}

fn micros(d: Duration) -> u64 {
    d.as_micros().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_requests_meet_both_bounds() {
        let ms = Duration::from_millis;
        let mut tally = Tally::new(Slo { ttft: ms(100), itl: ms(10) }).unwrap();
        for _ in 0..5 {
            tally.send();
        }
        tally.answered(ms(100), ms(10), ms(200));
        tally.answered(ms(101), ms(10), ms(200));
        tally.answered(ms(100), ms(11), ms(200));
        tally.refused("full".to_owned());
        tally.failed("cut".to_owned());
        assert_eq!((tally.sent, tally.answered, tally.good), (5, 3, 1));
        assert_eq!((tally.refused, tally.failed), (1, 1), "refusals are no failures");
        assert_eq!((tally.in_flight, tally.most_in_flight), (0, 5));
        assert_eq!(tally.reasons["refused: full"], 1);
    }

    #[test]
    fn reasons_are_bounded() {
        let mut tally = Tally::new(Slo { ttft: Duration::ZERO, itl: Duration::ZERO }).unwrap();
        (0..100).for_each(|n| tally.failed(format!("{n}")));
        assert_eq!(tally.reasons.len(), KINDS + 1);
        assert_eq!(tally.reasons.values().sum::<u64>(), 100);
    }
}
