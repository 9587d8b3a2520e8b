//! Building a micro-batch: decodes first, then prompt chunks, oldest first.

use std::time::Duration;

use super::Scheduler;
use super::policy::{self, Candidate};
use super::sequence::Phase;
use super::types::Step;
use crate::id::SequenceId;
use crate::wire::data::{Row, StepMeta, TableUpdate, Want};

/// A micro-batch under construction.
#[derive(Debug, Default)]
struct Draft {
    meta: StepMeta,
    tokens: Vec<u32>,
    opens: Vec<SequenceId>,
    prefill_tokens: u32,
    preempted: bool,
}

impl Draft {
    fn has(&self, id: SequenceId) -> bool {
        self.meta.rows.iter().any(|r| r.sequence == id)
    }

    fn is_empty(&self) -> bool {
        self.meta.rows.is_empty()
    }
}

/// Whether blocks were found for a row.
#[derive(Debug, PartialEq, Eq)]
enum Room {
    /// Yes.
    Granted,
    /// Not now: younger sequences in this very micro-batch hold them.
    Later,
    /// Only older sequences hold blocks.
    None,
}

impl Scheduler {
    pub(super) fn build_step(&mut self, now: Duration) -> Option<Step> {
        let mut draft = Draft::default();
        let limit = policy::decode_limit(&self.config, self.prefill_waits(), self.rotation);
        self.add_decodes(limit, &mut draft);
        self.add_prefills(&mut draft);
        self.admit(&mut draft);
        if draft.is_empty() {
            // What was kept for prompts is of no use to them: blocks are short.
            self.add_decodes(self.config.max_batch_tokens, &mut draft);
        }
        let idle = self.in_flight.len() == 0;
        if draft.is_empty() && (self.released.is_empty() || !idle) {
            return None;
        }
        draft.meta.released = std::mem::take(&mut self.released);
        let id = self.in_flight.next_id();
        if !draft.is_empty() {
            self.in_flight.insert(id, now, &draft.meta.rows);
        }
        Some(Step { id, meta: draft.meta, tokens: draft.tokens, opens: draft.opens })
    }

    /// A cohort of at most `limit` decodes, those that became ready first.
    fn add_decodes(&mut self, limit: u32, draft: &mut Draft) {
        if self.ready.is_empty() {
            return;
        }
        let decoding =
            self.running.values().filter(|&&id| self.phase(id) == Some(Phase::Decoding)).count();
        let slots = self.config.max_in_flight;
        let cohort = policy::decode_cohort(decoding as u32, slots, self.rotation % slots);
        self.rotation = self.rotation.wrapping_add(1);
        let mut later = Vec::new();
        while (draft.meta.rows.len() as u32) < cohort.min(limit) {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(end) = self.sequences.get(&id).map(|s| s.issued + 1) else { continue };
            debug_assert_eq!(self.phase(id), Some(Phase::Decoding), "only decoding ones are ready");
            match self.make_room(id, end, draft) {
                Room::Granted => self.issue(id, 1, draft),
                Room::Later => later.push(id),
                Room::None => self.preempt_in(id, draft),
            }
        }
        for id in later.into_iter().rev() {
            // A younger one of them may have been preempted for an older one since.
            if self.phase(id) == Some(Phase::Decoding) {
                self.ready.push_front(id);
            }
        }
    }

    /// Chunks of prompts that are under way. All of them may take free blocks; only the oldest
    /// running sequence may take blocks from others, so that prompts do not evict each other.
    fn add_prefills(&mut self, draft: &mut Draft) {
        let under_way: Vec<SequenceId> = self.running.values().copied().collect();
        for (age, id) in under_way.into_iter().enumerate() {
            let budget = self.prefill_budget(draft);
            if budget == 0 {
                break;
            }
            if self.phase(id) == Some(Phase::Prefilling) {
                self.add_chunk(id, budget, age == 0, draft);
            }
        }
    }

    /// Admits sequences in order of age while blocks and budget last.
    fn admit(&mut self, draft: &mut Draft) {
        while !draft.preempted && (self.running.len() as u32) < self.config.max_num_seqs {
            let budget = self.prefill_budget(draft);
            let Some((&order, &id)) = self.waiting.first_key_value() else { break };
            if budget == 0 || !self.may_admit(id) {
                break;
            }
            self.waiting.remove(&order);
            self.running.insert(order, id);
            if let Some(seq) = self.sequences.get_mut(&id) {
                seq.phase = Phase::Prefilling;
            }
            self.add_chunk(id, budget, false, draft);
        }
    }

