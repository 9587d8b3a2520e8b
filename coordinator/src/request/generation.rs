//! A continuation being produced: its log, its text, and who listens.
//!
//! Every token enters the log (and the journal) before an event of it is handed on; listeners get
//! events from the index on that they asked for, each once. Channels hold every event the request
//! can ever produce, so that sending never waits. Invariant: `tokens` is all there is to know; the
//! rest follows from it and the head.

use std::sync::Arc;
use std::time::Duration;

use millrace_shared::error::Status;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{FinishReason, GenerateEvent, Timings, TokenLogprobs, Usage};

use super::transcript::{Transcript, replay, started};
use super::{EventSender, event_capacity};
use crate::journal::{End, Entry, Head, Journal, Record, Token, unix_ms};
use crate::service::{Departure, EventStream, Meter};
use crate::text::Tokenizer;

/// The one choice of today's requests.
const CHOICE: u32 = 0;
/// Most who hear one request at once.
const MAX_LISTENERS: usize = 8;
/// When to come back, told to one listener too many.
const RETRY_LISTEN_MS: u32 = 1000;

/// Somebody who hears the events.
#[derive(Debug)]
struct Listener {
    events: EventSender,
    /// First token to hear.
    from: u32,
    /// How it went, where it did.
    departure: Arc<Departure>,
}

/// What a token means for the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Continue,
    /// It is complete; the finishing event has been sent.
    Finished(FinishReason),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Generation {
    head: Arc<Head>,
    tokens: Vec<Token>,
    end: Option<(u64, End)>,
    transcript: Transcript,
    tokenizer: Arc<Tokenizer>,
    listeners: Vec<Listener>,
    /// Who counts for clients whose connections were lost.
    meters: Vec<Box<dyn Meter>>,
    /// Since when nobody listens because connections were lost, on the scheduler's clock.
    alone: Option<Duration>,
    /// How long that may be.
    keep: Duration,
    cached_tokens: u32,
    queue: Option<Duration>,
    first_token: Option<Duration>,
    last_token: Option<Duration>,
}

impl Generation {
    /// A continuation without tokens; it enters the journal.
    pub fn new(head: Arc<Head>, tokenizer: &Arc<Tokenizer>, journal: &Journal) -> Self {
        journal.write(|| Record::Request(Arc::clone(&head)));
        Self::build(head, tokenizer)
    }

    fn build(head: Arc<Head>, tokenizer: &Arc<Tokenizer>) -> Self {
        Self {
            transcript: Transcript::new(&head, tokenizer),
            tokenizer: Arc::clone(tokenizer),
            tokens: Vec::new(),
            end: None,
            listeners: Vec::new(),
            meters: Vec::new(),
            alone: None,
            keep: Duration::from_millis(head.keep_ms),
            cached_tokens: 0,
            queue: None,
            first_token: None,
            last_token: None,
            head,
        }
    }

    /// A continuation of an earlier life, for at least `patience` without anybody who listens;
    /// `Some` reason where its last token had ended it, but that was not written any more.
    pub fn restored(
        entry: Entry,
        tokenizer: &Arc<Tokenizer>,
        patience: Duration,
    ) -> (Self, Option<FinishReason>) {
        let mut generation = Self::build(entry.head, tokenizer);
        generation.keep = generation.keep.max(patience);
        generation.alone = Some(Duration::ZERO);
        generation.tokens = entry.tokens.into_iter().next().unwrap_or_default();
        let at = |token: &Token| Duration::from_millis(token.at_ms.into());
        generation.first_token = generation.tokens.first().map(at);
        generation.last_token = generation.tokens.last().map(at);
        // Not known any more, but no later than this.
        generation.queue = generation.first_token;
        let mut ended = None;
        for token in &generation.tokens {
            ended = generation.transcript.push(token.id).1;
        }
        (generation, ended)
    }

    /// What was asked.
    pub fn head(&self) -> &Arc<Head> {
        &self.head
    }

    /// The parameters, for the last stage.
    pub fn params(&self) -> &SamplingParams {
        &self.head.params
    }

