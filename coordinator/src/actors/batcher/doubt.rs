//! Steps that failed, and nodes that died: is it the node, or a request?
//!
//! The requests of a failed step are held back until [`super::Cluster`] has said what becomes of
//! them: they fail, or are computed again from their tokens, in the next epoch (which does without
//! the node) or in this one, beside others or alone. Until it is known how they fare then, the
//! cluster hears of it. Scores are not held: they fail with their step. Which requests nodes die of
//! is counted here, for only the batcher knows what was in flight.

use std::collections::{BTreeMap, BTreeSet};

use actix::prelude::*;
use millrace_shared::error::Status;
use millrace_shared::id::{Epoch, SequenceId};
use millrace_shared::membership::{Deaths, Fate};
use millrace_shared::scheduler::Scheduler;
use millrace_shared::wire::data::Failure;

use super::{Batcher, RETRY_PIPELINE_MS};
use crate::actors::cluster::{Fared, StepFailed};
use crate::request::Work;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    /// Waiting for a verdict, with what their step failed of.
    held: BTreeMap<SequenceId, String>,
    /// Computed again, with the names that the cluster knows: it waits for how they fare.
    watched: BTreeMap<SequenceId, SequenceId>,
    /// Of those, the ones that run alone.
    alone: BTreeSet<SequenceId>,
    deaths: Deaths,
}

impl Doubts {
    /// Nobody is watched.
    fn is_idle(&self) -> bool {
        let sets = self.alone.is_empty() && self.held.is_empty();
        sets && self.watched.is_empty() && self.deaths.is_empty()
    }

    fn is_alone(&self, id: SequenceId) -> bool {
        self.alone.contains(&id) || self.deaths.is_alone(id)
    }

    /// The name that the cluster knows.
    fn known(&self, id: SequenceId) -> SequenceId {
        self.watched.get(&id).copied().unwrap_or(id)
    }

    fn current(&self, known: SequenceId) -> SequenceId {
        self.watched.iter().find(|(_, k)| **k == known).map_or(known, |(id, _)| *id)
    }

    /// An epoch begins.
    pub(super) fn begin_epoch(&mut self, scheduler: &mut Scheduler) {
        self.deaths.handle_begin();
        self.keep_alone(scheduler);
    }

    /// Says who runs alone: the scheduler may have just heard of some sequences.
    fn keep_alone(&self, scheduler: &mut Scheduler) {
        let alone = self.watched.keys().filter(|id| self.is_alone(**id));
        alone.for_each(|id| scheduler.handle_alone(*id));
    }
}

/// What becomes of the sequences of a failed step.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct StepVerdict {
    /// Of the step.
    pub epoch: Epoch,
    /// These fail.
    pub failed: Vec<SequenceId>,
    /// These are computed again.
    pub again: Vec<SequenceId>,
    /// These too, one by one.
    pub alone: Vec<SequenceId>,
    /// In an epoch that is yet to come.
    pub elsewhere: bool,
}

impl Handler<StepVerdict> for Batcher {
    type Result = ();

    fn handle(&mut self, m: StepVerdict, _: &mut Context<Self>) {
        for known in m.failed {
            let id = self.doubts.current(known);
            let Some(message) = self.doubts.held.remove(&id) else { continue };
            if let Some(request) = self.forget(id) {
                self.fail(request, Status::internal(message));
            }
        }
        // Where the epoch has changed meanwhile, nobody waits for another one.
        let now = !m.elsewhere || self.active.as_ref().is_some_and(|a| a.epoch != m.epoch);
        let again = m.again.into_iter().map(|known| (known, false));
        for (known, alone) in again.chain(m.alone.into_iter().map(|known| (known, true))) {
            self.try_again(known, alone, now);
        }
        if now && let Some(mut scheduler) = self.scheduler.take() {
            let refused = self.resume(&mut scheduler);
            self.doubts.keep_alone(&mut scheduler);
            self.scheduler = Some(scheduler);
            for (id, why) in refused {
                let Some(request) = self.forget(id) else { continue };
                self.fail(request, Status::exhausted(why.to_string(), RETRY_PIPELINE_MS));
            }
        }
        self.pump();
    }
}

/// A node is gone, and nobody knows why; it had a stage of the epoch that serves or served last.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct NodeDied;

impl Handler<NodeDied> for Batcher {
    type Result = ();

    fn handle(&mut self, _: NodeDied, _: &mut Context<Self>) {
        self.note_death();
    }
}