    /// Whether the blocks of the whole sequence so far are free, beside what prompts under way
    /// still need and the reserve. Alone it may always come.
    fn may_admit(&self, id: SequenceId) -> bool {
        if self.running.is_empty() {
            return true;
        }
        let needed: u32 = std::iter::once(&id)
            .chain(self.running.values())
            .filter_map(|id| self.sequences.get(id))
            .filter(|s| s.phase != Phase::Decoding)
            .map(|s| self.kv.blocks_for(s.len()) - self.kv.table(s.id).len() as u32)
            .sum();
        let reserve = policy::admission_reserve(self.kv.total(), self.running.len() as u32);
        self.kv.can_allocate(needed + reserve)
    }

    fn add_chunk(&mut self, id: SequenceId, budget: u32, may_preempt: bool, draft: &mut Draft) {
        let Some(seq) = self.sequences.get(&id) else { return };
        let (count, _) = seq.next_row(budget);
        if count == 0 {
            return;
        }
        let issued = seq.issued;
        let covered = self.kv.table(id).len() as u32 + self.kv.free_blocks();
        let room = covered.saturating_mul(self.kv.block_size()).saturating_sub(issued);
        let mut count = count.min(room);
        if count == 0 && may_preempt && self.make_room(id, issued + 1, draft) == Room::Granted {
            count = 1;
        }
        if count > 0 {
            self.issue(id, count, draft);
        }
    }

    /// Prompt tokens that still fit into the micro-batch.
    fn prefill_budget(&self, draft: &Draft) -> u32 {
        let chunk = self.config.prefill_chunk - draft.prefill_tokens;
        chunk.min(self.config.max_batch_tokens - draft.tokens.len() as u32)
    }

    /// Whether some prompt could use a place in the micro-batch.
    fn prefill_waits(&self) -> bool {
        !self.waiting.is_empty()
            || self
                .running
                .values()
                .filter_map(|id| self.sequences.get(id))
                .any(|s| s.phase == Phase::Prefilling && s.remaining() > 0)
    }

    /// Sees to it that `id` can cover positions up to `end`, at the cost of younger sequences that
    /// have no row in this micro-batch.
    fn make_room(&mut self, id: SequenceId, end: u32, draft: &mut Draft) -> Room {
        let Some(order) = self.sequences.get(&id).map(|s| s.order) else { return Room::None };
        let held = self.kv.table(id).len() as u32;
        let missing = self.kv.blocks_for(end).saturating_sub(held);
        while !self.kv.can_allocate(missing) {
            let younger =
                || self.running.range(order + 1..).filter_map(|(_, id)| self.sequences.get(id));
            let candidates = younger().filter(|s| !draft.has(s.id)).map(Candidate::from);
            match policy::victim(candidates) {
                Some(victim) => self.preempt_in(victim, draft),
                None if younger().next().is_some() => return Room::Later,
                None => return Room::None,
            }
        }
        Room::Granted
    }

    fn preempt_in(&mut self, id: SequenceId, draft: &mut Draft) {
        draft.preempted = true;
        self.preempt(id);
    }

    /// Puts the next `count` positions of a running sequence into the micro-batch; blocks for them
    /// are free.
    fn issue(&mut self, id: SequenceId, count: u32, draft: &mut Draft) {
        let Some(seq) = self.sequences.get_mut(&id) else { return };
        let first = self.kv.table(id).len() as u32;
        let added = self
            .kv
            .allocate(id, seq.issued + count)
            .expect("invariant: rows are issued after their blocks were found free");
        if !added.is_empty() {
            let blocks = added.iter().map(|b| b.0).collect();
            draft.meta.tables.push(TableUpdate { sequence: id, first, blocks });
        }
        if !std::mem::replace(&mut seq.opened, true) {
            draft.opens.push(id);
        }
        let (count, want) = seq.next_row(count);
        let span = seq.issued as usize..(seq.issued + count) as usize;
        draft.tokens.extend_from_slice(&seq.tokens[span]);
        draft.meta.rows.push(Row {
            sequence: id,
            sequence_epoch: seq.epoch,
            position: seq.issued,
            count,
            want,
        });
        seq.issued += count;
        seq.rows_in_flight += 1;
        if seq.phase == Phase::Prefilling {
            draft.prefill_tokens += count;
        }
        if want == Want::Sample {
            seq.phase = Phase::Decoding;
        }
    }
}
