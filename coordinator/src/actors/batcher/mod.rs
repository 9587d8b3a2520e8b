//! Drives the scheduler of one pipeline.
//!
//! States: *down* (no pipeline: submissions are refused with `UNAVAILABLE` and a hint), *up* (one
//! epoch of one pipeline), *switching* (the next epoch is connected: nothing more is issued in this
//! one, and when the last result is in, the next begins) and *suspended* (the pipeline was lost and
//! forms again: requests wait, new ones too, each for at most the recovery time). Every new epoch
//! computes the sequences anew from their tokens; clients see a pause. Requests of an earlier life
//! of the coordinator wait from its start on, as after a loss. Inbox: `Submit*`, `Attach`, `Cancel`,
//! `PipelineUp`, `PipelineDown`, `ResultFrame`, `GetCounters`. Held by the service (APIs) and by
//! [`super::Cluster`].

mod doubt;
mod early;
mod embeddings;
mod epochs;
mod inbox;
mod kept;
mod masks;
mod pace;
mod requests;
mod submit;
mod whereabouts;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::{Epoch, MicroBatchId, PipelineId, RequestId, SequenceId};
use millrace_shared::membership::{Balance, LinkTimes, Paces, Stalls};
use millrace_shared::model::Dtype;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::scheduler::{Outcome, Scheduler, SchedulerStats, Step};
use millrace_shared::wire::data::{FrameHeader, FrameKind, OpenMeta, SequenceOpen};
use millrace_shared::wire::frame::{Frame, FrameMeta};
use millrace_shared::wire::rpc::TokenLogprobs;
use millrace_shared::wire::stamp::Stamp;
use tokio::sync::mpsc;

use super::cluster::{Cluster, RowsVoid};
use crate::journal::{Entry, Journal, Retained};
use crate::metrics::{Metrics, Shed};
use crate::request::{Request, Verdict, Work};
use crate::text::Tokenizer;
pub use doubt::{NodeDied, StepVerdict};
pub use early::Enter;
pub use embeddings::SubmitEmbed;
pub use epochs::{PipelineDown, PipelineUp};
pub use inbox::{Attach, Cancel, Forget, GetCounters, Knows, ResultFrame, Submit, SubmitScore};
use submit::retry_ms;
pub use whereabouts::{Flight, Look, Seen};

/// Deadlines and vanished clients are looked for this often: well under what a person notices.
const SWEEP: Duration = Duration::from_millis(25);
/// Stages hear what is void this often at most: many clients may leave at once.
const VOID_PAUSE: Duration = Duration::from_millis(4);
/// Hint to clients when no pipeline is up: a lost node is noticed and replaced in a few seconds.
pub const RETRY_PIPELINE_MS: u32 = 2000;
/// Hint when the queue is full: about the time a short answer takes.
const RETRY_QUEUE_MS: u32 = 1000;

/// An epoch in which requests can run.
struct Active {
    pipeline: PipelineId,
    epoch: Epoch,
    lease: Duration,
    /// Tokens that the model knows, how wide it is, and the number of the stage that chooses them.
    vocabulary: u32,
    hidden: u32,
    last_stage: u16,
    /// Names of the stages' nodes, in order.
    nodes: Vec<String>,
    links: LinkTimes,
    /// To the first stage; capacity covers every micro-batch in flight.
    steps: mpsc::Sender<Frame>,
    /// To the last stage.
    opens: mpsc::Sender<Frame>,
    /// Ends the epoch, tells the stages, and hears how they do.
    cluster: Addr<Cluster>,
    balance: Balance,
    paces: Paces,
    /// An edge is lost: nothing more is sent, and `PipelineDown` is on its way.
    broken: bool,
    /// Number of the epoch's first micro-batch.
    first: Option<u64>,
}

/// Why a micro-batch was not sent.
enum IssueError {
    /// The epoch is over.
    EdgeLost,
    /// The frame exceeds the limits of the wire.
    Frame(String),
}

