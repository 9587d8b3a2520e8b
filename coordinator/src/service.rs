//! What the APIs ask of the coordinator. The QUIC and HTTP servers know only this trait, so they
//! can be tested without a cluster, and neither can do more than the other.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::scheduler::Priority;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{
    AttachRequest, ClusterStatus, EmbedRequest, Embedded, GenerateEvent, GenerateRequest,
    ModelCard, PositionScore, Prompt, ScoreRequest,
};
use tokio::sync::{mpsc, oneshot};

use crate::journal::unix_ms;
use crate::metrics::Metrics;
use crate::request::{Replay, Vectors};
use crate::spans::Parent;

/// Events of one request. Bounded by the request's own token limit, so it never blocks the
/// scheduler. Dropping it cancels the request, unless somebody else listens, or it was said to be
/// [`EventStream::lost`] and the request is to be kept for a while.
#[derive(Debug)]
pub struct EventStream {
    request_id: RequestId,
    /// What comes before the events.
    play: Option<Play>,
    /// Where choices come from that are compared first.
    ranked: Option<Ranked>,
    events: mpsc::Receiver<Result<GenerateEvent, Status>>,
    meter: Option<Box<dyn Meter>>,
    departure: Arc<Departure>,
    origin: Origin,
}

/// Where a request came from.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// [`Caller::tag`] of whoever submitted it.
    pub tag: u32,
    /// [`Caller::note`] of the same.
    pub note: Arc<[u8]>,
    /// When it was submitted, milliseconds since 1970; 0 where nobody knows.
    pub submitted_ms: u64,
    /// Tokens of the prompt that were left out because it was too long.
    pub left_out: u32,
    /// What the model reads, where that is not what was sent.
    pub read: Option<Vec<u32>>,
}

/// Events that are made again from the log, once all of it is durable.
#[derive(Debug)]
pub(crate) struct Play {
    settled: Option<oneshot::Receiver<()>>,
    replay: Replay,
}

impl Play {
    /// What `replay` gives, from when `settled` completes.
    pub(crate) fn new(replay: Replay, settled: oneshot::Receiver<()>) -> Self {
        Self { settled: Some(settled), replay }
    }

    /// The next event; `None` at the end, and where the journal is gone. Cancel-safe.
    async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        if let Some(settled) = &mut self.settled {
            settled.await.ok()?;
            self.settled = None;
        }
        // A long answer is played in turns with others.
        tokio::task::coop::consume_budget().await;
        self.replay.next()
    }
}

/// Choices to come, when all have ended.
#[derive(Debug)]
pub(crate) struct Ranked(pub(crate) oneshot::Receiver<Play>);

/// Is told of the events that a stream hands out, and dropped with it.
pub trait Meter: fmt::Debug + Send {
    /// One more event.
    fn see(&mut self, event: &GenerateEvent);
}

impl EventStream {
    /// The stream's two ends: the sender goes to whoever produces events.
    pub fn new(
        request_id: RequestId,
        capacity: usize,
    ) -> (mpsc::Sender<Result<GenerateEvent, Status>>, Self) {
        let (sender, events) = mpsc::channel(capacity);
        let stream = Self {
            request_id,
            play: None,
            ranked: None,
            events,
            meter: None,
            departure: Arc::default(),
            origin: Origin::default(),
        };
        (sender, stream)
    }

    /// The same stream, of a request that came from there.
    #[must_use]
    pub fn with_origin(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }

    /// Where the request came from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Says that when this is dropped the client did not go, but its connection was lost.
    pub fn lost(&self) {
        self.departure.lost.store(true, Ordering::Release);
    }

    /// For the other end: how it went.
    pub(crate) fn departure(&self) -> Arc<Departure> {
        Arc::clone(&self.departure)
    }

    /// The same stream, with somebody who counts.
    #[must_use]
    pub fn metered(mut self, meter: Box<dyn Meter>) -> Self {
        self.meter = Some(meter);
        self
    }

    /// Name of the request, for `cancel`.
    pub fn request_id(&self) -> RequestId {
        self.request_id
    }

    /// The same stream after what `play` gives.
    pub(crate) fn begin_with(&mut self, play: Play) {
        self.play = Some(play);
    }

    /// The same stream, whose choices come at the end.
    pub(crate) fn then_ranked(&mut self, ranked: Ranked) {
        self.ranked = Some(ranked);
    }

