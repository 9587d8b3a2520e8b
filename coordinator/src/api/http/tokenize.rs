//! `POST /tokenize` and `POST /detokenize`: text to ids and back, for debugging and for clients
//! that count tokens; `GET /tokenizer_info`: what these need to render conversations themselves.
//! Special tokens in the text are parsed.

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::AppState;
use super::chat::take_conversation;
use super::completions::{ids_of, take_prompt};
use super::error::ApiError;
use super::fields::Fields;
use super::request::{Body, caller, read_body, with_ignored};
use crate::service::Framing;
use millrace_shared::wire::rpc::Prompt;

/// `GET /tokenizer_info`.
pub(crate) async fn info(state: web::Data<AppState>) -> HttpResponse {
    HttpResponse::Ok().json(state.service.tokenizer_info())
}

/// Answers `{"tokens","count","max_model_len"}` for a `prompt` (or `content`) or `messages`: as the
/// model reads it, or without the token that begins texts where `add_special_tokens` is false.
pub(crate) async fn tokenize(
    state: web::Data<AppState>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let pass = state.service.admit(caller(&request)?)?;
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
    let framing = match fields.take("add_special_tokens")? {
        Some(false) => Framing::Bare,
        Some(true) | None => Framing::Prompt,
    };
    let ignored = fields.into_ignored();
    let cards = state.service.models();
    let card = cards.iter().find(|c| model.is_empty() || c.id == model);
    let max_model_len = card.map(|c| c.max_model_len);
    let service = state.service.clone();
    // A long text takes seconds; this thread also serves every stream.
    let tokens = web::block(move || {
        let _pass = pass;
        service.tokenize(&model, &prompt, framing)
    });
    let tokens = tokens.await;
    let tokens = tokens.map_err(|_| stopping())?.map_err(ApiError::of_model)?;
    let body = json!({"count": tokens.len(), "max_model_len": max_model_len, "tokens": tokens});
    Ok(with_ignored(HttpResponse::Ok().json(body), &ignored))
}

/// Answers `{"prompt","content"}`, the same text under the two names that clients look for.
pub(crate) async fn detokenize(
    state: web::Data<AppState>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let pass = state.service.admit(caller(&request)?)?;
    let mut fields = Fields::parse(&read_body(body)?)?;
    fields.take_value("model");
    let ids = match fields.take_value("tokens") {
        Some(Value::Array(items)) => ids_of("tokens", &items)?,
        _ => return Err(ApiError::invalid("tokens", "must be an array of token ids")),
    };
    let ignored = fields.into_ignored();
    let service = state.service.clone();
    let text = web::block(move || {
        let _pass = pass;
        service.detokenize(&ids)
    });
    let text = text.await;
    let text = text.map_err(|_| stopping())??;
    let body = json!({"prompt": text, "content": text});
    Ok(with_ignored(HttpResponse::Ok().json(body), &ignored))
}

fn stopping() -> ApiError {
    super::shutting_down().into()
}
