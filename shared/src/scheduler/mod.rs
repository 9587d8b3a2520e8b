//! The scheduler: decides, at every free slot of the pipeline, what the next micro-batch computes.
//!
//! Continuous batching over a pipeline of stages with several micro-batches in flight, as many as
//! measurements ask for: a cohort of decodes, so sized that decodes spread evenly over the slots,
//! plus prefill chunks as long as their predicted time allows ([`cost`]); clients take turns. A pure
//! state machine in the style of quinn-proto: `handle_*` in, `poll_*` out, time as an argument. It knows
//! nothing of text, sampling, stop strings or sockets; the owner ends sequences and carries steps.
//!
//! ```text
//!             submit                admit                  last chunk issued
//!   (nothing) ──────▶ Waiting ─────────────▶ Prefilling ───────────────────▶ Decoding
//!                        ▲                       │                              │  ▲
//!                        │    preempt: blocks    │                     row ────▶│  │ token
//!                        └───── freed, epoch+1 ──┴──────────────────────────────┘──┘
//!   Waiting, never admitted: deadline out of reach (shed) ──▶ (nothing)
//!   any state: finish, cancel, failed row, own limit ──▶ (nothing), id goes into `released`
//! ```
//!
//! Invariants: at most one row that samples is outstanding per sequence, beside rows that hold
//! nothing but guesses of what follows it; chunks of a sequence are
//! issued in order, and stages run frames in issue order, so freed blocks may be reused at once; at
//! most `max_in_flight` micro-batches with rows are out, and those of guesses only where slots are
//! idle; what a sequence generates depends on its
//! tokens alone, never on batching, chunking or preemption; the most senior running sequence can
//! always take blocks from juniors, and alone it fits, so something always moves.

mod alone;
mod batch;
pub mod cost;
pub mod draft;
mod fair;
mod pipeline;
mod policy;
mod prefix;
mod prompts;
mod results;
mod sequence;
mod shed;
mod types;
mod whereabouts;
mod window;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

pub use types::{
    Kind, NewSequence, Outcome, Policy, Priority, Rejected, SchedulerConfig, SchedulerStats, Step,
};
pub use whereabouts::{Place, Whereabouts};

use crate::id::{MicroBatchId, SequenceId};
use crate::kv::KvBlockManager;
use crate::wire::MAX_VOID_ROWS;
use crate::wire::control::VoidRows;
use cost::{CostModel, StageCost};
use draft::{Drafter, NgramDrafter};
use fair::FairQueue;
use pipeline::InFlight;
use policy::Reserve;
use prefix::Prefixes;
use sequence::{Phase, Sequence};
use window::Window;

/// Most positions of a row that scores; the wire format's limit.
const MAX_SCORE_POSITIONS: u32 = 64;
/// Most logits per scored position; the wire format's limit.
const MAX_TOP_LOGITS: u8 = 64;

/// See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    kv: KvBlockManager,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Not admitted, or preempted.
    queue: FairQueue,
    /// Admitted, by seniority.
    running: BTreeMap<u64, SequenceId>,
    /// Those of them whose prompt is not all issued (or scored).
    prefilling: BTreeMap<u64, SequenceId>,
    /// Decoding and without a row in flight, the one that became so first at the front.
    ready: VecDeque<SequenceId>,
    in_flight: InFlight,
    /// To be computed one after the other, with nobody beside them: see `alone`.
    alone: BTreeSet<SequenceId>,
    /// Ended sequences that stages still have tables of.
    released: Vec<SequenceId>,
    /// Rows in flight that nobody wants any more.
    void: Vec<VoidRows>,
    next_arrival: u64,
    next_order: u64,
    /// Micro-batches with rows that were built; alternates where there is room for one token.
    turn: u32,
    /// Those of them with prompts: short prompts have every other one.
    prompt_turn: u32,
    /// What the last cohort of decodes took less than its share, in rows.
    carry: f64,
    /// Tokens of running sequences past their prompt.
    decode_context: u64,
    /// Running sequences whose last row is in flight.
    closing: u32,
    /// Tokens that running sequences may still generate.
    outstanding: u64,
    reserve: Reserve,
    cost: CostModel,
    window: Window,
    prefixes: Prefixes,
    drafter: Box<dyn Drafter>,
    drafted: u64,
    drafts_accepted: u64,
    shed: u64,
    preemptions: u64,
    stale_dropped: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
    round_trip: Duration,
}

impl Scheduler {
    /// A scheduler with nothing to do. Limits of zero count as one.
    pub fn new(config: SchedulerConfig) -> Self {
        let config = config.at_least_one();
        Self {
            config,
            kv: KvBlockManager::new(config.num_blocks, config.block_size),
            sequences: BTreeMap::new(),
            queue: FairQueue::default(),
            running: BTreeMap::new(),
            prefilling: BTreeMap::new(),
            ready: VecDeque::new(),
            in_flight: InFlight::default(),
            alone: BTreeSet::new(),
            released: Vec::new(),
            void: Vec::new(),
            next_arrival: 0,
            next_order: 0,
            turn: 0,
            prompt_turn: 0,
            carry: 0.0,
            decode_context: 0,
            closing: 0,
            outstanding: 0,
            reserve: Reserve::default(),
            cost: CostModel::default(),
            window: Window::new(config.max_in_flight, config.policy.measured_from),
            prefixes: Prefixes::default(),
            drafter: Box::new(NgramDrafter),
            drafted: 0,
            drafts_accepted: 0,
            shed: 0,
            preemptions: 0,
            stale_dropped: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
            round_trip: Duration::ZERO,
        }
    }

