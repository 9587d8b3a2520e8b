//! Building a micro-batch: decodes first, then chunks of prompts.

use std::time::Duration;

use super::Scheduler;
use super::cost::Load;
use super::draft;
use super::policy::{self, Candidate};
use super::sequence::Phase;
use super::types::{Kind, Step};
use crate::id::SequenceId;
use crate::wire::data::{MAX_EMBEDDINGS, Row, StepMeta, TableUpdate, Want};

/// How much longer than its time a micro-batch may take for the sake of the least chunk.
const STRETCH: f64 = 1.05;

/// A micro-batch under construction.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) meta: StepMeta,
    pub(super) tokens: Vec<u32>,
    opens: Vec<SequenceId>,
    /// What it asks of the stages so far.
    pub(super) load: Load,
    pub(super) preempted: bool,
    /// Nothing else can run: nobody waits for blocks that another one computes.
    pub(super) impatient: bool,
    /// The even share of the decodes, in rows of usual length.
    cohort: f64,
    /// What of it is taken.
    taken: f64,
}

impl Draft {
    fn has(&self, id: SequenceId) -> bool {
        self.meta.rows.iter().any(|r| r.sequence == id)
    }

    fn is_empty(&self) -> bool {
        self.meta.rows.is_empty()
    }

    /// Whether it has as many embeddings as it may.
    pub(super) fn is_full_of_embeddings(&self) -> bool {
        let embeds = |row: &&Row| matches!(row.want, Want::Embed { .. });
        self.meta.rows.iter().filter(embeds).count() >= MAX_EMBEDDINGS
    }
}

/// Whether blocks were found for a row.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Yes.
    Granted,
    /// Not now: juniors in this very micro-batch hold them.
    Later,
    /// Only seniors hold blocks.
    None,
}

/// How many micro-batches may be in flight, and how long one may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) slots: u32,
    /// Seconds at the slowest stage; `None` where nothing is known or asked for.
    pub(super) seconds: Option<f64>,
    /// For so many prompt tokens it may take longer,
    pub(super) floor: u32,
    /// by this factor.
    pub(super) stretch: f64,
}

impl Scheduler {
    /// While answers are under way, prompts may stretch the round of the decodes, as it would be
    /// without them, by `itl_factor`: by taking longer micro-batches and by taking the slots that
    /// few decodes leave empty. Else chunks take equal time, however much context they read.
    pub(super) fn pace(&self) -> Pace {
        let slots = self.window.size();
        let policy = &self.config.policy;
        if !policy.timed_chunks || !self.cost.is_ready() || !self.prompt_waits() {
            return Pace { slots, seconds: None, floor: 0, stretch: 1.0 };
        }
        let decoding = self.decoding();
        if decoding == 0 {
            // With the head's row: a prompt that is as long as a chunk is one chunk.
            let chunk = Load::default().with_prompt(0, self.config.prefill_chunk, 1);
            let floor = self.config.prefill_chunk.div_ceil(2);
            let seconds = Some(self.cost.bottleneck(&chunk));
            return Pace { slots, seconds, floor, stretch: f64::INFINITY };
        }
        let readers = f64::from(decoding) + self.future_readers();
        let readers = readers.min(f64::from(self.config.max_num_seqs));
        let rows = (readers / f64::from(slots)).max(1.0);
        let (alone, sum) = self.even_share(rows);
        let through = sum + self.window.link().as_secs_f64();
        let full = readers.min(f64::from(slots));
        let round = policy.itl_factor * through.max(alone * full);
        let fit = (round / alone.max(1e-9)).min(f64::from(slots)) as u32;
        let slots = fit.max(full as u32).max(1);
        let seconds = (policy.itl_factor * alone).min(round / f64::from(slots));
        Pace { slots, seconds: Some(seconds), floor: policy.min_prefill, stretch: STRETCH }
    }

    /// What waits or is in its prompt, as readers: decodes that are about to be. Were they not counted,
    /// a stream of short requests would never get more than a few of them to decode at once.
    fn future_readers(&self) -> f64 {
        let under_way = self.prefilling.values().filter_map(|id| self.sequences.get(id));
        self.queue.readers() + under_way.map(policy::future_reader).sum::<f64>()
    }

    /// Seconds at the slowest stage, and at all of them, of so many decodes and nothing else.
    fn even_share(&self, rows: f64) -> (f64, f64) {
        let usual = u64::from(self.usual_context());
        let of = |rows: u32| -> (f64, f64) {
            let context = u64::from(rows) * usual;
            let load = Load { decode_rows: rows, prefill_tokens: 0, context, head_rows: rows };
            (self.cost.bottleneck(&load), self.cost.sum(&load))
        };
        let (low, high) = (of(rows.floor() as u32), of(rows.ceil() as u32));
        let part = rows.fract();
        (low.0 + part * (high.0 - low.0), low.1 + part * (high.1 - low.1))
    }

