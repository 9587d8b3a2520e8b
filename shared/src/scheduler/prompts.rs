//! Prompts: whose is next, whether its blocks are there, how long its chunk is.

use std::collections::BTreeSet;

use super::Scheduler;
use super::batch::{Draft, Pace, Room};
use super::cost::Load;
use super::sequence::{Phase, Sequence};
use super::types::Kind;
use crate::id::SequenceId;
use crate::wire::data::Want;

/// Newcomers' chunks shrink while less than one part in this many of the cache is free, so that
/// decodes find blocks instead of preempting.
const SCARCE: u32 = 4;

/// Service that a flow got, and what is left of a prompt where that counts.
type Rank = (u64, u32);

/// What became of an attempt to add a chunk.
#[derive(Debug, PartialEq, Eq)]
enum Chunk {
    Added,
    /// Blocks are short.
    NoBlocks,
    /// The micro-batch is as long as it may be.
    NoTime,
    /// Another sequence is computing its next block, or the micro-batch has all the embeddings that
    /// it may have.
    Waits,
}

impl Scheduler {
    /// Chunks of prompts, in fair turns, while time, tokens and blocks last. Prompts under way may
    /// take free blocks; only the most senior running sequence may take blocks from others, so that
    /// prompts do not evict each other. A newcomer that does not fit keeps later ones out. Of one
    /// flow's prompts the one that came first and the one with least to go begin a micro-batch by
    /// turns, where nobody has a deadline.
    pub(super) fn add_prompts(&mut self, pace: Pace, draft: &mut Draft) {
        let short = self.prompt_turn % 2 == 1 && self.short_turns();
        let most = self.spread();
        let mut tried = BTreeSet::new();
        let mut open = true;
        loop {
            let budget =
                self.prompt_budget(draft).min(most.saturating_sub(draft.load.prefill_tokens));
            if budget == 0 {
                break;
            }
            let under_way = self.next_under_way(&tried, short);
            let admits = open
                && self.alone.is_empty()
                && !draft.preempted
                && self.running.len() < self.config.max_num_seqs as usize;
            let head = if admits { self.queue.head(short) } else { None };
            let newcomer = head.filter(|&head| {
                under_way.is_none_or(|(rank, ..)| self.rank(head.id(), short) < rank)
            });
            let (id, budget) = if let Some(head) = newcomer {
                if !self.may_admit(head.id()) {
                    open = false;
                    continue;
                }
                self.start(head.id());
                (head.id(), budget.min(self.newcomer_budget()))
            } else {
                let Some((_, _, id)) = under_way else { break };
                (id, budget)
            };
            tried.insert(id);
            let senior = self.running.first_key_value().is_some_and(|(_, &first)| first == id);
            if self.add_chunk(id, budget, senior, pace, draft) == Chunk::NoTime {
                break;
            }
        }
    }

    /// Whether some prompt could use a place in the micro-batch.
    pub(super) fn prompt_waits(&self) -> bool {
        let under_way = || self.prefilling.values().filter_map(|id| self.sequences.get(id));
        !self.queue.is_empty() || under_way().any(|s| s.remaining() > 0)
    }

    /// The running prompt whose turn it is: its rank, its seniority, its id.
    fn next_under_way(
        &self,
        tried: &BTreeSet<SequenceId>,
        short: bool,
    ) -> Option<(Rank, u64, SequenceId)> {
        let under_way = self.prefilling.values().filter(|id| !tried.contains(id));
        under_way
            .filter_map(|id| self.sequences.get(id))
            .filter(|s| s.remaining() > 0)
            .map(|s| (self.rank(s.id, short), s.order, s.id))
            .min()
    }

    /// Lower goes first: the service that the flow got; where short prompts have their turn, what
    /// is left of this one.
    fn rank(&self, id: SequenceId, short: bool) -> Rank {
        self.sequences
            .get(&id)
            .map_or((0, 0), |s| (self.queue.served(s.flow), if short { s.remaining() } else { 0 }))
    }

    /// Prompt tokens that still fit into the micro-batch.
    fn prompt_budget(&self, draft: &Draft) -> u32 {
        let chunk = self.config.prefill_chunk.saturating_sub(draft.load.prefill_tokens);
        chunk.min(self.config.max_batch_tokens.saturating_sub(draft.tokens.len() as u32))
    }

