//! What the APIs ask of the coordinator. The QUIC and HTTP servers know only this trait, so they
//! can be tested without a cluster, and neither can do more than the other.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::scheduler::Priority;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{
    ClusterStatus, GenerateEvent, GenerateRequest, ModelCard, PositionScore, Prompt, ScoreRequest,
};
use tokio::sync::mpsc;

use crate::metrics::Metrics;

/// Events of one request. Bounded by the request's own token limit, so it never blocks the
/// scheduler; dropping it cancels the request.
#[derive(Debug)]
pub struct EventStream {
    request_id: RequestId,
    events: mpsc::Receiver<Result<GenerateEvent, Status>>,
}

impl EventStream {
    /// The stream's two ends: the sender goes to whoever produces events.
    pub fn new(
        request_id: RequestId,
        capacity: usize,
    ) -> (mpsc::Sender<Result<GenerateEvent, Status>>, Self) {
        let (sender, events) = mpsc::channel(capacity);
        (sender, Self { request_id, events })
    }

    /// Name of the request, for `cancel`.
    pub fn request_id(&self) -> RequestId {
        self.request_id
    }

    /// The next event; after `Finished` or an error comes `None`.
    pub async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        self.events.recv().await
    }
}

/// Who asks, and how urgently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// From now; later the answer is of no use.
    pub deadline: Option<Duration>,
    /// Stands for the API key: callers with different ones share the pipeline fairly.
    pub client: u64,
    /// The class of the request.
    pub priority: Priority,
}

impl Caller {
    /// The number that stands for a key; without one, that of nobody (FNV-1a).
    pub fn client_of(key: Option<&str>) -> u64 {
        let fold = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
        key.map_or(0, |key| key.bytes().fold(0xcbf2_9ce4_8422_2325, fold))
    }
}

/// The abilities of a serving cluster.
pub trait Service: Send + Sync + 'static {
    /// Continues a prompt. Fails at once if the request is wrong, the queue is full or nothing is
    /// ready; the caller's deadline counts from now.
    fn generate(
        &self,
        request: GenerateRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>>;

    /// Scores given tokens, all positions in order.
    fn score(
        &self,
        request: ScoreRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Vec<PositionScore>, Status>>;

    /// Text or conversation to ids. An empty model name means the only one served.
    ///
    /// # Errors
    /// If the model is unknown or the conversation cannot be rendered.
    fn tokenize(&self, model: &str, prompt: &Prompt) -> Result<Vec<u32>, Status>;

    /// Ids to text.
    ///
    /// # Errors
    /// If an id is outside the vocabulary.
    fn detokenize(&self, ids: &[u32]) -> Result<String, Status>;

    /// How tokens are chosen where a request says nothing: as the model's makers advise.
    fn sampling(&self) -> SamplingParams {
        SamplingParams::default()
    }

    /// Bytes that one token stands for, which may be part of a character; none for ids outside the
    /// vocabulary.
    fn token_bytes(&self, id: u32) -> Vec<u8>;

    /// What is served.
    fn models(&self) -> Vec<ModelCard>;

    /// Stops a request.
    fn cancel(&self, request_id: RequestId) -> BoxFuture<'_, Result<(), Status>>;

    /// The state of the cluster.
    fn status(&self) -> BoxFuture<'_, ClusterStatus>;

    /// What an administrator asks.
    ///
    /// Fails with `PermissionDenied` where the key is not an administrator's.
    fn admin(
        &self,
        key: Option<&str>,
        request: AdminRequest,
    ) -> BoxFuture<'_, Result<AdminReply, Status>>;

    /// Checks an API key (the text after `Bearer `).
    ///
    /// # Errors
    /// `Unauthenticated` where it is missing or wrong.
    fn authenticate(&self, key: Option<&str>) -> Result<(), Status>;
}

/// A service whose refusals are counted. What it admits is for the scheduler's side to count.
#[derive(Debug)]
pub struct Counted<S> {
    inner: Arc<S>,
    metrics: Arc<Metrics>,
}

impl<S> Counted<S> {
    /// Counts what `inner` refuses.
    pub fn new(inner: Arc<S>, metrics: Arc<Metrics>) -> Self {
        Self { inner, metrics }
    }
}

/// Whether a scoring that ended so was refused. One that was admitted can be cut off, but not be
/// found wrong any more; `Unavailable` may be either, and then is the scheduler's side's to count.
fn refuses(code: ErrorCode) -> bool {
    use ErrorCode as E;
    match code {
        E::InvalidArgument | E::NotFound | E::PermissionDenied | E::ResourceExhausted => true,
        E::FailedPrecondition | E::Unimplemented | E::Unauthenticated => true,
        E::Cancelled | E::DeadlineExceeded | E::Internal | E::Unavailable => false,
    }
}

impl<S: Service> Service for Counted<S> {
    fn generate(
        &self,
        request: GenerateRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        let count = |result: Result<EventStream, Status>| {
            result.inspect_err(|status| self.metrics.on_refused(status.code))
        };
        self.inner.generate(request, caller).map(count).boxed()
    }

    fn score(
        &self,
        request: ScoreRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Vec<PositionScore>, Status>> {
        let count = |result: Result<Vec<PositionScore>, Status>| {
            result.inspect_err(|status| {
                if refuses(status.code) {
                    self.metrics.on_refused(status.code);
                }
            })
        };
        self.inner.score(request, caller).map(count).boxed()
    }

    fn tokenize(&self, model: &str, prompt: &Prompt) -> Result<Vec<u32>, Status> {
        self.inner.tokenize(model, prompt)
    }

    fn detokenize(&self, ids: &[u32]) -> Result<String, Status> {
        self.inner.detokenize(ids)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.inner.token_bytes(id)
    }

    fn models(&self) -> Vec<ModelCard> {
        self.inner.models()
    }

    fn cancel(&self, request_id: RequestId) -> BoxFuture<'_, Result<(), Status>> {
        self.inner.cancel(request_id)
    }

    fn status(&self) -> BoxFuture<'_, ClusterStatus> {
        self.inner.status()
    }

    fn admin(
        &self,
        key: Option<&str>,
        request: AdminRequest,
    ) -> BoxFuture<'_, Result<AdminReply, Status>> {
        self.inner.admin(key, request)
    }

    fn authenticate(&self, key: Option<&str>) -> Result<(), Status> {
        self.inner.authenticate(key)
    }
}
