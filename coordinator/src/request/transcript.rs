//! From tokens to text and to the end of a choice.
//!
//! A function of what was asked and of the tokens alone, so that an answer can be played again: for
//! whoever attaches in the middle, and after a restart.

use std::collections::HashSet;
use std::sync::Arc;

use millrace_shared::sampling::StopMatcher;
use millrace_shared::wire::rpc::FinishReason;

use crate::journal::Head;
use crate::text::tools::{CallParser, Piece};
use crate::text::{Detokenizer, Tokenizer};

/// The text of one choice in the making.
#[derive(Clone, Debug)]
pub(super) struct Transcript {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Reads calls, where the request has tools.
    calls: Option<CallParser>,
    end_ids: HashSet<u32>,
    produced: u32,
    max_new: u32,
    /// A stop string matched, so nothing is held back.
    stopped: bool,
}

impl Transcript {
    /// Of the answer to `head` that has this number in the log.
    pub(super) fn new(head: &Head, tokenizer: &Arc<Tokenizer>, choice: u32) -> Self {
        let mut end_ids: HashSet<u32> = head.params.stop_token_ids.iter().copied().collect();
        if !head.params.ignore_eos {
            end_ids.extend(tokenizer.eos_ids());
        }
        let calls = head.calls.as_ref();
        let shown = calls.map(|form| form.shown(tokenizer)).unwrap_or_default();
        let detokenizer = Detokenizer::new(Arc::clone(tokenizer)).showing(shown);
        Self {
            detokenizer: if head.chat { detokenizer } else { detokenizer.continuing() },
            stop: StopMatcher::new(&head.params.stop),
            calls: calls.map(|form| CallParser::new(form, head.id, choice)),
            end_ids,
            produced: 0,
            max_new: head.max_new,
            stopped: false,
        }
    }

    /// Takes a token: what became certain, and why the answer ends with it, if it does.
    pub(super) fn push(&mut self, token: u32) -> (Piece, Option<FinishReason>) {
        self.produced += 1;
        let ended = self.end_ids.contains(&token);
        let text = if ended {
            String::new()
        } else {
            let outcome = self.stop.push(&self.detokenizer.push(token));
            self.stopped |= outcome.stopped;
            outcome.emit
        };
        let reason = match (ended || self.stopped, self.produced >= self.max_new) {
            (true, _) => Some(FinishReason::Stop),
            (false, true) => Some(FinishReason::Length),
            (false, false) => None,
        };
        (self.read(text), reason)
    }

    fn read(&mut self, text: String) -> Piece {
        match &mut self.calls {
            None => Piece::of_text(text),
            Some(calls) => calls.push(&text),
        }
    }

    /// The end: what was held back, and the reason, for a stop string may become certain only now.
    pub(super) fn finish(&mut self, reason: FinishReason) -> (Piece, FinishReason) {
        let (mut piece, mut reason) = (Piece::default(), reason);
        if !self.stopped {
            let end = self.stop.end(&self.detokenizer.finish());
            if end.stopped && reason == FinishReason::Length {
                reason = FinishReason::Stop;
            }
            piece = self.read(end.emit);
        }
        if let Some(calls) = &mut self.calls {
            piece.append(calls.finish());
            if calls.called() && reason == FinishReason::Stop {
                reason = FinishReason::ToolCalls;
            }
        }
        (piece, reason)
    }
}
