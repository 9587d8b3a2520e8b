//! The client API: one bidirectional stream per call. The client sends two messages, a
//! [`CallHeader`] and a [`Method`], without waiting in between; the server answers with [`Reply`]
//! frames, the last of which is `Done` or `Failed`.
//!
//! The server checks the key in the header before it reads the method, so that only clients with a
//! key can make it hold more than [`super::MAX_CALL_HEADER_BYTES`]. Lists of strings have a limit
//! on their entries besides that on the bytes.

use serde::{Deserialize, Serialize};

use super::admin::{AdminReply, AdminRequest};
use super::bounded;
pub use super::chat::{
    CallPiece, ChatMessage, Conversation, MAX_CHAT_MESSAGES, MAX_TOOL_CALLS, MAX_TOOLS, ToolCall,
    ToolChoice,
};
pub use super::status::{ClusterStatus, ModelCard, StageStatus};
use crate::error::Status;
use crate::id::RequestId;
use crate::pooling::Pooling;
use crate::sampling::SamplingParams;

/// Most pairs of metadata of a call.
pub const MAX_METADATA: usize = 32;
/// Stands for a token that nobody is to know.
pub const HIDDEN_TOKEN: u32 = u32::MAX;
/// Most texts of a request for embeddings.
pub const MAX_EMBED_INPUTS: usize = 2048;
/// Most choices of a request.
pub const MAX_CHOICES: usize = 16;

/// The first message of a client on a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallHeader {
    /// Free-form pairs, at most [`MAX_METADATA`]; `authorization: Bearer KEY` is required.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_METADATA>")]
    pub metadata: Vec<(String, String)>,
    /// Milliseconds after which the caller no longer wants an answer.
    pub deadline_ms: Option<u64>,
}

/// The second and last message of a client on a stream: what is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Method {
    /// Stream a continuation: replies `Started`, `Token`…, a `Finished` for each choice, `Done`.
    Generate(GenerateRequest),
    /// Score given tokens: replies `Scores`…, `Done`.
    Score(ScoreRequest),
    /// Text to ids: reply `Tokens`.
    Tokenize(TokenizeRequest),
    /// Ids to text: reply `Text`.
    Detokenize { ids: Vec<u32> },
    /// What is served: reply `Models`.
    Models,
    /// Stop a request of this client: reply `Done`.
    Cancel { request_id: RequestId },
    /// The state of the cluster: reply `Status`.
    Status,
    /// For administrators: reply `Admin`.
    Admin(AdminRequest),
    /// Hear a continuation that was asked for before, from a token on: replies as of `Generate`.
    Attach(AttachRequest),
    /// Make vectors of texts: replies `Embeddings`…, `Done`.
    Embed(EmbedRequest),
}

/// Metadata: the class of a request, `high`, `normal` or `low`.
pub const META_PRIORITY: &str = "millrace-priority";
/// Metadata of `Generate`: the client's own id (a UUID) of the request. Where it is in use for the
/// same content, the call attaches to that request; for another, it is refused.
pub const META_REQUEST_ID: &str = "millrace-request-id";
/// Metadata of `Generate`: for how many seconds the request goes on when the connection of whoever
/// listens is lost. Dropping the stream of replies ends it at once all the same.
pub const META_KEEP_ALIVE: &str = "millrace-keep-alive";
/// Metadata: the span that the call belongs to, as W3C Trace Context writes it.
pub const META_TRACEPARENT: &str = "traceparent";
/// Metadata: what vendors say of the same trace.
pub const META_TRACESTATE: &str = "tracestate";

/// A request to hear a continuation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRequest {
    /// As `Started` named it.
    pub request_id: RequestId,
    /// Index of the first token to send, per choice, at most [`MAX_CHOICES`]; 0 where an entry is
    /// missing.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_CHOICES>")]
    pub next: Vec<u32>,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    /// Plain text; special tokens are parsed, none are added.
    Text(String),
    /// Ids as they are.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's chat template.
    Chat(Conversation),
}

