//! A service whose refusals are counted.

use std::net::IpAddr;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{
    AttachRequest, ClusterStatus, EmbedRequest, GenerateRequest, ModelCard, PositionScore, Prompt,
    ScoreRequest,
};

use super::{Caller, Embeddings, EventStream, Framing, Meter, Service};
use crate::metrics::Metrics;
use crate::text::TokenizerInfo;

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

    fn admit(&self, caller: Caller) -> Result<Option<Box<dyn Meter>>, Status> {
        let refused = |status: &Status| self.metrics.on_refused(status.code);
        self.inner.admit(caller).inspect_err(refused)
    }

    fn tokenize(&self, model: &str, prompt: &Prompt, framing: Framing) -> Result<Vec<u32>, Status> {
        self.inner.tokenize(model, prompt, framing)
    }

    fn tokenizer_info(&self) -> TokenizerInfo {
        self.inner.tokenizer_info()
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
