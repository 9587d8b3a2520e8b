//! `POST /tokenize` and `POST /detokenize`: text to ids and back, for debugging and for clients
//! that count tokens. Special tokens in the text are parsed, none are added.

use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use super::AppState;
use super::chat::take_conversation;
use super::completions::{ids_of, take_prompt};
use super::error::ApiError;
use super::fields::Fields;
use super::request::{Body, read_body, with_ignored};
use millrace_shared::wire::rpc::Prompt;

/// Answers `{"tokens","count","max_model_len"}` for a `prompt` (or `content`) or `messages`.
pub(crate) async fn tokenize(
    state: web::Data<AppState>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut fields = Fields::parse(&read_body(body)?)?;
    let model: String = fields.take("model")?.unwrap_or_default();
    let prompt = match take_prompt(&mut fields, "prompt")? {
        Some(prompt) => Some(prompt),
        None => match take_prompt(&mut fields, "content")? {
            Some(prompt) => Some(prompt),
            None => take_conversation(&mut fields)?.map(Prompt::Chat),
        },
    };
    let prompt =
        prompt.ok_or_else(|| ApiError::invalid("prompt", "is missing: give prompt or messages"))?;
    let ignored = fields.into_ignored();
    let cards = state.service.models();
    let card = cards.iter().find(|c| model.is_empty() || c.id == model);
    let max_model_len = card.map(|c| c.max_model_len);
    let service = state.service.clone();
    // A long text takes seconds; this thread also serves every stream.
    let tokens = web::block(move || service.tokenize(&model, &prompt)).await;
    let tokens = tokens.map_err(|_| stopping())?.map_err(ApiError::of_model)?;
    let body = json!({"count": tokens.len(), "max_model_len": max_model_len, "tokens": tokens});
    Ok(with_ignored(HttpResponse::Ok().json(body), &ignored))
}

/// Answers `{"prompt","content"}`, the same text under the two names that clients look for.
pub(crate) async fn detokenize(
    state: web::Data<AppState>,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut fields = Fields::parse(&read_body(body)?)?;
    fields.take_value("model");
    let ids = match fields.take_value("tokens") {
        Some(Value::Array(items)) => ids_of("tokens", &items)?,
        _ => return Err(ApiError::invalid("tokens", "must be an array of token ids")),
    };
    let ignored = fields.into_ignored();
    let service = state.service.clone();
    let text = web::block(move || service.detokenize(&ids)).await;
    let text = text.map_err(|_| stopping())??;
    let body = json!({"prompt": text, "content": text});
    Ok(with_ignored(HttpResponse::Ok().json(body), &ignored))
}

fn stopping() -> ApiError {
    super::shutting_down().into()
}
