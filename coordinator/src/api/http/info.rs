//! What is served and how it fares: models, health, version, metrics. Nothing here runs a model.

use actix_web::http::header::CONTENT_TYPE;
use actix_web::{HttpResponse, web};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::WIRE_VERSION;
use serde_json::json;

use super::AppState;
use super::error::ApiError;
use super::types::ModelBody;
use crate::metrics;

/// When to ask again while nothing is ready.
const RETRY_MS: u32 = 1000;

/// `GET /v1/models`.
pub(crate) async fn models(state: web::Data<AppState>) -> HttpResponse {
    let data: Vec<ModelBody> = state.service.models().into_iter().map(ModelBody::from).collect();
    HttpResponse::Ok().json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/{id}`.
pub(crate) async fn model(
    state: web::Data<AppState>,
    id: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let id = id.into_inner();
    let cards = state.service.models();
    match cards.into_iter().find(|card| card.id == id) {
        Some(card) => Ok(HttpResponse::Ok().json(ModelBody::from(card))),
        None => {
            let shown: String = id.chars().take(200).collect();
            let message = format!("the model '{shown}' is not served; see GET /v1/models");
            Err(ApiError::of_model(Status::new(ErrorCode::NotFound, message)))
        }
    }
}

/// `GET /health` and `GET /ready`: 200 when requests are served, else 503.
pub(crate) async fn health(state: web::Data<AppState>) -> Result<HttpResponse, ApiError> {
    state.refuse_while_draining()?;
    let status = state.service.status().await;
    if status.ready {
        return Ok(ok());
    }
    let detail = if status.detail.is_empty() { "not ready yet".into() } else { status.detail };
    Err(Status::unavailable(detail, RETRY_MS).into())
}

/// `GET /live`: 200 as long as the process answers.
pub(crate) async fn live() -> HttpResponse {
    ok()
}

fn ok() -> HttpResponse {
    HttpResponse::Ok().json(json!({"status": "ok"}))
}

/// `GET /version`.
pub(crate) async fn version() -> HttpResponse {
    HttpResponse::Ok()
        .json(json!({"version": env!("CARGO_PKG_VERSION"), "wire_version": WIRE_VERSION}))
}

/// `GET /metrics`.
pub(crate) async fn metrics(state: web::Data<AppState>) -> HttpResponse {
    state.metrics.set_cluster(&state.service.status().await);
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, metrics::CONTENT_TYPE))
        .body(state.metrics.render())
}
