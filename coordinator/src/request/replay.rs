//! The events of an answer again: what has happened so far, for whoever attaches, and what is sent
//! of several choices once they were compared.
//!
//! A function of the journal's entry, read by whoever listens, one event at a time and on its own
//! thread. Choices come one after the other, each from its own index on. Where choices are ranked,
//! nothing is told of them before all have ended; then the best come, under numbers from 0 on, the
//! same at every reading.

use std::collections::VecDeque;
use std::sync::Arc;

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{GenerateEvent, HIDDEN_TOKEN, TokenLogprobs, Usage};

use super::transcript::{Ending, Told, Transcript};
use crate::journal::{End, Entry, Head, Log};
use crate::text::Tokenizer;
use crate::text::tools::Piece;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Replay {
    entry: Entry,
    tokenizer: Arc<Tokenizer>,
    /// Index of the first token to tell, per choice as sent; 0 where there is none.
    from: Vec<u32>,
    /// Choices to tell, by their number in the log.
    order: Vec<usize>,
    /// Of the order.
    at: usize,
    /// Within that choice.
    index: u32,
    transcript: Transcript,
    /// Events that come before all else.
    ready: VecDeque<GenerateEvent>,
    step: Step,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Start,
    Choices,
    Failure,
    Done,
}

impl Replay {
    /// All of it, but for tokens before `from`.
    pub(super) fn new(entry: Entry, tokenizer: &Arc<Tokenizer>, from: Vec<u32>) -> Self {
        let order = order(&entry);
        let first = order.first().copied().unwrap_or_default();
        Self {
            transcript: Transcript::new(&entry.head, tokenizer, first as u32),
            tokenizer: Arc::clone(tokenizer),
            order,
            entry,
            from,
            at: 0,
            index: 0,
            ready: VecDeque::new(),
            step: Step::Start,
        }
    }

    /// The same without the beginning, which was told.
    pub(super) fn without_start(self) -> Self {
        Self { step: Step::Choices, ..self }
    }

    fn start(&mut self) -> GenerateEvent {
        self.step = Step::Choices;
        let head = &self.entry.head;
        GenerateEvent::Started {
            request_id: head.id,
            prompt_token_ids: head.prompt.clone(),
            seed: head.seed,
            choices: head.n,
            left_out: head.left_out,
        }
    }

    /// Tokens of the present choice that are told of.
    fn tell(&mut self, told: Vec<Told>) {
        let Some(&choice) = self.order.get(self.at) else { return };
        let from = self.from.get(self.at).copied().unwrap_or_default();
        let (head, log, number) = (&self.entry.head, &self.entry.tokens[choice], self.at as u32);
        let told = told.into_iter().filter(|told| told.index >= from);
        self.ready.extend(told.filter_map(|told| event_of(head, log, number, told)));
    }

    /// The next event of the choices; `None` when they are through.
    fn of_choices(&mut self) -> Option<GenerateEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let &choice = self.order.get(self.at)?;
            if let Some(token) = self.entry.tokens[choice].get(self.index as usize) {
                self.index += 1;
                let (told, _) = self.transcript.push(token.id);
                self.tell(told);
                continue;
            }
            if let Some((_, End::Finished { reason, timings, .. })) = self.entry.ends[choice] {
                let Ending { told, piece: Piece { text, calls }, .. } =
                    self.transcript.finish(reason);
                self.tell(told);
                let number = self.at as u32;
                let usage = usage(&self.entry, number, choice);
                let choice = number;
                let event = GenerateEvent::Finished { choice, reason, text, calls, usage, timings };
                self.ready.push_back(event);
            }
            self.at += 1;
            self.index = 0;
            let next = self.order.get(self.at).copied().unwrap_or_default();
            self.transcript = Transcript::new(&self.entry.head, &self.tokenizer, next as u32);
        }
    }
}

