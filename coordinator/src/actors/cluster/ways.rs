//! The ways between members: tried by a real handshake before a plan uses them, and when an operator
//! asks.
//!
//! A way that was open is believed as long as both ends stay; one that was closed is tried again
//! after a while, for somebody may have opened it. Nothing here decides what a closed way means.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_shared::id::NodeId;

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

/// What is known of the ways.
#[derive(Debug, Default)]
pub(super) struct Ways {
    trials: BTreeMap<Way, Trial>,
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
    pub(super) fn end(&mut self, way: Way, outcome: Result<f64, String>, now: Duration) {
        // What nobody asked for says nothing.
        if let Some(trial) = self.trials.get_mut(&way).filter(|t| t.outcome.is_none()) {
            *trial = Trial { outcome: Some(outcome), at: now };
        }
    }

    /// Ends trials of which nobody has heard.
    pub(super) fn expire(&mut self, now: Duration) {
        for trial in self.trials.values_mut() {
            if trial.outcome.is_none() && now.saturating_sub(trial.at) >= PATIENCE {
                let message = "the node did not say how its handshake went".to_owned();
                *trial = Trial { outcome: Some(Err(message)), at: now };
            }
        }
    }

    /// A member came or went: nothing is known of its ways.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.trials.retain(|(from, to), _| *from != node && *to != node);
    }

    /// What plans may build on.
    pub(super) fn known(&self, now: Duration) -> Vec<KnownWay> {
        let known = |&(from, to): &Way| {
            let round_trip = self.outcome((from, to), now)?.as_ref().ok().copied();
            Some(KnownWay { from, to, round_trip })
        };
        self.trials.keys().filter_map(known).collect()
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
        ways.end(way, Ok(0.1), s(0));
        assert_eq!(ways.outcome(way, s(0)), None, "nobody asked");
        assert!(ways.begin(way, s(0)) && ways.begin(back, s(0)));
        assert!(!ways.begin(way, s(1)), "under way");
        ways.end(way, Err("shut".into()), s(1));
        ways.end(back, Ok(0.1), s(1));
        let known =
            |ways: &Ways, at| ways.known(s(at)).iter().map(|w| w.round_trip).collect::<Vec<_>>();
        assert_eq!(known(&ways, 2), [None, Some(0.1)]);
        assert_eq!(ways.outcome(way, s(31)), None, "somebody may have opened it");
        assert_eq!(ways.outcome(back, s(3600)), Some(&Ok(0.1)));
        assert!(ways.begin(way, s(31)));
        ways.expire(s(41));
        assert!(ways.outcome(way, s(41)).is_some_and(Result::is_err), "silence is an answer");
        ways.forget(node(2));
        assert_eq!((ways.outcome(back, s(42)), known(&ways, 42)), (None, vec![]));
    }
}
