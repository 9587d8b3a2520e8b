//! The QUIC API: one bidirectional stream per call, as `millrace_shared::wire::rpc` defines it.
//!
//! All calls of a connection run inside one future: when the connection ends, or a client resets a
//! stream, its calls are dropped, and with them their event streams, which cancels the requests; a
//! request whose connection was cut, not closed, waits for its client as long as the call allowed. At
//! most [`MAX_CALLS`] calls of a connection run at once; more wait as unaccepted streams. The key is
//! checked before the method is read, and a client that shows none in time is turned out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use millrace_net::room::Room;
use millrace_net::rpc_server::{IncomingCall, ReplySender, accept_call};
use millrace_net::{Connection, IncomingStream, NetError, timing};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::scheduler::Priority;
use millrace_shared::wire::MAX_REPLY_BYTES;
use millrace_shared::wire::rpc::{
    GenerateEvent, META_KEEP_ALIVE, META_PRIORITY, META_REQUEST_ID, Method, Reply,
};

use crate::service::{Caller, EventStream, Framing, Service};
use crate::spans::Parent;

/// Longest time that a request goes on by itself.
pub(crate) const MAX_KEEP: Duration = Duration::from_secs(24 * 3600);
/// Calls of one connection that run at once.
pub const MAX_CALLS: usize = 128;
/// Positions per `Scores` reply: below 1 MiB with 64 logits each.
const SCORES_PER_REPLY: usize = 512;
/// Numbers of embeddings per reply: 1 MiB, unless a model is wider than that.
const NUMBERS_PER_REPLY: usize = 256 << 10;
/// Most ids in one reply: each takes at most five bytes of bincode.
const MAX_REPLY_IDS: usize = (MAX_REPLY_BYTES - 64) / 5;

/// How long clients may keep the server waiting.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the handshake to the first call with a valid key.
    pub first_call: Duration,
    /// For a client that reads nothing of its replies.
    pub reply: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first_call: timing::FIRST_CALL, reply: timing::REPLY_WRITE }
    }
}

/// A connection and what its calls have in common.
struct Client {
    connection: Connection,
    service: Arc<dyn Service>,
    patience: Patience,
    /// Whether one of its calls had a valid key.
    proven: AtomicBool,
}

/// Serves one client until its connection ends, or until [`timing::FIRST_CALL`] has passed without
/// a call with a valid key.
pub async fn serve_connection(connection: Connection, service: Arc<dyn Service>) {
    serve_connection_with(connection, service, Patience::default()).await;
}

/// [`serve_connection`] with another patience.
pub async fn serve_connection_with(
    connection: Connection,
    service: Arc<dyn Service>,
    patience: Patience,
) {
    let client = Client { connection, service, patience, proven: AtomicBool::new(false) };
    let connection = &client.connection;
    let mut calls = FuturesUnordered::new();
    let mut waited = std::pin::pin!(tokio::time::sleep(patience.first_call));
    let mut waiting = true;
    loop {
        tokio::select! {
            accepted = connection.accept_incoming(), if calls.len() < MAX_CALLS => match accepted {
                Ok(stream) => calls.push(client.serve_call(stream)),
                Err(error) => {
                    tracing::debug!(peer = %connection.remote_address(), %error, "client left");
                    return;
                }
            },
            Some(ended) = calls.next() => {
                if let Err(error) = ended {
                    tracing::debug!(peer = %connection.remote_address(), %error, "call broken off");
                }
            }
            () = &mut waited, if waiting => {
                waiting = false;
                if !client.proven.load(Ordering::Relaxed) {
                    tracing::debug!(peer = %connection.remote_address(), "no call with a key");
                    connection.close("no call with a valid key came in time");
                    return;
                }
            }
            // With every slot taken nothing above would notice a connection that is gone.
            error = connection.closed() => {
                tracing::debug!(peer = %connection.remote_address(), %error, "client left");
                return;
            }
        }
    }
}

