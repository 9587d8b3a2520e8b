//! Continuations being produced: the logs of a request's choices, their text, and who listens.
//!
//! Every token enters its log (and the journal) before an event of it is handed on; listeners get
//! events from the indices on that they asked for, each once. Channels hold every event the request
//! can ever produce, so that sending never waits; what happened before somebody came is played again
//! where it is heard, not here. Choices that are compared (`best_of`) are handed on when all have
//! ended. Invariant: logs and ends are all there is to know; the rest follows from them and the head.

use std::sync::Arc;
use std::time::Duration;

use millrace_shared::error::Status;
use millrace_shared::sampling::{SamplingParams, choice_seed};
use millrace_shared::wire::rpc::{FinishReason, GenerateEvent, TokenLogprobs};

use super::choice::Choice;
use super::listeners::{Listeners, MAX_LISTENERS};
use super::replay::{Replay, event_of, usage};
use super::transcript::{Ending, RulesDid, Told};
use super::{EventSender, event_capacity};
use crate::journal::{End, Entry, Head, Journal, Record, Token, unix_ms};
use crate::service::{EventStream, Meter, Origin, Play};
use crate::text::Tokenizer;
use crate::text::tools::Piece;

/// When to come back, told to one listener too many.
const RETRY_LISTEN_MS: u32 = 1000;
/// Tokens for which the journal's room is promised at once: far fewer than long contexts hold, so
/// that nobody is refused for what others may never say.
const STRETCH: u64 = 256;

/// What a token means for its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Continue,
    /// The choice is complete.
    Finished(FinishReason),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Generation {
    head: Arc<Head>,
    choices: Vec<Choice>,
    tokenizer: Arc<Tokenizer>,
    listeners: Listeners,
    /// Tokens of all choices.
    tokens: u64,
    /// Tokens for which the journal has promised room.
    promised: u64,
}

impl Generation {
    /// Continuations without tokens; they enter the journal.
    pub fn new(head: Arc<Head>, tokenizer: &Arc<Tokenizer>, journal: &Journal) -> Self {
        journal.write(|| Record::Request(Arc::clone(&head)));
        let choices = (0..head.choices).map(|n| Choice::new(&head, tokenizer, n)).collect();
        let keep = Duration::from_millis(head.keep_ms);
        Self {
            promised: at_first(&head),
            choices,
            tokenizer: Arc::clone(tokenizer),
            listeners: Listeners::new(keep),
            tokens: 0,
            head,
        }
    }

    /// Those of an earlier life, for at least `patience` without anybody who listens. Choices whose
    /// last token had ended them, which was not written any more, end now.
    pub fn restored(
        entry: Entry,
        tokenizer: &Arc<Tokenizer>,
        patience: Duration,
        journal: &Journal,
    ) -> Self {
        let head = entry.head;
        let (mut choices, mut ended) = (Vec::new(), Vec::new());
        for (number, kept) in (0..).zip(entry.tokens.into_iter().zip(entry.ends)) {
            let (choice, reason) = Choice::restored(&head, tokenizer, number, kept);
            choices.push(choice);
            ended.push(reason);
        }
        let keep = Duration::from_millis(head.keep_ms).max(patience);
        let tokens = choices.iter().map(|c: &Choice| c.log.len() as u64).sum();
        let mut generation = Self {
            promised: tokens + at_first(&head),
            choices,
            tokenizer: Arc::clone(tokenizer),
            listeners: Listeners::of_an_earlier_life(keep),
            tokens,
            head,
        };
        for (choice, reason) in (0..).zip(ended) {
            if let Some(reason) = reason {
                generation.finish(choice, reason, journal);
            }
        }
        generation
    }

    /// Has somebody count its tokens until it ends, whoever listens.
    pub fn counted(&mut self, meter: Box<dyn Meter>) {
        self.listeners.count(meter);
    }

    /// What was asked.
    pub fn head(&self) -> &Arc<Head> {
        &self.head
    }

    /// The parameters, for the last stage.
    pub fn params(&self) -> SamplingParams {
        SamplingParams { logprobs: self.head.scored(), ..self.head.params.clone() }
    }

    /// The random stream of a choice.
    pub fn seed(&self, choice: u32) -> u64 {
        choice_seed(self.head.seed, choice)
    }

