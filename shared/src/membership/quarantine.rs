//! Whose fault it is when a step fails: a node's, or a request's.
//!
//! ```text
//!  step fails on A ──▶ A in quarantine, its sequences are tried elsewhere
//!      ├─ they all fare well, or end       ──▶ A is sick: stays in quarantine for SICK
//!      ├─ one fails on B, another node     ──▶ that request fails, A is free again
//!      └─ all of them end (cancelled)      ──▶ nothing is known, A is free again
//!  no other node                           ──▶ the request fails at once, A stays in use
//! ```
//!
//! Pure: it hears what happened and says what follows; who plans and who schedules obey. Invariant:
//! one request fails steps on at most two nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::id::{NodeId, SequenceId};

/// A sick node is given another chance after so long.
pub const SICK: Duration = Duration::from_secs(600);
/// What becomes of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is computed again, where the node is not.
    Elsewhere,
    /// Its request fails.
    Fails,
}

/// Why a node is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Suspicion {
    /// Until it is known how these fare elsewhere; whether one of them has fared well.
    Of(BTreeSet<SequenceId>, bool),
    /// They fared well.
    Sick { until: Duration },
}

impl Suspicion {
    fn is_of(&self, id: SequenceId) -> bool {
        matches!(self, Self::Of(ids, _) if ids.contains(&id))
    }
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Quarantine {
    nodes: BTreeMap<NodeId, Suspicion>,
}

impl Quarantine {
    /// A step with these sequences failed on a node. `others`: whether the pipeline can do without
    /// the node. What becomes of each; the node is in quarantine where one is tried elsewhere.
    pub fn handle_failed(
        &mut self,
        node: NodeId,
        sequences: &[SequenceId],
        others: bool,
    ) -> Vec<(SequenceId, Verdict)> {
        let elsewhere =
            |q: &Self, id: &SequenceId| q.nodes.iter().any(|(n, s)| *n != node && s.is_of(*id));
        let guilty: Vec<SequenceId> =
            sequences.iter().copied().filter(|id| elsewhere(self, id)).collect();
        // Where one of them has failed before, the others only kept it company.
        let suspects = guilty.is_empty() && others;
        if suspects && !sequences.is_empty() {
            let ids = sequences.iter().copied().collect();
            match self.nodes.entry(node).or_insert_with(|| Suspicion::Of(BTreeSet::new(), false)) {
                Suspicion::Of(known, _) => known.extend(&ids),
                sick => *sick = Suspicion::Of(ids, false),
            }
        }
        // It was the request: nodes that failed with it are as good as any.
        self.nodes.retain(|_, s| !guilty.iter().any(|id| s.is_of(*id)));
        let verdict = |id: &SequenceId| match guilty.contains(id) || (guilty.is_empty() && !others)
        {
            true => (*id, Verdict::Fails),
            false => (*id, Verdict::Elsewhere),
        };
        sequences.iter().map(verdict).collect()
    }

    /// A sequence has one more token: it fares well elsewhere. The node is sick only when that, or
    /// nothing more, is to be known of all that were in the step: one of them may be poisonous yet.
    pub fn handle_token(&mut self, id: SequenceId, now: Duration) {
        self.acquit(id, true, now);
    }

    /// A sequence has ended, however.
    pub fn handle_ended(&mut self, id: SequenceId, now: Duration) {
        self.acquit(id, false, now);
    }

    fn acquit(&mut self, id: SequenceId, fares_well: bool, now: Duration) {
        self.nodes.retain(|_, suspicion| {
            let Suspicion::Of(ids, well) = suspicion else { return true };
            if !ids.remove(&id) {
                return true;
            }
            *well |= fares_well;
            let known = ids.is_empty();
            if known && *well {
                *suspicion = Suspicion::Sick { until: now + SICK };
                return true;
            }
            !known
        });
    }

    /// A node is gone; it may come back as a sound one.
    pub fn handle_lost(&mut self, node: NodeId) {
        self.nodes.remove(&node);
    }