impl Client {
    /// One call, from its header to its last reply.
    async fn serve_call(&self, stream: IncomingStream) -> Result<(), NetError> {
        let call = accept_call(stream).await?;
        let from = self.connection.remote_address().ip();
        if let Err(status) = self.service.authenticate_from(call.bearer(), from) {
            return call.refuse(status).await;
        }
        if !self.proven.swap(true, Ordering::Relaxed) {
            self.connection.widen();
        }
        self.serve_method(call).await
    }

    async fn serve_method(&self, call: IncomingCall) -> Result<(), NetError> {
        let key = call.bearer().map(str::to_owned);
        let caller = match caller(&call) {
            Ok(caller) => caller,
            Err(status) => return call.refuse(status).await,
        };
        let (method, room, replies) = call.method().await?;
        let mut replies = replies.waiting(self.patience.reply);
        let gone = replies.closed();
        let answered = async {
            let connection = &self.connection;
            let asked = (method, room);
            match answer(asked, (key, caller), &mut replies, (&self.service, connection)).await? {
                Ok(()) => replies.done().await,
                Err(status) => replies.fail(status).await,
            }
        };
        tokio::select! {
            biased;
            result = answered => result,
            () = gone => Ok(()),
        }
    }
}

/// Who asks, and what the metadata says of the request.
fn caller(call: &IncomingCall) -> Result<Caller, Status> {
    let header = call.header();
    let named = |name: &str| {
        let found = header.metadata.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.trim())
    };
    let priority = match named(META_PRIORITY) {
        None => Priority::Normal,
        Some(value) => value.parse().map_err(|e: String| Status::invalid(META_PRIORITY, e))?,
    };
    let request_id = named(META_REQUEST_ID).map(|value| {
        let wrong = |_| Status::invalid(META_REQUEST_ID, "the id of a request must be a UUID");
        value.parse::<RequestId>().map_err(wrong)
    });
    let keep = named(META_KEEP_ALIVE).map(|value| {
        let seconds = value.parse::<u64>().map(Duration::from_secs).ok();
        seconds.filter(|keep| *keep <= MAX_KEEP).ok_or_else(|| {
            let most = MAX_KEEP.as_secs();
            Status::invalid(META_KEEP_ALIVE, format!("must be whole seconds, at most {most}"))
        })
    });
    Ok(Caller {
        deadline: header.deadline_ms.map(Duration::from_millis),
        client: Caller::client_of(call.bearer()),
        priority,
        request_id: request_id.transpose()?,
        fresh: Some(RequestId(uuid::Uuid::now_v7())),
        keep: keep.transpose()?,
        trace: Parent::of(named),
        ..Caller::default()
    })
}

/// Sends all replies but the last. The outer error is the network's, the inner one the caller's.
async fn answer(
    (method, room): (Method, Room),
    (key, caller): (Option<String>, Caller),
    replies: &mut ReplySender,
    (service, connection): (&Arc<dyn Service>, &Connection),
) -> Result<Result<(), Status>, NetError> {
    let method = match method {
        Method::Generate(request) => {
            let events = service.generate(request, caller).await;
            // The prompt has become ids, which the scheduler's own limits bound.
            drop(room);
            return hear(events, replies, connection).await;
        }
        Method::Attach(request) => {
            drop(room);
            return hear(service.attach(request, caller).await, replies, connection).await;
        }
        other => other,
    };
    let found = match caller.deadline {
        None => unary(method, key, caller, service).await,
        Some(limit) => tokio::time::timeout(limit, unary(method, key, caller, service))
            .await
            .unwrap_or_else(|_| Err(late(limit))),
    };
    drop(room);
    match found {
        Err(status) => Ok(Err(status)),
        Ok(parts) => {
            for part in &parts {
                replies.reply(part).await?;
            }
            Ok(Ok(()))
        }
    }
}

/// Tells, when a client's stream of events is dropped, whether the client went or was cut off.
struct Heard<'a> {
    events: EventStream,
    connection: &'a Connection,
}