    /// Where several prompts wait beside decodes, an even share for each micro-batch in flight.
    fn spread(&self) -> u32 {
        let waiting = self.queue.len() + self.prefilling.len();
        if self.decoding() == 0 || waiting < 2 || self.queue.len() > self.queue.fresh() {
            return u32::MAX;
        }
        let under_way = self.prefilling.values().filter_map(|id| self.sequences.get(id));
        let tokens =
            self.queue.fresh_tokens() + under_way.map(|s| u64::from(s.remaining())).sum::<u64>();
        let share = tokens.div_ceil(self.window.size().into());
        u32::try_from(share).unwrap_or(u32::MAX).max(self.config.policy.min_prefill)
    }

    /// Tokens of a newcomer's first chunk: fewer as the cache fills while answers are under way.
    fn newcomer_budget(&self) -> u32 {
        let (free, all) = (u64::from(self.kv.free_blocks()), u64::from(self.kv.total()));
        let chunk = u64::from(self.config.prefill_chunk);
        if self.decoding() == 0 || free * u64::from(SCARCE) >= all {
            return self.config.prefill_chunk;
        }
        let throttled = chunk * free * u64::from(SCARCE) / all;
        (throttled as u32).max(self.config.policy.min_prefill)
    }

    /// Whether the blocks of the whole sequence so far are free, beside what prompts under way
    /// still need and the reserve. Alone it may always come.
    fn may_admit(&self, id: SequenceId) -> bool {
        if self.running.is_empty() {
            return true;
        }
        let needed: u32 = std::iter::once(&id)
            .chain(self.prefilling.values())
            .filter_map(|id| self.sequences.get(id))
            .map(|s| self.blocks_to_come(s))
            .sum();
        let outstanding = u32::try_from(self.outstanding).unwrap_or(u32::MAX);
        let outstanding = self.kv.blocks_for(outstanding);
        let running = self.running.len() as u32;
        let reserve = self.reserve.blocks(self.kv.total(), running, outstanding);
        self.kv.can_allocate(needed + reserve)
    }

    /// A waiting sequence runs.
    pub(super) fn start(&mut self, id: SequenceId) {
        let Some(seq) = self.sequences.get_mut(&id) else { return };
        if !self.queue.take_preempted(seq.order, id) {
            self.queue.serve(seq.flow);
            self.queue.take(seq.flow, seq.arrival);
            seq.order = self.next_order;
            self.next_order += 1;
        }
        seq.phase = Phase::Prefilling;
        self.running.insert(seq.order, seq.id);
        self.prefilling.insert(seq.order, seq.id);
        self.outstanding += u64::from(seq.left());
    }

    fn add_chunk(
        &mut self,
        id: SequenceId,
        budget: u32,
        may_preempt: bool,
        pace: Pace,
        draft: &mut Draft,
    ) -> Chunk {
        if !self.begin(id, !draft.impatient) {
            return Chunk::Waits;
        }
        let Some(seq) = self.sequences.get(&id) else { return Chunk::NoBlocks };
        let issued = seq.issued;
        if matches!(seq.kind, Kind::Embed { .. }) && draft.is_full_of_embeddings() {
            return Chunk::Waits;
        }
        let timely = self.timely(seq, budget, pace, draft);
        if timely == 0 {
            return Chunk::NoTime;
        }
        let covered = self.kv.table(id).len() as u32 + self.kv.free_blocks();
        let room = covered.saturating_mul(self.kv.block_size()).saturating_sub(issued);
        let mut count = timely.min(room);
        if count == 0 && may_preempt && self.make_room(id, issued + 1, draft) == Room::Granted {
            count = 1;
        }
        if count == 0 {
            return Chunk::NoBlocks;
        }
        self.issue(id, count, &[], draft);
        Chunk::Added
    }

    /// The longest next row within budget and time.
    fn timely(&self, seq: &Sequence, budget: u32, pace: Pace, draft: &Draft) -> u32 {
        let (count, want) = seq.next_row(budget);
        let Some(seconds) = pace.seconds else { return count };
        let remaining = seq.remaining();
        let with = |n: u32| -> Load {
            let head = match want {
                Want::Score { .. } => n,
                Want::Sum | Want::Embed { .. } => 0,
                _ => u32::from(n == remaining),
            };
            draft.load.with_prompt(seq.issued, n, head)
        };
        let fit = self.cost.largest(count, seconds, with);
        let floor = pace.floor.saturating_sub(draft.load.prefill_tokens).min(count);
        if floor <= fit {
            return fit;
        }
        // Somewhat longer for the least that is worth a row, and in any case some progress.
        let least = u32::from(draft.load.prefill_tokens == 0);
        self.cost.largest(floor, seconds * pace.stretch, with).max(least)
    }
}
