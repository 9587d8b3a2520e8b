//! One sequence as the scheduler sees it.

use std::time::Duration;

use super::draft::Acceptance;
use super::fair::FlowKey;
use super::types::{Kind, NewSequence};
use super::{MAX_SCORE_POSITIONS, policy};
use crate::id::SequenceId;
use crate::kv::BlockHash;
use crate::options::PrefixCache;
use crate::pooling::Pooling;
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
    /// Of submission: lower came first.
    pub(super) arrival: u64,
    /// Seniority: lower was admitted first. Kept through preemption; before admission `arrival`.
    pub(super) order: u64,
    /// Whose service it is counted as.
    pub(super) flow: FlowKey,
    /// When nobody wants it any more.
    pub(super) deadline: Option<Duration>,
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
    /// Its last row is in flight.
    pub(super) closing: bool,
    /// Positions whose scores have arrived.
    pub(super) scored: u32,
    /// Prompt positions that were counted as computed.
    counted: u32,
    /// Positions that were counted as service: computing them again is not the client's doing.
    charged: u32,
    prefill_done: bool,
    /// Names of the full blocks of its tokens, as far as they were needed.
    pub(super) contents: Vec<BlockHash>,
    /// Whether it has looked for its beginning in the cache since it was admitted.
    pub(super) begun: bool,
    /// What it found there the first time, positions.
    pub(super) first_hit: Option<u32>,
    /// Positions without a gap that are confirmed to be computed.
    pub(super) computed: u32,
    /// Blocks that are published.
    pub(super) published: u32,
    /// Blocks of its table that stages know.
    pub(super) sent: u32,
    /// Micro-batch of its last row.
    pub(super) last_row: u64,
    /// Tokens that rows in flight take for granted beyond its own: drafts, and what may follow them.
    pub(super) ahead: Vec<u32>,
    /// Where nobody had a guess what follows.
    pub(super) no_guess: u32,
    /// How its drafts fare.
    pub(super) acceptance: Acceptance,
    /// When the client asked.
    pub(super) submitted: Duration,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, arrival: u64, max_model_len: u32) -> Self {
        Self {
            id: new.id,
            arrival,
            order: arrival,
            flow: FlowKey { priority: new.priority, client: new.client },
            deadline: new.deadline,
            kind: new.kind,
            phase: Phase::Waiting,
            prompt_len: new.prompt.len() as u32,
            max_len: policy::final_len(&new, max_model_len),
            tokens: new.prompt,
            epoch: 0,
            issued: 0,
            rows_in_flight: 0,
            opened: false,
            closing: false,
            scored: 0,
            counted: 0,
            charged: 0,
            prefill_done: false,
            contents: Vec::new(),
            begun: false,
            first_hit: None,
            computed: 0,
            published: 0,
            sent: 0,
            last_row: 0,
            ahead: Vec::new(),
            no_guess: 0,
            acceptance: Acceptance::default(),
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

    /// Names the blocks that its tokens fill.
    pub(super) fn name_blocks(&mut self, cache: PrefixCache, block_size: u32) {
        let own = (cache == PrefixCache::PerKey).then(|| BlockHash::of_client(self.flow.client));
        BlockHash::extend(&mut self.contents, own.as_ref(), &self.tokens, block_size);
    }

    /// The next row, at most `budget` positions: how many, and what it wants.
    pub(super) fn next_row(&self, budget: u32) -> (u32, Want) {
        let count = self.remaining().min(budget);
        match self.kind {
            Kind::Generate | Kind::Constrained if count == self.remaining() => {
                (count, Want::Sample)
            }
            Kind::Generate | Kind::Constrained => (count, Want::None),
            Kind::Embed { pooling } if count == self.remaining() => {
                (count, Want::Embed { pooling })
            }
            Kind::Embed { pooling: Pooling::Mean } => (count, Want::Sum),
            Kind::Embed { pooling: Pooling::Last } => (count, Want::None),
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

    /// Prompt positions and generated tokens among the positions below `end` that were not counted
    /// as service yet; now they are.
    pub(super) fn charge(&mut self, end: u32) -> (u32, u32) {
        let upto = end.max(self.charged);
        let from = std::mem::replace(&mut self.charged, upto);
        let prompt = upto.min(self.prompt_len) - from.min(self.prompt_len);
        (prompt, upto - from - prompt)
    }

    /// Tokens that it may still generate.
    pub(super) fn left(&self) -> u32 {
        self.max_len.saturating_sub(self.len())
    }

    /// `chosen` tokens came of a row that is decided. Whether rows in flight were right to build on
    /// them; else they are stale, and the sequence goes on from its position `valid`.
    pub(super) fn was_foreseen(&mut self, chosen: &[u32], whole: bool, valid: u32) -> bool {
        let foreseen = whole && self.rows_in_flight > 0 && self.ahead.starts_with(chosen);
        if foreseen {
            self.ahead.drain(..chosen.len());
        } else {
            self.epoch += u32::from(self.rows_in_flight > 0);
            self.rows_in_flight = 0;
            self.ahead.clear();
            self.issued = valid;
        }
        foreseen
    }

    /// Back to waiting, to be computed anew from its tokens; rows in flight become stale.
    pub(super) fn restart(&mut self) {
        self.phase = Phase::Waiting;
        self.epoch += 1;
        self.issued = 0;
        self.closing = false;
        self.rows_in_flight = 0;
        self.ahead.clear();
        self.begun = false;
        self.computed = 0;
        self.published = 0;
        self.sent = 0;
    }

    /// Begins with `blocks` blocks of the cache, which hold its first `positions` positions.
    pub(super) fn begin_at(&mut self, positions: u32, blocks: u32) {
        self.begun = true;
        self.first_hit.get_or_insert(positions);
        self.issued = positions;
        self.computed = positions;
        self.published = blocks;
        // Nobody computes them, so nobody pays for them.
        self.counted = self.counted.max(positions.min(self.prompt_len));
        self.charged = self.charged.max(positions);
    }
}