/// How many continuations of one prompt. Each is a choice with a random stream of its own; the first
/// is the same as where only one is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choices {
    /// How many are wanted.
    pub n: u32,
    /// How many are made: of more than `n`, those with the highest mean raw log-probability are
    /// sent, best first, once all have ended.
    pub best_of: u32,
}

impl Default for Choices {
    fn default() -> Self {
        Self::of(1)
    }
}

impl Choices {
    /// `n` choices, all of which are sent as they come.
    pub fn of(n: u32) -> Self {
        Self { n, best_of: n }
    }

    /// Checks the limits.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the field.
    pub fn validate(self) -> Result<(), Status> {
        let most = MAX_CHOICES as u32;
        for (name, count) in [("n", self.n), ("best_of", self.best_of)] {
            if !(1..=most).contains(&count) {
                let message = format!("must be between 1 and {most}, got {count}");
                return Err(Status::invalid(name, message));
            }
        }
        if self.best_of < self.n {
            let message = format!("{} cannot give the {} of 'n'", self.best_of, self.n);
            return Err(Status::invalid("best_of", message));
        }
        Ok(())
    }
}

/// A request for continuations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// Served model name; empty means the only one.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// Sampling and stopping.
    pub params: SamplingParams,
    /// How many continuations.
    pub choices: Choices,
}

/// A request for the log-probabilities of given tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreRequest {
    /// Served model name; empty means the only one.
    pub model: String,
    /// The tokens; position `i` is scored for token `i + 1`.
    pub tokens: Vec<u32>,
    /// How many of the largest logits to return per position, at most 64.
    pub top_k: u8,
}

/// A request for embeddings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmbedRequest {
    /// Served model name; empty means the only one.
    pub model: String,
    /// Texts or ids, at most [`MAX_EMBED_INPUTS`]; no conversations.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_EMBED_INPUTS>")]
    pub inputs: Vec<Prompt>,
    /// Which hidden states a vector is made of.
    pub pooling: Pooling,
    /// Only so many numbers of each vector, made as long as 1 again; `None` for all.
    pub dimensions: Option<u32>,
}

/// The embedding of one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embedded {
    /// Tokens that the text became.
    pub prompt_tokens: u32,
    /// With an Euclidean length of 1.
    pub vector: Vec<f32>,
}

/// A request to tokenise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenizeRequest {
    /// Served model name; empty means the only one.
    pub model: String,
    /// Plain text or a conversation.
    pub prompt: Prompt,
}

/// The log-probability of a token and its rivals, raw: before bias, penalties and temperature.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Default,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct TokenLogprobs {
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The most probable tokens, best first, with theirs.
    pub top: Vec<(u32, f32)>,
}

/// What one position of a scored sequence says.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Default,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct PositionScore {
    /// The position in the sequence.
    pub position: u32,
    /// Log-probability of the token that follows in the sequence; `None` at the last position.
    pub next_logprob: Option<f32>,
    /// The largest logits, best first.
    pub top_logits: Vec<(u32, f32)>,
    /// Log of the sum of the exponentials of all logits.
    pub log_sum_exp: f32,
}

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// Somebody cancelled it.
    Cancelled,
    /// It ended with calls of tools.
    ToolCalls,
    /// The operator's rules ended it: what would have followed is not for sending.
    ContentFilter,
}

impl FinishReason {
    /// As JSON and metrics spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
        }
    }
}

/// Exact token counts of one choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt, which all choices share.
    pub prompt_tokens: u32,
    /// Tokens generated, the end token included.
    pub completion_tokens: u32,
    /// Prompt tokens found in the prefix cache; further choices find what the first one computes.
    pub cached_tokens: u32,
    /// Tokens of choices that `best_of` made and that are not sent; with choice 0 only.
    pub discarded_tokens: u32,
}

/// Where the time of a request went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Milliseconds from submission to the first scheduled row.
    pub queue_ms: f64,
    /// Milliseconds from submission to the first token.
    pub ttft_ms: f64,
    /// Milliseconds from the first token to the last.
    pub decode_ms: f64,
}

