//! Conversations as clients send them, and calls of tools as answers make them.
//!
//! Part of the client API ([`super::rpc`]). Only the shape is here: what a tool's description has to
//! look like is for the coordinator to say, as is what a model makes of it.

use serde::{Deserialize, Serialize};

use super::bounded;

/// Most messages of a conversation.
pub const MAX_CHAT_MESSAGES: usize = 4096;
/// Most tools of a conversation.
pub const MAX_TOOLS: usize = 128;
/// Most tool calls of a message.
pub const MAX_TOOL_CALLS: usize = 64;

/// What was said, and the tools that the answer may call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Conversation {
    /// The turns, at most [`MAX_CHAT_MESSAGES`].
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_CHAT_MESSAGES>")]
    pub messages: Vec<ChatMessage>,
    /// Functions that may be called, at most [`MAX_TOOLS`]: each a JSON object with `name`, and, where
    /// there is more to say, `description` and `parameters` (a JSON schema).
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_TOOLS>")]
    pub tools: Vec<String>,
    /// Whether one is to be called.
    pub tool_choice: ToolChoice,
    /// Leave it at one call per answer.
    pub single_call: bool,
}

impl From<Vec<ChatMessage>> for Conversation {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// Whether an answer calls tools.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// It calls none, and does not hear of them.
    None,
    /// It calls at least one.
    Required,
    /// It calls this one, once.
    Named(String),
}

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, `tool` or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
    /// What an assistant called, at most [`MAX_TOOL_CALLS`].
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_TOOL_CALLS>")]
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool answers.
    pub tool_call_id: Option<String>,
}

impl ChatMessage {
    /// A turn of words.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
    }
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Its name, to which the tool's answer refers.
    pub id: String,
    /// The tool.
    pub name: String,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

/// What became known of a call in an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallPiece {
    /// Which call of the choice, 0 first.
    pub call: u32,
    /// Its id and the tool, with the first piece; empty afterwards.
    pub id: String,
    /// See `id`.
    pub name: String,
    /// More of the arguments: all pieces together are JSON.
    pub arguments: String,
}
