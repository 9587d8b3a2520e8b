//! The HTTP API: OpenAI's endpoints with server-sent events, and what operators expect beside them.
//!
//! What there is, and what protects it, is the table [`ENDPOINTS`], from which the server is built.
//!
//! One worker thread: everything here is parsing and forwarding. The server runs in a runtime of its
//! own, so it can be started from anywhere. A connection that the client closes, even only its
//! sending half, drops the response in the making, and so cancels the request.

mod admin;
mod chat;
mod completions;
mod constraint;
mod dashboard;
mod echo;
mod embeddings;
mod error;
mod fields;
mod generation;
mod guard;
mod info;
mod logprobs;
mod openapi;
mod options;
mod request;
mod requests;
mod responses;
mod several;
mod sse;
mod tokenize;
mod tools;
mod types;

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use actix_tls::accept::rustls_0_23::TlsStream;
use actix_web::dev::{Server, ServerHandle};
use actix_web::middleware::from_fn;
use actix_web::rt::System;
use actix_web::rt::net::TcpStream;
use actix_web::{App, HttpRequest, HttpServer, ResponseError, guard as route, web};
use millrace_net::seats::Seats;
use millrace_net::tls::{self, WebCerts};
use millrace_shared::error::Status;
use socket2::SockRef;

use self::error::ApiError;
use self::guard::{HostPolicy, LocalAddr, Place};
use self::request::MAX_BODY_BYTES;
use crate::metrics::Metrics;
use crate::service::Service;

/// Connections at once. Only who has shown a key has a body read, of at most 4 MiB.
const MAX_CONNECTIONS: usize = 1024;
/// Those of one host, but for this one; a proxy needs many.
const MAX_PER_HOST: usize = 512;
/// What the system takes for a client beyond what that has said it has room for: little, so that it
/// shows soon that one does not read. What is under way has no such limit.
#[cfg(target_os = "linux")]
const UNSENT_BYTES: u32 = 16 << 10;
/// TLS handshakes at once.
const MAX_HANDSHAKES: usize = 64;
/// From the first byte of a request's head to its last; slower ones are turned out.
const HEAD: Duration = Duration::from_secs(10);
/// The usual [`HttpConfig::unread_timeout`].
const UNREAD: Duration = Duration::from_secs(60);
/// How long an idle connection stays open: longer than the 60 s at which proxies drop theirs.
const IDLE: Duration = Duration::from_secs(75);
/// When to try again, told to clients while the server stops.
const DRAIN_RETRY_MS: u32 = 5000;

/// How to serve HTTP.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Where to listen; port 0 takes a free one.
    pub bind: SocketAddr,
    /// Host names to answer to besides loopback and the bound address (`--http-host`).
    pub allowed_hosts: Vec<String>,
    /// Silence after which a stream sends a comment.
    pub keep_alive: Duration,
    /// How long a graceful stop waits for answers in the making.
    pub shutdown_timeout: Duration,
    /// How long a request's body may take to come.
    pub body_timeout: Duration,
    /// How long a client may take nothing of what was sent to it, before its connection is cut.
    pub unread_timeout: Duration,
    /// HTTPS, and what it shows.
    pub tls: Option<WebCerts>,
    /// Let anybody read `/metrics`.
    pub public_metrics: bool,
}

impl HttpConfig {
    /// No further host names, a comment after 15 s, 30 s for a graceful stop.
    pub fn new(bind: SocketAddr) -> Self {
        Self {
            bind,
            allowed_hosts: Vec::new(),
            keep_alive: Duration::from_secs(15),
            shutdown_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            unread_timeout: UNREAD,
            tls: None,
            public_metrics: false,
        }
    }
}

/// A running HTTP server. Dropping it stops the server at once.
#[derive(Debug)]
pub struct HttpServerHandle {
    /// Where it listens.
    pub addr: SocketAddr,
    server: ServerHandle,
    draining: Arc<AtomicBool>,
}

