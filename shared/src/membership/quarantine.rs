//! Whose fault it is when a step fails: a node's, or a request's.
//!
//! ```text
//!  step fails on A ──▶ A in quarantine, its sequences are tried elsewhere
//!      ├─ they all fare well, or end       ──▶ A is sick: stays in quarantine for SICK
//!      ├─ a step with some of them fails   ──▶ each of those is tried alone
//!      │       ├─ it fails alone           ──▶ that request fails, A is free again
//!      │       └─ it fares well            ──▶ as above
//!      └─ all of them end (cancelled)      ──▶ nothing is known, A is free again
//!  no other node                           ──▶ A stays in use, each is tried alone at once
//! ```
//!
//! Pure: it hears what happened and says what follows; who plans and who schedules obey. Invariant:
//! a request fails only of a step that held nobody else and that was not its first to fail; nobody
//! fails for the company that it was in.

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
    /// It is computed again at once, with no other in flight.
    Alone,
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
    /// Tried alone, until it is known how they fare.
    alone: BTreeSet<SequenceId>,
}

impl Quarantine {
    /// A step with these sequences failed on a node. `alone`: it held nobody else, not even one that
    /// nobody waits for any more. `others`: whether the pipeline can do without the node. What becomes
    /// of each; the node is in quarantine where none of them has failed before and there are others.
    pub fn handle_failed(
        &mut self,
        node: NodeId,
        sequences: &[SequenceId],
        alone: bool,
        others: bool,
    ) -> Vec<(SequenceId, Verdict)> {
        let elsewhere =
            |id: &SequenceId| self.nodes.iter().any(|(n, s)| *n != node && s.is_of(*id));
        let before: BTreeSet<SequenceId> = sequences
            .iter()
            .copied()
            .filter(|id| elsewhere(id) || self.alone.contains(id))
            .collect();
        if let [id] = sequences
            && alone
            && before.contains(id)
        {
            // It was the request: nodes that failed with it are as good as any.
            self.nodes.retain(|_, s| !s.is_of(*id));
            self.alone.remove(id);
            return vec![(*id, Verdict::Fails)];
        }
        if before.is_empty() && others {
            let ids = sequences.iter().copied().collect();
            match self.nodes.entry(node).or_insert_with(|| Suspicion::Of(BTreeSet::new(), false)) {
                Suspicion::Of(known, _) => known.extend(&ids),
                sick => *sick = Suspicion::Of(ids, false),
            }
            return sequences.iter().map(|id| (*id, Verdict::Elsewhere)).collect();
        }
        // One of those that have failed before, most likely; the others kept it company. Where
        // there is nowhere else to try, it may be any.
        let verdict = |id: &SequenceId| match before.is_empty() || before.contains(id) {
            true => (*id, Verdict::Alone),
            false => (*id, Verdict::Elsewhere),
        };
        let verdicts: Vec<_> = sequences.iter().map(verdict).collect();
        let alone = verdicts.iter().filter(|(_, v)| *v == Verdict::Alone);
        self.alone.extend(alone.map(|(id, _)| *id));
        verdicts
    }

    /// A node is needed although it is in quarantine: no other could serve. Those that failed on it
    /// are tried again there; which of them fail then, fail of themselves.
    pub fn handle_needed(&mut self, node: NodeId) {
        self.nodes.remove(&node);
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
        self.alone.remove(&id);
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
        assert_eq!(q.handle_failed(node(1), &[A, B], false, true), both);
        assert!(q.holds(node(1), NOW) && !q.holds(node(2), NOW));
        // They do well elsewhere: it is the node.
        q.handle_token(B, NOW);
        q.handle_ended(A, NOW);
        q.handle_ended(B, NOW);
        assert!(q.holds(node(1), NOW + SICK / 2) && !q.holds(node(1), NOW + SICK));
        // One that fails again, beside others, is tried alone; they only kept it company.
        let mut q = Quarantine::default();
        q.handle_failed(node(1), &[A], true, true);
        let verdicts = q.handle_failed(node(2), &[A, B], false, true);
        assert_eq!(verdicts, [(A, Verdict::Alone), (B, Verdict::Elsewhere)]);
        assert!(q.holds(node(1), NOW) && !q.holds(node(2), NOW));
        assert_eq!(q.handle_failed(node(2), &[A], true, true), [(A, Verdict::Fails)]);
        assert!(!q.holds(node(1), NOW) && !q.holds(node(2), NOW));
    }

