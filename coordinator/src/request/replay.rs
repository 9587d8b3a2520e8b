//! The events of an answer again: what has happened so far, for whoever attaches, and what is sent
//! of several choices once they were compared.
//!
//! A function of the journal's entry, read by whoever listens, one event at a time and on its own
//! thread. Choices come one after the other, each from its own index on. Where choices are ranked,
//! nothing is told of them before all have ended; then the best come, under numbers from 0 on, the
//! same at every reading.

use std::sync::Arc;

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{GenerateEvent, TokenLogprobs, Usage};

use super::transcript::Transcript;
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
        }
    }

    /// The next event of the choices; `None` when they are through.
    fn of_choices(&mut self) -> Option<GenerateEvent> {
        while let Some(&choice) = self.order.get(self.at) {
            let number = self.at as u32;
            let from = self.from.get(self.at).copied().unwrap_or_default();
            let head = &self.entry.head;
            if let Some(token) = self.entry.tokens[choice].get(self.index as usize) {
                let index = self.index;
                self.index += 1;
                let (Piece { text, calls }, _) = self.transcript.push(token.id);
                if index >= from {
                    return Some(GenerateEvent::Token {
                        choice: number,
                        index,
                        token_id: token.id,
                        text,
                        logprobs: told(head, token.logprobs.as_ref()),
                        calls,
                    });
                }
                continue;
            }
            let end = self.entry.ends[choice].as_ref().map(|(_, end)| end);
            let finished = match end {
                Some(End::Finished { reason, timings, .. }) => {
                    let (Piece { text, calls }, _) = self.transcript.finish(*reason);
                    let (reason, timings) = (*reason, *timings);
                    let usage = usage(&self.entry, number, choice);
                    let choice = number;
                    Some(GenerateEvent::Finished { choice, reason, text, calls, usage, timings })
                }
                Some(End::Failed(_)) | None => None,
            };
            self.at += 1;
            self.index = 0;
            let next = self.order.get(self.at).copied().unwrap_or_default();
            self.transcript = Transcript::new(head, &self.tokenizer, next as u32);
            if finished.is_some() {
                return finished;
            }
        }
        None
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

/// What is told of a token's log-probabilities.
pub(super) fn told(head: &Head, found: Option<&TokenLogprobs>) -> Option<TokenLogprobs> {
    found.filter(|_| head.params.logprobs.is_some()).cloned()
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
