//! Handing prompts to the scheduler, and what clients are told where it refuses.

use std::time::Duration;

use millrace_shared::error::Status;
use millrace_shared::id::SequenceId;
use millrace_shared::scheduler::{Kind, NewSequence, Rejected};

use super::{Batcher, RETRY_QUEUE_MS};
use crate::metrics::Shed;
use crate::service::Caller;

impl Batcher {
    /// Queues a prompt once for each of `choices`, all or none; on success their ids.
    pub(super) fn submit(
        &mut self,
        tokens: Vec<u32>,
        kind: Kind,
        (max_new_tokens, choices): (u32, u32),
        caller: &Caller,
    ) -> Result<Vec<(SequenceId, u32)>, Status> {
        let now = self.now();
        let serves = self.active.is_some() || self.suspended.is_some();
        let Some(scheduler) = self.scheduler.as_mut().filter(|_| serves) else {
            return Err(self.unavailable());
        };
        let first = self.next_sequence;
        let prompt_tokens = tokens.len() as u64;
        for choice in 0..u64::from(choices) {
            let queued = scheduler.handle_submit(NewSequence {
                id: SequenceId(first + choice),
                prompt: tokens.clone(),
                max_new_tokens,
                kind,
                submitted: now,
                deadline: caller.deadline.map(|d| now + d),
                client: caller.client,
                priority: caller.priority,
            });
            if let Err(why) = queued {
                (0..choice)
                    .for_each(|earlier| scheduler.handle_cancel(SequenceId(first + earlier)));
                return Err(self.rejected(why));
            }
        }
        self.next_sequence += u64::from(choices);
        self.metrics.on_submit();
        self.metrics.on_prompt_tokens(prompt_tokens);
        Ok((0..choices).map(|choice| (SequenceId(first + u64::from(choice)), choice)).collect())
    }

    pub(super) fn rejected(&self, why: Rejected) -> Status {
        match why {
            Rejected::DeadlineTooShort { wait } => {
                self.metrics.on_shed(Shed::Deadline);
                Status::exhausted(why.to_string(), retry_ms(wait))
            }
            Rejected::QueueFull { .. } => {
                self.metrics.on_shed(Shed::QueueFull);
                Status::exhausted(why.to_string(), RETRY_QUEUE_MS)
            }
            Rejected::TooManyTopLogits { .. } => Status::invalid("top_k", why.to_string()),
            Rejected::NothingToGenerate => Status::invalid("max_tokens", why.to_string()),
            _ => Status::invalid("prompt", why.to_string()),
        }
    }
}

/// A retry hint: at least a moment.
pub(super) fn retry_ms(wait: Duration) -> u32 {
    u32::try_from(wait.as_millis()).unwrap_or(u32::MAX).max(100)
}