/// See the module's documentation.
pub struct Batcher {
    started: Instant,
    tokenizer: Arc<Tokenizer>,
    metrics: Arc<Metrics>,
    /// From the first epoch on; idle while nothing is up.
    scheduler: Option<Scheduler>,
    active: Option<Active>,
    /// The epoch that begins when the present one has no micro-batch in flight.
    next: Option<PipelineUp>,
    /// Since when requests wait for a pipeline.
    suspended: Option<Duration>,
    /// How long they may.
    recovery: Duration,
    /// Why nothing is up.
    detail: String,
    requests: requests::Requests,
    next_sequence: u64,
    stale_frames: u64,
    /// When the stages last heard what is void.
    told_void: Duration,
    /// Whether micro-batches come back.
    stalls: Stalls,
    /// Requests whose steps failed.
    doubts: doubt::Doubts,
    /// Known from the first epoch on.
    cluster: Option<Addr<Cluster>>,
    journal: Journal,
    /// What the journal's requests are of.
    model: [u8; 32],
    /// Ended requests.
    retained: Retained,
    /// Of an earlier life, until there is a scheduler.
    resumed: Vec<SequenceId>,
    /// Before there is a scheduler.
    early: Vec<early::Early>,
    /// Requests were left to the next life.
    leaving: bool,
    /// What constrained answers may go on with.
    masks: masks::Masks,
    /// When the log last said how much is done.
    told: pace::Told,
    /// The batcher's own; there while it runs.
    own: Option<Addr<Batcher>>,
}

impl std::fmt::Debug for Batcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batcher").field("requests", &self.requests.len()).finish_non_exhaustive()
    }
}