    /// The ids so far.
    pub fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }

    /// All of it, as the journal keeps it.
    pub fn entry(&self) -> Entry {
        Entry {
            head: Arc::clone(&self.head),
            tokens: vec![self.tokens.clone()],
            ends: vec![self.end.clone()],
        }
    }

    /// Lets somebody hear the events from token `from` on.
    ///
    /// # Errors
    /// If too many do.
    pub fn listen(&mut self, from: u32, journal: &Journal) -> Result<EventStream, Status> {
        self.listeners.retain(|l| !l.events.is_closed());
        if self.listeners.len() >= MAX_LISTENERS {
            return Err(Status::exhausted(
                format!("{MAX_LISTENERS} clients hear request {} already", self.head.id),
                RETRY_LISTEN_MS,
            ));
        }
        let (events, stream) = stream_of(&self.head);
        if self.tokens.is_empty() {
            journal.deliver(&events, Ok(started(&self.head)));
        } else {
            let end = self.end.as_ref().map(|(_, end)| end);
            for event in replay(&self.head, &self.tokens, end, from, &self.tokenizer) {
                journal.deliver(&events, event);
            }
        }
        self.listeners.push(Listener { events, from, departure: stream.departure() });
        self.alone = None;
        Ok(stream)
    }

    /// Whether nobody will want the answer any more, as far as can be known.
    pub fn is_abandoned(&mut self, now: Duration) -> bool {
        let mut lost = false;
        self.listeners.retain(|l| {
            let gone = l.events.is_closed();
            if gone && l.departure.is_lost() {
                lost = true;
                self.meters.extend(l.departure.take_meter());
            }
            !gone
        });
        if !self.listeners.is_empty() {
            return false;
        }
        if lost {
            self.alone.get_or_insert(now);
        }
        self.alone.is_none_or(|since| now.saturating_sub(since) >= self.keep)
    }

    /// Takes a token; `now` counts from submission, `last` says that the limits allow no more.
    pub fn on_token(
        &mut self,
        (index, token, last): (u32, u32, bool),
        logprobs: Option<TokenLogprobs>,
        now: Duration,
        journal: &Journal,
    ) -> Verdict {
        debug_assert_eq!(index as usize, self.tokens.len(), "indices follow each other");
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        let at_ms = u32::try_from(now.as_millis()).unwrap_or(u32::MAX);
        let entry = Token { id: token, at_ms, logprobs: logprobs.clone() };
        journal.write(|| Record::Token {
            request: self.head.id,
            choice: CHOICE,
            index,
            token: entry.clone(),
        });
        self.tokens.push(entry);
        let (text, reason) = self.transcript.push(token);
        let event = GenerateEvent::Token { index, token_id: token, text, logprobs };
        self.meters.iter_mut().for_each(|meter| meter.see(&event));
        for listener in self.listeners.iter().filter(|l| index >= l.from) {
            journal.deliver(&listener.events, Ok(event.clone()));
        }
        match reason.or_else(|| last.then_some(FinishReason::Length)) {
            None => Verdict::Continue,
            Some(reason) => Verdict::Finished(self.finish(reason, journal)),
        }
    }

    /// Ends it; returns the reason, for a stop string may become certain only now.
    pub fn finish(&mut self, reason: FinishReason, journal: &Journal) -> FinishReason {
        let (text, reason) = self.transcript.finish(reason);
        let timings = self.timings();
        let cached_tokens = self.cached_tokens;
        self.close(End::Finished { reason, cached_tokens, timings }, journal);
        let usage = Usage {
            prompt_tokens: self.head.prompt.len() as u32,
            completion_tokens: self.tokens.len() as u32,
            cached_tokens,
        };
        let event = GenerateEvent::Finished { reason, text, usage, timings };
        for listener in &self.listeners {
            journal.deliver(&listener.events, Ok(event.clone()));
        }
        reason
    }

    /// Ends it with an error.
    pub fn fail(&mut self, status: &Status, journal: &Journal) {
        self.close(End::Failed(status.clone()), journal);
        for listener in &self.listeners {
            journal.deliver(&listener.events, Err(status.clone()));
        }
    }

    fn close(&mut self, end: End, journal: &Journal) {
        let at_ms = unix_ms();
        journal.write(|| Record::End {
            request: self.head.id,
            choice: CHOICE,
            at_ms,
            end: end.clone(),
        });
        self.end = Some((at_ms, end));
    }

    /// Marks the end of the time in the queue, `now` after submission.
    pub fn on_scheduled(&mut self, now: Duration) {
        self.queue.get_or_insert(now);
    }

    /// Notes how many tokens of the prompt were in the prefix cache.
    pub fn on_cached(&mut self, tokens: u32) {
        self.cached_tokens = tokens.min(self.head.prompt.len() as u32);
    }

    /// Time spent in the queue, once it is over.
    pub fn queue_time(&self) -> Option<Duration> {
        self.queue
    }

    /// When the last token came, counted from submission.
    pub fn last_token(&self) -> Option<Duration> {
        self.last_token
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

/// A stream for the events of one request, and where they go in.
fn stream_of(head: &Head) -> (EventSender, EventStream) {
    let (events, stream) = EventStream::new(head.id, event_capacity(head.max_new));
    (events, stream.with_origin(head.tag, head.submitted_ms))
}

/// The events of a request that has ended, from token `from` on.
pub fn play_again(
    entry: &Entry,
    from: u32,
    tokenizer: &Arc<Tokenizer>,
    journal: &Journal,
) -> EventStream {
    let (events, stream) = stream_of(&entry.head);
    let tokens = entry.tokens.first().map(Vec::as_slice).unwrap_or_default();
    let end = entry.ends.first().and_then(|e| e.as_ref()).map(|(_, end)| end);
    for event in replay(&entry.head, tokens, end, from, tokenizer) {
        journal.deliver(&events, event);
    }
    stream
}
