//! Steps that failed: is it the node, or a request?
//!
//! The requests of a failed step are held back until [`super::Cluster`] has said what becomes of
//! them: they fail, or are computed again from their tokens, in the next epoch (which does without
//! the node) or in this one. Until it is known how they fare then, the cluster hears of it. Scores
//! are not held: they fail with their step.

use std::collections::BTreeMap;

use actix::prelude::*;
use millrace_shared::error::Status;
use millrace_shared::id::{Epoch, SequenceId};

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
    /// In an epoch that is yet to come.
    pub elsewhere: bool,
}

impl Handler<StepVerdict> for Batcher {
    type Result = ();

    fn handle(&mut self, m: StepVerdict, _: &mut Context<Self>) {
        for id in m.failed {
            let Some(message) = self.doubts.held.remove(&id) else { continue };
            if let Some(request) = self.forget(id) {
                self.fail(request, Status::internal(message));
            }
        }
        // Where the epoch has changed meanwhile, nobody waits for another one.
        let now = !m.elsewhere || self.active.as_ref().is_some_and(|a| a.epoch != m.epoch);
        for known in m.again {
            if self.doubts.held.remove(&known).is_none() {
                // It ended while it was held.
                if let Some(cluster) = &self.cluster {
                    let _ = cluster.try_send(Fared { sequence: known, ended: true });
                }
                continue;
            }
            let id = if now { self.rename(known) } else { known };
            self.doubts.watched.insert(id, known);
            self.resumed.push(id);
        }
        if now && let Some(mut scheduler) = self.scheduler.take() {
            let refused = self.resume(&mut scheduler);
            self.scheduler = Some(scheduler);
            for (id, why) in refused {
                let Some(request) = self.forget(id) else { continue };
                self.fail(request, Status::exhausted(why.to_string(), RETRY_PIPELINE_MS));
            }
        }
        self.pump();
    }
}

/// The last stage, whatever its number.
pub const LAST_STAGE: u16 = u16::MAX;

/// The stage that a failure names, as stages describe what a step of theirs failed of. Logits that
/// are not finite are the last one's.
fn stage_of(message: &str) -> Option<u16> {
    if message.starts_with("logit ") && message.contains(" is not finite") {
        return Some(LAST_STAGE);
    }
    let (stage, rest) = message.strip_prefix("stage ")?.split_once(',')?;
    stage.parse().ok().filter(|_| rest.starts_with(" layers "))
}

impl Batcher {
    /// Holds a request back whose step failed at a stage; `None` where it fails at once.
    pub(super) fn doubt(&mut self, id: SequenceId, message: &str) -> Option<u16> {
        let stage = stage_of(message).filter(|_| self.active.is_some())?;
        let work = self.requests.of(id).map(|(r, _)| &r.work);
        if !matches!(work, Some(Work::Generate(_))) {
            return None;
        }
        self.doubts.held.insert(id, message.to_owned());
        Some(stage)
    }

    /// Asks the cluster what becomes of the sequences of a step, all of which are held.
    pub(super) fn ask_verdict(&mut self, stage: u16, sequences: Vec<SequenceId>) {
        let Some(active) = &self.active else { return };
        let failed = StepFailed { epoch: active.epoch, stage, sequences: sequences.clone() };
        if active.cluster.try_send(failed).is_err() {
            for id in sequences {
                let message = self.doubts.held.remove(&id).unwrap_or_default();
                if let Some(request) = self.forget(id) {
                    self.fail(request, Status::internal(message));
                }
            }
        }
    }

    /// A sequence has a token more, or has ended.
    pub(super) fn note_fared(&mut self, sequence: SequenceId, ended: bool) {
        if self.doubts.held.is_empty() && self.doubts.watched.is_empty() {
            return;
        }
        if ended {
            self.doubts.held.remove(&sequence);
        }
        if let Some(sequence) = self.doubts.watched.remove(&sequence)
            && let Some(cluster) = &self.cluster
        {
            let _ = cluster.try_send(Fared { sequence, ended });
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
        id
    }
}

#[cfg(test)]
mod tests {
    use super::stage_of;

    #[test]
    fn failures_name_their_stage() {
        assert_eq!(stage_of("stage 2, layers 10..20: input of layer 11 is not finite"), Some(2));
        let logit = "logit NaN of token 11 is not finite; the model's output is unusable";
        assert_eq!(stage_of(logit), Some(super::LAST_STAGE));
        for other in ["", "stage", "stage x, layers 1..2", "stage 1, or so", "the engine panicked"]
        {
            assert_eq!(stage_of(other), None, "{other}");
        }
    }
}
