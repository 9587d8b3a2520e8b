//! Deadlines: a sequence that cannot be served in time is told so while it waits, with a hint when
//! to try again, and takes nobody's place.
//!
//! The prediction errs on the side of hope: prompts are taken to run at the pipeline's best speed,
//! as if nothing decoded; of other clients' prompts as much is counted as comes before in fair
//! turns; blocks are taken to be free. Only what even so comes too late is rejected. Without
//! measurements nothing is.

use std::time::Duration;

use super::Scheduler;
use super::cost::Load;
use super::fair::FlowKey;
use super::types::{NewSequence, Outcome, Rejected};
use crate::id::SequenceId;

/// Predictions are off by a few per cent; this much less is believed.
const HOPE: f64 = 0.9;

impl Scheduler {
    /// Rejects waiting sequences whose deadline cannot be met any more. To be called now and then,
    /// at least as often as deadlines should be noticed; `Shed` outcomes only.
    pub fn poll_shed(&mut self, now: Duration) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for (sequence, retry_after) in self.hopeless(now) {
            self.remove(sequence);
            self.shed += 1;
            outcomes.push(Outcome::Shed { sequence, retry_after });
        }
        outcomes
    }

    /// Whether a new sequence could be served in time.
    pub(super) fn check_deadline(&mut self, new: &NewSequence) -> Result<(), Rejected> {
        let flow = FlowKey { priority: new.priority, client: new.client };
        let (Some(deadline), Some(speed)) = (new.deadline, self.prompt_speed()) else {
            return Ok(());
        };
        let backlog = self.flow_backlog();
        let tokens = new.prompt.len() as u32;
        let own = backlog.iter().find(|(key, _)| *key == flow).map_or(0, |(_, tokens)| *tokens);
        let own = own + u64::from(tokens);
        let wait = self.predicted(&backlog, flow, own, speed);
        if new.submitted + wait <= deadline {
            return Ok(());
        }
        self.shed += 1;
        Err(Rejected::DeadlineTooShort { wait })
    }

    fn hopeless(&self, now: Duration) -> Vec<(SequenceId, Duration)> {
        let mut found = Vec::new();
        let Some(speed) = self.prompt_speed() else { return found };
        let backlog = self.flow_backlog();
        for (flow, waiting) in self.queue.backlog() {
            let mut ahead = 0;
            for (id, tokens) in waiting {
                ahead += u64::from(tokens);
                let deadline = self.sequences.get(&id).and_then(|s| s.deadline);
                let Some(deadline) = deadline else { continue };
                let wait = self.predicted(&backlog, flow, ahead, speed);
                if now + wait > deadline {
                    // It takes nobody's time any more.
                    ahead -= u64::from(tokens);
                    found.push((id, wait));
                }
            }
        }
        found
    }

    /// Whether short prompts have their turns now: never while somebody has a deadline, as what is
    /// promised follows from the order of arrival.
    pub(super) fn short_turns(&self) -> bool {
        self.config.policy.short_turns && !self.sequences.values().any(|s| s.deadline.is_some())
    }

    /// Waiting prompt tokens of each flow.
    fn flow_backlog(&self) -> Vec<(FlowKey, u64)> {
        let sum = |(key, waiting): (FlowKey, _)| {
            (key, Iterator::map(waiting, |(_, tokens): (_, u32)| u64::from(tokens)).sum())
        };
        self.queue.backlog().map(sum).collect()
    }

    /// Prompt tokens per second at best; `None` where nothing is known.
    fn prompt_speed(&self) -> Option<f64> {
        let chunk = self.config.prefill_chunk.min(self.config.max_batch_tokens);
        let seconds = self.cost.bottleneck(&Load::default().with_prompt(0, chunk, 0));
        // What the cache holds of prompts, as a rule, takes no time.
        let known = self.prefixes.hits as f64 / (self.prefixes.queried as f64).max(1.0);
        let tokens = f64::from(chunk) / (1.0 - known).max(0.02);
        (self.cost.is_measured() && seconds > 0.0).then(|| tokens / seconds)
    }

    /// Until the first token of a sequence of `flow`, with which the flow has `own` tokens to go:
    /// before that every other flow is served up to the same counter, but no more than it wants.
    fn predicted(
        &self,
        backlog: &[(FlowKey, u64)],
        flow: FlowKey,
        own: u64,
        speed: f64,
    ) -> Duration {
        let until = self.queue.start(flow) + own * flow.cost();
        let others: u64 = (backlog.iter().filter(|(key, _)| *key != flow))
            .map(|(key, tokens)| {
                let turns = until.saturating_sub(self.queue.start(*key)) / key.cost();
                turns.min(*tokens)
            })
            .sum();
        // The last chunk is on its way through the other stages when the slowest has done it.
        let load = Load::default().with_prompt(0, 1, 1);
        let rest = self.cost.sum(&load) - self.cost.bottleneck(&load);
        let through = rest.max(0.0) + self.window.link().as_secs_f64();
        let seconds = (own + others) as f64 / speed + through;
        Duration::from_secs_f64((seconds * HOPE).min(1e6))
    }
}
