//! `/v1/requests/{id}`: requests that were submitted before.
//!
//! `GET .../events` goes on where a connection was lost: `Last-Event-ID` (what browsers send by
//! themselves) is the `id:` of the last event that arrived, `0:12,1:9` for token 12 of choice 0 and
//! token 9 of choice 1 as the next ones. `POST .../cancel` ends the request. The id is that of the
//! response's `x-millrace-request-id`, or the client's own `Idempotency-Key`.

use actix_web::http::header::HeaderName;
use actix_web::{HttpRequest, HttpResponse, web};
use millrace_shared::error::ErrorCode;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::MAX_CHOICES;

use super::AppState;
use super::error::ApiError;
use super::generation;
use super::request::{caller, request_named};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Streams the rest of an answer.
pub(crate) async fn events(
    state: web::Data<AppState>,
    request: HttpRequest,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let caller = caller(&request)?;
    let from = match request.headers().get(&LAST_EVENT_ID) {
        None => Vec::new(),
        Some(value) => value.to_str().ok().and_then(cursor).ok_or_else(|| {
            let why = "must be the id of an event of this request, such as 0:12 or 0:12,1:9";
            ApiError::invalid(LAST_EVENT_ID.as_str(), why)
        })?,
    };
    let (first, second) = meant(caller.client, &name);
    match (generation::attach(&state, first, &from, caller.clone()).await, second) {
        (Err(e), Some(second)) if e.code() == ErrorCode::NotFound => {
            generation::attach(&state, second, &from, caller).await
        }
        (found, _) => found,
    }
}

/// Ends a request.
pub(crate) async fn cancel(
    state: web::Data<AppState>,
    request: HttpRequest,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let caller = caller(&request)?;
    let (first, second) = meant(caller.client, &name);
    match (state.service.cancel(first, caller.clone()).await, second) {
        (Err(status), Some(second)) if status.code == ErrorCode::NotFound => {
            state.service.cancel(second, caller).await?;
        }
        (ended, _) => ended?,
    }
    Ok(HttpResponse::NoContent().finish())
}

/// The request that a client means: where the name is an id, that one, or else its own of that name.
fn meant(client: u64, name: &str) -> (RequestId, Option<RequestId>) {
    let named = request_named(client, name);
    name.parse().map_or((named, None), |id| (id, Some(named)))
}

/// The next token of each choice in `0:12,1:9`; every entry must make sense.
fn cursor(text: &str) -> Option<Vec<u32>> {
    let mut next = Vec::new();
    for part in text.split(',') {
        let (choice, index) = part.trim().split_once(':')?;
        let (choice, index): (usize, u32) = (choice.parse().ok()?, index.parse().ok()?);
        if choice >= MAX_CHOICES {
            return None;
        }
        next.resize(next.len().max(choice + 1), 0);
        next[choice] = index;
    }
    Some(next)
}

#[cfg(test)]
mod tests {
    use super::cursor;

    #[test]
    fn cursors() {
        assert_eq!(cursor("0:12"), Some(vec![12]));
        assert_eq!(cursor("1:9, 0:12"), Some(vec![12, 9]));
        assert_eq!(cursor("2:9"), Some(vec![0, 0, 9]));
        for wrong in ["", "12", "0:", "0:-1", "a:1", "0:1,", "0:99999999999", "16:1", "-1:1"] {
            assert_eq!(cursor(wrong), None, "{wrong}");
        }
    }
}
