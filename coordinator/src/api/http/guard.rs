//! What every request passes before its handler: the host check, the key check, room for its body,
//! the request id.
//!
//! The host check is the defence against DNS rebinding: a page in a browser on this machine can
//! make a name of its own point here, but it cannot change the name the browser sends. So only
//! loopback, addresses of the connection itself and names the operator gave are served. Cross-origin
//! headers are never sent.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::error::PayloadError;
use actix_web::http::header::{
    AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING,
};
use actix_web::http::{ConnectionType, Method};
use actix_web::middleware::Next;
use actix_web::web::Bytes;
use actix_web::{Error, HttpMessage as _, ResponseError, web};
use futures::{Stream, StreamExt as _, stream};
use millrace_net::room::Room;
use millrace_net::seats::Seat;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use tracing::Instrument as _;
use uuid::Uuid;

use super::AppState;
use super::error::ApiError;
use super::request::MAX_BODY_BYTES;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id that is echoed.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Our end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalAddr(pub(crate) SocketAddr);

/// The connection's place among those of its host; `None` where there was none left.
#[derive(Debug)]
pub(crate) struct Place(pub(crate) Option<Seat>);

/// The caller has shown a key.
#[derive(Clone, Copy, Debug)]
struct HasKey;

/// From so many bytes on bodies share room.
const LONG_BODY: usize = 64 << 10;
/// When to try again, told to hosts that have too many connections.
const CROWDED_RETRY_MS: u32 = 5000;

/// Which names this server answers to.
#[derive(Clone, Debug)]
pub(crate) struct HostPolicy {
    bound: IpAddr,
    allowed: Vec<String>,
}

impl HostPolicy {
    /// Besides loopback: the bound address, and `allowed` (`name` or `name:port`).
    pub(crate) fn new(bound: IpAddr, allowed: &[String]) -> Self {
        let allowed = allowed.iter().map(|h| h.trim().trim_end_matches('.').to_lowercase());
        Self { bound, allowed: allowed.filter(|h| !h.is_empty()).collect() }
    }

    fn allows(&self, authority: &str, local: Option<IpAddr>) -> bool {
        let authority = authority.to_lowercase();
        let host = host_of(&authority);
        if host == "localhost" || self.allowed.iter().any(|a| a == host || *a == authority) {
            return true;
        }
        let Ok(ip) = host.parse::<IpAddr>() else { return false };
        let ip = ip.to_canonical();
        ip.is_loopback() || ip == self.bound || local.is_some_and(|l| ip == l.to_canonical())
    }

    fn check(&self, request: &ServiceRequest) -> Result<(), ApiError> {
        if request.conn_data::<Place>().is_some_and(|place| place.0.is_none()) {
            let message = "too many connections from this address: close some";
            return Err(Status::exhausted(message, CROWDED_RETRY_MS).into());
        }
        let local = request.conn_data::<LocalAddr>().map(|l| l.0.ip());
        let mut hosts = request.headers().get_all(HOST).peekable();
        if hosts.peek().is_none() {
            return Err(ApiError::bad_body("the Host header is missing"));
        }
        let named = hosts.map(|h| h.to_str().unwrap_or_default());
        let target = request.head().uri.authority().map(|a| a.as_str());
        match named.chain(target).find(|host| !self.allows(host, local)) {
            None => Ok(()),
            Some(host) => {
                let shown: String = host.chars().take(100).collect();
                let message = format!(
                    "this server does not answer to the host '{shown}'; use its address, or start \
                     it with --http-host {shown}"
                );
                Err(Status::new(ErrorCode::PermissionDenied, message).into())
            }
        }
    }
}

/// The host of `host`, `host:port`, `[v6]` or `[v6]:port`.
fn host_of(authority: &str) -> &str {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(host, _)| host),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    host.trim_end_matches('.')
}

/// Around everything: the host check, and the request id on every answer.
pub(crate) async fn check_host<B: MessageBody + 'static>(
    state: web::Data<AppState>,
    mut request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    let called = CalledSo::new(request.headers());
    let (name, id) = (called.name.clone(), called.header());
    let span = tracing::info_span!("http", request_id = %name);
    let (method, path) = (request.method().clone(), request.path().to_owned());
    request.extensions_mut().insert(called);
    let mut response = match state.hosts.check(&request) {
        Ok(()) => {
            hurry(&mut request, state.body_timeout);
            next.call(request).instrument(span.clone()).await?.map_into_left_body()
        }
        Err(error) => {
            let mut refused = request.into_response(error.error_response()).map_into_right_body();
            refused.response_mut().head_mut().set_connection_type(ConnectionType::Close);
            refused
        }
    };
    response.headers_mut().insert(REQUEST_ID, id);
    let status = response.status();
    span.in_scope(|| tracing::debug!(%method, path, status = status.as_u16(), "answered"));
    // Who has no key leaves no trace: what is remembered has room for so many.
    let has_key = response.request().extensions().contains::<HasKey>();
    let refused = status.is_client_error() || status.is_server_error();
    if has_key && method == Method::POST && refused {
        let why = response.response().error().map(ToString::to_string);
        state.metrics.names().refused(&name, why.unwrap_or_else(|| status.to_string()));
    }
    Ok(response)
}

