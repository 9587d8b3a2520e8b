//! What a request to `/v1/responses` asks for.

use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{ChatMessage, Conversation};
use serde_json::{Map, Value, json};

use super::super::chat::join_parts;
use super::super::error::ApiError;
use super::super::fields::Fields;
use super::super::options::{self, Options};
use super::super::tools::{self, Nesting};

/// Most messages of an input.
const MAX_ITEMS: usize = 4096;
/// What is said of the request in the response, as it was asked.
const SAID: [&str; 10] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "previous_response_id",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
    "user",
];

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Asked {
    /// Everything but the conversation.
    pub(super) options: Options,
    /// What the input adds, with the tools.
    pub(super) conversation: Conversation,
    /// What the system says, this time only.
    pub(super) instructions: Option<String>,
    /// The response that this one goes on from.
    pub(super) previous: Option<String>,
    /// Whether it goes on without anybody who listens.
    pub(super) background: bool,
    /// Whether it can be asked for afterwards.
    pub(super) store: bool,
    /// Fields of the response that repeat the request.
    pub(super) said: Map<String, Value>,
    /// Names of the fields that were ignored.
    pub(super) ignored: Vec<String>,
}

/// Reads a body.
///
/// # Errors
/// Naming the field that is wrong or not supported.
pub(super) fn read(mut fields: Fields, usual: SamplingParams) -> Result<Asked, ApiError> {
    refuse_unsupported(&mut fields)?;
    let mut said = said_of(&fields);
    let previous = fields.take("previous_response_id")?;
    let instructions = fields.take("instructions")?;
    let background = fields.take("background")?.unwrap_or(false);
    let store = fields.take("store")?.unwrap_or(true);
    if background && !store {
        let why = "must be true where background is: the answer is asked for afterwards";
        return Err(ApiError::invalid("store", why));
    }
    fields.take::<Map<String, Value>>("metadata")?;
    let mut conversation = Conversation::from(take_input(&mut fields)?);
    tools::take(&mut fields, Nesting::Flat, &mut conversation)?;
    take_format(&mut fields)?;
    if let Some(limit) = fields.take_value("max_output_tokens") {
        fields.put("max_tokens", limit);
    }
    let options = options::take(&mut fields, usual, None).map_err(|e| {
        // As the client spelled it.
        if e.param() == Some("max_tokens") {
            return ApiError::invalid("max_output_tokens", "must be a whole number, at least 1");
        }
        e
    })?;
    said.insert("background".into(), json!(background));
    said.insert("store".into(), json!(store));
    said.insert("parallel_tool_calls".into(), json!(!conversation.single_call));
    let ignored = fields.into_ignored();
    let asked =
        Asked { options, conversation, instructions, previous, background, store, said, ignored };
    Ok(asked)
}

/// Fields that would change the answer.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let table: &[(&str, &[Value])] = &[
        ("prompt", &[]),
        ("conversation", &[]),
        ("include", &[json!([])]),
        ("top_logprobs", &[json!(0)]),
        ("truncation", &[json!("disabled")]),
        ("reasoning", &[json!({}), json!({"effort": "none"}), json!({"effort": null})]),
        ("n", &[json!(1)]),
        ("best_of", &[json!(1)]),
        // These have other names here.
        ("response_format", &[]),
        ("max_tokens", &[]),
        ("max_completion_tokens", &[]),
        ("messages", &[]),
    ];
    table.iter().try_for_each(|(field, harmless)| fields.refuse_unless(field, harmless))
}

fn said_of(fields: &Fields) -> Map<String, Value> {
    let mut said = Map::new();
    for name in SAID {
        let usual = match name {
            "metadata" => json!({}),
            "temperature" | "top_p" => json!(1.0),
            "text" => json!({"format": {"type": "text"}}),
            "tool_choice" => json!("auto"),
            "tools" => json!([]),
            _ => Value::Null,
        };
        said.insert(name.to_owned(), fields.peek(name).cloned().unwrap_or(usual));
    }
    said.insert("truncation".into(), json!("disabled"));
    said
}

/// `text.format` becomes what chat completions call `response_format`.
fn take_format(fields: &mut Fields) -> Result<(), ApiError> {
    let Some(value) = fields.take_value("text") else { return Ok(()) };
    let mut text = Fields::nested("text", value)?;
    text.refuse_unless("verbosity", &[json!("medium")])?;
    if let Some(format) = text.take_value("format") {
        let mut format = Fields::nested("text.format", format)?;
        let kind: String = format.take("type")?.unwrap_or_default();
        let format = match kind.as_str() {
            "text" | "json_object" => json!({ "type": kind }),
            "json_schema" => {
                let missing = || ApiError::invalid("text.format.schema", "is missing");
                let schema = format.take_value("schema").ok_or_else(missing)?;
                json!({"type": kind, "json_schema": {"schema": schema}})
            }
            _ => {
                let why = format!("'{kind}' is not known: use text, json_object or json_schema");
                return Err(ApiError::invalid("text.format.type", why));
            }
        };
        fields.put("response_format", format);
    }
    fields.note_ignored(text.into_ignored());
    Ok(())
}

