//! The [`Service`] that real clients get: validates, tokenises, and hands sequences to the batcher.

mod passes;
mod prompts;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use actix::{Addr, MailboxError};
use futures::FutureExt;
use futures::future::BoxFuture;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::codec;
use millrace_shared::wire::rpc::{
    AttachRequest, ClusterStatus, EmbedRequest, GenerateRequest, ModelCard, PositionScore, Prompt,
    ScoreRequest,
};
use uuid::Uuid;

pub use self::prompts::Prompts;
use self::prompts::Read;
use crate::actors::batcher::{Attach, Cancel, Enter, Forget, GetCounters, Knows, Submit};
use crate::actors::cluster::{Admin, GetStatus};
use crate::actors::{Batcher, Cluster};
use crate::collect::{self, About};
use crate::metrics::Metrics;
use crate::service::{Caller, Embeddings, EventStream, Framing, Service};
use crate::text::TokenizerInfo;
use crate::whereabouts;

/// What is served and by whom.
#[derive(Debug)]
pub struct Serving {
    /// Driver of the scheduler.
    pub batcher: Addr<Batcher>,
    /// Members and plan.
    pub cluster: Addr<Cluster>,
    /// What turns prompts into ids.
    pub prompts: Arc<Prompts>,
    /// What is measured, and what requests are called.
    pub metrics: Arc<Metrics>,
    /// Settings for people.
    pub about: Arc<About>,
    /// Distinguishes seeds drawn within one clock tick.
    pub draws: AtomicU64,
}

pub(crate) fn crossed(e: MailboxError) -> Status {
    match e {
        MailboxError::Timeout => Status::exhausted("the scheduler is busy", 1000),
        MailboxError::Closed => Status::unavailable("the coordinator is shutting down", 5000),
    }
}

impl Serving {
    /// Waits where requests cannot be submitted yet but will be soon; what is left of the caller's
    /// time.
    async fn enter(&self, id: RequestId, mut caller: Caller) -> Result<Caller, Status> {
        let begun = Instant::now();
        let entering = self.batcher.send(Enter { id, client: caller.client });
        let entered = match caller.deadline {
            Some(deadline) => tokio::time::timeout(deadline, entering).await.map_err(|_| {
                let message = "the deadline passed while the request waited for a pipeline";
                Status::new(ErrorCode::DeadlineExceeded, message)
            })?,
            None => entering.await,
        };
        entered.map_err(crossed)??;
        caller.deadline = caller.deadline.map(|d| d.saturating_sub(begun.elapsed()));
        Ok(caller)
    }

