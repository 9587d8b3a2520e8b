//! What the journal holds of a request: what was asked, each token, how it ended.
//!
//! Everything is keyed by (request, choice). The encoding is bincode, so the shape of these types *is* the file's format: whoever changes one of them, or a
//! type inside, raises [`super::store::VERSION`] and writes a migration (a test compares bytes).

use std::sync::Arc;

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::scheduler::Priority;
use millrace_shared::wire::rpc::{FinishReason, Timings, TokenLogprobs};
use serde::{Deserialize, Serialize};

use super::log::Log;
use crate::text::CallForm;
use crate::text::rules::AnswerRules;

/// What was asked. Times are milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Name of the request.
    pub id: RequestId,
    /// Content hash of the model.
    pub model: [u8; 32],
    /// Prompt ids.
    pub prompt: Vec<u32>,
    /// Sampling and stopping.
    pub params: SamplingParams,
    /// The seed, given or drawn.
    pub seed: u64,
    /// Whether the prompt is a conversation, rather than a text to go on with.
    pub chat: bool,
    /// Most tokens of a choice.
    pub max_new: u32,
    /// Choices that are made: `best_of`.
    pub choices: u32,
    /// Who asked: the number that stands for the key.
    pub client: u64,
    /// The class.
    pub priority: Priority,
    /// When it came.
    pub submitted_ms: u64,
    /// When it is of no use any more.
    pub deadline_ms: Option<u64>,
    /// How long it goes on while nobody is connected.
    pub keep_ms: u64,
    /// BLAKE3 of the request as it was asked.
    pub digest: [u8; 32],
    /// What the API that took it wants to know when somebody attaches.
    pub tag: u32,
    /// Choices that are sent. Since version 2.
    pub n: u32,
    /// What the answer is read for, where the request has tools. Since version 4.
    pub calls: Option<CallForm>,
    /// What the API that took it keeps with it, up to a few MiB. Since version 4.
    pub note: Vec<u8>,
    /// What is done to the answers. Since version 5.
    pub rules: Option<AnswerRules>,
    /// Tokens of the prompt that were left out because it was too long. Since version 5.
    pub left_out: u32,
    /// Whether the prompt is not what was sent. Since version 5.
    pub altered: bool,
}

/// One token of a choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Milliseconds from submission.
    pub at_ms: u32,
    /// Where asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum End {
    /// By itself, or cancelled.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
        /// Where the time went.
        timings: Timings,
    },
    /// With an error.
    Failed(Status),
}

/// One entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A request begins.
    Request(Arc<Head>),
    /// A token came.
    Token {
        /// Of which request.
        request: RequestId,
        /// Of which choice.
        choice: u32,
        /// Its index.
        index: u32,
        /// What it is.
        token: Token,
    },
    /// A choice ended.
    End {
        /// Of which request.
        request: RequestId,
        /// Which.
        choice: u32,
        /// When, milliseconds since 1970.
        at_ms: u64,
        /// How.
        end: End,
    },
    /// Nothing of the request is kept any more.
    Erase(RequestId),
}

/// A request as the journal knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// What was asked.
    pub head: Arc<Head>,
    /// Tokens so far, per choice.
    pub tokens: Vec<Log>,
    /// How each choice ended, and when; `None` where it has not.
    pub ends: Vec<Option<(u64, End)>>,
}

impl Record {
    /// Of which request it is.
    pub(super) fn request(&self) -> RequestId {
        match self {
            Self::Request(head) => head.id,
            Self::Token { request, .. } | Self::End { request, .. } | Self::Erase(request) => {
                *request
            }
        }
    }
}

impl Head {
    /// Whether choices are compared when all have ended, and only the best are sent.
    pub fn ranks(&self) -> bool {
        self.n < self.choices
    }

    /// What the last stage is to return of log-probabilities: what was asked for, or what comparing
    /// takes.
    pub fn scored(&self) -> Option<u8> {
        self.params.logprobs.or_else(|| self.ranks().then_some(0))
    }

    /// Bytes that it takes itself, roughly.
    pub fn bytes(&self) -> u64 {
        let SamplingParams { stop, stop_token_ids, logit_bias, grammar, .. } = &self.params;
        let stops: usize = stop.iter().map(|text| 24 + text.len()).sum();
        let grammar = grammar.as_ref().map_or(0, |g| g.source().len());
        let lists = 4 * (self.prompt.len() + stop_token_ids.len()) + 8 * logit_bias.len();
        let rules = self.rules.as_ref().map_or(0, AnswerRules::bytes);
        512 + (lists + stops + grammar + rules + self.note.len()) as u64
    }

    /// Bytes that a token of it takes, roughly: key, entry, and what the log-probabilities hold.
    pub fn token_bytes(&self) -> u64 {
        48 + self.scored().map_or(0, |k| 16 + 8 * (u64::from(k) + 1))
    }
}

impl Entry {
    /// A request without tokens.
    pub fn new(head: Arc<Head>) -> Self {
        let choices = head.choices as usize;
        Self { head, tokens: vec![Log::default(); choices], ends: vec![None; choices] }
    }

    /// Bytes that it takes, roughly.
    pub fn bytes(&self) -> u64 {
        let tokens: u64 = self.tokens.iter().map(|t| t.len() as u64).sum();
        let failed = |end: &Option<(u64, End)>| match end {
            Some((_, End::Failed(status))) => status.message.len() as u64,
            _ => 0,
        };
        let failures: u64 = self.ends.iter().map(failed).sum();
        self.head.bytes() + tokens * self.head.token_bytes() + failures
    }

    /// When the last choice ended; `None` while one runs.
    pub fn ended_ms(&self) -> Option<u64> {
        let ends = self.ends.iter().map(|e| e.as_ref().map(|(at, _)| *at));
        ends.collect::<Option<Vec<_>>>().map(|all| all.into_iter().max().unwrap_or_default())
    }

    /// All of it as records, the request first.
    pub fn records(&self) -> Vec<Record> {
        let request = self.head.id;
        let mut records = vec![Record::Request(Arc::clone(&self.head))];
        for (choice, tokens) in self.tokens.iter().enumerate() {
            records.extend(tokens.iter().enumerate().map(|(index, token)| Record::Token {
                request,
                choice: choice as u32,
                index: index as u32,
                token: token.clone(),
            }));
        }
        for (choice, end) in self.ends.iter().enumerate() {
            let Some((at_ms, end)) = end.clone() else { continue };
            records.push(Record::End { request, choice: choice as u32, at_ms, end });
        }
        records
    }
}
