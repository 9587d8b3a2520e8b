//! What handlers do with every request: read its body within the limit, its headers, and name what
//! was ignored.

use std::time::Duration;

use actix_web::error::PayloadError;
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::{HttpRequest, HttpResponse, web};
use millrace_shared::scheduler::Priority;

use super::error::ApiError;
use super::guard::bearer;
use crate::service::Caller;

/// Longest body that is read.
pub(crate) const MAX_BODY_BYTES: usize = 4 << 20;
/// Names of the fields that were ignored.
pub(crate) const IGNORED: HeaderName = HeaderName::from_static("x-millrace-ignored");
/// Milliseconds after which the client no longer wants an answer.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// The class of a request: high, normal or low.
const PRIORITY: HeaderName = HeaderName::from_static("x-millrace-priority");

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
    Ok(Caller { deadline: deadline(request)?, client, priority })
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

/// Adds the names of ignored fields to the response.
pub(crate) fn with_ignored(mut response: HttpResponse, ignored: &[String]) -> HttpResponse {
    if !ignored.is_empty()
        && let Ok(value) = HeaderValue::from_str(&ignored.join(", "))
    {
        response.headers_mut().insert(IGNORED, value);
    }
    response
}