/// Gives the body a time by which all of it must have come. Until then it is read as fast as it
/// comes, and a slow one holds nobody up; but it holds a place.
fn hurry(request: &mut ServiceRequest, limit: Duration) {
    if matches!(request.parts_mut().1, Payload::None) {
        return;
    }
    let until = tokio::time::Instant::now() + limit;
    let body = request.take_payload();
    let timed = stream::unfold(body, move |mut body| async move {
        let late = || PayloadError::Io(io::Error::from(io::ErrorKind::TimedOut));
        let next = tokio::time::timeout_at(until, body.next()).await;
        let next = next.unwrap_or_else(|_| Some(Err(late())))?;
        Some((next, body))
    });
    let timed: Pin<Box<dyn Stream<Item = Result<Bytes, PayloadError>>>> = Box::pin(timed);
    request.set_payload(Payload::Stream { payload: timed });
}

/// Around what needs a key.
pub(crate) async fn check_key<B: MessageBody + 'static>(
    state: web::Data<AppState>,
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    // Not what a proxy's header says: anybody can send that.
    let from = request.peer_addr().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |peer| peer.ip());
    let room = match state.service.authenticate_from(bearer(request.headers()), from) {
        Ok(()) => {
            request.extensions_mut().insert(HasKey);
            room_for(&request).await
        }
        Err(status) => Err(status),
    };
    match room {
        // Until the handler has read the body and made of it what it needs.
        Ok(_room) => Ok(next.call(request).await?.map_into_left_body()),
        Err(status) => {
            let response = ApiError::from(status).error_response();
            Ok(request.into_response(response).map_into_right_body())
        }
    }
}

/// Room for the body where it is long; connections are few enough for short ones.
///
/// # Errors
/// As [`Room::of`].
async fn room_for(request: &ServiceRequest) -> Result<Option<Room>, Status> {
    let length = request.headers().get(&CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let length: usize = match length {
        Some(length) => length,
        None if request.headers().contains_key(&TRANSFER_ENCODING) => MAX_BODY_BYTES,
        None => 0,
    };
    match length {
        // Longer ones are refused before they are read.
        LONG_BODY..=MAX_BODY_BYTES => Room::of(length).await.map(Some),
        _ => Ok(None),
    }
}

/// The caller's key.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// What a request is called, on its response and in logs.
#[derive(Clone, Debug)]
pub(crate) struct CalledSo {
    /// The client's `x-request-id` where it is fit to be echoed, else the id.
    pub(crate) name: String,
    /// A new id.
    pub(crate) fresh: RequestId,
}

impl CalledSo {
    fn new(headers: &HeaderMap) -> Self {
        let fit = |v: &&str| (1..=MAX_REQUEST_ID_BYTES).contains(&v.len());
        let given = headers.get(&REQUEST_ID).and_then(|v| v.to_str().ok()).filter(fit);
        let fresh = RequestId(Uuid::now_v7());
        Self { name: given.map_or_else(|| fresh.to_string(), str::to_owned), fresh }
    }

    fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.name).expect("invariant: it was one, or is a uuid")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let bound = "192.168.1.5".parse().expect("an address");
        let policy = HostPolicy::new(bound, &["Box.example.".into(), "other:8000".into()]);
        let local = Some("10.0.0.7".parse().expect("an address"));
        for good in [
            "localhost",
            "LOCALHOST:8000",
            "localhost.",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:8000",
            "[::ffff:127.0.0.1]",
            "192.168.1.5:8000",
            "10.0.0.7",
            "box.example:1",
            "BOX.example",
            "other:8000",
        ] {
            assert!(policy.allows(good, local), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "other:8001",
            "192.168.1.6",
            "[::2]",
            "[::1",
            "box.example.evil",
            "evil.example:127.0.0.1",
        ] {
            assert!(!policy.allows(bad, local), "{bad}");
        }
    }
}