impl HttpServerHandle {
    /// Refuses new generations and turns `/ready` and `/health` to 503; streams go on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Stops listening, waits for answers in the making up to the configured time, then ends.
    pub async fn stop(&self) {
        self.drain();
        self.server.stop(true).await;
    }
}

impl Drop for HttpServerHandle {
    fn drop(&mut self) {
        // The command is sent by this call; the future only waits for its effect.
        drop(self.server.stop(false));
    }
}

/// What handlers share.
pub(crate) struct AppState {
    service: Arc<dyn Service>,
    metrics: Arc<Metrics>,
    hosts: HostPolicy,
    keep_alive: Duration,
    body_timeout: Duration,
    draining: Arc<AtomicBool>,
}

impl AppState {
    /// # Errors
    /// `Unavailable` while the server stops.
    fn refuse_while_draining(&self) -> Result<(), Status> {
        if self.draining.load(Ordering::Relaxed) { Err(shutting_down()) } else { Ok(()) }
    }

    /// Counts a generation that is refused before the service sees it.
    fn counted<T>(&self, result: Result<T, ApiError>) -> Result<T, ApiError> {
        result.inspect_err(|error| self.metrics.on_refused(error.code()))
    }
}

fn shutting_down() -> Status {
    Status::unavailable("the server is shutting down", DRAIN_RETRY_MS)
}

/// Binds and serves until the handle is stopped or dropped.
///
/// # Errors
/// If the address cannot be bound; the message says why and what to do.
pub fn start(
    config: HttpConfig,
    service: Arc<dyn Service>,
    metrics: Arc<Metrics>,
) -> io::Result<HttpServerHandle> {
    let listener = TcpListener::bind(config.bind).map_err(|e| explain(config.bind, &e))?;
    let addr = listener.local_addr()?;
    let draining = Arc::new(AtomicBool::new(false));
    let state = web::Data::new(AppState {
        service,
        metrics,
        hosts: HostPolicy::new(config.bind.ip(), &config.allowed_hosts),
        keep_alive: config.keep_alive,
        body_timeout: config.body_timeout,
        draining: draining.clone(),
    });
    let (started, server) = mpsc::channel();
    thread::Builder::new().name("millrace-http".into()).spawn(move || {
        System::new().block_on(async move {
            match serve(&config, listener, state) {
                Err(e) => drop(started.send(Err(e))),
                Ok(server) => {
                    drop(started.send(Ok(server.handle())));
                    if let Err(error) = server.await {
                        tracing::error!(%error, "the HTTP server failed");
                    }
                }
            }
        });
    })?;
    let server = server.recv().map_err(|_| io::Error::other("the HTTP thread died at start"))??;
    Ok(HttpServerHandle { addr, server, draining })
}

fn explain(bind: SocketAddr, error: &io::Error) -> io::Error {
    let port = bind.port();
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "port {port} is already in use; stop the program that has it or choose another with \
             --port"
        ),
        io::ErrorKind::PermissionDenied => {
            format!("port {port} needs privileges; choose one above 1023 with --port")
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("{} is no address of this machine; choose another with --host", bind.ip())
        }
        _ => error.to_string(),
    };
    io::Error::new(error.kind(), format!("cannot serve HTTP on {bind}: {advice}"))
}

