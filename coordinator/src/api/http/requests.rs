//! `/v1/requests/{id}`: requests that were submitted before.
//!
//! `GET .../events` goes on where a connection was lost: `Last-Event-ID` (what browsers send by
//! themselves) is the `id:` of the last event that arrived, `0:12` for token 12 of choice 0 as the
//! next one. `POST .../cancel` ends the request. The id is that of the response's `x-millrace-request-id`, or
//! the client's own `Idempotency-Key`.

use actix_web::http::header::HeaderName;
use actix_web::{HttpRequest, HttpResponse, web};

use super::AppState;
use super::error::ApiError;
use super::generation;
use super::request::{caller, request_named};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Streams the rest of an answer.
pub(crate) async fn events(
    state: web::Data<AppState>,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let caller = caller(&request)?;
    let from = match request.headers().get(&LAST_EVENT_ID) {
        None => 0,
        Some(value) => value.to_str().ok().and_then(next_of).ok_or_else(|| {
            let why = "must be the id of an event of this request, such as 0:12";
            ApiError::invalid(LAST_EVENT_ID.as_str(), why)
        })?,
    };
    generation::attach(&state, request_named(caller.client, &id), from, caller).await
}

/// Ends a request.
pub(crate) async fn cancel(
    state: web::Data<AppState>,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let caller = caller(&request)?;
    state.service.cancel(request_named(caller.client, &id), caller).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// The next token of choice 0 in `0:12,1:9`; every entry must make sense.
fn next_of(text: &str) -> Option<u32> {
    let mut next = 0;
    for part in text.split(',') {
        let (choice, index) = part.trim().split_once(':')?;
        let (choice, index): (u32, u32) = (choice.parse().ok()?, index.parse().ok()?);
        if choice == 0 {
            next = index;
        }
    }
    Some(next)
}

#[cfg(test)]
mod tests {
    use super::next_of;

    #[test]
    fn cursors() {
        assert_eq!(next_of("0:12"), Some(12));
        assert_eq!(next_of("1:9, 0:12"), Some(12));
        assert_eq!(next_of("1:9"), Some(0));
        for wrong in ["", "12", "0:", "0:-1", "a:1", "0:1,", "0:99999999999"] {
            assert_eq!(next_of(wrong), None, "{wrong}");
        }
    }
}