    /// Positions of a sequence that decodes, on average.
    fn usual_context(&self) -> u32 {
        let decoding = self.running.len() - self.prefilling.len();
        (self.decode_context / (decoding as u64).max(1)) as u32
    }

    pub(super) fn build_step(&mut self, pace: Pace, now: Duration) -> Option<Step> {
        let mut draft = Draft { cohort: self.cohort(), ..Draft::default() };
        let all = self.config.max_batch_tokens;
        self.add_decodes(
            policy::decode_limit(&self.config, self.prompt_waits(), self.turn),
            &mut draft,
        );
        self.add_prompts(pace, &mut draft);
        // What was kept for prompts and is of no use to them.
        self.add_decodes(all, &mut draft);
        if draft.is_empty() && self.in_flight.len() == 0 && !self.prefilling.is_empty() {
            draft.impatient = true;
            self.add_prompts(pace, &mut draft);
        }
        let idle = self.in_flight.len() == 0;
        if draft.is_empty() && (self.released.is_empty() || !idle) {
            return None;
        }
        draft.meta.released = std::mem::take(&mut self.released);
        let id = self.in_flight.next_id();
        if !draft.is_empty() {
            self.turn = self.turn.wrapping_add(1);
            self.prompt_turn =
                self.prompt_turn.wrapping_add(u32::from(draft.load.prefill_tokens > 0));
            self.reserve.on_micro_batch();
            let short = self.ready.is_empty();
            self.carry = if short { 0.0 } else { (draft.cohort - draft.taken).clamp(-1.0, 1.0) };
            self.in_flight.insert(id, now, &draft.meta.rows, draft.load);
        }
        Some(Step { id, meta: draft.meta, tokens: draft.tokens, opens: draft.opens })
    }

    /// A micro-batch of guesses for a slot that is idle: nobody has anything certain to compute.
    pub(super) fn build_ahead(&mut self, slots: u32, now: Duration) -> Option<Step> {
        // One is left for whoever comes now.
        let most = slots.min(self.config.max_in_flight.saturating_sub(1)) as usize;
        let idle = self.in_flight.len() < most && self.ready.is_empty();
        // A single stage is never idle while a row is under way.
        if !idle || !self.may_guess() || self.cost.stages().len() == 1 {
            return None;
        }
        let mut draft = Draft::default();
        let running: Vec<SequenceId> = self.running.values().copied().collect();
        running.into_iter().for_each(|id| self.add_ahead(id, &mut draft));
        if draft.is_empty() {
            return None;
        }
        draft.meta.released = std::mem::take(&mut self.released);
        let id = self.in_flight.next_id();
        self.in_flight.insert(id, now, &draft.meta.rows, draft.load);
        Some(Step { id, meta: draft.meta, tokens: draft.tokens, opens: draft.opens })
    }

    /// What may follow the rows of a decode that are under way.
    fn add_ahead(&mut self, id: SequenceId, draft: &mut Draft) {
        let Some(seq) = self.sequences.get(&id) else { return };
        let follows =
            seq.phase == Phase::Decoding && seq.rows_in_flight > 0 && seq.kind != Kind::Constrained;
        if !follows || seq.issued < seq.len() || seq.no_guess == seq.issued {
            return;
        }
        let likely = seq.acceptance.ahead(seq.ahead.len() as u32);
        // The last token is never fed back.
        let left = seq.max_len.saturating_sub(seq.issued + 1);
        // A block for each of those that are certain stays free.
        let free = self.kv.free_blocks().saturating_sub(self.running.len() as u32);
        let held = self.kv.table(id).len() as u32 + free;
        let room = held.saturating_mul(self.kv.block_size()).saturating_sub(seq.issued);
        let tokens = self.config.max_batch_tokens.saturating_sub(draft.tokens.len() as u32);
        let most = likely.min(left).min(room).min(tokens) as usize;
        if most == 0 {
            return;
        }
        let so_far = [&seq.tokens[..], &seq.ahead].concat();
        let mut guesses = self.drafter.draft(id, &so_far, most);
        guesses.truncate(most);
        if guesses.is_empty() {
            if let Some(seq) = self.sequences.get_mut(&id) {
                seq.no_guess = seq.issued;
            }
            return;
        }
        let (position, count) = (seq.issued, guesses.len() as u32);
        self.cover(id, position + count, draft);
        let Some(seq) = self.sequences.get_mut(&id) else { return };
        draft.tokens.extend_from_slice(&guesses);
        draft.meta.drafts.extend_from_slice(&guesses);
        let (sequence_epoch, want) = (seq.epoch, Want::Follow);
        draft.meta.rows.push(Row { sequence: id, sequence_epoch, position, count, want });
        draft.load = draft.load.with_prompt(position, count, count);
        seq.ahead.extend(guesses);
        seq.issued += count;
        seq.rows_in_flight += 1;
        seq.last_row = self.in_flight.last_id() + 1;
    }

