//! The ways between members: tried by a real handshake before a plan uses them, and when an operator
//! asks.
//!
//! A way that was open is believed as long as both ends stay; one that was closed is tried again
//! after a while, for somebody may have opened it. The bandwidth of an open way is measured once, one
//! way at a time, so that bursts do not share links. Nothing here decides what a closed way means.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_shared::id::NodeId;
use millrace_shared::wire::control::WayMeasured;

use crate::plan::KnownWay;

/// From, to.
pub(super) type Way = (NodeId, NodeId);

/// Longer than a handshake's own deadline.
const PATIENCE: Duration = Duration::from_secs(10);
/// A closed way is believed to be closed for this long.
const CLOSED_FOR: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Trial {
    /// `None` while it is under way.
    outcome: Option<Result<f64, String>>,
    /// When it was begun, or ended.
    at: Duration,
}

/// Bytes a second that are believed: from a bad radio link to several of the fastest cards.
const SOUND_RATES: (f64, f64) = (1e4, 1e11);
/// Seconds of a round trip that are believed.
const SOUND_ROUND_TRIPS: (f64, f64) = (0.0, 10.0);

/// What is known of a way's bandwidth.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rate {
    /// To be measured when it is its turn.
    Waiting,
    /// Being measured since.
    UnderWay(Duration),
    /// Measured; `None` where that gave nothing.
    Known(Option<f64>),
}

/// What is known of the ways.
#[derive(Debug, Default)]
pub(super) struct Ways {
    trials: BTreeMap<Way, Trial>,
    /// Round trips of open ways that are to be tried anew.
    doubtful: BTreeMap<Way, f64>,
    rates: BTreeMap<Way, Rate>,
}

impl Ways {
    /// What is known; `None` where it must be tried, or is being tried.
    pub(super) fn outcome(&self, way: Way, now: Duration) -> Option<&Result<f64, String>> {
        let trial = self.trials.get(&way)?;
        let stale =
            |o: &&Result<f64, String>| o.is_err() && now.saturating_sub(trial.at) >= CLOSED_FOR;
        trial.outcome.as_ref().filter(|o| !stale(o))
    }

    /// Begins a trial; `false` where one is under way.
    pub(super) fn begin(&mut self, way: Way, now: Duration) -> bool {
        let running = |t: &Trial| t.outcome.is_none() && now.saturating_sub(t.at) < PATIENCE;
        if self.trials.get(&way).is_some_and(running) {
            return false;
        }
        self.trials.insert(way, Trial { outcome: None, at: now });
        true
    }

    /// A member says how it went.
    pub(super) fn end(&mut self, way: Way, outcome: Result<WayMeasured, String>, now: Duration) {
        // What nobody asked for says nothing.
        let pending = self.trials.get(&way).is_some_and(|t| t.outcome.is_none());
        let measured = outcome.as_ref().ok().and_then(|m| m.bytes_per_second);
        if let Some(rate @ Rate::UnderWay(_)) = self.rates.get_mut(&way)
            && (measured.is_some() || !pending)
        {
            let sound = measured.filter(|r| r.is_finite());
            *rate = Rate::Known(sound.map(|r| r.clamp(SOUND_RATES.0, SOUND_RATES.1)));
        } else if let Some(trial) = self.trials.get_mut(&way).filter(|t| t.outcome.is_none()) {
            let sound = |m: WayMeasured| match m.round_trip.is_finite() {
                true => Ok(m.round_trip.clamp(SOUND_ROUND_TRIPS.0, SOUND_ROUND_TRIPS.1)),
                false => Err("the node's answer makes no sense".to_owned()),
            };
            let outcome = outcome.and_then(sound);
            if outcome.is_ok() {
                self.rates.entry(way).or_insert(Rate::Waiting);
            }
            *trial = Trial { outcome: Some(outcome), at: now };
            self.doubtful.remove(&way);
        }
    }

    /// The next way to measure, where none is being measured; it is from now on.
    pub(super) fn next_to_measure(&mut self, now: Duration) -> Option<Way> {
        if self.rates.values().any(|r| matches!(r, Rate::UnderWay(_))) {
            return None;
        }
        let (way, rate) = self.rates.iter_mut().find(|(_, r)| **r == Rate::Waiting)?;
        *rate = Rate::UnderWay(now);
        Some(*way)
    }

    /// Whether some way is yet to be measured.
    pub(super) fn is_measuring(&self) -> bool {
        self.rates.values().any(|r| !matches!(r, Rate::Known(_)))
    }

    /// How many ways have a measured bandwidth.
    pub(super) fn measured(&self) -> usize {
        self.rates.values().filter(|r| matches!(r, Rate::Known(Some(_)))).count()
    }

    /// Bytes a second, where they were measured.
    pub(super) fn rate(&self, way: Way) -> Option<f64> {
        match self.rates.get(&way) {
            Some(Rate::Known(rate)) => *rate,
            _ => None,
        }
    }

    /// Ends trials of which nobody has heard.
    pub(super) fn expire(&mut self, now: Duration) {
        for rate in self.rates.values_mut() {
            if matches!(*rate, Rate::UnderWay(at) if now.saturating_sub(at) >= PATIENCE) {
                *rate = Rate::Known(None);
            }
        }
        for trial in self.trials.values_mut() {
            if trial.outcome.is_none() && now.saturating_sub(trial.at) >= PATIENCE {
                let message = "the node did not say how its handshake went".to_owned();
                *trial = Trial { outcome: Some(Err(message)), at: now };
            }
        }
    }