    /// Whether a node gets no new steps.
    pub fn holds(&self, node: NodeId, now: Duration) -> bool {
        match self.nodes.get(&node) {
            None => false,
            Some(Suspicion::Of(..)) => true,
            Some(Suspicion::Sick { until }) => now < *until,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(i: u128) -> NodeId {
        NodeId(uuid::Uuid::from_u128(i))
    }
    const A: SequenceId = SequenceId(1);
    const B: SequenceId = SequenceId(2);
    const NOW: Duration = Duration::from_secs(5);

    #[test]
    fn a_sick_node_is_told_from_a_poisonous_request() {
        let mut q = Quarantine::default();
        let both = [(A, Verdict::Elsewhere), (B, Verdict::Elsewhere)];
        assert_eq!(q.handle_failed(node(1), &[A, B], true), both);
        assert!(q.holds(node(1), NOW) && !q.holds(node(2), NOW));
        // They do well elsewhere: it is the node.
        q.handle_token(B, NOW);
        q.handle_ended(A, NOW);
        q.handle_ended(B, NOW);
        assert!(q.holds(node(1), NOW + SICK / 2) && !q.holds(node(1), NOW + SICK));
        // One that does well acquits nobody but itself: another one may be poisonous.
        let mut q = Quarantine::default();
        q.handle_failed(node(1), &[A, B], true);
        q.handle_token(B, NOW);
        let verdicts = q.handle_failed(node(2), &[A, B], true);
        assert_eq!(verdicts, [(A, Verdict::Fails), (B, Verdict::Elsewhere)]);
        assert!(!q.holds(node(1), NOW) && !q.holds(node(2), NOW));
        // Failing twice, it is the request; who kept it company is tried again.
        let mut q = Quarantine::default();
        q.handle_failed(node(1), &[A], true);
        let verdicts = q.handle_failed(node(2), &[A, B], true);
        assert_eq!(verdicts, [(A, Verdict::Fails), (B, Verdict::Elsewhere)]);
        assert!(!q.holds(node(1), NOW) && !q.holds(node(2), NOW));
    }

    #[test]
    fn without_another_node_the_request_fails_at_once() {
        let mut q = Quarantine::default();
        assert_eq!(q.handle_failed(node(1), &[A], false), [(A, Verdict::Fails)]);
        assert!(!q.holds(node(1), NOW));
        // Also where the other one is gone by the second failure.
        q.handle_failed(node(1), &[A], true);
        assert_eq!(q.handle_failed(node(2), &[A], false), [(A, Verdict::Fails)]);
        assert!(!q.holds(node(1), NOW));
    }

    #[test]
    fn what_ends_before_it_is_known_frees_the_node() {
        let mut q = Quarantine::default();
        q.handle_failed(node(1), &[A, B], true);
        q.handle_ended(A, NOW);
        assert!(q.holds(node(1), NOW));
        q.handle_ended(B, NOW);
        assert!(!q.holds(node(1), NOW));
        q.handle_failed(node(1), &[A], true);
        q.handle_lost(node(1));
        assert!(!q.holds(node(1), NOW));
    }

    /// Any order of failures: nobody breaks more than two nodes, and nothing stays behind.
    #[test]
    fn one_request_breaks_two_nodes_at_most() {
        for seed in 0..2000u64 {
            let mut dice = seed;
            let mut draw = |n: u64| {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (dice >> 33) % n
            };
            let mut q = Quarantine::default();
            let mut broken: BTreeMap<SequenceId, BTreeSet<u128>> = BTreeMap::new();
            let mut open: BTreeSet<SequenceId> = (0..5).map(SequenceId).collect();
            for _ in 0..60 {
                let id = SequenceId(draw(5));
                let free: Vec<u128> = (0..4).filter(|n| !q.holds(node(*n), NOW)).collect();
                if !open.contains(&id) || free.is_empty() {
                    continue;
                }
                let on = free[draw(free.len() as u64) as usize];
                match draw(3) {
                    0 => {
                        let of = q.handle_failed(node(on), &[id], free.len() > 1);
                        broken.entry(id).or_default().insert(on);
                        assert!(broken[&id].len() <= 2, "seed {seed}");
                        if of == [(id, Verdict::Fails)] {
                            open.remove(&id);
                        }
                    }
                    1 => {
                        q.handle_ended(id, NOW);
                        open.remove(&id);
                    }
                    _ => {
                        q.handle_token(id, NOW);
                        // What fails later is another step.
                        broken.remove(&id);
                    }
                }
            }
            open.into_iter().for_each(|id| q.handle_ended(id, NOW));
            assert!((0..4).all(|n| !q.holds(node(n), NOW + SICK)), "seed {seed}");
        }
    }
}