    /// Whether guesses may be computed: no prompt waits, and there are no more than a few streams.
    fn may_guess(&self) -> bool {
        let few = self.decoding() <= self.window.size() * draft::FEW_STREAMS;
        self.config.policy.speculate && few && !self.prompt_waits()
    }

    /// The even share of the decodes in one micro-batch, in rows; what the last one left over goes
    /// to the next.
    fn cohort(&self) -> f64 {
        if !self.config.policy.cohorts {
            return f64::INFINITY;
        }
        // A millionth against rounding, or three thirds would be less than one.
        f64::from(self.decoding()) / f64::from(self.window.size()) + self.carry + 1e-6
    }

    /// What a decode of `len` positions costs, in rows of usual length: those with a long past take
    /// a larger part of the cohort.
    fn row_share(&self, len: u32) -> f64 {
        if !self.cost.is_ready() {
            return 1.0;
        }
        let usual = self.usual_context();
        let rows = self.decoding().div_ceil(self.window.size()).max(1);
        let one = Load::default().with_decode(usual);
        let stage = self.cost.slowest(&one);
        let base = stage.fixed / f64::from(rows) + stage.decode_row + stage.head_row;
        let cost = |len: u32| base + stage.context * f64::from(len);
        let share = cost(len) / cost(usual);
        if share.is_finite() { share.clamp(0.5, 4.0) } else { 1.0 }
    }

    /// Decodes, those that became ready first, until the cohort is full or the micro-batch has
    /// `limit` tokens; at least one.
    fn add_decodes(&mut self, limit: u32, draft: &mut Draft) {
        let mut later = Vec::new();
        while (draft.tokens.len() as u32) < limit {
            let Some(&id) = self.ready.front() else { break };
            let Some(len) = self.sequences.get(&id).map(|s| s.issued + 1) else {
                self.ready.pop_front();
                continue;
            };
            let share = self.row_share(len);
            if draft.taken > 0.0 && draft.taken + share > draft.cohort {
                break;
            }
            self.ready.pop_front();
            debug_assert_eq!(self.phase(id), Some(Phase::Decoding), "only decoding ones are ready");
            match self.make_room(id, len, draft) {
                Room::Granted => {
                    draft.taken += share;
                    let drafts = self.drafts(id, limit, draft);
                    self.issue(id, 1, &drafts, draft);
                }
                Room::Later => later.push(id),
                Room::None => self.preempt_in(id, draft),
            }
        }
        for id in later.into_iter().rev() {
            // A junior among them may have been preempted for a senior since.
            if self.phase(id) == Some(Phase::Decoding) {
                self.ready.push_front(id);
            }
        }
    }

    /// Likely next tokens of a decode that is about to be issued, as many as pay: none where prompts
    /// wait, where there are more than a few streams, or where blocks are short.
    fn drafts(&mut self, id: SequenceId, limit: u32, draft: &Draft) -> Vec<u32> {
        if !self.may_guess() {
            return Vec::new();
        }
        let streams = self.decoding();
        let rows = streams.div_ceil(self.window.size());
        let Some(seq) = self.sequences.get_mut(&id).filter(|s| s.kind != Kind::Constrained) else {
            return Vec::new();
        };
        // The other rows of the cohort, those that are to come included.
        let to_come = rows.saturating_sub(1 + draft.meta.rows.len() as u32);
        let plain = (0..to_come).fold(draft.load, |load, _| load.with_decode(seq.issued));
        let cost = &self.cost;
        let time = |drafts: u32| match drafts {
            0 => cost.sum(&plain.with_decode(seq.issued)),
            n => cost.sum(&plain.with_prompt(seq.issued, n + 1, n + 1)),
        };
        let guess = |drafts: u32| draft::usual_time(rows + drafts);
        let ready = cost.is_ready();
        let pays = seq.acceptance.length(rows, |n| if ready { time(n) } else { guess(n) });
        // The row gives one token more than it has drafts.
        let left = seq.max_len.saturating_sub(seq.len() + 1);
        let held = self.kv.table(id).len() as u32 + self.kv.free_blocks();
        let room = held.saturating_mul(self.kv.block_size()).saturating_sub(seq.issued + 1);
        let tokens = limit.saturating_sub(draft.tokens.len() as u32 + rows);
        let most = pays.min(left).min(room).min(tokens) as usize;
        if most == 0 {
            return Vec::new();
        }
        let mut drafts = self.drafter.draft(id, &seq.tokens, most);
        drafts.truncate(most);
        drafts
    }

