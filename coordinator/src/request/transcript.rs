//! From tokens to text and to the end of a choice.
//!
//! A function of what was asked and of the tokens alone, so that an answer can be played again: for
//! whoever attaches in the middle, and after a restart. Text goes through the detokenizer, the stop
//! strings, the operator's rules and the reader of calls, in this order. Where rules hide text a
//! token is told of once what it stands for is certain; elsewhere at once.

use std::collections::HashSet;
use std::sync::Arc;

use millrace_shared::sampling::StopMatcher;
use millrace_shared::wire::rpc::FinishReason;

use crate::journal::Head;
use crate::text::rules::{JsonFinder, Screen, Shown};
use crate::text::tools::{CallParser, Piece};
use crate::text::{Detokenizer, Tokenizer};

/// A token that is told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// Its index.
    pub(super) index: u32,
    /// What became certain with it.
    pub(super) piece: Piece,
    /// Whether nobody is to know which it is.
    pub(super) hidden: bool,
}

/// The end of a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ending {
    /// Tokens that were not told of.
    pub(super) told: Vec<Told>,
    /// What was held back.
    pub(super) piece: Piece,
    /// Why it ended.
    pub(super) reason: FinishReason,
}

/// What the operator's rules did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RulesDid {
    /// Text was redacted.
    pub redacted: bool,
    /// The answer was ended.
    pub blocked: bool,
    /// JSON was taken out.
    pub extracted: bool,
}

/// The text of one choice in the making.
#[derive(Clone, Debug)]
pub(super) struct Transcript {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Hides text, where there are rules that do.
    screen: Option<Screen>,
    /// Takes JSON out, where that is wanted.
    json: Option<JsonFinder>,
    /// Reads calls, where the request has tools.
    calls: Option<CallParser>,
    end_ids: HashSet<u32>,
    produced: u32,
    /// Bytes of text so far.
    bytes: usize,
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
        let rules = head.rules.as_ref();
        // Tools have JSON of their own, and a grammar sees to it.
        let free = calls.is_none() && head.params.grammar.is_none();
        let json = rules.filter(|rules| free && rules.takes_json());
        Self {
            detokenizer: if head.chat { detokenizer } else { detokenizer.continuing() },
            stop: StopMatcher::new(&head.params.stop),
            screen: rules.and_then(Screen::new),
            json: json.map(|_| JsonFinder::default()),
            calls: calls.map(|form| CallParser::new(form, head.id, choice)),
            end_ids,
            produced: 0,
            bytes: 0,
            max_new: head.max_new,
            stopped: false,
        }
    }

    /// What the operator's rules did so far.
    pub(super) fn rules_did(&self) -> RulesDid {
        let screen = self.screen.as_ref();
        RulesDid {
            redacted: screen.is_some_and(Screen::redacted),
            blocked: screen.is_some_and(Screen::blocked),
            extracted: self.json.as_ref().is_some_and(JsonFinder::found),
        }
    }

    /// Takes a token: those that are told of now, and why the answer ends with it, if it does.
    pub(super) fn push(&mut self, token: u32) -> (Vec<Told>, Option<FinishReason>) {
        let index = self.produced;
        self.produced += 1;
        let (ended, begin) = (self.end_ids.contains(&token), self.bytes);
        let text = if ended {
            String::new()
        } else {
            let text = self.detokenizer.push(token);
            self.bytes += text.len();
            let outcome = self.stop.push(&text);
            self.stopped |= outcome.stopped;
            outcome.emit
        };
        let shown = match &mut self.screen {
            None => vec![Shown { index, text, hidden: false }],
            Some(screen) => {
                let inside = !ended && self.detokenizer.is_inside();
                screen.token(index, begin..self.bytes, inside);
                screen.push(&text)
            }
        };
        let told = self.told(shown);
        let did = self.rules_did();
        let stops = ended || self.stopped || did.extracted;
        let reason = match (did.blocked, stops, self.produced >= self.max_new) {
            (true, _, _) => Some(FinishReason::ContentFilter),
            (false, true, _) => Some(FinishReason::Stop),
            (false, false, true) => Some(FinishReason::Length),
            (false, false, false) => None,
        };
        (told, reason)
    }

    fn told(&mut self, shown: Vec<Shown>) -> Vec<Told> {
        let told = |Shown { index, text, hidden }| {
            let piece = self.read(text);
            Told { index, piece, hidden }
        };
        shown.into_iter().map(told).collect()
    }

    fn read(&mut self, text: String) -> Piece {
        let text = match &mut self.json {
            None => text,
            Some(json) => json.push(&text),
        };
        match &mut self.calls {
            None => Piece::of_text(text),
            Some(calls) => calls.push(&text),
        }
    }

    /// The end: what was held back, and the reason, for a stop string may become certain only now.
    pub(super) fn finish(&mut self, reason: FinishReason) -> Ending {
        let (mut text, mut stops) = (String::new(), false);
        if !self.stopped {
            let end = self.stop.end(&self.detokenizer.finish());
            (text, stops) = (end.emit, end.stopped);
        }
        let shown;
        (shown, text) = match &mut self.screen {
            None => (Vec::new(), text),
            Some(screen) => screen.finish(&text),
        };
        let told = self.told(shown);
        let mut piece = self.read(text);
        if let Some(json) = &mut self.json {
            piece.text.push_str(&json.finish());
        }
        if let Some(calls) = &mut self.calls {
            piece.append(calls.finish());
        }
        let did = self.rules_did();
        let called = self.calls.as_ref().is_some_and(CallParser::called);
        let reason = match reason {
            FinishReason::Stop | FinishReason::Length if did.blocked => FinishReason::ContentFilter,
            FinishReason::Length if stops || did.extracted => FinishReason::Stop,
            other => other,
        };
        let reason = match reason {
            FinishReason::Stop if called => FinishReason::ToolCalls,
            other => other,
        };
        Ending { told, piece, reason }
    }
}