impl Drop for Heard<'_> {
    fn drop(&mut self) {
        if self.connection.was_cut() {
            self.events.lost();
        }
    }
}

async fn hear(
    events: Result<EventStream, Status>,
    replies: &mut ReplySender,
    connection: &Connection,
) -> Result<Result<(), Status>, NetError> {
    let mut heard = match events {
        Ok(events) => Heard { events, connection },
        Err(status) => return Ok(Err(status)),
    };
    let mut to_come = 1;
    loop {
        match heard.events.next().await {
            // The coordinator stops, and goes on with the request when it is back: a stream that
            // breaks off is what tells the client to attach again.
            None => return Err(NetError::Ended("the coordinator stops")),
            Some(Err(status)) => return Ok(Err(status)),
            Some(Ok(event)) => {
                match &event {
                    GenerateEvent::Started { choices, .. } => to_come = *choices,
                    GenerateEvent::Token { .. } => {}
                    GenerateEvent::Finished { .. } => to_come = to_come.saturating_sub(1),
                }
                replies.event(event).await?;
                if to_come == 0 {
                    return Ok(Ok(()));
                }
            }
        }
    }
}

/// Every method but `Generate` and `Attach`: its replies, without `Done`.
async fn unary(
    method: Method,
    key: Option<String>,
    caller: Caller,
    service: &Arc<dyn Service>,
) -> Result<Vec<Reply>, Status> {
    let reply = match method {
        Method::Generate(_) | Method::Attach(_) => {
            return Err(Status::internal("it is answered with a stream of events"));
        }
        Method::Score(request) => {
            let scores = service.score(request, caller).await?;
            let chunks = scores.chunks(SCORES_PER_REPLY);
            return Ok(chunks.map(|chunk| Reply::Scores(chunk.to_vec())).collect());
        }
        Method::Embed(request) => {
            let embedded = service.embed(request, caller).await?.all().await?;
            let width = embedded.first().map_or(1, |e| e.vector.len().max(1));
            let chunks = embedded.chunks((NUMBERS_PER_REPLY / width).max(1));
            return Ok(chunks.map(|chunk| Reply::Embeddings(chunk.to_vec())).collect());
        }
        Method::Tokenize(request) => {
            let (service, pass) = (Arc::clone(service), service.admit(caller)?);
            let ids = blocking(move || {
                let _pass = pass;
                service.tokenize(&request.model, &request.prompt, Framing::Prompt)
            });
            let ids = ids.await?;
            check_size(ids.len(), MAX_REPLY_IDS, "ids")?;
            Reply::Tokens(ids)
        }
        Method::Detokenize { ids } => {
            let (service, pass) = (Arc::clone(service), service.admit(caller)?);
            let text = blocking(move || {
                let _pass = pass;
                service.detokenize(&ids)
            });
            let text = text.await?;
            check_size(text.len(), MAX_REPLY_BYTES - 64, "bytes")?;
            Reply::Text(text)
        }
        Method::Models => Reply::Models(service.models()),
        Method::Cancel { request_id } => {
            service.cancel(request_id, caller).await?;
            return Ok(Vec::new());
        }
        Method::Admin(request) => Reply::Admin(service.admin(key.as_deref(), request).await?),
        Method::Status => Reply::Status(Box::new(service.status().await)),
    };
    Ok(vec![reply])
}

/// A long text takes seconds; the thread that calls this also serves every stream.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Status::internal(format!("tokenizer: {e}"))))
}

fn check_size(len: usize, limit: usize, unit: &str) -> Result<(), Status> {
    if len <= limit {
        return Ok(());
    }
    let message = format!("the answer of {len} {unit} exceeds the limit of {limit}; send less");
    Err(Status::new(ErrorCode::InvalidArgument, message))
}

fn late(limit: Duration) -> Status {
    Status::new(ErrorCode::DeadlineExceeded, format!("no answer within {limit:?}"))
}
