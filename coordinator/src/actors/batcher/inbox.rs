//! What others say to [`Batcher`].

use std::time::Duration;

use actix::prelude::*;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::{MicroBatchId, RequestId};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::scheduler::{Kind, SchedulerStats};
use millrace_shared::wire::data::{Failure, FrameKind, ResultMeta, RowResult};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::rpc::{AttachRequest, Choices, PositionScore};
use tokio::sync::oneshot;

use super::{Active, Batcher};
use crate::request::{Generation, Request, Scoring, Work};
use crate::service::{Caller, EventStream, unknown_request};
use crate::spans::RequestSpan;
use crate::text::rules::AnswerRules;
use crate::text::{CallForm, Matcher};

/// A continuation to produce. The prompt is tokenised, the parameters are validated.
#[derive(Debug, Message)]
#[rtype(result = "Result<EventStream, Status>")]
pub struct Submit {
    /// Name of the request.
    pub id: RequestId,
    /// Prompt ids.
    pub tokens: Vec<u32>,
    /// Parameters.
    pub params: SamplingParams,
    /// How many continuations.
    pub choices: Choices,
    /// The state of the grammar, where there is one.
    pub matcher: Option<Matcher>,
    /// What the answer is read for, where there are tools.
    pub calls: Option<CallForm>,
    /// The seed, given or drawn.
    pub seed: u64,
    /// Whether the prompt is a conversation, rather than a text to go on with.
    pub chat: bool,
    /// Who asks.
    pub caller: Caller,
    /// BLAKE3 of the request as it was asked.
    pub digest: [u8; 32],
    /// What is done to the answers.
    pub rules: Option<AnswerRules>,
    /// Tokens of the prompt that were left out because it was too long.
    pub left_out: u32,
    /// Whether the prompt is not what was sent.
    pub altered: bool,
}

impl Handler<Submit> for Batcher {
    type Result = Result<EventStream, Status>;

    fn handle(&mut self, m: Submit, _: &mut Context<Self>) -> Self::Result {
        self.refuse_while_leaving()?;
        if let Some(known) = self.submitted_before(&m) {
            return known;
        }
        if m.caller.again {
            let message = "the request ended as it was sent again: send it once more";
            return Err(Status::unavailable(message, 0));
        }
        let Some(scheduler) = &self.scheduler else { return Err(self.unavailable()) };
        let room = scheduler.max_sequence_len().saturating_sub(m.tokens.len() as u32).max(1);
        let max_new = m.params.max_tokens.unwrap_or(room).min(room);
        let head = self.head_of(m.id, &m, max_new);
        let first = Generation::first_bytes(&head);
        self.check_room(first)?;
        let counts = (max_new, head.choices);
        let last = (m.tokens.len() as u32).saturating_sub(1);
        let kind = if m.matcher.is_some() { Kind::Constrained } else { Kind::Generate };
        let sequences = self.submit(m.tokens, kind, counts, &m.caller)?;
        self.promise(first);
        if let (Some(matcher), Some(own)) = (m.matcher, &self.own) {
            for &(sequence, _) in &sequences {
                self.masks.begin(sequence, last, matcher.fresh(), own);
            }
        }
        let now = self.now();
        let mut generation = Generation::new(head, &self.tokenizer, &self.journal);
        let stream = generation.listen(Vec::new(), false, &self.journal)?;
        let span = self.metrics.spans().begin(m.caller.trace.as_ref(), &generation);
        self.register(Request {
            id: m.id,
            span,
            sequences,
            chunks: Vec::new(),
            work: Work::Generate(Box::new(generation)),
            submitted: now,
            before: Duration::ZERO,
            deadline: m.caller.deadline.map(|d| now + d),
        });
        Ok(stream)
    }
}

/// Is there a request of this id that its caller would hear, rather than begin?
#[derive(Debug, Message)]
#[rtype(result = "bool")]
pub struct Knows {
    /// Its name.
    pub id: RequestId,
    /// Who asks.
    pub caller: Caller,
}

