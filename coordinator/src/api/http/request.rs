//! What handlers do with every request: read its body within the limit, its headers, and name what
//! was ignored.

use std::time::Duration;

use actix_web::error::PayloadError;
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::{HttpMessage as _, HttpRequest, HttpResponse, web};
use millrace_shared::id::RequestId;
use millrace_shared::scheduler::Priority;

use super::AppState;
use super::error::ApiError;
use super::guard::{CalledSo, bearer};
use crate::api::quic::MAX_KEEP;
use crate::service::Caller;
use crate::spans::Parent;

/// Longest body that is read.
pub(crate) const MAX_BODY_BYTES: usize = 4 << 20;
/// Names of the fields that were ignored.
pub(crate) const IGNORED: HeaderName = HeaderName::from_static("x-millrace-ignored");
/// Tokens of the prompts that were left out.
const TRUNCATED: HeaderName = HeaderName::from_static("x-millrace-truncated");
/// Milliseconds after which the client no longer wants an answer.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// The class of a request: high, normal or low.
const PRIORITY: HeaderName = HeaderName::from_static("x-millrace-priority");

/// The client's own name of a request: sent again with it, the same request is not run again.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Seconds that a request goes on when its connection is gone.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("x-millrace-keep-alive");
/// Longest name of a request.
const MAX_NAME_BYTES: usize = 256;

/// A body as handlers receive it; [`read_body`] says what went wrong.
pub(crate) type Body = Result<web::Bytes, actix_web::Error>;

/// The body, or why it could not be read.
///
/// # Errors
/// If it is too long, or ended early.
pub(crate) fn read_body(body: Body) -> Result<web::Bytes, ApiError> {
    body.map_err(|e| match e.as_error::<PayloadError>() {
        Some(PayloadError::Overflow) => ApiError::too_large(MAX_BODY_BYTES),
        _ => ApiError::bad_body(format!("the request body could not be read: {e}")),
    })
}

/// Who asks, and how urgently.
///
/// # Errors
/// If one of the headers makes no sense.
pub(crate) fn caller(request: &HttpRequest) -> Result<Caller, ApiError> {
    let client = Caller::client_of(bearer(request.headers()));
    let priority = match request.headers().get(&PRIORITY) {
        None => Priority::default(),
        Some(value) => value
            .to_str()
            .map_err(|_| "the header must be high, normal or low".to_owned())
            .and_then(|v| v.trim().parse())
            .map_err(|e| ApiError::invalid(PRIORITY.as_str(), e))?,
    };
    let request_id = match request.headers().get(&IDEMPOTENCY_KEY) {
        None => None,
        Some(value) => {
            let text = value.to_str().ok().map(str::trim).filter(|t| !t.is_empty());
            let text = text.filter(|t| t.len() <= MAX_NAME_BYTES).ok_or_else(|| {
                let why = format!("must be 1 to {MAX_NAME_BYTES} visible ASCII characters");
                ApiError::invalid(IDEMPOTENCY_KEY.as_str(), why)
            })?;
            Some(request_named(client, text))
        }
    };
    let keep = keep(request)?;
    let deadline = deadline(request)?;
    let fresh = request.extensions().get::<CalledSo>().map(|called| {
        let id = request_id.unwrap_or(called.fresh);
        if let Some(state) = request.app_data::<web::Data<AppState>>()
            && called.name != id.to_string()
        {
            state.metrics.names().note(&called.name, id);
        }
        called.fresh
    });
    let trace = Parent::of(|name| request.headers().get(name)?.to_str().ok());
    Ok(Caller { deadline, client, priority, request_id, fresh, keep, trace, ..Caller::default() })
}

/// The id that stands for a client's own name of a request: others may give the same name to theirs.
pub(crate) fn request_named(client: u64, name: &str) -> RequestId {
    let hash =
        blake3::Hasher::new().update(&client.to_le_bytes()).update(name.as_bytes()).finalize();
    let bytes = hash.as_bytes().first_chunk::<16>().copied().unwrap_or_default();
    RequestId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// How long the request goes on when the connection is gone.
///
/// # Errors
/// If the header is there but no whole number of seconds.
fn keep(request: &HttpRequest) -> Result<Option<Duration>, ApiError> {
    let Some(value) = request.headers().get(&KEEP_ALIVE) else { return Ok(None) };
    let seconds = value.to_str().ok().and_then(|v| v.trim().parse::<u64>().ok());
    let keep = seconds.map(Duration::from_secs).filter(|keep| *keep <= MAX_KEEP);
    let most = MAX_KEEP.as_secs();
    let why = format!("the header must be a whole number of seconds, at most {most}");
    keep.map(Some).ok_or_else(|| ApiError::invalid(KEEP_ALIVE.as_str(), why))
}

/// The caller's deadline, counted from now.
///
/// # Errors
/// If the header is there but no positive whole number.
fn deadline(request: &HttpRequest) -> Result<Option<Duration>, ApiError> {
    let Some(value) = request.headers().get(&TIMEOUT) else { return Ok(None) };
    let millis = value.to_str().ok().and_then(|v| v.trim().parse::<u64>().ok());
    match millis {
        Some(ms @ 1..) => Ok(Some(Duration::from_millis(ms))),
        _ => Err(ApiError::invalid(
            TIMEOUT.as_str(),
            "the header must be a whole number of milliseconds, at least 1",
        )),
    }
}

/// Tells how many tokens of the prompts were left out because they were too long.
pub(crate) fn with_left_out(mut response: HttpResponse, tokens: u32) -> HttpResponse {
    if tokens > 0 {
        response.headers_mut().insert(TRUNCATED, HeaderValue::from(tokens));
    }
    response
}

/// Adds the names of ignored fields to the response.
pub(crate) fn with_ignored(mut response: HttpResponse, ignored: &[String]) -> HttpResponse {
    if !ignored.is_empty()
        && let Ok(value) = HeaderValue::from_str(&ignored.join(", "))
    {
        response.headers_mut().insert(IGNORED, value);
    }
    response
}
