//! The scheduler: decides, at every free slot of the pipeline, what the next micro-batch computes.
//!
//! Continuous batching over a pipeline of stages with several micro-batches in flight: a cohort of
//! decodes, so sized that decodes spread evenly over the slots, plus prefill chunks. A pure state
//! machine in the style of quinn-proto: `handle_*` in, `poll_*` out, time as an argument. It knows
//! nothing of text, sampling, stop strings or sockets; the owner ends sequences and carries steps.
//!
//! ```text
//!             submit                admit                  last chunk issued
//!   (nothing) ──────▶ Waiting ─────────────▶ Prefilling ───────────────────▶ Decoding
//!                        ▲                       │                              │  ▲
//!                        │    preempt: blocks    │                     row ────▶│  │ token
//!                        └───── freed, epoch+1 ──┴──────────────────────────────┘──┘
//!   any state: finish, cancel, failed row, own limit ──▶ (nothing), id goes into `released`
//! ```
//!
//! Invariants: at most one row that samples is outstanding per sequence; chunks of a sequence are
//! issued in order, and stages run frames in issue order, so freed blocks may be reused at once; at
//! most `max_in_flight` micro-batches with rows are out; what a sequence generates depends on its
//! tokens alone, never on batching, chunking or preemption; the oldest running sequence can always
//! take blocks from younger ones, and alone it fits, so something always moves.

mod batch;
mod pipeline;
mod policy;
mod sequence;
mod types;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

pub use types::{Kind, NewSequence, Outcome, Rejected, SchedulerConfig, SchedulerStats, Step};

