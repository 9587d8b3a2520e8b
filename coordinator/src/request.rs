//! One client request on its way through the pipeline, from the coordinator's side: tokens in,
//! events out.
//!
//! Pure but for the bounded channels at its end, whose capacity covers every event the request can
//! ever produce: sending never waits, so a slow client cannot hold the scheduler. Stop decisions are
//! made here, before the next step is built.

mod choice;
mod embedding;
mod generation;
mod listeners;
mod replay;
#[cfg(test)]
pub(crate) mod tests;
mod transcript;

use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::{RequestId, SequenceId};
use millrace_shared::wire::rpc::{GenerateEvent, PositionScore};
use tokio::sync::{mpsc, oneshot};

use crate::journal::Journal;
use crate::spans::RequestSpan;
pub use embedding::{Embedding, Vectors};
pub use generation::{Generation, Verdict, play_again};
pub(crate) use replay::Replay;
pub use transcript::RulesDid;

/// Where a request's events go.
pub type EventSender = mpsc::Sender<Result<GenerateEvent, Status>>;

/// Events that `choices` of `max_tokens` each can produce: started, tokens, an end each or an error.
pub fn event_capacity(max_tokens: u32, choices: u32) -> usize {
    (max_tokens as usize + 1) * choices as usize + 2
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
    /// Vectors.
    Embed(Box<Embedding>),
}

/// Chunks of a prompt that were sent to the stages.
#[derive(Clone, Copy, Debug)]
pub struct Chunks {
    choice: u32,
    sent: u32,
    /// Where the last one ends.
    end: u32,
    /// Positions of the last one.
    last: u32,
}

impl Chunks {
    /// Which chunk was sent last, and about how many there will be for so many tokens.
    pub fn of(&self, tokens: u32) -> (u32, u32) {
        (self.sent, self.sent + tokens.saturating_sub(self.end).div_ceil(self.last.max(1)))
    }
}

/// A request that the scheduler knows.
#[derive(Debug)]
pub struct Request {
    /// As the client names it.
    pub id: RequestId,
    /// As the pipeline names what is still computed of it: each choice once.
    pub sequences: Vec<(SequenceId, u32)>,
    /// How far the prompts of its choices are, of those that were begun.
    pub chunks: Vec<Chunks>,
    /// What it wants.
    pub work: Work,
    /// What is told of it in a trace.
    pub span: Option<RequestSpan>,
    /// When it came, on the scheduler's clock.
    pub submitted: Duration,
    /// How long before that it was submitted to an earlier life of the coordinator.
    pub before: Duration,
    /// When it must be over, on the scheduler's clock.
    pub deadline: Option<Duration>,
}

impl Request {
    /// Time since the client asked.
    pub fn age(&self, now: Duration) -> Duration {
        self.before + now.saturating_sub(self.submitted)
    }

    /// A part of a choice's prompt goes to the stages. One that begins anew begins at the front.
    pub fn on_chunk(&mut self, choice: u32, position: u32, count: u32) {
        let new = Chunks { choice, sent: 1, end: position + count, last: count };
        match self.chunks.iter_mut().find(|c| c.choice == choice) {
            Some(chunks) if position >= chunks.end => {
                *chunks = Chunks { sent: chunks.sent + 1, ..new };
            }
            Some(chunks) => *chunks = new,
            None => self.chunks.push(new),
        }
    }

    /// How far a choice's prompt is.
    pub fn chunks(&self, choice: u32) -> Option<Chunks> {
        self.chunks.iter().find(|c| c.choice == choice).copied()
    }

    /// Marks the end of a choice's time in the queue, and how many tokens of the prompt were in the
    /// prefix cache when it was first computed.
    pub fn on_scheduled(&mut self, choice: u32, now: Duration, cached: u32) {
        let age = self.age(now);
        if let Work::Generate(g) = &mut self.work {
            g.on_scheduled(choice, age, cached);
        }
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_abandoned(&mut self, now: Duration) -> bool {
        match &mut self.work {
            Work::Generate(g) => g.is_abandoned(now),
            Work::Score(s) => s.reply.as_ref().is_none_or(oneshot::Sender::is_closed),
            Work::Embed(e) => e.is_abandoned(),
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
    pub fn fail(&mut self, status: Status, journal: &Journal) {
        match &mut self.work {
            Work::Generate(g) => g.fail(&status, journal),
            Work::Embed(e) => e.fail(status),
            Work::Score(s) => {
                if let Some(reply) = s.reply.take() {
                    let _ = reply.send(Err(status));
                }
            }
        }
    }

    /// Ends the request as cancelled by its client.
    pub fn cancelled(&mut self, journal: &Journal) {
        match &mut self.work {
            Work::Generate(g) => g.cancel(journal),
            Work::Score(_) | Work::Embed(_) => {
                let status = Status::new(ErrorCode::Cancelled, "cancelled by the client");
                self.fail(status, journal);
            }
        }
    }
}
