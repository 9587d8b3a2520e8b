//! Steps that fail, nodes that die, hang or want to leave: what the coordinator's actors do around
//! `Quarantine`, `Deaths` and the reasons of a cordon.
//!
//! A sequence goes by another name each time that it is tried again in the epoch that serves; its
//! request is what the quarantine knows it by.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use millrace_shared::id::{Epoch, NodeId, SequenceId};
use millrace_shared::membership::{CordonReason, Deaths, Fate, PipelinePhase, Quarantine, Verdict};

use super::world::{Happening, World, name, number};

/// Names of one request lie so far apart.
const NAMES: u64 = 1000;
/// How long a drain waits for somebody to take the layers.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a request does to whoever computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Poison {
    /// Every step with it fails.
    Fails,
    /// The process dies.
    Kills,
}

/// What the coordinator remembers of all that.
#[derive(Default)]
pub(crate) struct Doubts {
    pub(crate) quarantine: Quarantine,
    deaths: Deaths,
    sick: Vec<NodeId>,
    /// Tried alone, by request.
    alone: BTreeSet<u64>,
    /// To be given to the scheduler when the next epoch begins.
    resumed: Vec<SequenceId>,
    /// How often a request was named.
    names: BTreeMap<u64, u64>,
    /// Since when nodes want to leave.
    draining: BTreeMap<usize, Duration>,
    /// Requests that failed although nothing is wrong with them.
    pub(crate) unjust: usize,
    /// Requests that failed as they should.
    pub(crate) found: usize,
    pub(crate) drained: usize,
}

/// The request of a sequence.
pub(crate) fn request_of(sequence: SequenceId) -> u64 {
    sequence.0 / NAMES
}

fn known(id: u64) -> SequenceId {
    SequenceId(id)
}

impl World {
    /// The name of a request's sequence.
    pub(crate) fn sequence_of(&self, id: u64) -> SequenceId {
        SequenceId(id * NAMES + self.doubts.names.get(&id).copied().unwrap_or_default())
    }

    /// Steps with these sequences failed at a stage.
    pub(crate) fn judge(
        &mut self,
        epoch: Epoch,
        (stage, alone): (usize, bool),
        sequences: &[SequenceId],
    ) {
        let now = self.now;
        let Some(node) = self.orders.get(&epoch).and_then(|o| o.get(stage)).copied() else {
            panic!("a stage that is none failed");
        };
        let requests: Vec<SequenceId> = sequences.iter().map(|s| known(request_of(*s))).collect();
        let usable = |n: &NodeId| *n != name(node) && self.pipeline.profile_of(*n).is_some();
        let rest = (0..self.nodes.len()).map(name).filter(usable).count();
        let others = self.doubts.quarantine.holds(name(node), now) || rest >= self.need;
        let verdicts = self.doubts.quarantine.handle_failed(name(node), &requests, alone, others);
        let held = self.doubts.quarantine.holds(name(node), now);
        for (id, verdict) in verdicts {
            self.doubts.alone.remove(&id.0);
            match verdict {
                Verdict::Fails => self.fail(id.0),
                Verdict::Alone => {
                    self.doubts.alone.insert(id.0);
                    self.try_again(id.0);
                }
                Verdict::Elsewhere => self.try_again(id.0),
            }
        }
        if held {
            if !self.doubts.sick.contains(&name(node)) {
                self.doubts.sick.push(name(node));
            }
            self.pipeline.handle_cordon(name(node), CordonReason::Quarantine, true, now);
            self.pipeline.handle_restart("a step failed", now);
            self.advance();
        } else {
            self.resume();
        }
        self.pump();
    }

    fn fail(&mut self, id: u64) {
        let Some(request) = self.requests.get_mut(&id).filter(|r| !r.ended) else { return };
        request.ended = true;
        match request.poison {
            Some(_) => self.doubts.found += 1,
            None => self.doubts.unjust += 1,
        }
        self.note_ended(id);
    }

    fn try_again(&mut self, id: u64) {
        let old = self.sequence_of(id);
        *self.doubts.names.entry(id).or_default() += 1;
        let new = self.sequence_of(id);
        self.doubts.deaths.handle_renamed(old, new);
        self.doubts.resumed.push(new);
    }

    /// Gives the scheduler what is to be tried again, and says who runs alone.
    pub(crate) fn resume(&mut self) {
        for sequence in std::mem::take(&mut self.doubts.resumed) {
            let id = request_of(sequence);
            let request = &self.requests[&id];
            if request.ended {
                continue;
            }
            let new = request.sequence(sequence, self.now);
            self.scheduler.handle_resume(new, &request.log).unwrap();
            if self.doubts.alone.contains(&id) || self.doubts.deaths.is_alone(sequence) {
                self.scheduler.handle_alone(sequence);
            }
        }
    }