impl Handler<Knows> for Batcher {
    type Result = bool;

    fn handle(&mut self, m: Knows, _: &mut Context<Self>) -> bool {
        self.client_of(m.id) == Some(m.caller.client) && !self.is_tried_again(m.id)
    }
}

impl Batcher {
    /// Who submitted a request that runs or is kept.
    fn client_of(&self, id: RequestId) -> Option<u64> {
        self.head_of_known(id).map(|head| head.client)
    }
}

/// Refuses a request of somebody else, and one that is not there, by the same words.
fn check_own(id: RequestId, client: Option<u64>, caller: &Caller) -> Result<(), Status> {
    let ours = client.is_some_and(|client| caller.owns(client));
    ours.then_some(()).ok_or_else(|| unknown_request(id))
}

/// Hear a request that was submitted before.
#[derive(Debug, Message)]
#[rtype(result = "Result<EventStream, Status>")]
pub struct Attach {
    /// Which, from where.
    pub request: AttachRequest,
    /// Who asks.
    pub caller: Caller,
}

impl Handler<Attach> for Batcher {
    type Result = Result<EventStream, Status>;

    fn handle(&mut self, m: Attach, _: &mut Context<Self>) -> Self::Result {
        self.refuse_while_leaving()?;
        let id = m.request.request_id;
        check_own(id, self.client_of(id), &m.caller)?;
        // Who has heard something was here before.
        let returns = m.request.next.iter().any(|&next| next > 0);
        self.attach(id, m.request.next, returns)
    }
}

/// Tokens to score.
#[derive(Debug, Message)]
#[rtype(result = "Result<oneshot::Receiver<Result<Vec<PositionScore>, Status>>, Status>")]
pub struct SubmitScore {
    /// Name of the request.
    pub id: RequestId,
    /// Ids.
    pub tokens: Vec<u32>,
    /// Largest logits per position.
    pub top_k: u8,
    /// Who asks.
    pub caller: Caller,
}

impl Handler<SubmitScore> for Batcher {
    type Result = Result<oneshot::Receiver<Result<Vec<PositionScore>, Status>>, Status>;

    fn handle(&mut self, m: SubmitScore, _: &mut Context<Self>) -> Self::Result {
        let kind = Kind::Score { top_k: m.top_k };
        let sequences = self.submit(m.tokens, kind, (1, 1), &m.caller)?;
        let (reply, receiver) = oneshot::channel();
        let now = self.now();
        self.register(Request {
            id: m.id,
            span: None,
            sequences,
            chunks: Vec::new(),
            work: Work::Score(Scoring::new(reply)),
            submitted: now,
            before: Duration::ZERO,
            deadline: m.caller.deadline.map(|d| now + d),
        });
        Ok(receiver)
    }
}

/// Stop a request.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), Status>")]
pub struct Cancel {
    /// Which.
    pub request_id: RequestId,
    /// Who asks.
    pub caller: Caller,
}

impl Handler<Cancel> for Batcher {
    type Result = Result<(), Status>;

    fn handle(&mut self, m: Cancel, _: &mut Context<Self>) -> Self::Result {
        if self.cancel_early(&m) {
            return Ok(());
        }
        let id = m.request_id;
        let embeds = match self.requests.named(id).map(|r| &r.work) {
            Some(Work::Embed(work)) => Some(work.caller.client),
            _ => None,
        };
        check_own(id, self.client_of(id).or(embeds), &m.caller)?;
        let mut request = self.end(id).ok_or_else(|| {
            Status::new(ErrorCode::NotFound, format!("no request {id} is running or waiting"))
        })?;
        self.metrics.on_failed(ErrorCode::Cancelled);
        request.cancelled(&self.journal);
        self.put_away(request);
        self.pump();
        Ok(())
    }
}

/// Forget a request, and stop it where it runs.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), Status>")]
pub struct Forget(pub Cancel);

impl Handler<Forget> for Batcher {
    type Result = Result<(), Status>;

