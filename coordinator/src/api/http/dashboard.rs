//! The dashboard: one static page with its style and script, and the three things it asks for that
//! nobody else does.
//!
//! The page itself is open: it holds nothing but how to ask, and asks with the key of whoever looks at
//! it. It loads nothing from elsewhere, which its `Content-Security-Policy` enforces, so that it works
//! in a closed network, and nothing that a model says can become code.

use actix_web::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;

use super::AppState;
use super::error::ApiError;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn part(kind: &'static str, text: &'static str) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, kind))
        .insert_header((CONTENT_SECURITY_POLICY, POLICY))
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header(("x-content-type-options", "nosniff"))
        .insert_header(("referrer-policy", "no-referrer"))
        .body(text)
}

/// `GET /`.
pub(crate) async fn page() -> HttpResponse {
    part("text/html; charset=utf-8", include_str!("dashboard/index.html"))
}

/// `GET /dashboard/style.css`.
pub(crate) async fn style() -> HttpResponse {
    part("text/css; charset=utf-8", include_str!("dashboard/style.css"))
}

/// `GET /dashboard/app.js`.
pub(crate) async fn script() -> HttpResponse {
    part("text/javascript; charset=utf-8", include_str!("dashboard/app.js"))
}

/// `GET /v1/cluster`: stages, nodes and counters.
pub(crate) async fn cluster(state: web::Data<AppState>) -> HttpResponse {
    HttpResponse::Ok().json(state.service.status().await)
}

/// From where the timeline, or the events, are wanted.
#[derive(Deserialize)]
pub(crate) struct After {
    /// The `last` of the answer before; all that is known where it is missing.
    #[serde(default)]
    after: u64,
}

/// `GET /v1/cluster/timeline?after=N`: micro-batches that came back since.
///
/// # Errors
/// If `after` is no number.
pub(crate) async fn timeline(
    state: web::Data<AppState>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let query = web::Query::<After>::from_query(request.query_string());
    let after = query.map_err(|_| ApiError::invalid("after", "must be a whole number"))?.after;
    let (now, last, passages) = state.metrics.timeline().after(after);
    Ok(HttpResponse::Ok().json(json!({"now": now, "last": last, "passages": passages})))
}

/// `GET /v1/cluster/events?after=N`: what happened since, and the plan that serves.
///
/// # Errors
/// If `after` is no number.
pub(crate) async fn events(
    state: web::Data<AppState>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let query = web::Query::<After>::from_query(request.query_string());
    let after = query.map_err(|_| ApiError::invalid("after", "must be a whole number"))?.after;
    let (last, events, plan) = state.metrics.chronicle().after(after);
    Ok(HttpResponse::Ok().json(json!({"last": last, "events": events, "plan": plan})))
}
