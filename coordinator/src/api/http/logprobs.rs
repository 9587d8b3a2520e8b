//! Log-probabilities in the shapes of the two endpoints.
//!
//! The service knows tokens by id; their text comes from detokenising each alone. The text of a token
//! that is only part of a character is the replacement character; `bytes` are always the token's own.

use std::collections::BTreeMap;

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::TokenLogprobs;

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
    /// For an answer of this endpoint.
    pub(crate) fn new(kind: Kind) -> Self {
        Self { kind, offset: 0 }
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
        let top = found
            .top
            .iter()
            .map(|&(id, logprob)| candidate(service, id, logprob))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(match self.kind {
            Kind::Chat => LogprobsBody::Chat {
                content: vec![TokenLogprob { chosen, top_logprobs: top }],
                refusal: None,
            },
            Kind::Completion => {
                let text_offset = vec![self.offset];
                self.offset += chosen.token.chars().count();
                LogprobsBody::Completion {
                    token_logprobs: vec![chosen.logprob],
                    top_logprobs: vec![by_text(&chosen, top)],
                    tokens: vec![chosen.token],
                    text_offset,
                }
            }
        })
    }
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