    /// Sees to it that `id` can cover positions up to `end`, at the cost of juniors that have no
    /// row in this micro-batch.
    pub(super) fn make_room(&mut self, id: SequenceId, end: u32, draft: &mut Draft) -> Room {
        let Some(order) = self.sequences.get(&id).map(|s| s.order) else { return Room::None };
        let held = self.kv.table(id).len() as u32;
        let missing = self.kv.blocks_for(end).saturating_sub(held);
        while !self.kv.can_allocate(missing) {
            let juniors =
                || self.running.range(order + 1..).filter_map(|(_, id)| self.sequences.get(id));
            let candidates = juniors().filter(|s| !draft.has(s.id)).map(Candidate::from);
            match policy::victim(candidates) {
                Some(victim) => self.preempt_in(victim, draft),
                None if juniors().next().is_some() => return Room::Later,
                None => return Room::None,
            }
        }
        Room::Granted
    }

    fn preempt_in(&mut self, id: SequenceId, draft: &mut Draft) {
        draft.preempted = true;
        self.preempt(id);
    }

    /// Gives a running sequence blocks up to position `end`, which are free, and tells the stages.
    fn cover(&mut self, id: SequenceId, end: u32, draft: &mut Draft) {
        let Some(seq) = self.sequences.get_mut(&id) else { return };
        self.kv
            .allocate(id, end)
            .expect("invariant: rows are issued after their blocks were found free");
        let (first, table) = (seq.sent, self.kv.table(id));
        if first < table.len() as u32 {
            let blocks = table[first as usize..].iter().map(|b| b.0).collect();
            draft.meta.tables.push(TableUpdate { sequence: id, first, blocks });
            seq.sent = table.len() as u32;
        }
    }

    /// Puts the next `count` positions of a running sequence into the micro-batch; blocks for them
    /// are free. `drafts` may follow the last position of an answer, in the same row.
    pub(super) fn issue(&mut self, id: SequenceId, count: u32, drafts: &[u32], draft: &mut Draft) {
        let Some(end) = self.sequences.get(&id).map(|s| s.issued + count + drafts.len() as u32)
        else {
            return;
        };
        self.cover(id, end, draft);
        let Some(seq) = self.sequences.get_mut(&id) else { return };
        if !std::mem::replace(&mut seq.opened, true) {
            draft.opens.push(id);
        }
        let (mut count, mut want) = seq.next_row(count);
        let span = seq.issued as usize..(seq.issued + count) as usize;
        draft.tokens.extend_from_slice(&seq.tokens[span]);
        let (prompt, generated) = seq.charge(seq.issued + count);
        if !drafts.is_empty() {
            draft.tokens.extend_from_slice(drafts);
            draft.meta.drafts.extend_from_slice(drafts);
            count += drafts.len() as u32;
            want = Want::Verify;
            seq.ahead.extend_from_slice(drafts);
        }
        draft.meta.rows.push(Row {
            sequence: id,
            sequence_epoch: seq.epoch,
            position: seq.issued,
            count,
            want,
        });
        let head = match want {
            Want::None | Want::Sum | Want::Embed { .. } => 0,
            Want::Sample => 1,
            Want::Score { .. } | Want::Verify | Want::Follow => count,
        };
        draft.load = match seq.phase {
            Phase::Decoding if count == 1 => draft.load.with_decode(seq.issued),
            _ => draft.load.with_prompt(seq.issued, count, head),
        };
        seq.issued += count;
        seq.rows_in_flight += 1;
        seq.last_row = self.in_flight.last_id() + 1;
        if want == Want::Sample {
            seq.phase = Phase::Decoding;
            if self.prefilling.remove(&seq.order).is_some() {
                self.decode_context += u64::from(seq.len());
            }
            if seq.left() == 1 {
                seq.closing = true;
                self.closing += 1;
            }
        }
        self.queue.charge(seq.flow, prompt, generated);
    }
}
