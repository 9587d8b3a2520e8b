//! One of a request's choices: its log, its text in the making, its times and its end.

use std::sync::Arc;
use std::time::Duration;

use millrace_shared::wire::rpc::{FinishReason, Timings};

use super::transcript::{Ending, RulesDid, Told, Transcript};
use crate::journal::{End, Head, Log, Token};
use crate::text::Tokenizer;

/// See the module's documentation. Times count from the request's submission.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) log: Log,
    pub(super) end: Option<(u64, End)>,
    transcript: Transcript,
    pub(super) cached_tokens: u32,
    queue: Option<Duration>,
    first_token: Option<Duration>,
    last_token: Option<Duration>,
}

impl Choice {
    /// The one of this number, without tokens.
    pub(super) fn new(head: &Head, tokenizer: &Arc<Tokenizer>, number: u32) -> Self {
        Self {
            log: Log::default(),
            end: None,
            transcript: Transcript::new(head, tokenizer, number),
            cached_tokens: 0,
            queue: None,
            first_token: None,
            last_token: None,
        }
    }

    /// As an earlier life left it; `Some` reason where its last token had ended it, but that was not
    /// written any more.
    pub(super) fn restored(
        head: &Head,
        tokenizer: &Arc<Tokenizer>,
        number: u32,
        (log, end): (Log, Option<(u64, End)>),
    ) -> (Self, Option<FinishReason>) {
        let mut choice = Self::new(head, tokenizer, number);
        let at = |token: &Token| Duration::from_millis(token.at_ms.into());
        let mut ended = None;
        for token in log.iter() {
            ended = choice.transcript.push(token.id).1;
            choice.first_token.get_or_insert_with(|| at(token));
            choice.last_token = Some(at(token));
        }
        // Not known any more, but no later than this.
        choice.queue = choice.first_token;
        ended = ended.filter(|_| end.is_none());
        (choice.log, choice.end) = (log, end);
        (choice, ended)
    }

    /// Takes a token: those that are told of now, and why the choice ends with it, if it does.
    pub(super) fn push(
        &mut self,
        token: Token,
        now: Duration,
    ) -> (Vec<Told>, Option<FinishReason>) {
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        let id = token.id;
        self.log.push(token);
        self.transcript.push(id)
    }

    /// Its end: what was held back, and the reason, for a stop string may become certain only
    /// now.
    pub(super) fn finish(&mut self, reason: FinishReason) -> Ending {
        self.transcript.finish(reason)
    }

    /// What the operator's rules did to it so far.
    pub(super) fn rules_did(&self) -> RulesDid {
        self.transcript.rules_did()
    }

    /// Marks the end of the time in the queue.
    pub(super) fn on_scheduled(&mut self, now: Duration) {
        self.queue.get_or_insert(now);
    }

    /// Time spent in the queue, once it is over.
    pub(super) fn queue_time(&self) -> Option<Duration> {
        self.queue
    }

    /// When the last token came.
    pub(super) fn last_token(&self) -> Option<Duration> {
        self.last_token
    }

    /// When the first token came.
    pub(super) fn first_token(&self) -> Option<Duration> {
        self.first_token
    }

    pub(super) fn timings(&self) -> Timings {
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