/// What a stream of a continuation carries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum GenerateEvent {
    /// Accepted and queued.
    Started {
        /// Name of the request, for `Cancel`.
        request_id: RequestId,
        /// The ids that the prompt became.
        prompt_token_ids: Vec<u32>,
        /// The seed in use, drawn by the coordinator where none was given.
        seed: u64,
        /// How many choices come; their events are mixed.
        choices: u32,
        /// Tokens of the prompt that were left out because it was too long.
        left_out: u32,
    },
    /// One more token. Text may lag behind: characters and stop strings are never split.
    Token {
        /// Of which choice, 0 first.
        choice: u32,
        /// Index in the choice, 0 first, without gaps.
        index: u32,
        /// The token; [`HIDDEN_TOKEN`] where the operator's rules hide its text.
        token_id: u32,
        /// Text that became certain with this token; often empty, never half a character.
        text: String,
        /// Present where asked for.
        logprobs: Option<TokenLogprobs>,
        /// What became certain of calls of tools; their text is not in `text`.
        calls: Vec<CallPiece>,
    },
    /// The end of a choice.
    Finished {
        /// Which.
        choice: u32,
        /// Why.
        reason: FinishReason,
        /// Text that was held back until now (for example a stop string half matched).
        text: String,
        /// The same of calls.
        calls: Vec<CallPiece>,
        /// Token counts.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
    },
}

/// A frame from the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Part of a continuation.
    Event(GenerateEvent),
    /// Scores of some positions, in order.
    Scores(Vec<PositionScore>),
    /// Ids.
    Tokens(Vec<u32>),
    /// Text.
    Text(String),
    /// Served models.
    Models(Vec<ModelCard>),
    /// State of the cluster.
    Status(Box<ClusterStatus>),
    /// To an administrator.
    Admin(AdminReply),
    /// The call is complete.
    Done,
    /// The call failed; nothing follows.
    Failed(Status),
    /// Embeddings of some texts, in order.
    Embeddings(Vec<Embedded>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::codec::{decode, encode};

    fn turns(count: usize) -> Vec<ChatMessage> {
        vec![ChatMessage::default(); count]
    }

    #[test]
    fn lists_of_strings_are_bounded() {
        let most = Prompt::Chat(turns(MAX_CHAT_MESSAGES).into());
        assert_eq!(decode::<Prompt>(&encode(&most)).unwrap(), most);
        let more = encode(&Prompt::Chat(turns(MAX_CHAT_MESSAGES + 1).into()));
        let message = decode::<Prompt>(&more).unwrap_err().to_string();
        assert!(message.contains("at most 4096 entries"), "{message}");

        let header = |pairs| CallHeader {
            metadata: vec![("a".to_owned(), "b".to_owned()); pairs],
            deadline_ms: Some(5),
        };
        assert_eq!(decode::<CallHeader>(&encode(&header(32))).unwrap(), header(32));
        assert!(decode::<CallHeader>(&encode(&header(33))).is_err());

        let attach = |next| AttachRequest { request_id: RequestId(uuid::Uuid::nil()), next };
        let most = attach(vec![1; MAX_CHOICES]);
        assert_eq!(decode::<AttachRequest>(&encode(&most)).unwrap(), most);
        assert!(decode::<AttachRequest>(&encode(&attach(vec![1; MAX_CHOICES + 1]))).is_err());

        let params = |stops| SamplingParams { stop: vec!["x".into(); stops], ..Default::default() };
        assert_eq!(decode::<SamplingParams>(&encode(&params(17))).unwrap(), params(17));
        assert!(decode::<SamplingParams>(&encode(&params(100_000))).is_err());
    }
    #[test]
    fn choices_are_bounded() {
        let check = |n, best_of| Choices { n, best_of }.validate().map_err(|s| s.param);
        for (n, best_of) in [(1, 1), (2, 2), (1, 16), (16, 16)] {
            assert_eq!(check(n, best_of), Ok(()));
        }
        for (n, best_of, param) in
            [(0, 1, "n"), (17, 17, "n"), (1, 0, "best_of"), (1, 17, "best_of"), (3, 2, "best_of")]
        {
            assert_eq!(check(n, best_of), Err(Some(param.to_owned())), "{n} of {best_of}");
        }
    }
}