impl Batcher {
    /// A batcher that waits for a pipeline. Requests outlive the loss of one for `recovery`; those
    /// that the journal holds of an earlier life go on.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        metrics: Arc<Metrics>,
        recovery: Duration,
        (journal, model, entries): (Journal, [u8; 32], Vec<Entry>),
    ) -> Self {
        let retained = journal.retained();
        let mut batcher = Self {
            started: Instant::now(),
            tokenizer,
            metrics,
            scheduler: None,
            active: None,
            next: None,
            suspended: None,
            recovery,
            detail: "the cluster is starting".into(),
            requests: requests::Requests::default(),
            next_sequence: 1,
            stale_frames: 0,
            told_void: Duration::ZERO,
            stalls: Stalls::default(),
            doubts: doubt::Doubts::default(),
            cluster: None,
            journal,
            model,
            retained,
            resumed: Vec::new(),
            early: Vec::new(),
            leaving: false,
            masks: masks::Masks::default(),
            told: pace::Told::default(),
            own: None,
        };
        batcher.restore(entries);
        batcher
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Tells the stages which rows nobody wants any more, and sends every micro-batch the scheduler
    /// has ready.
    fn pump(&mut self) {
        let now = self.now();
        self.tell_void(now);
        self.begin_next(now);
        // What was computed and not written waits in memory, so a slow disk slows the pipeline.
        let goes_on = !self.journal.is_behind();
        while goes_on && self.next.is_none() && self.active.as_ref().is_some_and(|a| !a.broken) {
            let Some(scheduler) = &mut self.scheduler else { return };
            let Some(step) = scheduler.poll_step(now) else { return };
            match self.issue(&step, now) {
                Ok(()) => {}
                // Requests end when the cluster says so, and why.
                Err(IssueError::EdgeLost) => self.break_off(),
                Err(IssueError::Frame(message)) => {
                    tracing::warn!(micro_batch = %step.id, %message, "a micro-batch was not sent");
                    let Some(scheduler) = self.scheduler.as_mut() else { return };
                    let outcomes = scheduler.handle_step_failed(step.id, &message);
                    self.apply(outcomes, now);
                }
            }
        }
    }

    /// Now and then: where nobody hears it in time, rows are computed in vain, no more.
    fn tell_void(&mut self, now: Duration) {
        if now.saturating_sub(self.told_void) < VOID_PAUSE {
            return;
        }
        let rows = self.scheduler.as_mut().map(Scheduler::poll_void).unwrap_or_default();
        if !rows.is_empty() {
            self.told_void = now;
        }
        if let Some(active) = self.active.as_ref().filter(|_| !rows.is_empty()) {
            let _ = active.cluster.try_send(RowsVoid { epoch: active.epoch, rows });
        }
    }

    fn issue(&mut self, step: &Step, now: Duration) -> Result<(), IssueError> {
        for id in &step.opens {
            let cached = self.scheduler.as_ref().map_or(0, |s| s.cached_tokens(*id));
            if let Some((request, choice)) = self.requests.of_mut(*id) {
                request.on_scheduled(choice, now, cached);
            }
        }
        // What is no decode, and few rows: chunks of prompts.
        for row in step.meta.rows.iter().filter(|row| row.count > 1) {
            if let Some((request, choice)) = self.requests.of_mut(row.sequence) {
                request.on_chunk(choice, row.position, row.count);
            }
        }
        if let Some(active) = &mut self.active {
            active.first.get_or_insert(step.id.0);
        }
        let (Some(active), Some(scheduler)) = (&self.active, &self.scheduler) else {
            return Ok(());
        };
        let send = |channel: &mpsc::Sender<Frame>, frame: Frame| {
            channel.try_send(frame).map_err(|_| IssueError::EdgeLost)
        };
        if !step.opens.is_empty() {
            let opens = step.opens.iter().filter_map(|id| self.open(scheduler, *id));
            let meta = OpenMeta { opens: opens.collect() };
            let frame = frame(active, FrameKind::Sequences, MicroBatchId(0), &meta, &[])
                .map_err(IssueError::Frame)?;
            send(&active.opens, frame)?;
        }
        let frame = frame(active, FrameKind::Step, step.id, &step.meta, &step.tokens)
            .map_err(IssueError::Frame)?;
        send(&active.steps, frame)?;
        self.send_masks_of(&step.meta)
    }

    fn open(&self, scheduler: &Scheduler, id: SequenceId) -> Option<SequenceOpen> {
        let (tokens, prompt_len) = scheduler.tokens(id)?;
        let (request, choice) = self.requests.of(id)?;
        let (mut params, seed) = match &request.work {
            Work::Generate(g) => (g.params(), g.seed(choice)),
            Work::Score(_) | Work::Embed(_) => (SamplingParams::greedy(), 0),
        };
        let constrained = params.grammar.take().is_some();
        Some(SequenceOpen {
            sequence: id,
            tokens: tokens.to_vec(),
            prompt_len: prompt_len as u32,
            params,
            seed,
            constrained,
        })
    }

    fn apply(&mut self, outcomes: Vec<Outcome>, now: Duration) {
        let mut doubted: BTreeMap<(u16, bool), Vec<SequenceId>> = BTreeMap::new();
        for outcome in outcomes {
            match outcome {
                Outcome::PrefillDone { .. } => {}
                Outcome::Token { sequence, index, token, logprobs, last } => {
                    self.on_token(sequence, (index, token, last), logprobs, now);
                }
                Outcome::Scores { sequence, scores, last } => {
                    if let Some((request, _)) = self.requests.of_mut(sequence) {
                        request.on_scores(scores, last);
                        if last {
                            self.forget(sequence);
                        }
                    }
                }
                Outcome::Embedding { sequence, vector } => {
                    self.on_embedding(sequence, vector, now);
                }
                Outcome::Shed { sequence, retry_after } => {
                    if let Some(request) = self.forget(sequence) {
                        self.metrics.on_shed(Shed::Deadline);
                        let status = Status::exhausted(
                            "the queue is too long for the request's deadline; try again later or \
                             allow more time",
                            retry_ms(retry_after),
                        );
                        self.fail(request, status);
                    }
                }
                Outcome::Failed { sequence, failure, alone } => {
                    if let Some(stage) = self.doubt(sequence, &failure) {
                        doubted.entry((stage, alone)).or_default().push(sequence);
                    } else if let Some(request) = self.forget(sequence) {
                        self.fail(request, Status::internal(failure.message));
                    }
                }
            }
        }
        for ((stage, alone), sequences) in doubted {
            self.ask_verdict(stage, alone, &sequences);
        }
    }

    fn on_token(
        &mut self,
        sequence: SequenceId,
        (index, token, last): (u32, u32, bool),
        logprobs: Option<TokenLogprobs>,
        now: Duration,
    ) {
        self.note_fared(sequence, false);
        let Some((request, choice)) = self.requests.of_mut(sequence) else { return };
        let (id, since) = (request.id, request.age(now));
        let Work::Generate(generation) = &mut request.work else { return };
        match generation.last_token(choice) {
            Some(previous) => self.metrics.on_token(since.saturating_sub(previous)),
            None => {
                let queue = generation.queue_time(choice).unwrap_or_default();
                self.metrics.on_first_token(queue, since);
            }
        }
        let verdict =
            generation.on_token(choice, (index, token, last), logprobs, since, &self.journal);
        let (more, done) = (generation.take_promise(), generation.is_done());
        let abandoned = verdict == Verdict::Continue && generation.is_abandoned(now);
        let position = generation.head().prompt.len() as u32 + index;
        if let Some(more) = more {
            self.promise(more);
        }
        match verdict {
            Verdict::Continue if abandoned => self.abandon(id),
            Verdict::Continue => self.advance_mask(sequence, position, token),
            Verdict::Finished(reason) if done => {
                self.metrics.on_finished(reason, since);
                let (request_id, reason) = (self.metrics.names().label(id), reason.as_str());
                tracing::debug!(request_id, reason, seconds = since.as_secs_f64(), "finished");
                if let Some(request) = self.end(id) {
                    self.put_away(request);
                }
            }
            Verdict::Finished(_) => self.end_choice(sequence),
        }
    }

    /// Nobody wants it any more.
    fn abandon(&mut self, id: RequestId) {
        let Some(request) = self.end(id) else { return };
        self.fail(request, Status::new(ErrorCode::Cancelled, "nobody listened any more"));
    }

    /// Ends a request that the scheduler does not know any more with an error.
    fn fail(&mut self, mut request: Request, status: Status) {
        self.metrics.on_failed(status.code);
        let request_id = self.metrics.names().label(request.id);
        tracing::info!(request_id, code = ?status.code, "failed: {}", status.message);
        request.fail(status, &self.journal);
        self.put_away(request);
    }

    /// Ends a request everywhere: the scheduler frees the blocks of its choices, the stages forget
    /// them.
    fn end(&mut self, id: RequestId) -> Option<Request> {
        let request = self.requests.remove(id)?;
        for &(sequence, _) in &request.sequences {
            self.end_sequence(sequence);
        }
        Some(request)
    }

    /// Ends the request of a sequence: without one of its choices there is no answer.
    fn forget(&mut self, sequence: SequenceId) -> Option<Request> {
        self.note_fared(sequence, true);
        let id = self.requests.of(sequence)?.0.id;
        self.end(id)
    }

    /// Ends one choice of a request that goes on.
    fn end_choice(&mut self, sequence: SequenceId) {
        self.requests.end(sequence);
        self.end_sequence(sequence);
    }

    /// Ends a sequence for all that know it besides its request.
    fn end_sequence(&mut self, sequence: SequenceId) {
        self.note_fared(sequence, true);
        self.end_masks(sequence);
        if let Some(scheduler) = self.scheduler.as_mut() {
            scheduler.handle_finish(sequence);
        }
    }

    fn sweep(&mut self) {
        let now = self.now();
        let (mut abandoned, mut late) = (Vec::new(), Vec::new());
        for request in self.requests.iter_mut() {
            if request.is_abandoned(now) {
                abandoned.push(request.id);
            } else if request.deadline.is_some_and(|d| d <= now) {
                late.push(request.id);
            }
        }
        abandoned.into_iter().for_each(|id| self.abandon(id));
        for id in late {
            let Some(request) = self.end(id) else { continue };
            let code = ErrorCode::DeadlineExceeded;
            self.fail(request, Status::new(code, "the request's deadline passed"));
        }
        self.tidy();
        if let Some(scheduler) = self.scheduler.as_mut().filter(|_| self.active.is_some()) {
            let shed = scheduler.poll_shed(now);
            self.apply(shed, now);
        }
        self.begin_waiting_texts();
        self.check_suspended(now);
        self.check_stall(now);
        self.pump();
    }

    fn register(&mut self, request: Request) {
        let request_id = self.metrics.names().label(request.id);
        tracing::debug!(request_id, choices = request.sequences.len(), "submitted");
        self.requests.insert(request);
        self.pump();
    }

    fn stats(&self) -> SchedulerStats {
        let mut stats = self.scheduler.as_ref().map(Scheduler::stats).unwrap_or_default();
        stats.stale_dropped += self.stale_frames;
        stats
    }
}

fn frame<M: FrameMeta>(
    active: &Active,
    kind: FrameKind,
    micro_batch: MicroBatchId,
    meta: &M,
    tokens: &[u32],
) -> Result<Frame, String> {
    let header = FrameHeader {
        kind,
        dtype: Dtype::U32,
        pipeline: active.pipeline,
        epoch: active.epoch,
        micro_batch,
        rows: tokens.len() as u32,
        meta_len: 0,
        payload_len: 0,
        crc: 0,
        ready: Stamp::NONE,
    };
    let mut frame = Frame::build(header, meta, tokens.len() * 4).map_err(|e| e.to_string())?;
    for (bytes, token) in frame.payload_mut().chunks_exact_mut(4).zip(tokens) {
        bytes.copy_from_slice(&token.to_le_bytes());
    }
    Ok(frame.seal())
}

impl Actor for Batcher {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // A result per micro-batch in flight, submissions and cancellations of every API task.
        ctx.set_mailbox_capacity(1024);
        self.own = Some(ctx.address());
        self.restore_masks();
        ctx.run_interval(SWEEP, |actor, _| actor.sweep());
        ctx.run_interval(pace::EVERY, |actor, _| actor.tell_pace());
    }
}
