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

/// Prompts of a flow by length; by default they go in the order of arrival.
#[derive(Default)]
struct Turns(Option<Lengths>);

struct Lengths {
    lengths: Vec<u32>,
    /// Sums of the first lengths.
    sums: Vec<u64>,
}

impl Turns {
    fn of(mut lengths: Vec<u32>) -> Self {
        lengths.sort_unstable();
        let mut sum = 0;
        let mut add = |&tokens: &u32| {
            sum += u64::from(tokens);
            sum
        };
        let sums = lengths.iter().map(&mut add).collect();
        Self(Some(Lengths { lengths, sums }))
    }

    /// Tokens of those that are shorter than one of `tokens`; no bound where that is no rule.
    fn before(&self, tokens: u32) -> u64 {
        let Some(Lengths { lengths, sums }) = &self.0 else { return u64::MAX };
        let shorter = lengths.partition_point(|&l| l < tokens);
        shorter.checked_sub(1).and_then(|last| sums.get(last)).copied().unwrap_or(0)
    }
}

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
        let own = own.min(self.short_turns(flow).before(tokens)) + u64::from(tokens);
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
            let turns = self.short_turns(flow);
            for (id, tokens) in waiting {
                ahead += u64::from(tokens);
                let deadline = self.sequences.get(&id).and_then(|s| s.deadline);
                let Some(deadline) = deadline else { continue };
                let own = ahead.min(turns.before(tokens).saturating_add(u64::from(tokens)));
                let wait = self.predicted(&backlog, flow, own, speed);
                if now + wait > deadline {
                    // It takes nobody's time any more.
                    ahead -= u64::from(tokens);
                    found.push((id, wait));
                }
            }
        }
        found
    }

    /// What is in the way of a flow's prompts if short ones always had their turn.
    fn short_turns(&self, flow: FlowKey) -> Turns {
        if !self.config.policy.short_turns {
            return Turns::default();
        }
        let own = self.queue.backlog().find(|(key, _)| *key == flow);
        Turns::of(own.map_or_else(Vec::new, |(_, waiting)| waiting.map(|(_, n)| n).collect()))
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
