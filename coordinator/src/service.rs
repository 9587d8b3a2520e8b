//! What the APIs ask of the coordinator. The QUIC and HTTP servers know only this trait, so they
//! can be tested without a cluster, and neither can do more than the other.

use std::time::Duration;

use futures::future::BoxFuture;
use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{
    ClusterStatus, GenerateEvent, GenerateRequest, ModelCard, PositionScore, Prompt, ScoreRequest,
};
use tokio::sync::mpsc;

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

/// The abilities of a serving cluster.
pub trait Service: Send + Sync + 'static {
    /// Continues a prompt. Fails at once if the request is wrong, the queue is full or nothing is
    /// ready; the deadline counts from now.
    fn generate(
        &self,
        request: GenerateRequest,
        deadline: Option<Duration>,
    ) -> BoxFuture<'_, Result<EventStream, Status>>;

    /// Scores given tokens, all positions in order.
    fn score(
        &self,
        request: ScoreRequest,
        deadline: Option<Duration>,
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

    /// Bytes that one token stands for, which may be part of a character; none for ids outside the
    /// vocabulary.
    fn token_bytes(&self, id: u32) -> Vec<u8>;

    /// What is served.
    fn models(&self) -> Vec<ModelCard>;

    /// Stops a request.
    fn cancel(&self, request_id: RequestId) -> BoxFuture<'_, Result<(), Status>>;

    /// The state of the cluster.
    fn status(&self) -> BoxFuture<'_, ClusterStatus>;

    /// Checks an API key (the text after `Bearer `).
    ///
    /// # Errors
    /// `Unauthenticated` where it is missing or wrong.
    fn authenticate(&self, key: Option<&str>) -> Result<(), Status>;
}