impl Batcher {
    /// Queues a sequence that was held, to be computed again; it goes by another name where the epoch
    /// that serves is to compute it.
    fn try_again(&mut self, known: SequenceId, alone: bool, now: bool) {
        let old = self.doubts.current(known);
        if self.doubts.held.remove(&old).is_none() {
            // It ended while it was held.
            if let Some(cluster) = &self.cluster {
                let _ = cluster.try_send(Fared { sequence: known, ended: true });
            }
            return;
        }
        let id = if now { self.rename(old) } else { old };
        self.doubts.watched.remove(&old);
        self.doubts.watched.insert(id, known);
        self.doubts.alone.remove(&old);
        if alone {
            self.doubts.alone.insert(id);
        }
        self.resumed.push(id);
    }

    /// Holds a request back whose step failed at a stage; `None` where it fails at once.
    pub(super) fn doubt(&mut self, id: SequenceId, failure: &Failure) -> Option<u16> {
        let stage = failure.stage.filter(|_| self.active.is_some())?;
        let work = self.requests.of(id).map(|(r, _)| &r.work);
        if !matches!(work, Some(Work::Generate(_) | Work::Embed(_))) {
            return None;
        }
        self.doubts.held.insert(id, failure.message.clone());
        Some(stage)
    }

    /// Asks the cluster what becomes of the sequences of a step, all of which are held.
    pub(super) fn ask_verdict(&mut self, stage: u16, alone: bool, sequences: &[SequenceId]) {
        let Some(active) = &self.active else { return };
        let known = sequences.iter().map(|id| self.doubts.known(*id)).collect();
        let failed = StepFailed { epoch: active.epoch, stage, alone, sequences: known };
        if active.cluster.try_send(failed).is_err() {
            for &id in sequences {
                let message = self.doubts.held.remove(&id).unwrap_or_default();
                if let Some(request) = self.forget(id) {
                    self.fail(request, Status::internal(message));
                }
            }
        }
    }

    /// A sequence has a token more, or has ended.
    pub(super) fn note_fared(&mut self, sequence: SequenceId, ended: bool) {
        if self.doubts.is_idle() {
            return;
        }
        let was_alone = self.doubts.is_alone(sequence);
        if ended {
            self.doubts.held.remove(&sequence);
            self.doubts.deaths.handle_ended(sequence);
        } else {
            self.doubts.deaths.handle_token(sequence);
        }
        self.doubts.alone.remove(&sequence);
        if was_alone
            && !self.doubts.is_alone(sequence)
            && let Some(scheduler) = &mut self.scheduler
        {
            scheduler.handle_company(sequence);
        }
        if let Some(sequence) = self.doubts.watched.remove(&sequence)
            && let Some(cluster) = &self.cluster
        {
            let _ = cluster.try_send(Fared { sequence, ended });
        }
    }

    /// The epoch ends: what was in flight is remembered until it is known whether a node died.
    pub(super) fn note_epoch_end(&mut self) {
        if let Some(scheduler) = &self.scheduler {
            self.doubts.deaths.handle_end(scheduler.in_flight());
        }
    }

    /// A node died, or hung, and what was in flight may be the cause.
    pub(super) fn note_death(&mut self) {
        if self.active.is_some() {
            self.note_epoch_end();
        }
        for (id, fate) in self.doubts.deaths.handle_death() {
            match fate {
                Fate::Company => {}
                Fate::Alone => {
                    let request = self.requests.of(id).map(|(r, _)| r.id);
                    let request_id = request.map(|id| self.metrics.names().label(id));
                    tracing::warn!(request_id, "in flight at two deaths: it runs alone");
                    if let Some(scheduler) = &mut self.scheduler {
                        scheduler.handle_alone(id);
                    }
                }
                Fate::Fails => {
                    let message = "four times nodes died or hung while this request was computed, \
                                   the last two while nothing else was: it is not tried again";
                    if let Some(request) = self.forget(id) {
                        self.fail(request, Status::internal(message));
                    }
                }
            }
        }
    }

    /// Another name for a sequence: stages never hear of one name twice in an epoch.
    fn rename(&mut self, old: SequenceId) -> SequenceId {
        let id = SequenceId(self.next_sequence);
        if !self.requests.rename(old, id) {
            return old;
        }
        self.masks.rename(old, id);
        self.next_sequence += 1;
        self.doubts.deaths.handle_renamed(old, id);
        id
    }
}
