//! Texts that become vectors: each goes to the scheduler as a sequence of its own, some at a time, and
//! in recovery, doubt and preemption it fares as a prompt does.

use std::time::Duration;

use actix::prelude::*;
use millrace_shared::error::Status;
use millrace_shared::id::{RequestId, SequenceId};
use millrace_shared::pooling::Pooling;
use millrace_shared::scheduler::{Kind, NewSequence};
use tokio::sync::oneshot;

use super::Batcher;
use crate::request::{Embedding, Request, Vectors, Work};
use crate::service::Caller;

/// Texts to make vectors of. They are tokenised, and none is empty.
#[derive(Debug, Message)]
#[rtype(result = "Result<oneshot::Receiver<Vectors>, Status>")]
pub struct SubmitEmbed {
    /// Name of the request.
    pub id: RequestId,
    /// Ids of each text.
    pub texts: Vec<Vec<u32>>,
    /// Which hidden states.
    pub pooling: Pooling,
    /// Numbers of each vector; all where nothing is said.
    pub dimensions: Option<u32>,
    /// Who asks.
    pub caller: Caller,
}

impl Handler<SubmitEmbed> for Batcher {
    type Result = Result<oneshot::Receiver<Vectors>, Status>;

    fn handle(&mut self, m: SubmitEmbed, _: &mut Context<Self>) -> Self::Result {
        self.refuse_while_leaving()?;
        let Some(scheduler) = &self.scheduler else { return Err(self.unavailable()) };
        let most = scheduler.max_sequence_len() as usize;
        if let Some(index) = m.texts.iter().position(|ids| ids.len() > most) {
            let len = m.texts[index].len();
            let message = format!("text {index} has {len} tokens, at most {most} are possible");
            return Err(Status::invalid("input", message));
        }
        let tokens = m.texts.iter().map(|ids| ids.len() as u64).sum();
        let (reply, receiver) = oneshot::channel();
        let (now, deadline) = (self.now(), m.caller.deadline);
        let work = Embedding::new(m.texts, (m.pooling, m.dimensions), m.caller, reply);
        self.requests.insert(Request {
            id: m.id,
            sequences: Vec::new(),
            chunks: Vec::new(),
            work: Work::Embed(Box::new(work)),
            span: None,
            submitted: now,
            before: Duration::ZERO,
            deadline: deadline.map(|d| now + d),
        });
        // The first one tells whether the call is accepted.
        if let Err(status) = self.begin_text(m.id) {
            self.requests.remove(m.id);
            return Err(status);
        }
        self.metrics.on_submit();
        self.metrics.on_prompt_tokens(tokens);
        self.begin_texts(m.id);
        self.pump();
        Ok(receiver)
    }
}

impl Batcher {
    /// Gives the next text of a call to the scheduler, where there is one to give. Whether it was.
    fn begin_text(&mut self, id: RequestId) -> Result<bool, Status> {
        let Some(request) = self.requests.named(id) else { return Ok(false) };
        let Work::Embed(work) = &request.work else { return Ok(false) };
        let Some(index) = work.next(request.sequences.len()) else { return Ok(false) };
        let new = embed_of(request, work, index, SequenceId(self.next_sequence));
        let sequence = new.id;
        let serves = self.active.is_some() || self.suspended.is_some();
        let Some(scheduler) = self.scheduler.as_mut().filter(|_| serves) else {
            return Err(self.unavailable());
        };
        if let Err(why) = scheduler.handle_submit(new) {
            let status = self.rejected(why);
            return Err(Status { param: status.param.map(|_| "input".to_owned()), ..status });
        }
        self.next_sequence += 1;
        self.requests.add(id, sequence, index);
        if let Some(Work::Embed(work)) = self.requests.named_mut(id).map(|r| &mut r.work) {
            work.begin();
        }
        Ok(true)
    }

    /// As many of a call's texts as may be under way and as the queue has room for.
    fn begin_texts(&mut self, id: RequestId) {
        while self.scheduler.as_ref().is_some_and(|s| s.has_room()) {
            match self.begin_text(id) {
                Ok(true) => {}
                Ok(false) => return,
                Err(status) => {
                    if let Some(request) = self.end(id) {
                        self.fail(request, status);
                    }
                    return;
                }
            }
        }
    }

    /// Calls that found no room in the queue try again.
    pub(super) fn begin_waiting_texts(&mut self) {
        let waits = |r: &&Request| matches!(&r.work, Work::Embed(work) if work.next(r.sequences.len()).is_some());
        let waiting: Vec<RequestId> = self.requests.iter().filter(waits).map(|r| r.id).collect();
        waiting.into_iter().for_each(|id| self.begin_texts(id));
    }

    /// A text has become a vector.
    pub(super) fn on_embedding(&mut self, sequence: SequenceId, vector: Vec<f32>, now: Duration) {
        let Some((request, index)) = self.requests.of_mut(sequence) else { return };
        let (id, age) = (request.id, request.age(now));
        let Work::Embed(work) = &mut request.work else { return };
        match work.take(index, vector) {
            Ok(false) => {
                self.end_choice(sequence);
                self.begin_texts(id);
            }
            Ok(true) => {
                work.complete();
                self.metrics.on_embedded(age);
                self.end(id);
            }
            Err(status) => {
                if let Some(request) = self.end(id) {
                    self.fail(request, status);
                }
            }
        }
    }
}

/// What the scheduler is told of a text.
pub(super) fn embed_of(
    request: &Request,
    work: &Embedding,
    index: u32,
    id: SequenceId,
) -> NewSequence {
    NewSequence {
        id,
        prompt: work.text(index).to_vec(),
        max_new_tokens: 0,
        kind: Kind::Embed { pooling: work.pooling },
        submitted: request.submitted,
        deadline: request.deadline,
        client: work.caller.client,
        priority: work.caller.priority,
    }
}
