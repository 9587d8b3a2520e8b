//! The grammar of answers that have to call a tool, or to have a form where they call none.
//!
//! Written in Lark, with the arguments of each tool as its JSON schema says. The text around them is
//! what the model was trained to write, so that it goes on as it would by itself.

use std::fmt::Write as _;

use millrace_shared::error::Status;
use millrace_shared::sampling::Grammar;
use millrace_shared::wire::rpc::{Conversation, ToolChoice};
use serde_json::{Value, json};

use super::closed::closed;
use super::{CallStyle, Tool};
use crate::text::Tokenizer;
use crate::text::grammar::tight;

/// Most calls of an answer that has to call: small models otherwise go on for ever.
const MOST: usize = 8;

/// The grammar of the answer; `asked` is the request's own.
///
/// # Errors
/// `InvalidArgument` where both cannot be.
pub(super) fn grammar(
    conversation: &Conversation,
    tools: &[Tool],
    asked: Option<Grammar>,
    how: (CallStyle, &Tokenizer),
) -> Result<Option<Grammar>, Status> {
    let (callable, most): (Vec<&Tool>, usize) = match (&conversation.tool_choice, &asked) {
        (ToolChoice::None, _) | (ToolChoice::Auto, None) => return Ok(asked),
        (ToolChoice::Named(name), _) => {
            (tools.iter().filter(|tool| tool.name == *name).collect(), 1)
        }
        (ToolChoice::Required | ToolChoice::Auto, _) => (tools.iter().collect(), MOST),
    };
    let most = if conversation.single_call { 1 } else { most };
    let mut lark = String::new();
    // Where a call is required, no other answer is left to have a form.
    let other = asked.filter(|_| conversation.tool_choice == ToolChoice::Auto);
    let answer = match other {
        None => "",
        Some(asked) => {
            let _ = writeln!(lark, "answer: %json {}", schema_of(asked)?);
            " | answer"
        }
    };
    let calls = calls(how, most);
    let _ = writeln!(lark, "start: calls{answer}\ncalls: {calls}");
    let names: Vec<String> = (0..callable.len()).map(|i| format!("call{i}")).collect();
    let _ = writeln!(lark, "call: {}", names.join(" | "));
    for (i, tool) in callable.into_iter().enumerate() {
        let _ = writeln!(lark, "call{i}: {}", call(how, &tool.name, i));
        let _ = writeln!(lark, "args{i}: %json {}", tight(closed(tool.parameters())));
    }
    Ok(Some(Grammar::Lark(lark)))
}

/// The schema of an answer that calls nothing.
fn schema_of(asked: Grammar) -> Result<Value, Status> {
    let wrong = |e: serde_json::Error| Status::invalid("grammar", e.to_string());
    match asked {
        Grammar::JsonObject => Ok(tight(json!({"type": "object"}))),
        Grammar::JsonSchema(text) => Ok(tight(serde_json::from_str(&text).map_err(wrong)?)),
        Grammar::Regex(_) | Grammar::Lark(_) => {
            let why = "regular expressions and Lark grammars cannot be combined with tools that \
                       may be called: use a JSON schema, or tool_choice none";
            Err(Status::invalid("grammar", why))
        }
    }
}

/// A text as Lark has it: the token of that text, where there is one that is no text otherwise.
fn literal(text: &str, tokenizer: &Tokenizer) -> String {
    match tokenizer.special_id(text) {
        Some(id) => format!("<[{id}]>"),
        // Lark's strings are written as JSON's.
        None => json!(text).to_string(),
    }
}

/// One to `most` calls.
fn calls((style, tokenizer): (CallStyle, &Tokenizer), most: usize) -> String {
    let more = most - 1;
    let again = |separated: &str| {
        if more == 0 { String::new() } else { format!(" ({separated}){{0,{more}}}") }
    };
    let marker = literal(style.marker(), tokenizer);
    match style {
        CallStyle::Tagged => {
            let end = literal("</tool_call>", tokenizer);
            let block = format!("{marker} \"\\n\" call \"\\n\" {end}");
            format!("{block}{}", again(&format!("\"\\n\" {block}")))
        }
        CallStyle::Json => "call".to_owned(),
        CallStyle::Listed => format!("{marker} \"[\" call{} \"]\"", again("\", \" call")),
        CallStyle::Named => format!("{marker} call{}", again(&format!("{marker} call"))),
    }
}

/// One call of a tool, whose arguments are `args{number}`.
fn call((style, tokenizer): (CallStyle, &Tokenizer), name: &str, number: usize) -> String {
    let key = match style {
        CallStyle::Json => "parameters",
        CallStyle::Tagged | CallStyle::Listed => "arguments",
        CallStyle::Named => {
            let args = literal("[ARGS]", tokenizer);
            return format!("{} {args} args{number}", json!(name));
        }
    };
    let before = format!("{{\"name\": {}, \"{key}\": ", json!(name));
    format!("{} args{number} \"}}\"", json!(before))
}
