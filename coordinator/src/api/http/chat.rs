//! `POST /v1/chat/completions`.

use actix_web::{HttpRequest, HttpResponse, web};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{ChatMessage, Prompt};
use serde_json::{Value, json};

use super::AppState;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{self, Asked, Kind};
use super::options;
use super::request::{Body, caller, read_body};

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
    let messages = take_messages(&mut fields)?
        .ok_or_else(|| ApiError::invalid("messages", "is missing: give at least one message"))?;
    let prompt = Prompt::Chat(messages);
    Ok(Asked { options, prompt, caller, ignored: fields.into_ignored() })
}

/// Takes the conversation; `None` where there is none.
///
/// # Errors
/// Naming the message and field that is wrong or not supported.
pub(crate) fn take_messages(fields: &mut Fields) -> Result<Option<Vec<ChatMessage>>, ApiError> {
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
    item.refuse_unless("tool_calls", &[json!([])])?;
    for field in ["tool_call_id", "function_call", "audio"] {
        item.refuse_unless(field, &[])?;
    }
    let role = item.take("role")?.ok_or_else(|| {
        ApiError::invalid(&item.name("role"), "is missing: use system, user or assistant")
    })?;
    let name = item.name("content");
    let content = match item.take_value("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join_parts(&name, parts)?,
        Some(_) => return Err(ApiError::invalid(&name, "must be a string or an array of parts")),
        None => return Err(ApiError::invalid(&name, "is missing")),
    };
    Ok(ChatMessage { role, content })
}

/// Text parts become lines, as other servers have it.
fn join_parts(name: &str, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::nested(&format!("{name}[{index}]"), part)?;
        let kind: String = part.take("type")?.unwrap_or_default();
        if kind != "text" {
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
        assert_eq!(got[0], ChatMessage { role: "system".into(), content: "be brief".into() });
        assert_eq!(got[1], ChatMessage { role: "user".into(), content: "a\nb".into() });
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
                "messages[0].tool_calls",
            ),
        ] {
            let error = messages(&body).expect_err("refused");
            let found = serde_json::to_value(error.body()).expect("serialisable");
            assert_eq!(found["error"]["param"], param, "{body} gave {found}");
        }
    }
}