    /// A seed for a request that gave none: from the random bits of its version 7 id.
    fn draw_seed(&self, id: RequestId) -> u64 {
        let bits = id.0.as_u128();
        let n = self.draws.fetch_add(1, Ordering::Relaxed);
        ((bits >> 64) as u64 ^ bits as u64).wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

impl Service for Serving {
    fn generate(
        &self,
        request: GenerateRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        async move {
            self.prompts.check_model(&request.model)?;
            request.choices.validate()?;
            let chat = matches!(request.prompt, Prompt::Chat(_));
            let digest = *blake3::hash(&codec::encode(&request)).as_bytes();
            let mut params = request.params;
            let ruled = self.prompts.ruled(request.prompt).await?;
            let (prompt, touched) =
                ruled.inspect_err(|_| self.metrics.on_rules_of_prompt("blocked"))?;
            let (calls, grammar) = self.prompts.plan_calls(&prompt, params.grammar)?;
            params.grammar = grammar;
            params
                .validate(self.prompts.card.vocab)
                .map_err(|e| Status::invalid(e.param, e.to_string()))?;
            let Read { ids: tokens, left_out } =
                self.prompts.read(prompt, params.max_tokens).await?;
            for (did, what) in [(touched.redacted, "redacted"), (left_out > 0, "shortened")] {
                if did {
                    self.metrics.on_rules_of_prompt(what);
                }
            }
            let matcher = self.prompts.matcher(params.grammar.as_ref()).await?;
            let id = caller.request_id.or(caller.fresh);
            let id = id.unwrap_or_else(|| RequestId(Uuid::now_v7()));
            let caller = self.enter(id, caller).await?;
            let seed = params.seed.unwrap_or_else(|| self.draw_seed(id));
            let choices = request.choices;
            let submit = Submit {
                id,
                tokens,
                params,
                choices,
                matcher,
                calls,
                seed,
                chat,
                caller,
                digest,
                rules: self.prompts.rules.answer.clone(),
                left_out,
                altered: touched.changed || left_out > 0,
            };
            self.batcher.send(submit).await.map_err(crossed)?
        }
        .boxed()
    }

    fn knows(&self, id: RequestId, caller: Caller) -> BoxFuture<'_, bool> {
        async move { self.batcher.send(Knows { id, caller }).await.unwrap_or(false) }.boxed()
    }

    fn attach(
        &self,
        request: AttachRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        async move { self.batcher.send(Attach { request, caller }).await.map_err(crossed)? }.boxed()
    }

    fn score(
        &self,
        request: ScoreRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Vec<PositionScore>, Status>> {
        self.scores(request, caller).boxed()
    }

    fn ruled(&self, prompt: Prompt) -> BoxFuture<'_, Result<Prompt, Status>> {
        async move { Ok(self.prompts.ruled(prompt).await??.0) }.boxed()
    }

    fn embed(
        &self,
        request: EmbedRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Embeddings, Status>> {
        self.vectors(request, caller).boxed()
    }

    fn tokenize(&self, model: &str, prompt: &Prompt, framing: Framing) -> Result<Vec<u32>, Status> {
        self.prompts.check_model(model)?;
        self.prompts.ids(prompt, framing)
    }

    fn detokenize(&self, ids: &[u32]) -> Result<String, Status> {
        self.prompts.check_ids("tokens", ids)?;
        Ok(self.prompts.text.tokenizer.decode(ids, false))
    }

    fn tokenizer_info(&self) -> TokenizerInfo {
        let model_max_length = Some(self.prompts.card.max_model_len);
        TokenizerInfo { model_max_length, ..TokenizerInfo::of(&self.prompts.text) }
    }

    fn sampling(&self) -> SamplingParams {
        self.prompts.text.sampling.clone()
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.prompts.text.tokenizer.token_bytes(id).to_vec()
    }

    fn models(&self) -> Vec<ModelCard> {
        vec![self.prompts.card.clone()]
    }

    fn cancel(&self, request_id: RequestId, caller: Caller) -> BoxFuture<'_, Result<(), Status>> {
        async move { self.batcher.send(Cancel { request_id, caller }).await.map_err(crossed)? }
            .boxed()
    }

    fn forget(&self, request_id: RequestId, caller: Caller) -> BoxFuture<'_, Result<(), Status>> {
        let forget = Forget(Cancel { request_id, caller });
        async move { self.batcher.send(forget).await.map_err(crossed)? }.boxed()
    }

    fn status(&self) -> BoxFuture<'_, ClusterStatus> {
        async move {
            let mut status = self.cluster.send(GetStatus).await.unwrap_or_default();
            if let Ok(counters) = self.batcher.send(GetCounters).await {
                status.running = counters.running;
                status.waiting = counters.waiting;
                status.kv_blocks_used = counters.blocks_used;
                status.preemptions = counters.preemptions;
                status.prompt_tokens = counters.prompt_tokens;
                status.generation_tokens = counters.generated_tokens;
                status.stale_dropped = counters.stale_dropped;
                status.prefix_query_tokens = counters.prefix_query_tokens;
                status.prefix_hit_tokens = counters.prefix_hit_tokens;
                status.draft_tokens = counters.draft_tokens;
                status.draft_tokens_accepted = counters.draft_tokens_accepted;
            }
            status
        }
        .boxed()
    }

    /// The gate has checked the key.
    fn admin(
        &self,
        _: Option<&str>,
        request: AdminRequest,
    ) -> BoxFuture<'_, Result<AdminReply, Status>> {
        async move {
            if let AdminRequest::Requests(query) = request {
                return whereabouts::answer(self, query).await;
            }
            if request == (AdminRequest::Collect { node: None }) {
                return collect::own(self, &self.about, &self.metrics).await;
            }
            let blocks_used = self.batcher.send(GetCounters).await.map_err(crossed)?.blocks_used;
            self.cluster.send(Admin { request, blocks_used }).await.map_err(crossed)?
        }
        .boxed()
    }

    /// Nobody comes in here: keys are the gate's.
    fn authenticate(&self, _: Option<&str>) -> Result<(), Status> {
        Err(Status::new(ErrorCode::Unauthenticated, "there are no keys behind the gate"))
    }
}
