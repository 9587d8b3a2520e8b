//! One sequence as the scheduler sees it.

use std::time::Duration;

use super::types::{Kind, NewSequence};
use super::{MAX_SCORE_POSITIONS, policy};
use crate::id::SequenceId;
use crate::wire::data::Want;

/// Where a sequence stands; see the module's transition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Waiting,
    Prefilling,
    Decoding,
}

/// A sequence. Its tokens are its truth: whatever the KV cache held can be computed from them.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Age: lower is older. Kept through preemption.
    pub(super) order: u64,
    pub(super) kind: Kind,
    pub(super) phase: Phase,
    /// Prompt and everything generated.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_len: u32,
    /// Length at which it ends.
    pub(super) max_len: u32,
    /// Bumped by preemption: rows of older epochs are dropped.
    pub(super) epoch: u32,
    /// Positions issued since the table was started; the next row begins here.
    pub(super) issued: u32,
    pub(super) rows_in_flight: u32,
    /// Whether a row was ever issued, that is: whether stages know it.
    pub(super) opened: bool,
    /// Positions whose scores have arrived.
    pub(super) scored: u32,
    /// Prompt positions that were counted as computed.
    counted: u32,
    prefill_done: bool,
    /// When the client asked.
    pub(super) submitted: Duration,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, order: u64, max_model_len: u32) -> Self {
        Self {
            id: new.id,
            order,
            kind: new.kind,
            phase: Phase::Waiting,
            prompt_len: new.prompt.len() as u32,
            max_len: policy::final_len(&new, max_model_len),
            tokens: new.prompt,
            epoch: 0,
            issued: 0,
            rows_in_flight: 0,
            opened: false,
            scored: 0,
            counted: 0,
            prefill_done: false,
            submitted: new.submitted,
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Positions that exist but were not issued.
    pub(super) fn remaining(&self) -> u32 {
        self.len() - self.issued
    }

    /// The next row, at most `budget` positions: how many, and what it wants.
    pub(super) fn next_row(&self, budget: u32) -> (u32, Want) {
        let count = self.remaining().min(budget);
        match self.kind {
            Kind::Generate if count == self.remaining() => (count, Want::Sample),
            Kind::Generate => (count, Want::None),
            // Recomputing after preemption: these scores have been delivered.
            Kind::Score { .. } if self.issued < self.scored => {
                (count.min(self.scored - self.issued), Want::None)
            }
            Kind::Score { top_k } => (count.min(MAX_SCORE_POSITIONS), Want::Score { top_k }),
        }
    }

    /// Appends a generated token and returns its index.
    pub(super) fn push(&mut self, token: u32) -> u32 {
        self.tokens.push(token);
        self.len() - self.prompt_len - 1
    }

    pub(super) fn is_complete(&self) -> bool {
        self.len() >= self.max_len
    }

    /// Notes that the prompt is computed; whether that was news.
    pub(super) fn finish_prefill(&mut self) -> bool {
        !std::mem::replace(&mut self.prefill_done, true)
    }

    /// Prompt positions below `end` that were not counted yet.
    pub(super) fn count_prompt(&mut self, end: u32) -> u32 {
        let upto = end.min(self.prompt_len).max(self.counted);
        let news = upto - self.counted;
        self.counted = upto;
        news
    }

    /// Back to waiting, to be computed anew from its tokens; rows in flight become stale.
    pub(super) fn restart(&mut self) {
        self.phase = Phase::Waiting;
        self.epoch += 1;
        self.issued = 0;
        self.rows_in_flight = 0;
    }
}