use crate::id::{MicroBatchId, SequenceId};
use crate::kv::KvBlockManager;
use crate::wire::data::{RowOutcome, RowResult, Want};
use pipeline::{InFlight, IssuedRow};
use sequence::{Phase, Sequence};

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
    /// Not admitted or preempted, by age: the front is next.
    waiting: BTreeMap<u64, SequenceId>,
    /// Admitted, by age.
    running: BTreeMap<u64, SequenceId>,
    /// Decoding and without a row in flight, the one that became so first at the front.
    ready: VecDeque<SequenceId>,
    in_flight: InFlight,
    /// Ended sequences that stages still have tables of.
    released: Vec<SequenceId>,
    next_order: u64,
    /// Spreads the remainder of decodes over slots: 0..max_in_flight.
    rotation: u32,
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
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            ready: VecDeque::new(),
            in_flight: InFlight::default(),
            released: Vec::new(),
            next_order: 0,
            rotation: 0,
            preemptions: 0,
            stale_dropped: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
            round_trip: Duration::ZERO,
        }
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// If the queue is full, or the sequence could never run: empty, too long for the model or for
    /// the KV cache, nothing to generate, too many logits asked for, id in use.
    pub fn handle_submit(&mut self, new: NewSequence) -> Result<(), Rejected> {
        policy::check(&self.config, &self.kv, &new)?;
        if self.sequences.contains_key(&new.id) {
            return Err(Rejected::Duplicate { id: new.id });
        }
        if self.waiting.len() >= self.config.max_waiting as usize {
            return Err(Rejected::QueueFull { limit: self.config.max_waiting });
        }
        let order = self.next_order;
        self.next_order += 1;
        self.waiting.insert(order, new.id);
        self.sequences.insert(new.id, Sequence::new(new, order, self.config.max_model_len));
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

    /// The last stage answered a micro-batch. Rows of sequences that ended or were preempted since
    /// are dropped and counted; rows that were issued but not answered fail their sequence.
    pub fn handle_result(
        &mut self,
        id: MicroBatchId,
        results: &[RowResult],
        now: Duration,
    ) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let Some((issued, rows)) = self.in_flight.take(id) else {
            self.stale_dropped += results.len() as u64;
            return outcomes;
        };
        self.round_trip = now.saturating_sub(issued);
        let mut results = results.iter();
        for row in rows {
            // In the order of the rows; what does not match is not ours.
            let result = results.by_ref().find(|r| row.is_answered_by(r));
            if !self.is_live(&row) {
                self.stale_dropped += 1;
                continue;
            }
            let outcome = match result {
                Some(result) => result.outcome.clone(),
                None => RowOutcome::Failed("the last stage sent no result for this row".into()),
            };
            self.apply(row, outcome, &mut outcomes);
        }
        outcomes
    }

    /// A stage could not compute the micro-batch: every sequence in it fails, for its KV is not
    /// what later rows need.
    pub fn handle_step_failed(&mut self, id: MicroBatchId, message: &str) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for row in self.in_flight.take(id).map_or_else(Vec::new, |(_, rows)| rows) {
            if self.is_live(&row) {
                self.fail(row.sequence, message.to_owned(), &mut outcomes);
            } else {
                self.stale_dropped += 1;
            }
        }
        outcomes
    }

    /// An epoch ended and another begins, perhaps with other limits: what was in flight is void, the
    /// cache is empty, and every sequence is computed anew from its tokens, in the order of age.
    /// Returns those that the new limits have no room for, which are forgotten. Until the new epoch
    /// serves, the owner does not poll.
    pub fn handle_epoch(&mut self, config: SchedulerConfig) -> Vec<(SequenceId, Rejected)> {
        self.config = config.at_least_one();
        self.kv = KvBlockManager::new(self.config.num_blocks, self.config.block_size);
        self.in_flight.clear();
        self.released.clear();
        self.ready.clear();
        self.running.clear();
        let mut refused = Vec::new();
        for seq in self.sequences.values_mut() {
            seq.restart();
            seq.opened = false;
            self.waiting.insert(seq.order, seq.id);
            if let Err(e) = policy::check_room(&self.kv, seq.max_len) {
                refused.push((seq.id, e));
            }
        }
        for (id, _) in &refused {
            self.remove(*id);
        }
        refused
    }

    /// The next micro-batch to send, if a slot is free and something can run. Call until `None`
    /// after every `handle_*`.
    pub fn poll_step(&mut self, now: Duration) -> Option<Step> {
        if self.in_flight.len() >= self.config.max_in_flight as usize {
            return None;
        }
        self.build_step(now)
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

    /// The micro-batch that has been out longest, and when it was issued.
    pub fn oldest_in_flight(&self) -> Option<(MicroBatchId, Duration)> {
        self.in_flight.oldest()
    }

    /// When the sequence that is next to be admitted was submitted.
    pub fn oldest_waiting(&self) -> Option<Duration> {
        let (_, id) = self.waiting.first_key_value()?;
        self.sequences.get(id).map(|s| s.submitted)
    }

    /// Counters and gauges.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            in_flight: self.in_flight.len() as u32,
            blocks_used: self.kv.used(),
            blocks: self.kv.total(),
            preemptions: self.preemptions,
            stale_dropped: self.stale_dropped,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            round_trip: self.round_trip,
        }
    }

    fn is_live(&self, row: &IssuedRow) -> bool {
        self.sequences.get(&row.sequence).is_some_and(|s| s.epoch == row.epoch)
    }

    /// Carries out what became of a live row.
    fn apply(&mut self, row: IssuedRow, outcome: RowOutcome, outcomes: &mut Vec<Outcome>) {
        let Some(seq) = self.sequences.get_mut(&row.sequence) else { return };
        seq.rows_in_flight -= 1;
        self.prompt_tokens += u64::from(seq.count_prompt(row.end()));
        match (row.want, outcome) {
            (_, RowOutcome::Failed(message)) => self.fail(row.sequence, message, outcomes),
            (Want::None, _) => {}
            (Want::Sample, RowOutcome::Token { token, logprobs }) => {
                if seq.finish_prefill() {
                    outcomes.push(Outcome::PrefillDone { sequence: row.sequence });
                }
                let index = seq.push(token);
                let last = seq.is_complete();
                self.generated_tokens += 1;
                outcomes.push(Outcome::Token {
                    sequence: row.sequence,
                    index,
                    token,
                    logprobs,
                    last,
                });
                if last {
                    self.remove(row.sequence);
                } else {
                    self.ready.push_back(row.sequence);
                }
            }
            (Want::Score { .. }, RowOutcome::Scores(scores)) => {
                seq.scored = row.end();
                let last = seq.scored as usize == seq.tokens.len();
                if last {
                    outcomes.push(Outcome::PrefillDone { sequence: row.sequence });
                }
                outcomes.push(Outcome::Scores { sequence: row.sequence, scores, last });
                if last {
                    self.remove(row.sequence);
                }
            }
            _ => {
                let message = "the last stage answered something that was not asked for".into();
                self.fail(row.sequence, message, outcomes);
            }
        }
    }

    fn fail(&mut self, sequence: SequenceId, message: String, outcomes: &mut Vec<Outcome>) {
        self.remove(sequence);
        outcomes.push(Outcome::Failed { sequence, message });
    }

    /// Forgets a sequence: its blocks are free, and stages that know it are told.
    fn remove(&mut self, id: SequenceId) {
        let Some(seq) = self.sequences.remove(&id) else { return };
        self.waiting.remove(&seq.order);
        self.running.remove(&seq.order);
        self.ready.retain(|&r| r != id);
        self.kv.free(id);
        if seq.opened {
            self.released.push(id);
        }
    }

    /// Takes the blocks of a running sequence; it will be computed anew.
    fn preempt(&mut self, id: SequenceId) {
        let Some(seq) = self.sequences.get_mut(&id) else { return };
        seq.restart();
        self.running.remove(&seq.order);
        self.waiting.insert(seq.order, id);
        self.ready.retain(|&r| r != id);
        self.kv.free(id);
        self.preemptions += 1;
    }

    fn phase(&self, id: SequenceId) -> Option<Phase> {
        self.sequences.get(&id).map(|s| s.phase)
    }
}