    /// Something that needed this way broke: an open one is tried again before a plan uses it. Until
    /// that is known, plans reckon with it as it was.
    pub(super) fn doubt(&mut self, way: Way) {
        let open = |t: &Trial| t.outcome.as_ref().and_then(|o| o.as_ref().ok()).copied();
        if let Some(round_trip) = self.trials.get(&way).and_then(open) {
            self.trials.remove(&way);
            self.doubtful.insert(way, round_trip);
        }
    }

    /// A member came or went: nothing is known of its ways.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.trials.retain(|(from, to), _| *from != node && *to != node);
        self.doubtful.retain(|(from, to), _| *from != node && *to != node);
        self.rates.retain(|(from, to), _| *from != node && *to != node);
    }

    /// What plans may build on.
    pub(super) fn known(&self, now: Duration) -> Vec<KnownWay> {
        let known = |&(from, to): &Way| {
            let before = self.doubtful.get(&(from, to)).map(|round_trip| Some(*round_trip));
            let tried = self.outcome((from, to), now).map(|o| o.as_ref().ok().copied());
            let round_trip = tried.or(before)?;
            Some(KnownWay { from, to, round_trip, bytes_per_second: self.rate((from, to)) })
        };
        let doubtful = self.doubtful.keys().filter(|way| !self.trials.contains_key(way));
        self.trials.keys().chain(doubtful).filter_map(known).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_way_is_tried_again_and_an_open_one_is_believed() {
        let node = |i| NodeId(uuid::Uuid::from_u128(i));
        let (way, back) = ((node(1), node(2)), (node(2), node(1)));
        let s = Duration::from_secs;
        let mut ways = Ways::default();
        let open = WayMeasured { round_trip: 0.1, bytes_per_second: None };
        ways.end(way, Ok(open), s(0));
        assert_eq!(ways.outcome(way, s(0)), None, "nobody asked");
        assert!(ways.begin(way, s(0)) && ways.begin(back, s(0)));
        assert!(!ways.begin(way, s(1)), "under way");
        ways.end(way, Err("shut".into()), s(1));
        ways.end(back, Ok(open), s(1));
        let known =
            |ways: &Ways, at| ways.known(s(at)).iter().map(|w| w.round_trip).collect::<Vec<_>>();
        assert_eq!(known(&ways, 2), [None, Some(0.1)]);
        assert_eq!(ways.outcome(way, s(31)), None, "somebody may have opened it");
        assert_eq!(ways.outcome(back, s(3600)), Some(&Ok(0.1)));
        assert!(ways.begin(way, s(31)));
        ways.expire(s(41));
        assert!(ways.outcome(way, s(41)).is_some_and(Result::is_err), "silence is an answer");
        // One that broke while it served is tried again, and plans know it as it was meanwhile.
        ways.doubt(back);
        ways.doubt(way);
        assert_eq!((ways.outcome(back, s(42)), known(&ways, 42)), (None, vec![None, Some(0.1)]));
        assert!(ways.begin(back, s(42)));
        assert_eq!(known(&ways, 42), [None, Some(0.1)]);
        ways.end(back, Err("shut".into()), s(43));
        assert_eq!(known(&ways, 43), [None, None]);
        ways.forget(node(2));
        assert_eq!((ways.outcome(back, s(42)), known(&ways, 42)), (None, vec![]));
    }

    #[test]
    fn bandwidth_is_measured_once_and_one_way_at_a_time() {
        let node = |i| NodeId(uuid::Uuid::from_u128(i));
        let (way, back) = ((node(1), node(2)), (node(2), node(1)));
        let s = Duration::from_secs;
        let seen = |rate| Ok(WayMeasured { round_trip: 1e-3, bytes_per_second: Some(rate) });
        let mut ways = Ways::default();
        assert!(ways.begin(way, s(0)) && ways.begin(back, s(0)));
        // A rate that nobody asked for is not taken.
        ways.end(way, seen(5e6), s(0));
        ways.end(back, seen(5e6), s(0));
        assert!(ways.is_measuring() && ways.measured() == 0);
        assert_eq!((ways.next_to_measure(s(1)), ways.next_to_measure(s(1))), (Some(way), None));
        ways.end(way, seen(1e300), s(1));
        assert_eq!(ways.rate(way), Some(SOUND_RATES.1), "nonsense is bounded");
        assert_eq!(ways.next_to_measure(s(2)), Some(back));
        ways.expire(s(2) + PATIENCE);
        assert_eq!((ways.rate(back), ways.measured()), (None, 1), "silence ends it");
        assert!(!ways.is_measuring());
        // Tried again, both keep what is known.
        assert!(ways.begin(way, s(20)));
        ways.end(way, seen(7.0), s(20));
        assert_eq!((ways.rate(way), ways.next_to_measure(s(21))), (Some(SOUND_RATES.1), None));
        ways.forget(node(2));
        assert_eq!((ways.rate(way), ways.measured()), (None, 0));
    }
}
