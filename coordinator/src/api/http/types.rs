//! The bodies and chunks of OpenAI's API, as far as Millrace writes them.

use std::collections::BTreeMap;

use millrace_shared::wire::rpc::{ModelCard, Usage};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

/// Exact token counts of a request.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(rename = "Usage")]
pub(crate) struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u64,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
struct PromptDetails {
    cached_tokens: u32,
}

impl UsageBody {
    /// The counts of what was asked for at once by those of its choices, of which `each` share a
    /// prompt.
    pub(crate) fn of(choices: &[(u32, Usage)], each: u32) -> Self {
        let made = |u: &Usage| u.completion_tokens + u.discarded_tokens;
        let completion_tokens: u32 = choices.iter().map(|(_, u)| made(u)).sum();
        // By prompt: what the first choice computes, the others find.
        let mut prompts: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        for (choice, usage) in choices {
            let found = (usage.prompt_tokens, usage.cached_tokens);
            let prompt = prompts.entry(choice / each.max(1)).or_insert(found);
            *prompt = (prompt.0.max(found.0), prompt.1.min(found.1));
        }
        let prompt_tokens: u32 = prompts.values().map(|(tokens, _)| tokens).sum();
        let cached_tokens: u32 = prompts.values().map(|(_, cached)| cached).sum();
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: u64::from(prompt_tokens) + u64::from(completion_tokens),
            prompt_tokens_details: PromptDetails { cached_tokens },
        }
    }
}

/// A whole answer or one chunk of it; they differ in `object` and in what a choice holds.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Answer")]
pub(crate) struct Envelope<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    /// Unix seconds.
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: Vec<Choice>,
    /// Absent in streams without usage, null in all but the last chunk of streams with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<UsageBody>>,
}

/// One choice: exactly one of `message`, `delta` and `text` is there.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(crate) struct Choice {
    pub(crate) index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) delta: Option<Delta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<String>,
    pub(crate) logprobs: Option<LogprobsBody>,
    pub(crate) finish_reason: Option<&'static str>,
}

/// The answer of a chat.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Message {
    pub(crate) role: &'static str,
    /// Null where there are only calls.
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<CallBody>,
    /// Always null; strict clients want the key.
    pub(crate) refusal: Option<String>,
}

/// What a chunk adds to the answer of a chat.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<CallBody>,
}

/// A call of a tool, or in chunks a part of one.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Call")]
pub(crate) struct CallBody {
    /// Which call; in chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: CallFunction,
}

/// What is called, and with what.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CallFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}

/// Log-probabilities in the shape of the endpoint.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "Logprobs")]
pub(crate) enum LogprobsBody {
    /// Of chat completions.
    Chat {
        /// One entry per token.
        content: Vec<TokenLogprob>,
        /// Always null.
        refusal: Option<Value>,
    },
    /// Of completions: parallel lists, one entry per token.
    Completion {
        /// Text of the tokens.
        tokens: Vec<String>,
        /// Their log-probabilities; null for the first of a prompt, before which there is nothing.
        token_logprobs: Vec<Option<f32>>,
        /// The best tokens and the chosen one; null for the same.
        top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
        /// Characters before each token, counted from the start of the answer.
        text_offset: Vec<usize>,
    },
}

/// A token with its rivals.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct TokenLogprob {
    #[serde(flatten)]
    pub(crate) chosen: Candidate,
    pub(crate) top_logprobs: Vec<Candidate>,
}

/// A token that was or could have been chosen.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Candidate {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    /// UTF-8, of which a token may be only a part.
    pub(crate) bytes: Vec<u8>,
}

/// One entry of the model list.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Model")]
pub(crate) struct ModelBody {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: u32,
    meta: ModelMeta,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ModelMeta {
    n_vocab: u32,
    n_ctx: u32,
    /// Weights in bytes.
    size: u64,
    /// Numbers in an embedding.
    n_embd: u32,
}

impl From<ModelCard> for ModelBody {
    fn from(card: ModelCard) -> Self {
        Self {
            id: card.id,
            object: "model",
            created: card.created,
            owned_by: "millrace",
            max_model_len: card.max_model_len,
            meta: ModelMeta {
                n_vocab: card.vocab,
                n_ctx: card.max_model_len,
                size: card.weight_bytes,
                n_embd: card.hidden,
            },
        }
    }
}
