//! Tools that an answer may call: how models are told of them, and how they write calls.
//!
//! A template that knows tools in a form that is known here ([`CallStyle`]) is used as it is. For any
//! other, a system message describes the tools, and calls are written in the tagged form
//! ([`words`]). Where a call is asked for, a grammar sees to it ([`form`]). What an answer says is
//! read by a [`CallParser`], a function of the request and the tokens alone: calls have the same ids
//! at every reading. Not here: who runs a tool.

mod closed;
mod form;
mod parser;
mod reader;
#[cfg(test)]
mod tests;
mod words;

use millrace_shared::error::Status;
use millrace_shared::sampling::Grammar;
use millrace_shared::wire::rpc::{Conversation, ToolChoice};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub(crate) use parser::{CallParser, Piece};
pub(super) use words::{Turns, turns};

use super::Tokenizer;

/// Longest name of a tool.
const MAX_NAME_CHARS: usize = 64;

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallStyle {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, as Hermes and Qwen; also what
    /// models are told to write whose template says nothing.
    Tagged,
    /// The answer is `{"name": .., "parameters": {..}}`, as Llama 3.
    Json,
    /// `[TOOL_CALLS][{"name": .., "arguments": {..}}]`, as Mistral.
    Listed,
    /// `[TOOL_CALLS]name[ARGS]{..}`, as newer ones of Mistral.
    Named,
}

impl CallStyle {
    /// What a call begins with.
    fn marker(self) -> &'static str {
        match self {
            Self::Tagged => "<tool_call>",
            Self::Json => "<|python_tag|>",
            Self::Listed | Self::Named => "[TOOL_CALLS]",
        }
    }

    /// What calls are written with that may be tokens of their own, which answers otherwise hide.
    fn markup(self) -> &'static [&'static str] {
        match self {
            Self::Tagged => &["<tool_call>", "</tool_call>"],
            Self::Json => &["<|python_tag|>"],
            Self::Listed | Self::Named => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
        }
    }

    /// The one that a template speaks of; `None` where it is none of these.
    fn of_template(source: &str) -> Option<Self> {
        let has = |text: &str| source.contains(text);
        // Forms that begin the same and go on otherwise.
        if has("<function=") || has("<arg_key>") {
            return None;
        }
        match () {
            () if has("[TOOL_CALLS]") && has("[ARGS]") => Some(Self::Named),
            () if has("[TOOL_CALLS]") => Some(Self::Listed),
            () if has("<tool_call>") => Some(Self::Tagged),
            () if has("<|python_tag|>") || has("Environment: ipython") => Some(Self::Json),
            () => None,
        }
    }
}

/// How a template is told of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dialect {
    pub(super) style: CallStyle,
    /// The template does it itself.
    pub(super) native: bool,
}

impl Dialect {
    /// Of a template; `tells` says whether it mentions a tool that it is given.
    pub(super) fn of(source: &str, tells: impl FnOnce() -> bool) -> Self {
        let style = CallStyle::of_template(source).filter(|_| tells());
        Self { style: style.unwrap_or(CallStyle::Tagged), native: style.is_some() }
    }
}

/// What an answer is read for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallForm {
    /// How calls are written.
    pub style: CallStyle,
    /// Names of the tools.
    pub names: Vec<String>,
    /// Leave it at one call.
    pub single: bool,
}

impl CallForm {
    /// Tokens that are shown to whoever reads the answer for calls.
    pub(crate) fn shown(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        self.style.markup().iter().filter_map(|text| tokenizer.special_id(text)).collect()
    }
}

/// A function that may be called.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    name: String,
    definition: Map<String, Value>,
}

impl Tool {
    /// Reads a tool's definition.
    fn parse(text: &str) -> Result<Self, String> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| format!("is not valid JSON: {e}"))?;
        let Value::Object(definition) = value else { return Err("must be an object".into()) };
        let name = definition.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.len() > MAX_NAME_CHARS || !name.chars().all(plain) {
            return Err(format!(
                "needs a name of 1 to {MAX_NAME_CHARS} letters, digits, dashes, dots and underscores"
            ));
        }
        match definition.get("parameters") {
            None | Some(Value::Null | Value::Object(_)) => Ok(Self { name, definition }),
            Some(_) => Err(format!("'{name}' has parameters that are no JSON schema (an object)")),
        }
    }

    /// The schema of its arguments.
    fn parameters(&self) -> Value {
        let given = self.definition.get("parameters").filter(|p| p.is_object());
        given.cloned().unwrap_or_else(|| json!({"type": "object", "properties": {}}))
    }

    /// As templates expect it.
    fn described(&self) -> Value {
        json!({"type": "function", "function": self.definition})
    }
}

/// The tools of a conversation.
///
/// # Errors
/// `InvalidArgument`, naming the one that is wrong.
pub(crate) fn parse(conversation: &Conversation) -> Result<Vec<Tool>, Status> {
    let mut tools: Vec<Tool> = Vec::with_capacity(conversation.tools.len());
    for (index, text) in conversation.tools.iter().enumerate() {
        let tool = Tool::parse(text).map_err(|e| Status::invalid(&format!("tools[{index}]"), e))?;
        if tools.iter().any(|other| other.name == tool.name) {
            let message = format!("there is a tool named '{}' before this one", tool.name);
            return Err(Status::invalid(&format!("tools[{index}]"), message));
        }
        tools.push(tool);
    }
    match &conversation.tool_choice {
        ToolChoice::Required if tools.is_empty() => {
            Err(Status::invalid("tool_choice", "requires a call, but there are no tools"))
        }
        ToolChoice::Named(name) if tools.iter().all(|t| t.name != *name) => {
            Err(Status::invalid("tool_choice", format!("'{name}' is none of the tools")))
        }
        _ => Ok(tools),
    }
}

/// What the answer to a conversation is read for, and the grammar that it follows. `asked` is the
/// grammar of the request.
///
/// # Errors
/// `InvalidArgument` where a grammar and calls exclude each other, or a tool is wrong.
pub(super) fn plan(
    conversation: &Conversation,
    asked: Option<Grammar>,
    style: CallStyle,
    tokenizer: &Tokenizer,
) -> Result<(Option<CallForm>, Option<Grammar>), Status> {
    let tools = parse(conversation)?;
    if tools.is_empty() || conversation.tool_choice == ToolChoice::None {
        return Ok((None, asked));
    }
    let grammar = form::grammar(conversation, &tools, asked, (style, tokenizer))?;
    let names = tools.into_iter().map(|tool| tool.name).collect();
    // A function that is named is called once.
    let named = matches!(conversation.tool_choice, ToolChoice::Named(_));
    let single = conversation.single_call || named;
    Ok((Some(CallForm { style, names, single }), grammar))
}
