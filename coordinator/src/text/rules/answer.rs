//! Answers, while they grow: redacted, or ended where they are blocked, without a broken stream.
//!
//! Each token covers bytes of the answer's text; a character of several tokens belongs to all of
//! them. A token is told of when all that it covers is certain, and without its id where a match has
//! any of that. All text comes out under the token that it was written with.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::RuleError;
use super::patterns::{Found, Patterns};

/// What is done to answers, as it is kept with each request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Source {
    /// Patterns that end an answer.
    pub(super) block: Vec<String>,
    /// Patterns that are replaced.
    pub(super) redact: Vec<String>,
    /// By what.
    pub(super) instead: String,
    /// Whether JSON is taken out.
    pub(super) json: bool,
}

/// What is done to answers. Clones share what was compiled.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Source", into = "Source")]
pub struct AnswerRules(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    source: Source,
    /// Compiled when it is needed first; `Err` where this program cannot.
    compiled: OnceLock<Result<Option<Patterns>, String>>,
}

impl From<Source> for AnswerRules {
    fn from(source: Source) -> Self {
        Self(Arc::new(Shared { source, compiled: OnceLock::new() }))
    }
}

impl From<AnswerRules> for Source {
    fn from(rules: AnswerRules) -> Self {
        rules.0.source.clone()
    }
}

impl PartialEq for AnswerRules {
    fn eq(&self, other: &Self) -> bool {
        self.0.source == other.0.source
    }
}

impl AnswerRules {
    /// Of these patterns and settings; `None` where there is nothing to do.
    pub(super) fn new(source: Source) -> Result<Option<Self>, RuleError> {
        let rules = Self::from(source);
        let Source { block, redact, json, .. } = &rules.0.source;
        if block.is_empty() && redact.is_empty() && !json {
            return Ok(None);
        }
        let flag = if redact.is_empty() { "answer-block" } else { "answer-redact" };
        match rules.compiled() {
            Err(why) => Err(RuleError { flag, why: why.clone() }),
            Ok(_) => Ok(Some(rules)),
        }
    }

    fn compiled(&self) -> &Result<Option<Patterns>, String> {
        let Source { block, redact, .. } = &self.0.source;
        self.0.compiled.get_or_init(|| Patterns::new(block, redact, true))
    }

    /// Whether JSON is taken out of answers.
    pub(crate) fn takes_json(&self) -> bool {
        self.0.source.json
    }

    /// Whether text is hidden, so that what the model would say must not be had in another way.
    pub(crate) fn hides(&self) -> bool {
        !(self.0.source.block.is_empty() && self.0.source.redact.is_empty())
    }

    /// Bytes that it takes, roughly.
    pub(crate) fn bytes(&self) -> usize {
        let Source { block, redact, instead, .. } = &self.0.source;
        block.iter().chain(redact).map(|p| p.len() + 8).sum::<usize>() + instead.len() + 16
    }
}

/// A token that may be told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Its index.
    pub(crate) index: u32,
    /// The text that was written with it.
    pub(crate) text: String,
    /// Whether a match has some of what it stands for.
    pub(crate) hidden: bool,
}

/// A token, and what it covers. Bytes count from the answer's beginning.
#[derive(Clone, Debug)]
struct Token {
    index: u32,
    /// What it stands for; to the next byte, where it ends inside a character.
    covers: Range<usize>,
    /// Where its text ends.
    end: usize,
}

/// Text that is certain.
#[derive(Clone, Debug)]
enum Part {
    /// As the model wrote it.
    Kept(String),
    /// A match of so many bytes.
    Gone(usize),
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct Screen {
    rules: AnswerRules,
    /// What is not certain, behind the character before it.
    text: String,
    /// Bytes of that character.
    before: usize,
    /// Bytes of the answer that are certain.
    certain: usize,
    tokens: VecDeque<Token>,
    parts: VecDeque<Part>,
    /// Bytes of the answer that were handed out.
    out: usize,
    /// Matches that tokens to come may cover.
    gone: VecDeque<Range<usize>>,
    redacted: bool,
    blocked: bool,
}

impl Screen {
    /// Before the first token; `None` where these rules hide nothing.
    pub(crate) fn new(rules: &AnswerRules) -> Option<Self> {
        rules.hides().then(|| Self {
            rules: rules.clone(),
            text: String::new(),
            before: 0,
            certain: 0,
            tokens: VecDeque::new(),
            parts: VecDeque::new(),
            out: 0,
            gone: VecDeque::new(),
            redacted: false,
            blocked: false,
        })
    }

