//! One client request on its way through the pipeline, from the coordinator's side: tokens in,
//! events out.
//!
//! Pure but for the bounded channel at its end, whose capacity covers every event the request can
//! ever produce: sending never waits, so a slow client cannot hold the scheduler. Stop decisions are
//! made here, before the next step is built.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use millrace_shared::error::Status;
use millrace_shared::id::{RequestId, SequenceId};
use millrace_shared::sampling::{SamplingParams, StopMatcher};
use millrace_shared::wire::rpc::{
    FinishReason, GenerateEvent, PositionScore, Timings, TokenLogprobs, Usage,
};
use tokio::sync::{mpsc, oneshot};

use crate::text::{Detokenizer, Tokenizer};

/// Where a request's events go.
pub type EventSender = mpsc::Sender<Result<GenerateEvent, Status>>;

/// Events a continuation of `max_tokens` can produce: started, tokens, finished or an error.
pub fn event_capacity(max_tokens: u32) -> usize {
    max_tokens as usize + 3
}

/// A continuation being produced.
#[derive(Debug)]
pub struct Generation {
    params: SamplingParams,
    events: EventSender,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    end_ids: HashSet<u32>,
    prompt_tokens: u32,
    cached_tokens: u32,
    produced: u32,
    queue: Option<Duration>,
    first_token: Option<Duration>,
    last_token: Option<Duration>,
}

/// What a token means for the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Continue,
    /// It is complete; the finishing event has been sent.
    Finished(FinishReason),
    /// Nobody listens any more.
    Gone,
}

impl Generation {
    /// Starts a continuation of `prompt_tokens` tokens.
    pub fn new(
        params: SamplingParams,
        events: EventSender,
        tokenizer: &Arc<Tokenizer>,
        prompt_tokens: u32,
    ) -> Self {
        let mut end_ids: HashSet<u32> = params.stop_token_ids.iter().copied().collect();
        if !params.ignore_eos {
            end_ids.extend(tokenizer.eos_ids());
        }
        Self {
            stop: StopMatcher::new(&params.stop),
            detokenizer: Detokenizer::new(Arc::clone(tokenizer)),
            params,
            events,
            end_ids,
            prompt_tokens,
            cached_tokens: 0,
            produced: 0,
            queue: None,
            first_token: None,
            last_token: None,
        }
    }

    /// The tokens go on with the prompt's text rather than answer it.
    #[must_use]
    pub fn continuing(mut self) -> Self {
        self.detokenizer = self.detokenizer.continuing();
        self
    }

    /// The parameters, for the last stage.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Takes a token. `now` counts from submission; `last` says that the limits allow no more.
    pub fn on_token(
        &mut self,
        index: u32,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        last: bool,
        now: Duration,
    ) -> Verdict {
        self.produced = index + 1;
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        let ended = self.end_ids.contains(&token);
        let (text, stopped) = if ended {
            (String::new(), false)
        } else {
            let piece = self.detokenizer.push(token);
            let outcome = self.stop.push(&piece);
            (outcome.emit, outcome.stopped)
        };
        let event = GenerateEvent::Token { index, token_id: token, text, logprobs };
        if self.events.try_send(Ok(event)).is_err() {
            return Verdict::Gone;
        }
        let reason = match (ended || stopped, last) {
            (true, _) => FinishReason::Stop,
            (false, true) => FinishReason::Length,
            (false, false) => return Verdict::Continue,
        };
        Verdict::Finished(self.finish(reason, stopped))
    }