    fn handle(&mut self, Forget(m): Forget, context: &mut Context<Self>) -> Self::Result {
        let id = m.request_id;
        check_own(id, self.client_of(id), &m.caller)?;
        if self.requests.named(id).is_some() {
            self.handle(m, context)?;
        }
        self.erase_ended(id);
        Ok(())
    }
}

/// A frame from the last stage.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), String>")]
pub struct ResultFrame(pub Frame);

impl Handler<ResultFrame> for Batcher {
    type Result = Result<(), String>;

    fn handle(&mut self, ResultFrame(frame): ResultFrame, _: &mut Context<Self>) -> Self::Result {
        let now = self.now();
        let header = frame.header();
        let ours = |a: &Active| a.pipeline == header.pipeline && a.epoch == header.epoch;
        let Some(scheduler) =
            self.scheduler.as_mut().filter(|_| self.active.as_ref().is_some_and(ours))
        else {
            self.stale_frames += 1;
            return Ok(());
        };
        if header.kind != FrameKind::Results {
            return Err(format!("a {:?} frame on the results edge", header.kind));
        }
        let mut meta: ResultMeta = frame.meta().map_err(|e| e.to_string())?;
        let model = self.active.as_ref().map_or((0, 0), |a| (a.vocabulary, a.hidden));
        let last_stage = self.active.as_ref().map_or(0, |a| a.last_stage);
        if let Err(what) = meta.validate(model.0, model.1) {
            // Whatever sends this is sick, or lies: nothing of it is taken, and others are to try.
            let message = format!("the last stage answered nonsense: {what}");
            tracing::error!("{message}");
            meta.fail_all(&Failure::of_stage(last_stage, message));
        }
        self.stalls.handle_answer(now);
        let predicted = scheduler.predicted_seconds(header.micro_batch);
        if scheduler.handle_times(header.micro_batch, &meta.times, now) {
            self.watch(&meta, now);
        }
        let Some(scheduler) = &mut self.scheduler else { return Ok(()) };
        let outcomes = scheduler.handle_result(header.micro_batch, &meta.rows, now);
        let stats = scheduler.stats();
        self.metrics.on_micro_batch(&meta.times, &predicted, &stats);
        let round_trip = stats.round_trip.as_secs_f64();
        self.metrics.timeline().push(header.micro_batch.0, &meta, round_trip);
        self.trace(header.micro_batch, &meta, stats.round_trip);
        tracing::trace!(
            micro_batch = %header.micro_batch,
            at = now.as_secs_f64(),
            rows = meta.rows.len(),
            positions = meta.rows.iter().map(|r| r.count).sum::<u32>(),
            round_trip,
            ?predicted,
            times = ?meta.times,
            window = stats.window,
            in_flight = stats.in_flight,
            "a micro-batch came back"
        );
        self.apply(outcomes, now);
        self.pump();
        Ok(())
    }
}

impl Batcher {
    /// Tells traces of a micro-batch that came back.
    fn trace(&self, id: MicroBatchId, meta: &ResultMeta, round_trip: Duration) {
        let spans = self.metrics.spans();
        if !spans.are_made() {
            return;
        }
        let of = |row: &RowResult| self.requests.of(row.sequence)?.0.span.as_ref();
        let mut all: Vec<&RequestSpan> = meta.rows.iter().filter_map(of).collect();
        // Choices of one request follow each other.
        all.dedup_by(|a, b| std::ptr::eq(*a, *b));
        let nodes = self.active.as_ref().map_or(&[][..], |a| &a.nodes);
        spans.step((id.0, round_trip), &all, &meta.times, nodes);
    }
}

/// The scheduler's counters.
#[derive(Debug, Message)]
#[rtype(result = "SchedulerStats")]
pub struct GetCounters;

impl Handler<GetCounters> for Batcher {
    type Result = MessageResult<GetCounters>;

    fn handle(&mut self, _: GetCounters, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.stats())
    }
}