    /// The next event; after the last `Finished` or an error comes `None`. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        let event = self.event().await;
        self.departure.taken_ms.store(unix_ms(), Ordering::Relaxed);
        if let (Some(meter), Some(Ok(event))) = (&mut self.meter, &event) {
            meter.see(event);
        }
        event
    }

    /// The next event of those that have happened; `None` where there is none yet, or none any more.
    pub async fn next_there(&mut self) -> Option<Result<GenerateEvent, Status>> {
        if let Some(play) = &mut self.play {
            if let Some(event) = play.next().await {
                return Some(event);
            }
            self.play = None;
        }
        self.events.try_recv().ok()
    }

    async fn event(&mut self) -> Option<Result<GenerateEvent, Status>> {
        loop {
            if let Some(play) = &mut self.play {
                if let Some(event) = play.next().await {
                    return Some(event);
                }
                self.play = None;
            }
            let Some(Ranked(ranked)) = &mut self.ranked else { return self.events.recv().await };
            let play = tokio::select! {
                biased;
                play = &mut *ranked => play.ok(),
                event = self.events.recv() => match event {
                    Some(event) => return Some(event),
                    // They may have come between the two looks.
                    None => ranked.try_recv().ok(),
                },
            };
            self.ranked = None;
            self.play = play;
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if self.departure.is_lost() {
            *self.departure.meter() = self.meter.take();
        }
    }
}

/// How the one who heard a stream went.
#[derive(Debug, Default)]
pub(crate) struct Departure {
    lost: AtomicBool,
    /// When the last event was taken, milliseconds since 1970; 0 before the first.
    taken_ms: AtomicU64,
    meter: Mutex<Option<Box<dyn Meter>>>,
}

impl Departure {
    /// Whether it was cut off, rather than having had enough.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// How long ago the last event was taken; none where none was yet.
    pub(crate) fn since_taken(&self) -> Duration {
        match self.taken_ms.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            taken => Duration::from_millis(unix_ms().saturating_sub(taken)),
        }
    }

    /// Who counted its events, and goes on with those of a request that goes on.
    pub(crate) fn take_meter(&self) -> Option<Box<dyn Meter>> {
        self.meter().take()
    }

    fn meter(&self) -> MutexGuard<'_, Option<Box<dyn Meter>>> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Texts that were accepted and become vectors. Dropping it cancels that.
#[derive(Debug)]
pub struct Embeddings {
    /// Tokens of each text.
    pub prompt_tokens: Vec<u32>,
    vectors: oneshot::Receiver<Vectors>,
    pass: Option<Box<dyn Meter>>,
}

impl Embeddings {
    /// Of texts of so many tokens.
    pub fn new(prompt_tokens: Vec<u32>, vectors: oneshot::Receiver<Vectors>) -> Self {
        Self { prompt_tokens, vectors, pass: None }
    }

    /// The same, with what is held until it is over.
    #[must_use]
    pub fn metered(mut self, pass: Box<dyn Meter>) -> Self {
        self.pass = Some(pass);
        self
    }

    /// The vectors, in the order of the texts.
    ///
    /// # Errors
    /// Why there are none.
    pub async fn all(self) -> Result<Vec<Embedded>, Status> {
        let gone = |_| Err(Status::unavailable("the coordinator is shutting down", 5000));
        let vectors = self.vectors.await.unwrap_or_else(gone)?;
        drop(self.pass);
        let embedded = |(prompt_tokens, vector)| Embedded { prompt_tokens, vector };
        Ok(self.prompt_tokens.into_iter().zip(vectors).map(embedded).collect())
    }
}

/// Who asks, and how urgently.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// From now; later the answer is of no use.
    pub deadline: Option<Duration>,
    /// Stands for the API key: callers with different ones share the pipeline fairly.
    pub client: u64,
    /// The class of the request.
    pub priority: Priority,
    /// The client's own name for the request.
    pub request_id: Option<RequestId>,
    /// The id that it gets where the client has named none; drawn early, so that a refusal has one.
    pub fresh: Option<RequestId>,
    /// How long the request goes on after a connection was lost; nothing ends it at once.
    pub keep: Option<Duration>,
    /// What the API wants to know when somebody attaches; only kept.
    pub tag: u32,
    /// The same, where it is long.
    pub note: Arc<[u8]>,
    /// The span that the call belongs to.
    pub trace: Option<Parent>,
    /// Whether the key is an administrator's; the gate says so.
    pub admin: bool,
    /// Whether the request must be one that is known by its id: a new one is refused.
    pub again: bool,
}

impl Caller {
    /// The number that stands for a key, the same in every life of a coordinator; without one, that
    /// of nobody. The first eight bytes of the key's BLAKE3: nobody finds another key of the same
    /// number, nor the key by the number.
    pub fn client_of(key: Option<&str>) -> u64 {
        let number = |key: &str| {
            let hash = blake3::hash(key.as_bytes());
            let first = hash.as_bytes().first_chunk::<8>().copied().unwrap_or_default();
            u64::from_le_bytes(first)
        };
        key.map_or(0, number)
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

    /// Whether a request of this id is this caller's, and would be heard rather than begun.
    fn knows(&self, id: RequestId, caller: Caller) -> BoxFuture<'_, bool> {
        let _ = (id, caller);
        async { false }.boxed()
    }