    /// Sends the finishing event; `stopped`: a stop string matched, so nothing is held back. Returns
    /// the reason: a stop string may become certain only now.
    fn finish(&mut self, reason: FinishReason, stopped: bool) -> FinishReason {
        let (text, reason) = if stopped {
            (String::new(), reason)
        } else {
            let end = self.stop.end(&self.detokenizer.finish());
            let length = reason == FinishReason::Length;
            (end.emit, if end.stopped && length { FinishReason::Stop } else { reason })
        };
        let event = GenerateEvent::Finished {
            reason,
            text,
            usage: Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.produced,
                cached_tokens: self.cached_tokens,
            },
            timings: self.timings(),
        };
        // A receiver that is gone needs no farewell.
        let _ = self.events.try_send(Ok(event));
        reason
    }

    fn timings(&self) -> Timings {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        Timings {
            queue_ms: self.queue.map_or(0.0, ms),
            ttft_ms: self.first_token.map_or(0.0, ms),
            decode_ms: match (self.first_token, self.last_token) {
                (Some(first), Some(last)) => ms(last.saturating_sub(first)),
                _ => 0.0,
            },
        }
    }
}

/// A scoring in progress.
#[derive(Debug)]
pub struct Scoring {
    scores: Vec<PositionScore>,
    reply: Option<oneshot::Sender<Result<Vec<PositionScore>, Status>>>,
}

impl Scoring {
    /// Collects scores for `reply`.
    pub fn new(reply: oneshot::Sender<Result<Vec<PositionScore>, Status>>) -> Self {
        Self { scores: Vec::new(), reply: Some(reply) }
    }
}

/// What a request wants.
#[derive(Debug)]
pub enum Work {
    /// Tokens.
    Generate(Box<Generation>),
    /// Scores.
    Score(Scoring),
}

/// A request that the scheduler knows.
#[derive(Debug)]
pub struct Request {
    /// As the client names it.
    pub id: RequestId,
    /// As the pipeline names it.
    pub sequence: SequenceId,
    /// What it wants.
    pub work: Work,
    /// The random stream.
    pub seed: u64,
    /// When it came, on the scheduler's clock.
    pub submitted: Duration,
    /// When it must be over, on the scheduler's clock.
    pub deadline: Option<Duration>,
}

impl Request {
    /// Marks the end of the time in the queue.
    pub fn on_scheduled(&mut self, now: Duration) {
        if let Work::Generate(g) = &mut self.work {
            let submitted = self.submitted;
            g.queue.get_or_insert_with(|| now.saturating_sub(submitted));
        }
    }

    /// Notes how many tokens of the prompt were in the prefix cache when it was first computed.
    pub fn on_cached(&mut self, tokens: u32) {
        if let Work::Generate(g) = &mut self.work {
            g.cached_tokens = tokens.min(g.prompt_tokens);
        }
    }

    /// Time spent in the queue, once it is over.
    pub fn queue_time(&self) -> Option<Duration> {
        match &self.work {
            Work::Generate(g) => g.queue,
            Work::Score(_) => None,
        }
    }

    /// When the last token came, counted from submission.
    pub fn last_token(&self) -> Option<Duration> {
        match &self.work {
            Work::Generate(g) => g.last_token,
            Work::Score(_) => None,
        }
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_abandoned(&self) -> bool {
        match &self.work {
            Work::Generate(g) => g.events.is_closed(),
            Work::Score(s) => s.reply.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    /// Takes scores; `last` completes the request.
    pub fn on_scores(&mut self, scores: Vec<PositionScore>, last: bool) {
        if let Work::Score(s) = &mut self.work {
            s.scores.extend(scores);
            if let Some(reply) = s.reply.take_if(|_| last) {
                let _ = reply.send(Ok(std::mem::take(&mut s.scores)));
            }
        }
    }

    /// Ends the request with an error.
    pub fn fail(mut self, status: Status) {
        match &mut self.work {
            Work::Generate(g) => {
                let _ = g.events.try_send(Err(status));
            }
            Work::Score(s) => {
                if let Some(reply) = s.reply.take() {
                    let _ = reply.send(Err(status));
                }
            }
        }
    }

    /// Ends the request as cancelled by its client.
    pub fn cancelled(mut self) {
        match &mut self.work {
            Work::Generate(g) => {
                g.finish(FinishReason::Cancelled, false);
            }
            Work::Score(_) => self.fail(Status::new(
                millrace_shared::error::ErrorCode::Cancelled,
                "cancelled by the client",
            )),
        }
    }
}
