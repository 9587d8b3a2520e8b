//! The client SDK: calls over QUIC to a coordinator.
//!
//! One connection carries all calls of a [`Client`], one stream each; a lost connection is made
//! again at the next call, and a call that was running on it fails with `UNAVAILABLE`: but a
//! continuation goes on by itself where the coordinator still knows it (see [`GenerateStream`]), so
//! that its events come once each, in order, also across a restart of the coordinator.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use millrace_net::client::{Client, ClientConfig};
//! use millrace_shared::sampling::SamplingParams;
//! use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};
//!
//! let config = ClientConfig::load("client.toml".as_ref())?;
//! let client = Client::connect(&config).await?;
//! let mut answer = client
//!     .generate(GenerateRequest {
//!         model: String::new(),
//!         prompt: Prompt::Text("Why is the sky blue?".into()),
//!         params: SamplingParams::default(),
//!         choices: Choices::default(),
//!     })
//!     .await?;
//! while let Some(event) = answer.next().await {
//!     if let GenerateEvent::Token { text, .. } = event? {
//!         eprint!("{text}");
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod call;
mod config;
mod generate;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{
    CallHeader, ClusterStatus, EmbedRequest, Embedded, GenerateRequest, MAX_EMBED_INPUTS,
    META_TRACEPARENT, META_TRACESTATE, Method, ModelCard, PositionScore, Reply, ScoreRequest,
    TokenizeRequest,
};
use millrace_shared::wire::{MAX_CALL_HEADER_BYTES, MAX_RPC_BYTES, codec};
use tokio::sync::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use call::Replies;
pub use config::ClientConfig;
pub use generate::GenerateStream;

use crate::endpoint::resolve;
use crate::{ClientTls, Connection, Endpoint, MessageSender, NetError, timing};

/// A client of one cluster. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
    deadline: Option<Duration>,
    /// Metadata that every call carries.
    trace: Vec<(String, String)>,
    /// When the call that this clone was made for ends.
    ends: Option<Instant>,
}

struct Shared {
    endpoint: Endpoint,
    tls: ClientTls,
    /// That the server's certificate must carry.
    name: String,
    address: String,
    api_key: String,
    connection: Mutex<Option<Connection>>,
    closed: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.address)
    }
}

impl Client {
    /// Connects to the cluster that the configuration names. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// `UNAVAILABLE`, naming the address, if it cannot be reached; `FAILED_PRECONDITION` if the
    /// configuration is unusable.
    pub async fn connect(config: &ClientConfig) -> Result<Self, Status> {
        let unusable = |what: String| {
            Status::new(ErrorCode::FailedPrecondition, format!("client configuration: {what}"))
        };
        let (tls, name) = config.tls().map_err(unusable)?;
        let failed = |e: NetError| unreachable_status(&config.quic, &e);
        let remote = resolve(&config.quic).await.map_err(failed)?;
        let first = remote.first().ok_or_else(|| unusable("quic names no address".into()))?;
        let endpoint = Endpoint::client(*first).map_err(failed)?;
        let client = Self {
            shared: Arc::new(Shared {
                endpoint,
                tls,
                name,
                address: config.quic.clone(),
                api_key: config.api_key.clone(),
                connection: Mutex::new(None),
                closed: AtomicBool::new(false),
            }),
            deadline: None,
            trace: Vec::new(),
            ends: None,
        };
        client.connection().await?;
        Ok(client)
    }

