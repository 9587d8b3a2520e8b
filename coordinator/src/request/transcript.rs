//! From tokens to text and to the end of a choice.
//!
//! A function of what was asked and of the tokens alone, so that an answer can be played again: for
//! whoever attaches in the middle, and after a restart.

use std::collections::HashSet;
use std::sync::Arc;

use millrace_shared::sampling::StopMatcher;
use millrace_shared::wire::rpc::FinishReason;

use crate::journal::Head;
use crate::text::{Detokenizer, Tokenizer};

/// The text of one choice in the making.
#[derive(Clone, Debug)]
pub(super) struct Transcript {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    end_ids: HashSet<u32>,
    produced: u32,
    max_new: u32,
    /// A stop string matched, so nothing is held back.
    stopped: bool,
}

impl Transcript {
    /// Of an answer to `head`.
    pub(super) fn new(head: &Head, tokenizer: &Arc<Tokenizer>) -> Self {
        let mut end_ids: HashSet<u32> = head.params.stop_token_ids.iter().copied().collect();
        if !head.params.ignore_eos {
            end_ids.extend(tokenizer.eos_ids());
        }
        let detokenizer = Detokenizer::new(Arc::clone(tokenizer));
        Self {
            detokenizer: if head.chat { detokenizer } else { detokenizer.continuing() },
            stop: StopMatcher::new(&head.params.stop),
            end_ids,
            produced: 0,
            max_new: head.max_new,
            stopped: false,
        }
    }

    /// Takes a token: the text that became certain, and why the answer ends with it, if it does.
    pub(super) fn push(&mut self, token: u32) -> (String, Option<FinishReason>) {
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
        (text, reason)
    }

    /// The end: text that was held back, and the reason, for a stop string may become certain only
    /// now.
    pub(super) fn finish(&mut self, reason: FinishReason) -> (String, FinishReason) {
        if self.stopped {
            return (String::new(), reason);
        }
        let end = self.stop.end(&self.detokenizer.finish());
        let length = reason == FinishReason::Length;
        (end.emit, if end.stopped && length { FinishReason::Stop } else { reason })
    }
}