    /// Choices that go on.
    pub fn open(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.choices).filter(|(_, c)| c.end.is_none()).map(|(number, _)| number)
    }

    /// Whether all choices have ended.
    pub fn is_done(&self) -> bool {
        self.choices.iter().all(|c| c.end.is_some())
    }

    /// The ids of a choice so far.
    pub fn token_ids(&self, choice: u32) -> Vec<u32> {
        self.choices
            .get(choice as usize)
            .map_or(Vec::new(), |c| c.log.iter().map(|t| t.id).collect())
    }

    /// All of it, as the journal keeps it.
    pub fn entry(&self) -> Entry {
        Entry {
            head: Arc::clone(&self.head),
            tokens: self.choices.iter().map(|c| c.log.clone()).collect(),
            ends: self.choices.iter().map(|c| c.end.clone()).collect(),
        }
    }

    /// Bytes that a request needs of the journal to begin.
    pub fn first_bytes(head: &Head) -> u64 {
        head.bytes() + at_first(head) * head.token_bytes()
    }

    /// Bytes of the journal that are promised to it.
    pub fn promised_bytes(&self) -> u64 {
        self.head.bytes() + self.promised * self.head.token_bytes()
    }

    /// Bytes that it needs beyond those, which count as promised from now on.
    pub fn take_promise(&mut self) -> Option<u64> {
        if self.tokens <= self.promised {
            return None;
        }
        self.promised += STRETCH;
        Some(STRETCH * self.head.token_bytes())
    }

    /// Lets somebody hear the events, of each choice from the token in `from` on. `returns` says
    /// that it may be a client whose connection was lost.
    ///
    /// # Errors
    /// If too many do.
    pub fn listen(
        &mut self,
        from: Vec<u32>,
        returns: bool,
        journal: &Journal,
    ) -> Result<EventStream, Status> {
        if self.listeners.is_full() {
            return Err(Status::exhausted(
                format!("{MAX_LISTENERS} clients hear request {} already", self.head.id),
                RETRY_LISTEN_MS,
            ));
        }
        let ends = stream_of(&self.entry(), from.clone(), &self.tokenizer, journal);
        Ok(self.listeners.add(ends, from, (self.head.ranks(), returns)))
    }

    /// Whether nobody will want the answer any more, as far as can be known.
    pub fn is_abandoned(&mut self, now: Duration) -> bool {
        self.listeners.are_gone(now)
    }

    /// Takes a token of a choice; `now` counts from submission, `last` says that the limits allow no
    /// more.
    pub fn on_token(
        &mut self,
        choice: u32,
        (index, token, last): (u32, u32, bool),
        logprobs: Option<TokenLogprobs>,
        now: Duration,
        journal: &Journal,
    ) -> Verdict {
        let Some(of) = self.choices.get_mut(choice as usize) else { return Verdict::Continue };
        debug_assert_eq!(index as usize, of.log.len(), "indices follow each other");
        let at_ms = u32::try_from(now.as_millis()).unwrap_or(u32::MAX);
        let entry = Token { id: token, at_ms, logprobs };
        let request = self.head.id;
        journal.write(|| Record::Token { request, choice, index, token: entry.clone() });
        let (told, reason) = of.push(entry, now);
        self.tokens += 1;
        self.tell(choice, told, journal);
        match reason.or_else(|| last.then_some(FinishReason::Length)) {
            None => Verdict::Continue,
            Some(reason) => Verdict::Finished(self.finish(choice, reason, journal)),
        }
    }

    /// Hands tokens of a choice on.
    fn tell(&mut self, choice: u32, told: Vec<Told>, journal: &Journal) {
        let Some(of) = self.choices.get(choice as usize) else { return };
        for event in told.into_iter().filter_map(|t| event_of(&self.head, &of.log, choice, t)) {
            self.listeners.token(&event, self.head.ranks(), journal);
        }
    }

    /// What the operator's rules did to the answers so far.
    pub fn rules_did(&self) -> RulesDid {
        let all = self.choices.iter().map(Choice::rules_did);
        all.fold(RulesDid::default(), |a, b| RulesDid {
            redacted: a.redacted | b.redacted,
            blocked: a.blocked | b.blocked,
            extracted: a.extracted | b.extracted,
        })
    }

    /// Ends a choice that goes on; returns the reason, for a stop string may become certain only now.
    pub fn finish(&mut self, choice: u32, reason: FinishReason, journal: &Journal) -> FinishReason {
        let Some(of) = self.choices.get_mut(choice as usize).filter(|c| c.end.is_none()) else {
            return reason;
        };
        let Ending { told, piece: Piece { text, calls }, reason } = of.finish(reason);
        let (timings, cached_tokens) = (of.timings(), of.cached_tokens);
        self.tell(choice, told, journal);
        self.close(choice, End::Finished { reason, cached_tokens, timings }, journal);
        if !self.head.ranks() {
            let usage = usage(&self.entry(), choice, choice as usize);
            let event = GenerateEvent::Finished { choice, reason, text, calls, usage, timings };
            self.listeners.tell(&Ok(event), journal);
        } else if self.is_done() {
            let entry = self.entry();
            let replay = |from| Replay::new(entry.clone(), &self.tokenizer, from).without_start();
            self.listeners.play(replay, journal);
        }
        reason
    }

    /// Ends all choices that go on as cancelled.
    pub fn cancel(&mut self, journal: &Journal) {
        let open: Vec<u32> = self.open().collect();
        for choice in open {
            self.finish(choice, FinishReason::Cancelled, journal);
        }
    }

    /// Ends all choices that go on with an error.
    pub fn fail(&mut self, status: &Status, journal: &Journal) {
        let open: Vec<u32> = self.open().collect();
        for choice in open {
            self.close(choice, End::Failed(status.clone()), journal);
        }
        self.listeners.tell(&Err(status.clone()), journal);
    }

    fn close(&mut self, choice: u32, end: End, journal: &Journal) {
        let (request, at_ms) = (self.head.id, unix_ms());
        journal.write(|| Record::End { request, choice, at_ms, end: end.clone() });
        if let Some(of) = self.choices.get_mut(choice as usize) {
            of.end = Some((at_ms, end));
        }
    }

    /// Marks the end of a choice's time in the queue, `now` after submission, and how many tokens of
    /// the prompt were in the prefix cache.
    pub fn on_scheduled(&mut self, choice: u32, now: Duration, cached: u32) {
        if let Some(of) = self.choices.get_mut(choice as usize) {
            of.on_scheduled(now);
            of.cached_tokens = cached.min(self.head.prompt.len() as u32);
        }
    }

    /// Time that a choice spent in the queue, once it is over.
    pub fn queue_time(&self, choice: u32) -> Option<Duration> {
        self.choices.get(choice as usize)?.queue_time()
    }

    /// When the last token of a choice came, counted from submission.
    pub fn last_token(&self, choice: u32) -> Option<Duration> {
        self.choices.get(choice as usize)?.last_token()
    }

    /// When the first token of a choice came, counted from submission.
    pub fn first_token(&self, choice: u32) -> Option<Duration> {
        self.choices.get(choice as usize)?.first_token()
    }

    /// Events that the one who lags most has not taken yet.
    pub fn unread(&self) -> u32 {
        self.listeners.unread()
    }

    /// How long ago the client that lags most took one.
    pub fn unread_since(&self) -> Duration {
        self.listeners.unread_since()
    }
}