    pub(crate) fn note_token(&mut self, sequence: SequenceId) {
        let id = request_of(sequence);
        self.doubts.quarantine.handle_token(known(id), self.now);
        self.doubts.deaths.handle_token(sequence);
        self.doubts.alone.remove(&id);
        if !self.doubts.deaths.is_alone(sequence) {
            self.scheduler.handle_company(sequence);
        }
    }

    pub(crate) fn note_ended(&mut self, id: u64) {
        let sequence = self.sequence_of(id);
        self.doubts.quarantine.handle_ended(known(id), self.now);
        self.doubts.deaths.handle_ended(sequence);
        self.doubts.alone.remove(&id);
    }

    /// The epoch ends: what was in flight may turn out to be what a node died of.
    pub(crate) fn note_epoch_end(&mut self) {
        if self.active.is_some() {
            self.doubts.deaths.handle_end(self.scheduler.in_flight());
        }
    }

    pub(crate) fn note_epoch_begin(&mut self) {
        self.doubts.deaths.handle_begin();
    }

    /// A node died or hung, nobody knows why.
    pub(crate) fn note_death(&mut self) {
        self.note_epoch_end();
        for (sequence, fate) in self.doubts.deaths.handle_death() {
            match fate {
                Fate::Company => {}
                Fate::Alone => self.scheduler.handle_alone(sequence),
                Fate::Fails => {
                    self.scheduler.handle_cancel(sequence);
                    self.fail(request_of(sequence));
                }
            }
        }
    }

    /// Nodes that are not in quarantine any more, or that nobody can replace.
    pub(crate) fn check_sick(&mut self) {
        let now = self.now;
        if let Some(node) = self.pipeline.needed_despite(CordonReason::Quarantine, now) {
            self.doubts.quarantine.handle_needed(node);
        }
        let quarantine = &self.doubts.quarantine;
        let free: Vec<NodeId> =
            self.doubts.sick.extract_if(.., |n| !quarantine.holds(*n, now)).collect();
        for node in free {
            self.pipeline.handle_cordon(node, CordonReason::Quarantine, false, now);
        }
    }

    /// A node wants to leave; it comes back some time later.
    pub(crate) fn drain(&mut self, node: usize) {
        // It is a member that says so.
        let there = self.nodes[node].alive && self.session_of(node).is_some();
        if !there || self.doubts.draining.contains_key(&node) {
            return;
        }
        self.doubts.draining.insert(node, self.now);
        self.pipeline.handle_cordon(name(node), CordonReason::Drain, true, self.now);
        self.advance();
    }

    /// Cuts without those who want to leave, and lets go who has no layers any more.
    pub(crate) fn check_drains(&mut self) {
        let now = self.now;
        for (node, since) in self.doubts.draining.clone() {
            let serves = self.pipeline.chosen().contains(&name(node));
            let busy = self.pipeline.next_epoch().is_some();
            let patient = now.saturating_sub(since) < PATIENCE;
            if !self.nodes[node].alive || (!serves && !busy) || !patient {
                self.doubts.draining.remove(&node);
                self.leave(node);
                continue;
            }
            let running = self.pipeline.phase() == PipelinePhase::Running;
            let others: Vec<NodeId> = ((0..self.nodes.len()).map(name))
                .filter(|n| self.pipeline.profile_of(*n).is_some())
                .collect();
            if serves && !busy && running && others.len() >= self.need {
                self.pipeline.handle_recut(&others[..others.len().min(self.most)], now);
            }
        }
    }

    /// A node says goodbye, and its process is started again.
    fn leave(&mut self, node: usize) {
        self.doubts.drained += 1;
        if let Some(session) = self.session_of(node) {
            self.membership.handle_leaving(name(node), session);
        }
        let n = &mut self.nodes[node];
        if n.alive {
            n.alive = false;
            n.life += 1;
            n.link += 1;
            n.forget();
            self.lose_links(node);
            let pause = Duration::from_millis(200 + self.draw(2000));
            self.at(self.now + pause, Happening::Restart(node));
        }
    }

    /// A node is lost: what was held against it is forgotten with it.
    pub(crate) fn forget_lost(&mut self, node: NodeId, left: bool) {
        let served = self.active_order().contains(&number(node));
        let drains = self.pipeline.cordons(node).any(|r| r == CordonReason::Drain);
        if served && !left && !drains {
            self.note_death();
        }
        self.doubts.draining.remove(&number(node));
        self.pipeline.handle_cordon(node, CordonReason::Drain, false, self.now);
        self.doubts.quarantine.handle_lost(node);
    }
}