    /// Whether something was redacted.
    pub(crate) fn redacted(&self) -> bool {
        self.redacted
    }

    /// Whether the answer ended in a match.
    pub(crate) fn blocked(&self) -> bool {
        self.blocked
    }

    /// A token comes, which covers these bytes of the answer; its text ends before the last of them
    /// where it is `cut` inside a character.
    pub(crate) fn token(&mut self, index: u32, bytes: Range<usize>, cut: bool) {
        let covers = bytes.start..bytes.end + usize::from(cut);
        self.tokens.push_back(Token { index, covers, end: bytes.end });
    }

    /// Takes more of the answer's text; returns the tokens that may be told of.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Shown> {
        self.text.push_str(text);
        self.decide(false);
        self.shown(self.blocked)
    }

    /// The end of the answer: all tokens, and text that belongs to none.
    pub(crate) fn finish(&mut self, text: &str) -> (Vec<Shown>, String) {
        self.text.push_str(text);
        self.decide(true);
        let shown = self.shown(true);
        (shown, self.take(usize::MAX))
    }

    fn decide(&mut self, ends: bool) {
        let rules = self.rules.clone();
        let patterns = match rules.compiled() {
            _ if self.blocked => return,
            Ok(Some(patterns)) => patterns,
            // Better nothing than what should not be seen.
            Ok(None) | Err(_) => return self.block(),
        };
        let mut from = self.before;
        loop {
            let open = if ends { self.text.len() } else { patterns.open(&self.text, from) };
            match patterns.find(&self.text, from).filter(|found| ends || found.start < open) {
                Some(Found { start, blocks: true, .. }) => {
                    self.keep(from..start);
                    return self.block();
                }
                Some(Found { start, end, .. }) => {
                    self.keep(from..start);
                    self.parts.push_back(Part::Gone(end - start));
                    self.gone.push_back(self.certain..self.certain + end - start);
                    self.certain += end - start;
                    self.redacted = true;
                    from = end;
                }
                None => {
                    self.keep(from..open);
                    from = open;
                    break;
                }
            }
        }
        // What look-around at the next place sees.
        let before = self.text[..from].chars().next_back().map_or(0, char::len_utf8);
        self.text.drain(..from - before);
        self.before = before;
    }

    fn keep(&mut self, range: Range<usize>) {
        if !range.is_empty() {
            self.certain += range.len();
            self.parts.push_back(Part::Kept(self.text[range].to_owned()));
        }
    }

    /// Nothing behind what is certain is sent.
    fn block(&mut self) {
        self.blocked = true;
        self.gone.push_back(self.certain..usize::MAX);
        self.text.clear();
    }

    /// The tokens all of whose text is certain, or all of them.
    fn shown(&mut self, all: bool) -> Vec<Shown> {
        let mut shown = Vec::new();
        while let Some(token) =
            self.tokens.pop_front_if(|token| all || token.covers.end <= self.certain)
        {
            let text = self.take(token.end);
            let Range { start, end } = token.covers;
            self.gone.retain(|gone| gone.end > start);
            let hidden = self.gone.iter().any(|gone| gone.start < end && start < end);
            shown.push(Shown { index: token.index, text, hidden });
        }
        shown
    }

    /// What was written up to this byte of the answer.
    fn take(&mut self, end: usize) -> String {
        let mut text = String::new();
        while self.out < end {
            match self.parts.pop_front() {
                None => break,
                Some(Part::Gone(bytes)) => {
                    self.out += bytes;
                    text.push_str(&self.rules.0.source.instead);
                }
                Some(Part::Kept(mut kept)) => {
                    let rest = kept.split_off(kept.len().min(end - self.out));
                    self.out += kept.len();
                    text.push_str(&kept);
                    if !rest.is_empty() {
                        self.parts.push_front(Part::Kept(rest));
                    }
                }
            }
        }
        text
    }
}