    /// The events of a request of this caller, from a token on, whether it runs or ended a while
    /// ago. Fails with `NotFound` where there is none that is this caller's.
    fn attach(
        &self,
        request: AttachRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        let _ = caller;
        async move { Err(unknown_request(request.request_id)) }.boxed()
    }

    /// Scores given tokens, all positions in order.
    fn score(
        &self,
        request: ScoreRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Vec<PositionScore>, Status>>;

    /// A prompt as the operator's rules have it. What `generate` takes goes through them anyway; this
    /// is for what is kept of it. Fails where they refuse it.
    fn ruled(&self, prompt: Prompt) -> BoxFuture<'_, Result<Prompt, Status>> {
        async { Ok(prompt) }.boxed()
    }

    /// Makes vectors of texts. Fails at once if the request is wrong, the queue is full or nothing is
    /// ready; the caller's deadline counts from now.
    fn embed(
        &self,
        request: EmbedRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Embeddings, Status>> {
        let _ = (request, caller);
        async { Err(Status::new(ErrorCode::Unimplemented, "embeddings are not made here")) }.boxed()
    }

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

    /// Forgets a request of this caller, and stops it where it runs. Fails with `NotFound` where there
    /// is none that is.
    fn forget(&self, request_id: RequestId, caller: Caller) -> BoxFuture<'_, Result<(), Status>> {
        let _ = caller;
        async move { Err(unknown_request(request_id)) }.boxed()
    }

    /// Stops a request of this caller. Fails with `NotFound` where there is none that is.
    fn cancel(&self, request_id: RequestId, caller: Caller) -> BoxFuture<'_, Result<(), Status>>;

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

    /// The same, for a caller at this address, who may not guess too often.
    ///
    /// # Errors
    /// Also `ResourceExhausted`.
    fn authenticate_from(&self, key: Option<&str>, from: IpAddr) -> Result<(), Status> {
        let _ = from;
        self.authenticate(key)
    }
}

/// What is said of a request that is not there, or somebody else's.
pub fn unknown_request(id: RequestId) -> Status {
    let message = format!(
        "no request {id} of this key is known here: it was never submitted, was not kept, or ended \
         too long ago (--journal and --retain of the coordinator say what is kept)"
    );
    Status::new(ErrorCode::NotFound, message)
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
        let id = caller.request_id.or(caller.fresh);
        let count = move |result: Result<EventStream, Status>| {
            result.inspect_err(|status| {
                self.metrics.on_refused(status.code);
                if let Some(id) = id {
                    self.metrics.names().refused_id(id, status);
                    let request_id = self.metrics.names().label(id);
                    tracing::info!(request_id, code = ?status.code, "refused: {}", status.message);
                }
            })
        };
        self.inner.generate(request, caller).map(count).boxed()
    }

    fn knows(&self, id: RequestId, caller: Caller) -> BoxFuture<'_, bool> {
        self.inner.knows(id, caller)
    }

    fn attach(
        &self,
        request: AttachRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        self.inner.attach(request, caller)
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

    fn ruled(&self, prompt: Prompt) -> BoxFuture<'_, Result<Prompt, Status>> {
        self.inner.ruled(prompt)
    }

    fn embed(
        &self,
        request: EmbedRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Embeddings, Status>> {
        let count = |result: Result<Embeddings, Status>| {
            result.inspect_err(|status| self.metrics.on_refused(status.code))
        };
        self.inner.embed(request, caller).map(count).boxed()
    }

    fn tokenize(&self, model: &str, prompt: &Prompt) -> Result<Vec<u32>, Status> {
        self.inner.tokenize(model, prompt)
    }

    fn detokenize(&self, ids: &[u32]) -> Result<String, Status> {
        self.inner.detokenize(ids)
    }

    fn sampling(&self) -> SamplingParams {
        self.inner.sampling()
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.inner.token_bytes(id)
    }

    fn models(&self) -> Vec<ModelCard> {
        self.inner.models()
    }

    fn cancel(&self, request_id: RequestId, caller: Caller) -> BoxFuture<'_, Result<(), Status>> {
        self.inner.cancel(request_id, caller)
    }

    fn forget(&self, request_id: RequestId, caller: Caller) -> BoxFuture<'_, Result<(), Status>> {
        self.inner.forget(request_id, caller)
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

    fn authenticate_from(&self, key: Option<&str>, from: IpAddr) -> Result<(), Status> {
        self.inner.authenticate_from(key, from)
    }
}
