//! A conversation with tools as a template takes it.
//!
//! Templates that know tools get them, calls and results as Hugging Face's `apply_chat_template`
//! hands them over. For the others they become words: the tools a system message, calls part of what
//! the assistant said, results something that the user says.

use millrace_shared::wire::rpc::{ChatMessage, Conversation, ToolCall, ToolChoice};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{CallStyle, Dialect, Tool};
use crate::text::python_json;

/// Length of ids that Mistral's templates take.
const SHORT_ID: usize = 9;

/// What a template is given.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in crate::text) struct Turns {
    pub(in crate::text) messages: Vec<Value>,
    /// None where there are none to call.
    pub(in crate::text) tools: Vec<Value>,
}

/// See the module's documentation. `tools` are those of the conversation.
pub(in crate::text) fn turns(
    conversation: &Conversation,
    tools: &[Tool],
    dialect: Dialect,
) -> Turns {
    let callable = if conversation.tool_choice == ToolChoice::None { &[] } else { tools };
    if dialect.native {
        let message = |m| native(m, dialect.style);
        return Turns {
            messages: conversation.messages.iter().map(message).collect(),
            tools: callable.iter().map(Tool::described).collect(),
        };
    }
    let mut messages: Vec<ChatMessage> = Vec::new();
    if !callable.is_empty() {
        messages.push(ChatMessage::new("system", instructions(callable)));
    }
    for message in &conversation.messages {
        let message = spoken(message);
        match messages.last_mut() {
            // Templates take one system message, and no two turns of one side for tools' results.
            Some(last) if last.role == "system" && message.role == "system" => {
                last.content = format!("{}\n\n{}", message.content, last.content);
            }
            Some(last) if last.role == "user" && is_result(last) && is_result(&message) => {
                last.content = format!("{}\n{}", last.content, message.content);
            }
            _ => messages.push(message),
        }
    }
    let plain = |m: ChatMessage| json!({"role": m.role, "content": m.content});
    Turns { messages: messages.into_iter().map(plain).collect(), tools: Vec::new() }
}

/// A message as Hugging Face's templates expect it; what is not there has no key.
fn native(message: &ChatMessage, style: CallStyle) -> Value {
    let mut turn = Map::new();
    turn.insert("role".into(), json!(message.role));
    turn.insert("content".into(), json!(message.content));
    let id = |id: &str| match style {
        CallStyle::Listed | CallStyle::Named => short_id(id),
        CallStyle::Tagged | CallStyle::Json => id.to_owned(),
    };
    if !message.tool_calls.is_empty() {
        let call = |call: &ToolCall| {
            let function = json!({"name": call.name, "arguments": arguments(call)});
            json!({"id": id(&call.id), "type": "function", "function": function})
        };
        turn.insert("tool_calls".into(), message.tool_calls.iter().map(call).collect());
    }
    if let Some(call) = &message.tool_call_id {
        turn.insert("tool_call_id".into(), json!(id(call)));
    }
    Value::Object(turn)
}

/// Arguments as JSON; as text where they are none.
fn arguments(call: &ToolCall) -> Value {
    serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!(call.arguments))
}

/// An id of nine letters and digits: the one given, where it is such.
fn short_id(id: &str) -> String {
    if id.len() == SHORT_ID && id.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return id.to_owned();
    }
    let hash = blake3::hash(id.as_bytes()).to_hex();
    hash.chars().take(SHORT_ID).collect()
}

fn is_result(message: &ChatMessage) -> bool {
    message.content.starts_with("<tool_response>")
}

/// A message of words alone.
fn spoken(message: &ChatMessage) -> ChatMessage {
    if message.role == "tool" {
        let content = format!("<tool_response>\n{}\n</tool_response>", message.content);
        return ChatMessage::new("user", content);
    }
    let mut content = message.content.clone();
    for call in &message.tool_calls {
        let value = json!({"name": call.name, "arguments": arguments(call)});
        let line = if content.is_empty() { "" } else { "\n" };
        let json = python_json::compact(&value);
        content.push_str(&format!("{line}<tool_call>\n{json}\n</tool_call>"));
    }
    ChatMessage::new(&message.role, content)
}

/// What a model is told of tools whose template has no place for them.
fn instructions(tools: &[Tool]) -> String {
    let mut text = String::from(
        "You can call these functions, which are given as JSON, one on each line:\n<tools>\n",
    );
    for tool in tools {
        text.push_str(&python_json::compact(&tool.described()));
        text.push('\n');
    }
    text.push_str(
        "</tools>\n\nTo call one, answer with its name and arguments as a JSON object within \
         <tool_call></tool_call>:\n<tool_call>\n{\"name\": NAME, \"arguments\": {ARGUMENTS}}\n\
         </tool_call>\nWhat a function returns is told to you within <tool_response>. Where no \
         function helps, answer in words.",
    );
    text
}