fn serve(
    config: &HttpConfig,
    listener: TcpListener,
    state: web::Data<AppState>,
) -> io::Result<Server> {
    let (public_metrics, unread) = (config.public_metrics, config.unread_timeout);
    let server = HttpServer::new(move || {
        App::new()
            .app_data(state.clone())
            .app_data(web::PayloadConfig::new(MAX_BODY_BYTES))
            .wrap(from_fn(guard::check_host))
            .configure(|config| routes(config, public_metrics))
            .default_service(web::to(no_route))
    });
    let seats = Seats::new(MAX_PER_HOST);
    let server = server
        .workers(1)
        .max_connections(MAX_CONNECTIONS)
        .max_connection_rate(MAX_HANDSHAKES)
        .keep_alive(IDLE)
        .client_request_timeout(HEAD)
        .tcp_nodelay(true)
        // A client that has hung up must not be taken for one that only stopped sending.
        .h1_allow_half_closed(false)
        .disable_signals()
        .shutdown_timeout(config.shutdown_timeout.as_secs())
        .on_connect(move |connection, data| {
            let tls = connection.downcast_ref::<TlsStream<TcpStream>>().map(|tls| tls.get_ref().0);
            let Some(tcp) = connection.downcast_ref::<TcpStream>().or(tls) else { return };
            #[cfg(target_os = "linux")]
            if let Err(e) = SockRef::from(tcp).set_tcp_user_timeout(Some(unread)) {
                tracing::debug!("a client that reads nothing will not be noticed: {e}");
            }
            #[cfg(target_os = "linux")]
            if let Err(e) = SockRef::from(tcp).set_tcp_notsent_lowat(UNSENT_BYTES) {
                tracing::debug!("a client that reads nothing will be noticed late: {e}");
            }
            if let Ok(local) = tcp.local_addr() {
                data.insert(LocalAddr(local));
            }
            if let Ok(peer) = tcp.peer_addr() {
                let place = seats.take(peer.ip());
                if place.is_none() {
                    // At once: a connection that never asks would keep its place among all.
                    let _ = SockRef::from(tcp).shutdown(Shutdown::Both);
                }
                data.insert(Place(place));
            }
        });
    let server = match &config.tls {
        None => server.listen(listener)?,
        Some(certs) => {
            let tls = tls::https_server(certs).map_err(io::Error::other)?;
            server.listen_rustls_0_23(listener, tls)?
        }
    };
    Ok(server.run())
}

/// What protects an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing: for those who watch over processes.
    Open,
    /// An API key; running the model also needs the scope `generate`.
    Key,
    /// An administrator's API key.
    Admin,
    /// An API key, unless the operator says `--public-metrics`.
    Metrics,
}

/// How an endpoint is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// GET and HEAD.
    Get,
    /// POST.
    Post,
    /// DELETE.
    Delete,
}

/// An endpoint of the HTTP API.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// How it is asked.
    pub verb: Verb,
    /// Where it is; names in braces are parameters.
    pub path: &'static str,
    /// What protects it.
    pub protection: Protection,
    handler: fn(actix_web::Route) -> actix_web::Route,
}

const fn route_of(
    verb: Verb,
    path: &'static str,
    protection: Protection,
    handler: fn(actix_web::Route) -> actix_web::Route,
) -> Route {
    Route { verb, path, protection, handler }
}