    /// Tells what the plan knows of the time of each stage, before anything is measured.
    pub fn set_prior(&mut self, stages: &[StageCost]) {
        self.cost = CostModel::new(stages);
    }

    /// Takes drafts from somebody else than [`NgramDrafter`].
    pub fn set_drafter(&mut self, drafter: Box<dyn Drafter>) {
        self.drafter = drafter;
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// If the queue is full, or the sequence could never run: empty, too long for the model or for
    /// the KV cache, nothing to generate, too many logits asked for, id in use; or if its deadline
    /// would pass in the queue.
    pub fn handle_submit(&mut self, new: NewSequence) -> Result<(), Rejected> {
        policy::check(&self.config, &self.kv, &new)?;
        if self.sequences.contains_key(&new.id) {
            return Err(Rejected::Duplicate { id: new.id });
        }
        if !self.has_room() {
            return Err(Rejected::QueueFull { limit: self.config.max_waiting });
        }
        self.check_deadline(&new)?;
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        let seq = Sequence::new(new, arrival, self.config.max_model_len);
        let id = seq.id;
        let reader = policy::future_reader(&seq);
        self.queue.push(seq.flow, arrival, id, seq.len(), reader);
        self.sequences.insert(id, seq);
        self.name_blocks(id);
        Ok(())
    }

    /// Takes a sequence up that generated `generated` in an earlier life of the owner: it is computed
    /// anew from all its tokens, and indices go on. Limits on the queue and deadlines are not looked
    /// at: it was admitted once.
    ///
    /// # Errors
    /// If it could never run, has nothing left to generate, or its id is in use.
    pub fn handle_resume(&mut self, new: NewSequence, generated: &[u32]) -> Result<(), Rejected> {
        policy::check(&self.config, &self.kv, &new)?;
        if self.sequences.contains_key(&new.id) {
            return Err(Rejected::Duplicate { id: new.id });
        }
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        let mut seq = Sequence::new(new, arrival, self.config.max_model_len);
        seq.tokens.extend_from_slice(generated);
        if seq.kind.generates() && seq.is_complete() {
            return Err(Rejected::NothingToGenerate);
        }
        let id = seq.id;
        let reader = policy::future_reader(&seq);
        self.queue.push(seq.flow, arrival, id, seq.len(), reader);
        self.sequences.insert(id, seq);
        self.name_blocks(id);
        Ok(())
    }

    /// The client gave up: blocks are free at once, later results are dropped as stale. Unknown ids
    /// are ignored.
    pub fn handle_cancel(&mut self, id: SequenceId) {
        self.remove(id);
    }

    /// The owner has all it wants of the sequence (end token, stop string, length). Unknown ids are
    /// ignored: sequences that reached their own limit are gone already.
    pub fn handle_finish(&mut self, id: SequenceId) {
        self.remove(id);
    }

    /// An epoch ended and another begins, perhaps with other limits: what was in flight is void, the
    /// cache is empty, and every sequence is computed anew from its tokens, in the order of age.
    /// Returns those that the new limits have no room for, which are forgotten. Until the new epoch
    /// serves, the owner does not poll.
    pub fn handle_epoch(&mut self, config: SchedulerConfig) -> Vec<(SequenceId, Rejected)> {
        self.config = config.at_least_one();
        self.kv = KvBlockManager::new(self.config.num_blocks, self.config.block_size);
        self.window = Window::new(self.config.max_in_flight, self.config.policy.measured_from);
        self.cost = CostModel::default();
        self.in_flight.clear();
        self.released.clear();
        self.void.clear();
        self.ready.clear();
        self.running.clear();
        self.prefilling.clear();
        self.decode_context = 0;
        self.closing = 0;
        self.outstanding = 0;
        self.prefixes.clear();
        let mut refused = Vec::new();
        for seq in self.sequences.values_mut() {
            seq.contents.clear();
            if seq.phase != Phase::Waiting {
                self.queue.push_preempted(seq.order, seq.id);
            }
            seq.restart();
            seq.opened = false;
            if let Err(e) = policy::check_room(&self.kv, seq.max_len) {
                refused.push((seq.id, e));
            }
        }
        for (id, _) in &refused {
            self.remove(*id);
        }
        let left: Vec<SequenceId> = self.sequences.keys().copied().collect();
        left.into_iter().for_each(|id| self.name_blocks(id));
        refused
    }

    /// The next micro-batch to send, if a slot is free and something can run. Call until `None`
    /// after every `handle_*`.
    pub fn poll_step(&mut self, now: Duration) -> Option<Step> {
        if self.in_flight.len() >= self.config.max_in_flight as usize {
            return None;
        }
        if !self.make_way() {
            return None;
        }
        let pace = self.pace();
        let certain = match self.in_flight.certain() < pace.slots as usize {
            true => self.build_step(pace, now),
            false => None,
        };
        certain.or_else(|| self.build_ahead(pace.slots, now))
    }

    /// Rows in flight that became void since the last call: their sequence was cancelled, ended or
    /// preempted. Stages may leave them out; a result that is missing then means nothing.
    pub fn poll_void(&mut self) -> Vec<VoidRows> {
        std::mem::take(&mut self.void)
    }

    /// Prompt and generated tokens of a sequence, and how many of them are the prompt.
    pub fn tokens(&self, id: SequenceId) -> Option<(&[u32], usize)> {
        self.sequences.get(&id).map(|s| (s.tokens.as_slice(), s.prompt_len as usize))
    }

    /// The longest prompt and answer together that [`Self::handle_submit`] accepts, tokens.
    pub fn max_sequence_len(&self) -> u32 {
        let cached = self.config.num_blocks.saturating_mul(self.config.block_size);
        self.config.max_model_len.min(cached)
    }

    /// Whether another sequence may wait.
    pub fn has_room(&self) -> bool {
        self.queue.len() < self.config.max_waiting as usize
    }

    /// The micro-batch that has been out longest, and when it was issued.
    pub fn oldest_in_flight(&self) -> Option<(MicroBatchId, Duration)> {
        self.in_flight.oldest()
    }

    /// How many positions a micro-batch in flight has.
    pub fn positions(&self, id: MicroBatchId) -> u32 {
        self.in_flight.rows(id).iter().map(|row| row.count).sum()
    }

    /// When the sequence that has waited longest for its first row was submitted.
    pub fn oldest_waiting(&self) -> Option<Duration> {
        let waiting = self.queue.ids().filter_map(|id| self.sequences.get(&id));
        waiting.map(|s| s.submitted).min()
    }

    /// What each stage costs, as fitted from measurements; empty until something is known.
    pub fn stage_costs(&self) -> &[StageCost] {
        self.cost.stages()
    }

    /// Usual seconds of each stage's step; empty until something is measured.
    pub fn stage_seconds(&self) -> Vec<f64> {
        self.window.stages().collect()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            running: self.running.len() as u32,
            waiting: self.queue.len() as u32,
            in_flight: self.in_flight.len() as u32,
            blocks_used: self.kv.used(),
            blocks: self.kv.total(),
            preemptions: self.preemptions,
            stale_dropped: self.stale_dropped,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            round_trip: self.round_trip,
            shed: self.shed,
            prefix_query_tokens: self.prefixes.queried,
            prefix_hit_tokens: self.prefixes.hits,
            draft_tokens: self.drafted,
            draft_tokens_accepted: self.drafts_accepted,
            window: self.window.size(),
            link: self.window.link(),
        }
    }

