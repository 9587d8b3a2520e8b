//! `POST /v1/chat/completions`.

use actix_web::{HttpRequest, HttpResponse, web};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{ChatMessage, Conversation, Prompt};
use serde_json::{Value, json};

use super::AppState;
use super::echo::Echo;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{self, Asked, Kind};
use super::options;
use super::request::{Body, caller, read_body};
use super::tools::{self, Nesting};

/// Answers a conversation.
pub(crate) async fn chat(
    state: web::Data<AppState>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let asked = state.counted(read(&request, body, state.service.sampling()))?;
    generation::respond(&state, Kind::Chat, asked).await
}

fn read(request: &HttpRequest, body: Body, usual: SamplingParams) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(&read_body(body)?)?;
    let caller = caller(request)?;
    let mut options = options::take(&mut fields, usual, None)?;
    options.params.logprobs = options::take_chat_logprobs(&mut fields)?;
    let conversation = take_conversation(&mut fields)?
        .ok_or_else(|| ApiError::invalid("messages", "is missing: give at least one message"))?;
    fields.refuse_unless("echo", &[json!(false)])?;
    let prompts = vec![Prompt::Chat(conversation)];
    Ok(Asked { options, prompts, echo: Echo::No, caller, ignored: fields.into_ignored() })
}

/// Takes the conversation with its tools; `None` where there are no messages.
///
/// # Errors
/// Naming the field that is wrong or not supported.
pub(crate) fn take_conversation(fields: &mut Fields) -> Result<Option<Conversation>, ApiError> {
    for field in ["functions", "function_call"] {
        let harmless = [json!([]), json!("none"), json!("auto")];
        if fields.take_value(field).is_some_and(|value| !harmless.contains(&value)) {
            let why = "is not supported: it was replaced by tools and tool_choice; use these";
            return Err(ApiError::invalid(field, why));
        }
    }
    let Some(messages) = take_messages(fields)? else { return Ok(None) };
    let mut conversation = Conversation::from(messages);
    tools::take(fields, Nesting::Function, &mut conversation)?;
    Ok(Some(conversation))
}

/// Takes the messages; `None` where there is none.
///
/// # Errors
/// Naming the message and field that is wrong or not supported.
fn take_messages(fields: &mut Fields) -> Result<Option<Vec<ChatMessage>>, ApiError> {
    let Some(value) = fields.take_value("messages") else { return Ok(None) };
    let Value::Array(items) = value else {
        return Err(ApiError::invalid("messages", "must be an array of messages"));
    };
    if items.is_empty() {
        return Err(ApiError::invalid("messages", "is empty: give at least one message"));
    }
    let mut messages = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let mut item = Fields::nested(&format!("messages[{index}]"), item)?;
        messages.push(take_message(&mut item)?);
        // Without the index: every message has the same extras.
        let names = item.into_ignored().into_iter();
        let short = names.filter_map(|n| n.split_once('.').map(|(_, f)| format!("messages.{f}")));
        fields.note_ignored(short.collect());
    }
    Ok(Some(messages))
}

fn take_message(item: &mut Fields) -> Result<ChatMessage, ApiError> {
    for field in ["function_call", "audio"] {
        item.refuse_unless(field, &[])?;
    }
    let role: String = item.take("role")?.ok_or_else(|| {
        ApiError::invalid(&item.name("role"), "is missing: use system, user, assistant or tool")
    })?;
    let role = match role.as_str() {
        // What the makers of newer models call it; templates know the one name.
        "developer" => "system".to_owned(),
        "function" => {
            let why = "function is not supported: it was replaced by tool; use that";
            return Err(ApiError::invalid(&item.name("role"), why));
        }
        _ => role,
    };
    let tool_calls = tools::take_calls(item)?;
    if !tool_calls.is_empty() && role != "assistant" {
        let why = "may only be in messages of the assistant";
        return Err(ApiError::invalid(&item.name("tool_calls"), why));
    }
    let tool_call_id: Option<String> = item.take("tool_call_id")?;
    if role == "tool" && tool_call_id.is_none() {
        let why = "is missing: it says which call the tool answers";
        return Err(ApiError::invalid(&item.name("tool_call_id"), why));
    }
    let name = item.name("content");
    let content = match item.take_value("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join_parts(&name, parts)?,
        Some(_) => return Err(ApiError::invalid(&name, "must be a string or an array of parts")),
        None if !tool_calls.is_empty() => String::new(),
        None => return Err(ApiError::invalid(&name, "is missing")),
    };
    Ok(ChatMessage { role, content, tool_calls, tool_call_id })
}

/// Text parts become lines, as other servers have it.
pub(crate) fn join_parts(name: &str, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::nested(&format!("{name}[{index}]"), part)?;
        let kind: String = part.take("type")?.unwrap_or_default();
        if !["text", "input_text", "output_text"].contains(&kind.as_str()) {
            let message = format!("parts of type '{kind}' are not supported; send text");
            return Err(ApiError::invalid(&part.name("type"), message));
        }
        let text: Option<String> = part.take("text")?;
        texts.push(text.ok_or_else(|| ApiError::invalid(&part.name("text"), "is missing"))?);
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_shared::wire::rpc::ToolCall;

    fn messages(value: &Value) -> Result<Option<Vec<ChatMessage>>, ApiError> {
        let mut fields = Fields::parse(value.to_string().as_bytes()).expect("an object");
        take_messages(&mut fields)
    }

    #[test]
    fn both_kinds_of_content() {
        let got = messages(&json!({"messages": [
            {"role": "system", "content": "be brief", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]}));
        let got = got.expect("valid").expect("present");
        assert_eq!(got[0], ChatMessage::new("system", "be brief"));
        assert_eq!(got[1], ChatMessage::new("user", "a\nb"));
    }

    #[test]
    fn calls_and_their_results() {
        let function = json!({"name": "f", "arguments": "{}"});
        let call = json!({"id": "c", "type": "function", "function": function});
        let got = messages(&json!({"messages": [
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "4"},
        ]}));
        let got = got.expect("valid").expect("present");
        let call = ToolCall { id: "c".into(), name: "f".into(), arguments: "{}".into() };
        assert_eq!(got[0].tool_calls, [call]);
        assert_eq!((got[0].content.as_str(), got[1].tool_call_id.as_deref()), ("", Some("c")));
    }

    #[test]
    fn wrong_messages_are_named() {
        for (body, param) in [
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": ["hi"]}), "messages[0]"),
            (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
                "messages[0].content[0].type",
            ),
            (
                json!({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}),
                "messages[0].tool_calls[0].function",
            ),
            (json!({"messages": [{"role": "tool", "content": "4"}]}), "messages[0].tool_call_id"),
            (json!({"messages": [{"role": "function", "content": "4"}]}), "messages[0].role"),
        ] {
            let error = messages(&body).expect_err("refused");
            let found = serde_json::to_value(error.body()).expect("serialisable");
            assert_eq!(found["error"]["param"], param, "{body} gave {found}");
        }
    }
}