/// Tokens for which the journal promises room at the beginning.
fn at_first(head: &Head) -> u64 {
    u64::from(head.choices) * u64::from(head.max_new).min(STRETCH)
}

/// A stream that begins with what has happened so far, and where its further events go in.
fn stream_of(
    entry: &Entry,
    from: Vec<u32>,
    tokenizer: &Arc<Tokenizer>,
    journal: &Journal,
) -> (EventSender, EventStream) {
    let head = &entry.head;
    let (events, mut stream) = EventStream::new(head.id, event_capacity(head.max_new, head.n));
    // What is told again may have been written a moment ago.
    stream.begin_with(Play::new(Replay::new(entry.clone(), tokenizer, from), journal.settled()));
    let origin = Origin {
        tag: head.tag,
        note: head.note.as_slice().into(),
        submitted_ms: head.submitted_ms,
        left_out: head.left_out,
        read: head.altered.then(|| head.prompt.clone()),
    };
    (events, stream.with_origin(origin))
}

/// The events of a request that has ended, of each choice from the token in `from` on.
pub fn play_again(
    entry: &Entry,
    from: Vec<u32>,
    tokenizer: &Arc<Tokenizer>,
    journal: &Journal,
) -> EventStream {
    stream_of(entry, from, tokenizer, journal).1
}
