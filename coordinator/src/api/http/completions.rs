//! `POST /v1/completions`.

use actix_web::{HttpRequest, HttpResponse, web};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::Prompt;
use serde_json::Value;

use super::AppState;
use super::echo::Echo;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{self, Asked, Kind};
use super::options;
use super::request::{Body, caller, read_body};

/// OpenAI's own default for this endpoint.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Most answers that one call asks for.
const MAX_PROMPTS: usize = 128;

/// Continues a text.
pub(crate) async fn completions(
    state: web::Data<AppState>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let asked = state.counted(read(&request, body, state.service.sampling()))?;
    generation::respond(&state, Kind::Completion, asked).await
}

fn read(request: &HttpRequest, body: Body, usual: SamplingParams) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(&read_body(body)?)?;
    let caller = caller(request)?;
    let echo = take_echo(&mut fields)?;
    let mut options = options::take(&mut fields, usual, Some(DEFAULT_MAX_TOKENS))?;
    options.params.logprobs = options::take_completion_logprobs(&mut fields)?;
    if echo == Echo::Alone && options.stream {
        let why = "a prompt alone ('echo' with 'max_tokens' 0) comes whole: leave 'stream' out";
        return Err(ApiError::invalid("stream", why));
    }
    let prompts = take_prompts(&mut fields, "prompt")?
        .ok_or_else(|| ApiError::invalid("prompt", "is missing"))?;
    if prompts.len() * options.choices.best_of as usize > MAX_PROMPTS {
        let why = format!("asks for more than {MAX_PROMPTS} answers at once; send less at once");
        return Err(ApiError::invalid("prompt", why));
    }
    Ok(Asked { options, prompts, echo, caller, ignored: fields.into_ignored() })
}

/// Takes `echo`, and a `max_tokens` of 0, which only it allows.
fn take_echo(fields: &mut Fields) -> Result<Echo, ApiError> {
    if !fields.take("echo")?.unwrap_or(false) {
        return Ok(Echo::No);
    }
    if fields.peek("max_tokens").and_then(Value::as_u64) == Some(0) {
        fields.take_value("max_tokens");
        return Ok(Echo::Alone);
    }
    Ok(Echo::Before)
}

/// Takes a prompt: a text, ids, or a list of exactly one of them.
///
/// # Errors
/// If it is anything else.
pub(crate) fn take_prompt(fields: &mut Fields, name: &str) -> Result<Option<Prompt>, ApiError> {
    let Some(mut prompts) = take_prompts(fields, name)? else { return Ok(None) };
    match (prompts.pop(), prompts.is_empty()) {
        (prompt, true) => Ok(prompt),
        (_, false) => Err(ApiError::invalid(name, "has several prompts; give one")),
    }
}

/// Takes one or more prompts: a text, ids, or a list of these.
pub(crate) fn take_prompts(
    fields: &mut Fields,
    name: &str,
) -> Result<Option<Vec<Prompt>>, ApiError> {
    let Some(value) = fields.take_value(name) else { return Ok(None) };
    let wrong = || {
        ApiError::invalid(name, "must be a string or an array of token ids, or an array of these")
    };
    let one = |value: Value| match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) => Ok(Prompt::Tokens(ids_of(name, &ids)?)),
        _ => Err(wrong()),
    };
    let lists = |items: &[Value]| matches!(items.first(), Some(Value::String(_) | Value::Array(_)));
    match value {
        Value::Array(items) if lists(&items) => {
            items.into_iter().map(one).collect::<Result<_, _>>().map(Some)
        }
        value => Ok(Some(vec![one(value)?])),
    }
}

/// Token ids from JSON.
///
/// # Errors
/// Naming the first entry that is none.
pub(crate) fn ids_of(name: &str, items: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |(index, item): (usize, &Value)| {
        item.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            ApiError::invalid(name, format!("entry {index} is not a token id (a whole number)"))
        })
    };
    items.iter().enumerate().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn prompts() {
        let take = |value: Value| {
            let body = json!({ "prompt": value }).to_string();
            let mut fields = Fields::parse(body.as_bytes()).expect("an object");
            take_prompt(&mut fields, "prompt").map_err(|e| e.to_string())
        };
        assert_eq!(take(json!("a")), Ok(Some(Prompt::Text("a".into()))));
        assert_eq!(take(json!(["a"])), Ok(Some(Prompt::Text("a".into()))));
        assert_eq!(take(json!([1, 2])), Ok(Some(Prompt::Tokens(vec![1, 2]))));
        assert_eq!(take(json!([[1, 2]])), Ok(Some(Prompt::Tokens(vec![1, 2]))));
        assert_eq!(take(json!([])), Ok(Some(Prompt::Tokens(vec![]))));
        assert_eq!(take(json!(null)), Ok(None));
        assert!(take(json!(["a", "b"])).expect_err("refused").contains("several"));
        assert!(take(json!(["a", 1])).expect_err("refused").contains("array of these"));
        assert!(take(json!([1, "b"])).expect_err("refused").contains("entry 1"));
        assert!(take(json!([-1])).expect_err("refused").contains("entry 0"));
        assert!(take(json!({})).expect_err("refused").contains("string or an array"));
    }
}