/// The messages of the input: a text, or a list of items.
fn take_input(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let items = match fields.take_value("input") {
        None => {
            return Err(ApiError::invalid("input", "is missing: give a text or a list of items"));
        }
        Some(Value::String(text)) => return Ok(vec![ChatMessage::new("user", text)]),
        Some(Value::Array(items)) if (1..=MAX_ITEMS).contains(&items.len()) => items,
        Some(_) => {
            let why = format!("must be a text or a list of 1 to {MAX_ITEMS} items");
            return Err(ApiError::invalid("input", why));
        }
    };
    let mut messages = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let mut item = Fields::nested(&format!("input[{index}]"), item)?;
        take_item(&mut item, &mut messages)?;
    }
    Ok(messages)
}

fn take_item(item: &mut Fields, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let kind: String = item.take("type")?.unwrap_or_else(|| "message".to_owned());
    match kind.as_str() {
        "message" => {
            let name = item.name("role");
            let missing = || ApiError::invalid(&name, "is missing: use system, user or assistant");
            let role: String = item.take("role")?.ok_or_else(missing)?;
            let role = if role == "developer" { "system".to_owned() } else { role };
            let content = take_text(item, "content")?;
            messages.push(ChatMessage::new(role, content));
        }
        "function_call" => {
            let id = call_id(item)?;
            let call = tools::take_call(item, id)?;
            match messages.last_mut().filter(|m| m.role == "assistant") {
                Some(last) => last.tool_calls.push(call),
                None => messages.push(ChatMessage {
                    tool_calls: vec![call],
                    ..ChatMessage::new("assistant", "")
                }),
            }
        }
        "function_call_output" => {
            let tool_call_id = Some(call_id(item)?);
            let content = take_text(item, "output")?;
            messages.push(ChatMessage { tool_call_id, ..ChatMessage::new("tool", content) });
        }
        // Models here are told nothing of what others thought.
        "reasoning" => {}
        _ => {
            let why = format!(
                "items of type '{kind}' are not supported; use message, function_call or \
                 function_call_output"
            );
            return Err(ApiError::invalid(&item.name("type"), why));
        }
    }
    Ok(())
}

fn call_id(item: &mut Fields) -> Result<String, ApiError> {
    let name = item.name("call_id");
    item.take("call_id")?.ok_or_else(|| ApiError::invalid(&name, "is missing"))
}

fn take_text(item: &mut Fields, field: &str) -> Result<String, ApiError> {
    let name = item.name(field);
    match item.take_value(field) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => join_parts(&name, parts),
        Some(_) => Err(ApiError::invalid(&name, "must be a text or an array of parts")),
        None => Err(ApiError::invalid(&name, "is missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(body: &Value) -> Result<Asked, ApiError> {
        read(Fields::parse(body.to_string().as_bytes())?, SamplingParams::default())
    }

    #[test]
    fn items_become_messages() {
        let call = |id: &str| json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"});
        let got = asked(&json!({"instructions": "Be brief.", "max_output_tokens": 7, "input": [
            {"role": "developer", "content": "x"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": []},
            {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            call("a"), call("b"),
            {"type": "function_call_output", "call_id": "a", "output": "4"},
        ], "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}}));
        let got = got.expect("valid");
        let roles: Vec<&str> = got.conversation.messages.iter().map(|m| &*m.role).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        assert_eq!(got.conversation.messages[2].tool_calls.len(), 2);
        assert_eq!(got.options.params.max_tokens, Some(7));
        assert!(got.options.params.grammar.is_some() && got.store && !got.background);
        assert_eq!(got.said["instructions"], "Be brief.");
        assert_eq!(got.said["text"]["format"]["name"], "n");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({}), "input"),
            (json!({"input": []}), "input"),
            (json!({"input": [{"type": "item_reference"}]}), "input[0].type"),
            (json!({"input": [{"role": "user"}]}), "input[0].content"),
            (json!({"input": "x", "max_output_tokens": 0}), "max_output_tokens"),
            (json!({"input": "x", "background": true, "store": false}), "store"),
            (json!({"input": "x", "conversation": "c"}), "conversation"),
            (json!({"input": "x", "tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"input": "x", "text": {"format": {"type": "xml"}}}), "text.format.type"),
            (json!({"input": "x", "include": ["reasoning.encrypted_content"]}), "include"),
        ] {
            let error = asked(&body).expect_err("refused");
            assert_eq!(error.param(), Some(param), "{body}: {error}");
        }
    }
}