    #[test]
    fn company_that_was_there_both_times_does_not_fail() {
        let mut q = Quarantine::default();
        q.handle_failed(node(1), &[A, B], false, true);
        let both = [(A, Verdict::Alone), (B, Verdict::Alone)];
        assert_eq!(q.handle_failed(node(2), &[A, B], false, true), both);
        assert!(!q.holds(node(2), NOW), "they are tried alone here");
        assert_eq!(q.handle_failed(node(2), &[A], true, true), [(A, Verdict::Fails)]);
        q.handle_ended(A, NOW);
        q.handle_token(B, NOW);
        assert!(!q.holds(node(1), NOW) && !q.holds(node(2), NOW), "it was the request");
        // Acquitted, it is as good as any that comes.
        assert_eq!(q.handle_failed(node(1), &[B], true, true), [(B, Verdict::Elsewhere)]);
        // Where neither fails alone, the first node stays under suspicion, and is sick.
        let mut q = Quarantine::default();
        q.handle_failed(node(1), &[A, B], false, true);
        q.handle_failed(node(2), &[A, B], false, true);
        q.handle_token(A, NOW);
        q.handle_token(B, NOW);
        assert!(q.holds(node(1), NOW + SICK / 2) && !q.holds(node(2), NOW));
    }

    #[test]
    fn without_another_node_each_is_tried_alone_at_once() {
        let mut q = Quarantine::default();
        // Even one that was alone: a step may fail of nothing that comes again.
        assert_eq!(q.handle_failed(node(1), &[A], true, false), [(A, Verdict::Alone)]);
        assert!(!q.holds(node(1), NOW));
        assert_eq!(q.handle_failed(node(1), &[A], true, false), [(A, Verdict::Fails)]);
        let both = [(A, Verdict::Alone), (B, Verdict::Alone)];
        assert_eq!(q.handle_failed(node(1), &[A, B], false, false), both);
        assert!(!q.holds(node(1), NOW), "nobody else could serve");
        q.handle_token(A, NOW);
        assert_eq!(q.handle_failed(node(1), &[B], true, false), [(B, Verdict::Fails)]);
        // Also where the other one is gone by the second failure.
        q.handle_failed(node(1), &[A], true, true);
        assert_eq!(q.handle_failed(node(2), &[A], true, false), [(A, Verdict::Fails)]);
        assert!(!q.holds(node(1), NOW));
        // What was in the step with one that nobody waits for any more is tried alone as well.
        let first = q.handle_failed(node(1), &[A], false, false);
        assert_eq!(first, [(A, Verdict::Alone)]);
        q.handle_token(A, NOW);
        // The last one that could serve does.
        q.handle_failed(node(1), &[A], true, true);
        q.handle_needed(node(1));
        assert!(!q.holds(node(1), NOW));
        assert_eq!(q.handle_failed(node(1), &[A], true, false), [(A, Verdict::Alone)]);
        assert_eq!(q.handle_failed(node(1), &[A], true, false), [(A, Verdict::Fails)]);
    }

    #[test]
    fn what_ends_before_it_is_known_frees_the_node() {
        let mut q = Quarantine::default();
        q.handle_failed(node(1), &[A, B], false, true);
        q.handle_ended(A, NOW);
        assert!(q.holds(node(1), NOW));
        q.handle_ended(B, NOW);
        assert!(!q.holds(node(1), NOW));
        q.handle_failed(node(1), &[A], true, true);
        q.handle_lost(node(1));
        assert!(!q.holds(node(1), NOW));
    }

    /// Any order of failures, one of five being poisonous: nobody else fails, and nothing stays
    /// behind.
    #[test]
    fn whoever_is_harmless_never_fails() {
        for seed in 0..2000u64 {
            let mut dice = seed;
            let mut draw = |n: u64| {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (dice >> 33) % n
            };
            let mut q = Quarantine::default();
            let poison = SequenceId(draw(5));
            let mut open: BTreeSet<SequenceId> = (0..5).map(SequenceId).collect();
            let mut alone = BTreeSet::new();
            for _ in 0..60 {
                let free: Vec<u128> = (0..3).filter(|n| !q.holds(node(*n), NOW)).collect();
                assert!(!free.is_empty(), "seed {seed}");
                let on = node(free[draw(free.len() as u64) as usize]);
                let step: Vec<SequenceId> = match alone.first() {
                    Some(id) => vec![*id],
                    None => open.iter().copied().filter(|_| draw(3) > 0).collect(),
                };
                if step.contains(&poison) {
                    for (id, verdict) in q.handle_failed(on, &step, step.len() == 1, free.len() > 1)
                    {
                        match verdict {
                            Verdict::Fails => {
                                assert_eq!(id, poison, "seed {seed}");
                                open.remove(&id);
                                alone.remove(&id);
                            }
                            Verdict::Alone => assert!(alone.insert(id), "seed {seed}: once"),
                            Verdict::Elsewhere => {}
                        }
                    }
                } else {
                    for id in step {
                        alone.remove(&id);
                        q.handle_token(id, NOW);
                    }
                }
            }
            assert!(!open.contains(&poison), "seed {seed}: it was found");
            open.into_iter().for_each(|id| q.handle_ended(id, NOW));
            assert!((0..3).all(|n| !q.holds(node(n), NOW + SICK)), "seed {seed}");
            assert!(q.alone.is_empty(), "seed {seed}");
        }
    }
}
