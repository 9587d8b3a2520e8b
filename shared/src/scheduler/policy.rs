//! The rules in numbers: what is accepted, what decodes leave to prompts, what admission leaves
//! free, who is preempted.

use super::MAX_TOP_LOGITS;
use super::sequence::Sequence;
use super::types::{Kind, NewSequence, Priority, Rejected, SchedulerConfig};
use crate::id::SequenceId;
use crate::kv::KvBlockManager;

/// Share of a micro-batch that decodes leave to prefill while prompts wait: one part in this many.
/// A quarter keeps prompts moving where `max_batch_tokens` is small, at little cost to decodes.
const PREFILL_SHARE: u32 = 4;
/// Admission leaves one block per running sequence free, but no more for that than one part in this
/// many of the cache: enough that a newcomer does not cause a preemption at the next boundary.
const RESERVE_SHARE: u32 = 8;

/// Length of prompt and answer at the end.
pub(super) fn final_len(new: &NewSequence, max_model_len: u32) -> u32 {
    let prompt = new.prompt.len() as u32;
    match new.kind.generates() {
        true => prompt.saturating_add(new.max_new_tokens).min(max_model_len),
        false => prompt,
    }
}

/// Whether a sequence can ever run.
pub(super) fn check(
    config: &SchedulerConfig,
    kv: &KvBlockManager,
    new: &NewSequence,
) -> Result<(), Rejected> {
    let len = u32::try_from(new.prompt.len()).unwrap_or(u32::MAX);
    let max = config.max_model_len - u32::from(new.kind.generates());
    if len == 0 {
        return Err(Rejected::EmptyPrompt);
    }
    if len > max {
        return Err(Rejected::PromptTooLong { len, max });
    }
    match new.kind {
        kind if kind.generates() && new.max_new_tokens == 0 => {
            return Err(Rejected::NothingToGenerate);
        }
        Kind::Score { top_k } if top_k > MAX_TOP_LOGITS => {
            return Err(Rejected::TooManyTopLogits { top_k });
        }
        _ => {}
    }
    check_room(kv, final_len(new, config.max_model_len))
}

/// Whether a sequence of this length at its end fits the cache alone.
pub(super) fn check_room(kv: &KvBlockManager, final_len: u32) -> Result<(), Rejected> {
    // The last token is never fed back, so it needs no position; counting it is the safe side.
    let needed = kv.blocks_for(final_len);
    if needed > kv.total() {
        return Err(Rejected::NeedsMoreBlocksThanExist { needed, exist: kv.total() });
    }
    Ok(())
}

/// Tokens of a micro-batch that decodes may take. `turn` alternates where there is room for one.
pub(super) fn decode_limit(config: &SchedulerConfig, prefill_waits: bool, turn: u32) -> u32 {
    let all = config.max_batch_tokens;
    match (prefill_waits, all) {
        (false, _) => all,
        (true, 1) => turn % 2,
        (true, _) => all - (all / PREFILL_SHARE).clamp(1, config.prefill_chunk),
    }
}

/// A prompt of so many tokens is short.
const SHORT_PROMPT: f64 = 192.0;

/// How much of a reader a request is whose prompt has `remaining` tokens to go: one with a short
/// prompt will read along in a moment, one with a long prompt counts for little. Nothing for what
/// ends with its prompt.
pub(super) fn future_reader(seq: &Sequence) -> f64 {
    if !seq.kind.generates() || seq.left() <= 1 {
        return 0.0;
    }
    (SHORT_PROMPT / f64::from(seq.remaining().max(1))).powi(2).min(1.0)
}

/// What admission leaves free, so that running sequences can grow: one block each, and a share of
/// all that they may still generate. The share adapts, as gLLM's does: it grows with every
/// preemption, which shows that too little was left, and shrinks slowly otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reserve {
    share: f64,
}

impl Reserve {
    /// Growth by a preemption.
    const STEP: f64 = 0.05;
    /// Decrease per micro-batch.
    const DECAY: f64 = 0.002;

    pub(super) fn on_preemption(&mut self) {
        self.share = (self.share + Self::STEP).min(1.0);
    }

    pub(super) fn on_micro_batch(&mut self) {
        self.share = (self.share - Self::DECAY).max(0.0);
    }

    /// Blocks, of `blocks` in all, while `running` sequences may generate `outstanding` blocks more.
    pub(super) fn blocks(&self, blocks: u32, running: u32, outstanding: u32) -> u32 {
        let least = running.min(blocks / RESERVE_SHARE);
        // Half of the cache at most, or a few long answers would keep everybody else out.
        let expected = (self.share * f64::from(outstanding)).ceil() as u32;
        least.max(expected.min(blocks / 2))
    }
}

/// A sequence that could give its blocks up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) id: SequenceId,
    pub(super) order: u64,
    pub(super) priority: Priority,
    pub(super) in_flight: bool,
}

impl From<&Sequence> for Candidate {
    fn from(s: &Sequence) -> Self {
        Self {
            id: s.id,
            order: s.order,
            priority: s.flow.priority,
            in_flight: s.rows_in_flight > 0,
        }
    }
}

/// One without a row in flight if there is one; of those the least urgent, of those the youngest.
pub(super) fn victim(candidates: impl Iterator<Item = Candidate>) -> Option<SequenceId> {
    candidates.max_by_key(|c| (!c.in_flight, c.priority, c.order)).map(|c| c.id)
}