/// All endpoints. Whatever else is asked for is not there; below `/v1` one is told so only with a
/// key.
pub const ENDPOINTS: &[Route] = &[
    route_of(Verb::Get, "/", Protection::Open, |r| r.to(dashboard::page)),
    route_of(Verb::Get, "/dashboard/style.css", Protection::Open, |r| r.to(dashboard::style)),
    route_of(Verb::Get, "/dashboard/app.js", Protection::Open, |r| r.to(dashboard::script)),
    route_of(Verb::Get, "/health", Protection::Open, |r| r.to(info::health)),
    route_of(Verb::Get, "/ready", Protection::Open, |r| r.to(info::health)),
    route_of(Verb::Get, "/live", Protection::Open, |r| r.to(info::live)),
    route_of(Verb::Get, "/metrics", Protection::Metrics, |r| r.to(info::metrics)),
    route_of(Verb::Get, "/version", Protection::Key, |r| r.to(info::version)),
    route_of(Verb::Get, "/openapi.json", Protection::Key, |r| r.to(openapi::openapi)),
    route_of(Verb::Post, "/v1/chat/completions", Protection::Key, |r| r.to(chat::chat)),
    route_of(Verb::Post, "/v1/completions", Protection::Key, |r| r.to(completions::completions)),
    route_of(Verb::Post, "/v1/embeddings", Protection::Key, |r| r.to(embeddings::embeddings)),
    route_of(Verb::Get, "/v1/requests/{id}/events", Protection::Key, |r| r.to(requests::events)),
    route_of(Verb::Post, "/v1/requests/{id}/cancel", Protection::Key, |r| r.to(requests::cancel)),
    route_of(Verb::Get, "/admin/requests", Protection::Admin, |r| r.to(admin::requests)),
    route_of(Verb::Get, "/admin/requests/{id}", Protection::Admin, |r| r.to(admin::request)),
    route_of(Verb::Get, "/v1/models", Protection::Key, |r| r.to(info::models)),
    route_of(Verb::Get, "/v1/cluster", Protection::Key, |r| r.to(dashboard::cluster)),
    route_of(Verb::Get, "/v1/cluster/timeline", Protection::Key, |r| r.to(dashboard::timeline)),
    route_of(Verb::Post, "/v1/responses", Protection::Key, |r| r.to(responses::create)),
    route_of(Verb::Get, "/v1/responses/{id}", Protection::Key, |r| r.to(responses::retrieve)),
    route_of(Verb::Delete, "/v1/responses/{id}", Protection::Key, |r| r.to(responses::delete)),
    route_of(Verb::Post, "/v1/responses/{id}/cancel", Protection::Key, |r| r.to(responses::cancel)),
    route_of(Verb::Get, "/v1/cluster/events", Protection::Key, |r| r.to(dashboard::events)),
    // Names may hold slashes.
    route_of(Verb::Get, "/v1/models/{id:.+}", Protection::Key, |r| r.to(info::model)),
    route_of(Verb::Post, "/tokenize", Protection::Key, |r| r.to(tokenize::tokenize)),
    route_of(Verb::Post, "/detokenize", Protection::Key, |r| r.to(tokenize::detokenize)),
    route_of(Verb::Get, "/tokenizer_info", Protection::Key, |r| r.to(tokenize::info)),
];

fn routes(config: &mut web::ServiceConfig, public_metrics: bool) {
    for (at, endpoint) in ENDPOINTS.iter().enumerate() {
        // What is at one place is one resource, with the protection of its first line.
        if ENDPOINTS[..at].iter().any(|before| before.path == endpoint.path) {
            continue;
        }
        let here = || ENDPOINTS.iter().filter(|other| other.path == endpoint.path);
        let has = |verb| here().any(|other| other.verb == verb);
        let other = match (has(Verb::Get), has(Verb::Delete)) {
            (true, true) => web::to(only_get_or_delete),
            (true, false) => web::to(only_get),
            (false, _) => web::to(only_post),
        };
        let mut resource = web::resource(endpoint.path).default_service(other);
        for endpoint in here() {
            let route = match endpoint.verb {
                Verb::Get => web::route().guard(route::Any(route::Get()).or(route::Head())),
                Verb::Post => web::post(),
                Verb::Delete => web::delete(),
            };
            resource = resource.route((endpoint.handler)(route));
        }
        match endpoint.protection {
            Protection::Open => config.service(resource),
            Protection::Metrics if public_metrics => config.service(resource),
            _ => config.service(resource.wrap(from_fn(guard::check_key))),
        };
    }
    config.service(
        web::scope("/v1").wrap(from_fn(guard::check_key)).default_service(web::to(no_route)),
    );
}

async fn no_route(request: HttpRequest) -> actix_web::HttpResponse {
    ApiError::no_route(request.method().as_str(), request.path()).error_response()
}

async fn only_get(request: HttpRequest) -> actix_web::HttpResponse {
    ApiError::wrong_method(request.method().as_str(), "GET").error_response()
}

async fn only_get_or_delete(request: HttpRequest) -> actix_web::HttpResponse {
    ApiError::wrong_method(request.method().as_str(), "GET, DELETE").error_response()
}

async fn only_post(request: HttpRequest) -> actix_web::HttpResponse {
    ApiError::wrong_method(request.method().as_str(), "POST").error_response()
}