    /// Forgets a sequence: its blocks are free, and stages that know it are told.
    fn remove(&mut self, id: SequenceId) {
        let Some(seq) = self.sequences.remove(&id) else { return };
        if seq.phase == Phase::Waiting {
            let _ =
                self.queue.take_preempted(seq.order, id) || self.queue.take(seq.flow, seq.arrival);
        } else {
            self.stop_running(&seq);
        }
        self.queue.leave(seq.flow);
        self.kv.free(id);
        self.drafter.forget(id);
        self.alone.remove(&id);
        if seq.opened {
            self.released.push(id);
        }
    }

    /// Takes the blocks of a running sequence; it will be computed anew.
    fn preempt(&mut self, id: SequenceId) {
        let Some(mut seq) = self.sequences.remove(&id) else { return };
        self.stop_running(&seq);
        seq.restart();
        self.queue.push_preempted(seq.order, id);
        self.sequences.insert(id, seq);
        self.kv.free(id);
        self.preemptions += 1;
        self.reserve.on_preemption();
    }

    fn stop_running(&mut self, seq: &Sequence) {
        if seq.rows_in_flight > 0 && self.void.len() < MAX_VOID_ROWS {
            self.void.push(VoidRows { sequence: seq.id, epoch: seq.epoch });
        }
        self.prefixes.take_back(seq);
        self.running.remove(&seq.order);
        self.prefilling.remove(&seq.order);
        self.outstanding = self.outstanding.saturating_sub(seq.left().into());
        self.closing -= u32::from(seq.closing);
        if seq.phase == Phase::Decoding {
            self.decode_context = self.decode_context.saturating_sub(seq.len().into());
        }
        if seq.phase == Phase::Decoding && seq.rows_in_flight == 0 {
            self.ready.retain(|&r| r != seq.id);
        }
    }

    /// Sequences that will decode further rows: neither in their prompt nor with their last row out,
    /// so that a burst of requests for a single token is not throttled for the sake of readers.
    fn decoding(&self) -> u32 {
        (self.running.len() - self.prefilling.len()) as u32 - self.closing
    }

    fn phase(&self, id: SequenceId) -> Option<Phase> {
        self.sequences.get(&id).map(|s| s.phase)
    }
}