    /// The same client whose calls end with `DEADLINE_EXCEEDED` after this long.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ends: None, ..self.clone() }
    }

    /// The same client whose calls belong to a span, as W3C Trace Context writes them:
    /// `traceparent`, such as `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`, and
    /// `tracestate`, which may be empty. A server that makes traces puts its spans below it; one that
    /// cannot read it goes by none.
    #[must_use]
    pub fn with_trace(&self, traceparent: &str, tracestate: &str) -> Self {
        let fields = [(META_TRACEPARENT, traceparent), (META_TRACESTATE, tracestate)];
        let said = fields.into_iter().filter(|(_, value)| !value.is_empty());
        let trace = said.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { trace, ..self.clone() }
    }

    /// Streams a continuation. Dropping the stream cancels the request; a lost connection does not,
    /// for the stream attaches again.
    ///
    /// # Errors
    /// If the call cannot be made; errors of the request come from the stream.
    pub async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, Status> {
        self.generate_as(RequestId(Uuid::now_v7()), request).await
    }

    /// The same under an id of the client's own. Sent again with the same id and content, it attaches
    /// to the request that is there already, from its beginning.
    ///
    /// # Errors
    /// As [`Client::generate`]; the stream ends with `INVALID_ARGUMENT` where the id is in use for
    /// other content.
    pub async fn generate_as(
        &self,
        id: RequestId,
        request: GenerateRequest,
    ) -> Result<GenerateStream, Status> {
        GenerateStream::ask(self, &self.for_a_call(), id, request).await
    }

    /// Hears a request that was submitted before with the same key, of each choice from the token
    /// in `next` on (0 where there is none): also one that has ended, as long as the coordinator
    /// keeps it.
    ///
    /// # Errors
    /// If the call cannot be made; the stream ends with `NOT_FOUND` where there is no such request.
    pub async fn attach(&self, id: RequestId, next: &[u32]) -> Result<GenerateStream, Status> {
        GenerateStream::attach(self, &self.for_a_call(), id, next).await
    }

    /// The same client, whose deadline counts from now.
    fn for_a_call(&self) -> Self {
        Self { ends: self.deadline.map(|d| Instant::now() + d), ..self.clone() }
    }

    /// When its call ends.
    fn ends_at(&self) -> Option<Instant> {
        self.ends
    }

    fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Relaxed)
    }

    /// Scores given tokens: one entry per position, in order.
    ///
    /// # Errors
    /// What the server says, or `UNAVAILABLE`.
    pub async fn score(&self, request: ScoreRequest) -> Result<Vec<PositionScore>, Status> {
        let method = Method::Score(request);
        let mut replies = self.call(&method, Vec::new(), timing::STREAM_SILENCE).await?;
        let mut scores = Vec::new();
        loop {
            match replies.next().await? {
                Reply::Scores(more) => scores.extend(more),
                Reply::Done => return Ok(scores),
                other => return Err(replies.unexpected(&other)),
            }
        }
    }

    /// Makes vectors of texts: one for each, in order.
    ///
    /// # Errors
    /// What the server says, or `UNAVAILABLE`; `INVALID_ARGUMENT` where there are too many texts.
    pub async fn embed(&self, request: EmbedRequest) -> Result<Vec<Embedded>, Status> {
        if request.inputs.len() > MAX_EMBED_INPUTS {
            let message = format!("{} texts, at most {MAX_EMBED_INPUTS}", request.inputs.len());
            return Err(Status::invalid("input", message));
        }
        let method = Method::Embed(request);
        let mut replies = self.call(&method, Vec::new(), timing::STREAM_SILENCE).await?;
        let mut embedded = Vec::new();
        loop {
            match replies.next().await? {
                Reply::Embeddings(more) => embedded.extend(more),
                Reply::Done => return Ok(embedded),
                other => return Err(replies.unexpected(&other)),
            }
        }
    }

    /// Turns text or a conversation into ids.
    ///
    /// # Errors
    /// What the server says, or `UNAVAILABLE`.
    pub async fn tokenize(&self, request: TokenizeRequest) -> Result<Vec<u32>, Status> {
        self.unary(Method::Tokenize(request), |reply| match reply {
            Reply::Tokens(ids) => Ok(ids),
            other => Err(Box::new(other)),
        })
        .await
    }

    /// Turns ids into text.
    ///
    /// # Errors
    /// What the server says, or `UNAVAILABLE`.
    pub async fn detokenize(&self, ids: Vec<u32>) -> Result<String, Status> {
        self.unary(Method::Detokenize { ids }, |reply| match reply {
            Reply::Text(text) => Ok(text),
            other => Err(Box::new(other)),
        })
        .await
    }

    /// What is served.
    ///
    /// # Errors
    /// What the server says, or `UNAVAILABLE`.
    pub async fn models(&self) -> Result<Vec<ModelCard>, Status> {
        self.unary(Method::Models, |reply| match reply {
            Reply::Models(cards) => Ok(cards),
            other => Err(Box::new(other)),
        })
        .await
    }

    /// The state of the cluster.
    ///
    /// # Errors
    /// What the server says, or `UNAVAILABLE`.
    pub async fn status(&self) -> Result<ClusterStatus, Status> {
        self.unary(Method::Status, |reply| match reply {
            Reply::Status(status) => Ok(*status),
            other => Err(Box::new(other)),
        })
        .await
    }

    /// Asks or orders something as an administrator.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` without an administrator's key, what else the server says, or
    /// `UNAVAILABLE`.
    pub async fn admin(&self, request: AdminRequest) -> Result<AdminReply, Status> {
        self.unary(Method::Admin(request), |reply| match reply {
            Reply::Admin(reply) => Ok(reply),
            other => Err(Box::new(other)),
        })
        .await
    }

    /// Stops a request of this client.
    ///
    /// # Errors
    /// `NOT_FOUND` if there is none of this name, what else the server says, or `UNAVAILABLE`.
    pub async fn cancel(&self, request_id: RequestId) -> Result<(), Status> {
        let method = Method::Cancel { request_id };
        let mut replies = self.call(&method, Vec::new(), timing::UNARY_CALL).await?;
        match replies.next().await? {
            Reply::Done => Ok(()),
            other => Err(replies.unexpected(&other)),
        }
    }

    /// Closes the connection and waits until the server has been told. Other clones lose it too.
    pub async fn close(&self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        self.shared.endpoint.close("client closed");
        self.shared.endpoint.drain().await;
    }

    async fn unary<T>(
        &self,
        method: Method,
        pick: impl FnOnce(Reply) -> Result<T, Box<Reply>>,
    ) -> Result<T, Status> {
        let mut replies = self.call(&method, Vec::new(), timing::UNARY_CALL).await?;
        let first = replies.next().await?;
        let value = pick(first).map_err(|other| replies.unexpected(&other))?;
        match replies.next().await? {
            Reply::Done => Ok(value),
            other => Err(replies.unexpected(&other)),
        }
    }

    /// Opens a stream and sends the call; `silence` bounds the wait for each reply where the
    /// client has no deadline.
    async fn call(
        &self,
        method: &Method,
        mut metadata: Vec<(String, String)>,
        silence: Duration,
    ) -> Result<Replies, Status> {
        let now = Instant::now();
        // A call that is made again has what is left.
        let left = self.ends.map(|until| until.saturating_duration_since(now)).or(self.deadline);
        let ends = left.map(|left| (now + left, self.deadline.unwrap_or(left)));
        let key = format!("Bearer {}", self.shared.api_key);
        metadata.push(("authorization".to_owned(), key));
        metadata.extend(self.trace.iter().cloned());
        let deadline_ms = left.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        let header = CallHeader { metadata, deadline_ms };
        // Both at once: the server answers neither by itself.
        let mut call = codec::encode_frame(&header);
        call.extend(codec::encode_frame(method));
        if call.len() > MAX_CALL_HEADER_BYTES + MAX_RPC_BYTES {
            let message =
                format!("the call of {} bytes is too long: send less at once", call.len());
            return Err(Status::new(ErrorCode::InvalidArgument, message));
        }
        let address = &self.shared.address;
        let open = async {
            let connection = self.connection().await?;
            let failed = |e: NetError| unreachable_status(address, &e);
            let (send, recv) = connection.open_bare().await.map_err(failed)?;
            let mut out = MessageSender::new(send);
            // A server that refuses early says why on its half.
            let _ = out.send_bytes(call.into()).await;
            out.finish();
            Ok(Replies::new(out.into_stream(), recv, address.clone(), ends, silence))
        };
        let limit = left.unwrap_or(timing::UNARY_CALL);
        tokio::time::timeout(limit, open).await.unwrap_or_else(|_| Err(call::late(limit)))
    }

    /// The connection, made again if it was lost.
    async fn connection(&self) -> Result<Connection, Status> {
        let shared = &self.shared;
        let mut slot = shared.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|c| c.close_reason().is_none()) {
            return Ok(connection.clone());
        }
        let connection = shared
            .endpoint
            .connect_host(&shared.address, &shared.name, &shared.tls, timing::HANDSHAKE)
            .await
            .map_err(|e| unreachable_status(&shared.address, &e))?;
        *slot = Some(connection.clone());
        Ok(connection)
    }
}

/// Connection trouble, as a client sees it.
fn unreachable_status(address: &str, e: &NetError) -> Status {
    Status::unavailable(format!("the cluster at {address} cannot be reached: {e}"), 1000)
}
