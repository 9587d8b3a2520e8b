//! Log-probabilities in the shapes of the two endpoints.
//!
//! The service knows tokens by id; their text comes from detokenising each alone. The text of a token
//! that is only part of a character is the replacement character; `bytes` are always the token's own.

use std::collections::BTreeMap;

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{PositionScore, TokenLogprobs};

use super::generation::Kind;
use super::types::{Candidate, LogprobsBody, TokenLogprob};
use crate::service::Service;

/// JSON has no infinity; this is what OpenAI sends for "impossible".
const LEAST_LOGPROB: f32 = -9999.0;

/// Writes the entries of one answer, token by token.
#[derive(Debug)]
pub(crate) struct LogprobWriter {
    kind: Kind,
    offset: usize,
}

impl LogprobWriter {
    /// After a prompt with which the answer begins.
    pub(crate) fn after(kind: Kind, prompt: &str) -> Self {
        Self { kind, offset: prompt.chars().count() }
    }

    /// The next token is hidden, and stands for this text.
    pub(crate) fn skip(&mut self, text: &str) {
        self.offset += text.chars().count();
    }

    /// The entry of the next token.
    ///
    /// # Errors
    /// If the service does not know an id that it sent itself.
    pub(crate) fn next(
        &mut self,
        service: &dyn Service,
        token_id: u32,
        found: &TokenLogprobs,
    ) -> Result<LogprobsBody, Status> {
        let chosen = candidate(service, token_id, found.logprob)?;
        let top = rivals(service, found)?;
        Ok(match self.kind {
            Kind::Chat => LogprobsBody::Chat {
                content: vec![TokenLogprob { chosen, top_logprobs: top }],
                refusal: None,
            },
            Kind::Completion => {
                let text_offset = vec![self.offset];
                self.offset += chosen.token.chars().count();
                LogprobsBody::Completion {
                    token_logprobs: vec![Some(chosen.logprob)],
                    top_logprobs: vec![Some(by_text(&chosen, top))],
                    tokens: vec![chosen.token],
                    text_offset,
                }
            }
        })
    }
}

/// The entries of a prompt's tokens, of which the first has no probability: nothing comes before it.
/// `said` is the text with which the answer begins, `scores` has one entry per token.
///
/// # Errors
/// If a score is missing, or the service does not know an id that it was asked for.
pub(crate) fn prompt_logprobs(
    service: &dyn Service,
    said: &str,
    ids: &[u32],
    scores: &[PositionScore],
) -> Result<LogprobsBody, Status> {
    let mut place = Place { said, byte: 0, offset: 0 };
    let (mut tokens, mut token_logprobs) = (Vec::new(), Vec::new());
    let (mut top_logprobs, mut text_offset) = (Vec::new(), Vec::new());
    for (index, &id) in ids.iter().enumerate() {
        text_offset.push(place.offset);
        place.pass(&service.token_bytes(id));
        if index == 0 {
            tokens.push(service.detokenize(&[id])?);
            token_logprobs.push(None);
            top_logprobs.push(None);
            continue;
        }
        let found = scores.get(index - 1).and_then(|score| before(score, id));
        let found = found
            .ok_or_else(|| Status::internal(format!("token {index} of a prompt has no score")))?;
        let chosen = candidate(service, id, found.logprob)?;
        top_logprobs.push(Some(by_text(&chosen, rivals(service, &found)?)));
        token_logprobs.push(Some(chosen.logprob));
        tokens.push(chosen.token);
    }
    Ok(LogprobsBody::Completion { tokens, token_logprobs, top_logprobs, text_offset })
}

/// What the position before a token says of it.
fn before(score: &PositionScore, next: u32) -> Option<TokenLogprobs> {
    let logprob = score.next_logprob?;
    let told = |&(id, logit): &(u32, f32)| {
        let rival = (f64::from(logit) - f64::from(score.log_sum_exp)) as f32;
        (id, if id == next { logprob } else { rival })
    };
    Some(TokenLogprobs { logprob, top: score.top_logits.iter().map(told).collect() })
}

/// Where in a text its tokens are. Those that are not of it (such as one that begins every text)
/// take no place.
struct Place<'s> {
    said: &'s str,
    byte: usize,
    /// Characters before it.
    offset: usize,
}

impl Place<'_> {
    fn pass(&mut self, token: &[u8]) {
        let rest = self.said.as_bytes().get(self.byte..).unwrap_or_default();
        // Some tokenizers put a space before a text.
        let without = token.strip_prefix(b" ").filter(|_| self.byte == 0);
        let here = [Some(token), without].into_iter().flatten().find(|t| rest.starts_with(t));
        let begins = |byte: &&u8| (**byte & 0xc0) != 0x80;
        self.offset += here.map_or(0, |token| token.iter().filter(begins).count());
        self.byte += here.map_or(0, <[u8]>::len);
    }
}

fn rivals(service: &dyn Service, found: &TokenLogprobs) -> Result<Vec<Candidate>, Status> {
    found.top.iter().map(|&(id, logprob)| candidate(service, id, logprob)).collect()
}

/// The best tokens by text, and the chosen one where it is not among them. Of several tokens with
/// the same text (parts of characters) the most probable stays.
fn by_text(chosen: &Candidate, top: Vec<Candidate>) -> BTreeMap<String, f32> {
    let mut map = BTreeMap::new();
    for rival in top {
        map.entry(rival.token).or_insert(rival.logprob);
    }
    map.entry(chosen.token.clone()).or_insert(chosen.logprob);
    map
}

fn candidate(service: &dyn Service, id: u32, logprob: f32) -> Result<Candidate, Status> {
    let token = service.detokenize(&[id])?;
    let bytes = service.token_bytes(id);
    // Also turns NaN into the least value.
    let logprob = logprob.max(LEAST_LOGPROB);
    Ok(Candidate { token, logprob, bytes })
}

impl LogprobsBody {
    /// Appends the entries of later tokens of the same answer.
    pub(crate) fn append(&mut self, later: Self) {
        match (self, later) {
            (Self::Chat { content, .. }, Self::Chat { content: more, .. }) => content.extend(more),
            (
                Self::Completion { tokens, token_logprobs, top_logprobs, text_offset },
                Self::Completion { tokens: t, token_logprobs: l, top_logprobs: r, text_offset: o },
            ) => {
                tokens.extend(t);
                token_logprobs.extend(l);
                top_logprobs.extend(r);
                text_offset.extend(o);
            }
            _ => debug_assert!(false, "an answer has one kind"),
        }
    }
}
