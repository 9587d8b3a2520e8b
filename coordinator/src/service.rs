//! What the APIs ask of the coordinator. The QUIC and HTTP servers know only this trait, so they
//! can be tested without a cluster, and neither can do more than the other.

mod counted;
mod stream;

use std::net::IpAddr;
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
    AttachRequest, ClusterStatus, EmbedRequest, Embedded, GenerateRequest, ModelCard,
    PositionScore, Prompt, ScoreRequest,
};
use tokio::sync::oneshot;

pub use self::counted::Counted;
pub(crate) use self::stream::{Departure, Play, Ranked};
pub use self::stream::{EventStream, Meter, Origin};
use crate::request::Vectors;
use crate::spans::Parent;
use crate::text::TokenizerInfo;

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

/// What stands around a text that becomes ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// What the model expects of prompts: the token that begins texts, where it wants one.
    #[default]
    Prompt,
    /// Nothing.
    Bare,
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

    /// Whether what `client` submitted is this caller's to hear and to end.
    pub(crate) fn owns(&self, client: u64) -> bool {
        self.admin || client == self.client
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

    /// Counts a call that computes without the model (text to ids and back) in what its key may do.
    /// What comes back is held until the call is answered.
    ///
    /// # Errors
    /// If the key may not, or its limits leave no room.
    fn admit(&self, caller: Caller) -> Result<Option<Box<dyn Meter>>, Status> {
        let _ = caller;
        Ok(None)
    }

    /// Text or conversation to ids. An empty model name means the only one served.
    ///
    /// # Errors
    /// If the model is unknown or the conversation cannot be rendered.
    fn tokenize(&self, model: &str, prompt: &Prompt, framing: Framing) -> Result<Vec<u32>, Status>;

    /// The tokenizer's markup, and the template of conversations.
    fn tokenizer_info(&self) -> TokenizerInfo {
        TokenizerInfo::default()
    }

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