impl Iterator for Replay {
    type Item = Result<GenerateEvent, Status>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.step == Step::Start {
            return Some(Ok(self.start()));
        }
        if self.step == Step::Choices {
            if let Some(event) = self.of_choices() {
                return Some(Ok(event));
            }
            self.step = Step::Failure;
        }
        if self.step == Step::Failure {
            self.step = Step::Done;
            return failure(&self.entry).map(|status| Err(status.clone()));
        }
        None
    }
}

/// The event of a token that is told of, of the choice that is sent as `choice`.
pub(super) fn event_of(head: &Head, log: &Log, choice: u32, told: Told) -> Option<GenerateEvent> {
    let Told { index, piece: Piece { text, calls }, hidden } = told;
    let token = log.get(index as usize)?;
    let shown: Option<&TokenLogprobs> = token.logprobs.as_ref().filter(|_| !hidden);
    Some(GenerateEvent::Token {
        choice,
        index,
        token_id: if hidden { HIDDEN_TOKEN } else { token.id },
        text,
        logprobs: shown.filter(|_| head.params.logprobs.is_some()).cloned(),
        calls,
    })
}

fn failure(entry: &Entry) -> Option<&Status> {
    entry.ends.iter().flatten().find_map(|(_, end)| match end {
        End::Failed(status) => Some(status),
        End::Finished { .. } => None,
    })
}

/// The choices to tell, by their number in the log.
fn order(entry: &Entry) -> Vec<usize> {
    let choices = 0..entry.tokens.len();
    if !entry.head.ranks() {
        return choices.collect();
    }
    if entry.ended_ms().is_none() || failure(entry).is_some() {
        return Vec::new();
    }
    let mut ranked: Vec<(f64, usize)> = choices.map(|c| (mean(&entry.tokens[c]), c)).collect();
    ranked.sort_by(|(a, i), (b, j)| b.total_cmp(a).then(i.cmp(j)));
    ranked.into_iter().take(entry.head.n as usize).map(|(_, choice)| choice).collect()
}

/// Mean raw log-probability of the tokens; nothing is more probable than no tokens, so that comes
/// last, as does what is no number.
fn mean(tokens: &Log) -> f64 {
    let found = tokens.iter().filter_map(|t| t.logprobs.as_ref());
    let sum: f64 = found.map(|l| f64::from(l.logprob)).sum();
    let mean = sum / tokens.len() as f64;
    if mean.is_nan() { f64::NEG_INFINITY } else { mean }
}

/// Counts of the choice that is told as `number`.
pub(super) fn usage(entry: &Entry, number: u32, choice: usize) -> Usage {
    let cached = |end: &Option<(u64, End)>| match end {
        Some((_, End::Finished { cached_tokens, .. })) => Some(*cached_tokens),
        _ => None,
    };
    let discarded = || {
        let kept = order(entry);
        let left_out = (0..entry.tokens.len()).filter(|c| !kept.contains(c));
        left_out.map(|c| entry.tokens[c].len() as u32).sum()
    };
    Usage {
        prompt_tokens: entry.head.prompt.len() as u32,
        completion_tokens: entry.tokens[choice].len() as u32,
        cached_tokens: match entry.head.ranks() {
            true => entry.ends.iter().filter_map(cached).min().unwrap_or_default(),
            false => cached(&entry.ends[choice]).unwrap_or_default(),
        },
        discarded_tokens: if number == 0 && entry.head.ranks() { discarded() } else { 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Token;

    #[test]
    fn the_mean_decides_and_nothing_comes_last() {
        let log = |found: &[f32]| {
            let mut log = Log::default();
            for &logprob in found {
                let logprobs = Some(TokenLogprobs { logprob, top: Vec::new() });
                log.push(Token { id: 1, at_ms: 0, logprobs });
            }
            log
        };
        assert!(mean(&log(&[-0.5, -0.5, -0.5])) > mean(&log(&[-0.6])));
        assert_eq!(mean(&log(&[])), f64::NEG_INFINITY);
        assert_eq!(mean(&log(&[f32::NAN, -0.1])), f64::NEG_INFINITY);
        assert_eq!(mean(&log(&[f32::NEG_INFINITY])), f64::NEG_INFINITY);
    }
}
