//! The HTTP API: OpenAI's endpoints with server-sent events, and what operators expect beside them.
//!
//! | path | key | |
//! |---|---|---|
//! | `POST /v1/chat/completions`, `POST /v1/completions` | yes | whole or streamed |
//! | `GET /v1/models`, `GET /v1/models/{id}` | yes | what is served |
//! | `POST /tokenize`, `POST /detokenize` | yes | text to ids and back |
//! | `GET /health`, `GET /ready`, `GET /live`, `GET /version`, `GET /metrics` | no | |
//!
//! One worker thread: everything here is parsing and forwarding. The server runs in a runtime of its
//! own, so it can be started from anywhere. A connection that the client closes, even only its
//! sending half, drops the response in the making, and so cancels the request.

mod chat;
mod completions;
mod error;
mod fields;
mod generation;
mod guard;
mod info;
mod logprobs;
mod options;
mod request;
mod sse;
mod tokenize;
mod types;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use actix_web::dev::{Server, ServerHandle};
use actix_web::middleware::from_fn;
use actix_web::rt::System;
use actix_web::rt::net::TcpStream;
use actix_web::{App, HttpRequest, HttpServer, ResponseError, guard as route, web};
use millrace_shared::error::Status;

use self::error::ApiError;
use self::guard::{HostPolicy, LocalAddr};
use self::request::MAX_BODY_BYTES;
use crate::metrics::Metrics;
use crate::service::Service;

/// Connections at once; each holds at most one body of 4 MiB.
const MAX_CONNECTIONS: usize = 1024;
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
}

impl HttpConfig {
    /// No further host names, a comment after 15 s, 30 s for a graceful stop.
    pub fn new(bind: SocketAddr) -> Self {
        Self {
            bind,
            allowed_hosts: Vec::new(),
            keep_alive: Duration::from_secs(15),
            shutdown_timeout: Duration::from_secs(30),
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
    let server = HttpServer::new(move || {
        App::new()
            .app_data(state.clone())
            .app_data(web::PayloadConfig::new(MAX_BODY_BYTES))
            .wrap(from_fn(guard::check_host))
            .configure(routes)
            .default_service(web::to(no_route))
    });
    let server = server
        .workers(1)
        .max_connections(MAX_CONNECTIONS)
        .keep_alive(IDLE)
        .tcp_nodelay(true)
        // A client that has hung up must not be taken for one that only stopped sending.
        .h1_allow_half_closed(false)
        .disable_signals()
        .shutdown_timeout(config.shutdown_timeout.as_secs())
        .on_connect(|connection, data| {
            let tcp = connection.downcast_ref::<TcpStream>();
            if let Some(local) = tcp.and_then(|tcp| tcp.local_addr().ok()) {
                data.insert(LocalAddr(local));
            }
        });
    Ok(server.listen(listener)?.run())
}

fn routes(config: &mut web::ServiceConfig) {
    let get = |path: &str| web::resource(path).default_service(web::to(only_get));
    let post = |path: &str| web::resource(path).default_service(web::to(only_post));
    let read = || web::route().guard(route::Any(route::Get()).or(route::Head()));
    config
        .service(get("/health").route(read().to(info::health)))
        .service(get("/ready").route(read().to(info::health)))
        .service(get("/live").route(read().to(info::live)))
        .service(get("/version").route(read().to(info::version)))
        .service(get("/metrics").route(read().to(info::metrics)))
        .service(
            web::scope("/v1")
                .wrap(from_fn(guard::check_key))
                .service(post("/chat/completions").route(web::post().to(chat::chat)))
                .service(post("/completions").route(web::post().to(completions::completions)))
                .service(get("/models").route(read().to(info::models)))
                // Names may hold slashes.
                .service(get("/models/{id:.+}").route(read().to(info::model)))
                .default_service(web::to(no_route)),
        )
        .service(
            post("/tokenize")
                .route(web::post().to(tokenize::tokenize))
                .wrap(from_fn(guard::check_key)),
        )
        .service(
            post("/detokenize")
                .route(web::post().to(tokenize::detokenize))
                .wrap(from_fn(guard::check_key)),
        );
}

async fn no_route(request: HttpRequest) -> actix_web::HttpResponse {
    ApiError::no_route(request.method().as_str(), request.path()).error_response()
}

async fn only_get(request: HttpRequest) -> actix_web::HttpResponse {
    ApiError::wrong_method(request.method().as_str(), "GET").error_response()
}

async fn only_post(request: HttpRequest) -> actix_web::HttpResponse {
    ApiError::wrong_method(request.method().as_str(), "POST").error_response()
}
