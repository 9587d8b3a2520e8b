//! The [`Service`] that real clients get: validates, tokenises, and hands sequences to the batcher.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use actix::{Addr, MailboxError};
use futures::FutureExt;
use futures::future::BoxFuture;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::{Grammar, SamplingParams};
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::codec;
use millrace_shared::wire::rpc::{
    AttachRequest, ChatMessage, ClusterStatus, Conversation, EmbedRequest, GenerateRequest,
    MAX_EMBED_INPUTS, ModelCard, PositionScore, Prompt, ScoreRequest, ToolCall,
};
use uuid::Uuid;

use crate::actors::batcher::{
    Attach, Cancel, Enter, Forget, GetCounters, Knows, Submit, SubmitEmbed, SubmitScore,
};
use crate::actors::cluster::{Admin, GetStatus};
use crate::actors::{Batcher, Cluster};
use crate::collect::{self, About};
use crate::metrics::Metrics;
use crate::service::{Caller, Embeddings, EventStream, Service};
use crate::text::rules::{
    AnswerRules, Fitted, Overflow, Overlong, PromptRules, TextRules, Touched,
};
use crate::text::{CallForm, Matcher, TextModel};
use crate::whereabouts;

/// Bytes of text from which tokenising takes a millisecond and more.
const LONG_TEXT: usize = 4096;
/// Most logits per scored position.
const MAX_TOP_LOGITS: u8 = 64;

/// Most tokens of all texts of a request for embeddings.
const MAX_EMBEDDED_TOKENS: usize = 300_000;
/// Most numbers of all vectors of an answer: 32 MiB.
const MAX_EMBEDDED_NUMBERS: usize = 8 << 20;

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

/// The text side of the served model.
#[derive(Debug)]
pub struct Prompts {
    /// Tokenizer and chat template.
    pub text: TextModel,
    /// What `/v1/models` says.
    pub card: ModelCard,
    /// What is done to prompts and answers.
    pub rules: TextRules,
}

/// A prompt as the model reads it.
struct Read {
    ids: Vec<u32>,
    /// Tokens that were left out because it was too long.
    left_out: u32,
}

/// A prompt on its way to ids.
enum Prepared {
    Ids(Vec<u32>),
    /// The request's field, and the text it became.
    Text(&'static str, String),
}

/// Bytes of text in a conversation.
fn bytes_of(conversation: &Conversation) -> usize {
    let call = |c: &ToolCall| c.name.len() + c.arguments.len();
    let turn = |m: &ChatMessage| {
        m.role.len() + m.content.len() + m.tool_calls.iter().map(call).sum::<usize>()
    };
    let tools: usize = conversation.tools.iter().map(String::len).sum();
    conversation.messages.iter().map(turn).sum::<usize>() + tools
}

/// The same trouble, of texts that are to be embedded.
fn of_input(status: Status) -> Status {
    Status { param: status.param.map(|_| "input".to_owned()), ..status }
}

pub(crate) fn crossed(e: MailboxError) -> Status {
    match e {
        MailboxError::Timeout => Status::exhausted("the scheduler is busy", 1000),
        MailboxError::Closed => Status::unavailable("the coordinator is shutting down", 5000),
    }
}

impl Prompts {
    fn check_model(&self, model: &str) -> Result<(), Status> {
        if model.is_empty() || model == self.card.id {
            return Ok(());
        }
        Err(Status {
            param: Some("model".into()),
            ..Status::new(
                ErrorCode::NotFound,
                format!("model '{model}' is not served here; served: '{}'", self.card.id),
            )
        })
    }

    fn check_ids(&self, param: &str, ids: &[u32]) -> Result<(), Status> {
        match ids.iter().find(|&&id| id >= self.card.vocab) {
            None => Ok(()),
            Some(id) => Err(Status::invalid(
                param,
                format!("token id {id} is outside the vocabulary of {} tokens", self.card.vocab),
            )),
        }
    }

    /// What is to be tokenised; ids are checked and done.
    fn prepare(&self, prompt: &Prompt) -> Result<Prepared, Status> {
        match prompt {
            Prompt::Tokens(ids) => {
                self.check_ids("prompt", ids)?;
                Ok(Prepared::Ids(ids.clone()))
            }
            Prompt::Text(text) => Ok(Prepared::Text("prompt", text.clone())),
            Prompt::Chat(conversation) => {
                let template = self
                    .text
                    .template
                    .as_ref()
                    .map_err(|e| Status::invalid("messages", e.clone()))?;
                let text = template
                    .render(conversation, true)
                    .map_err(|e| Status::invalid("messages", e.to_string()))?;
                Ok(Prepared::Text("messages", text))
            }
        }
    }

    /// Refuses what cannot fit, before time is spent on it: a token covers a few bytes on average,
    /// so text a hundred times longer than the context is hopeless, and a message takes a token.
    fn check_size(&self, prompt: &Prompt) -> Result<(), Status> {
        let limit = self.card.max_model_len as usize * 100;
        let (param, bytes, messages) = match prompt {
            Prompt::Tokens(ids) => ("prompt", ids.len(), 0),
            Prompt::Text(text) => ("prompt", text.len(), 0),
            Prompt::Chat(c) => ("messages", bytes_of(c), c.messages.len()),
        };
        if bytes <= limit && messages <= self.card.max_model_len as usize {
            return Ok(());
        }
        Err(Status::invalid(
            param,
            format!(
                "{bytes} bytes of text in {messages} messages cannot fit a context of {} tokens; \
                 shorten it",
                self.card.max_model_len
            ),
        ))
    }

    /// Does something with a prompt: with conversations (a template is a program, and may take its
    /// time) and what is long elsewhere, so that nobody else's answer waits for it.
    async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        prompt: Prompt,
        work: impl FnOnce(&Self, Prompt) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        self.check_size(&prompt)?;
        let long = match &prompt {
            Prompt::Tokens(ids) => ids.len() > LONG_TEXT,
            Prompt::Text(text) => text.len() > LONG_TEXT,
            Prompt::Chat(_) => true,
        };
        if !long {
            return work(self, prompt);
        }
        let serving = Arc::clone(self);
        let working = tokio::task::spawn_blocking(move || work(&serving, prompt));
        working.await.unwrap_or_else(|e| Err(Status::internal(e.to_string())))
    }

    /// Applies the operator's rules to a prompt, but for its length.
    /// The inner error is theirs.
    async fn ruled(
        self: &Arc<Self>,
        prompt: Prompt,
    ) -> Result<Result<(Prompt, Touched), Status>, Status> {
        if self.rules.prompt.are_none() {
            return Ok(Ok((prompt, Touched::default())));
        }
        let apply = |all: &Self, mut prompt: Prompt| {
            let text_of = |ids: &[u32]| all.text.tokenizer.decode(ids, false);
            if let Prompt::Tokens(ids) = &prompt {
                all.check_ids("prompt", ids)?;
            }
            let applied = all.rules.prompt.apply(&mut prompt, text_of);
            Ok(applied.map(|touched| (prompt, touched)))
        };
        self.with(prompt, apply).await
    }

    /// Renders, tokenises, and shortens where that is wanted; `answer` is the room that is asked for.
    async fn read(self: &Arc<Self>, prompt: Prompt, answer: Option<u32>) -> Result<Read, Status> {
        self.with(prompt, move |all, prompt| {
            let ids = all.ids(&prompt)?;
            let Some(limit) = all.limit(answer) else { return Ok(Read { ids, left_out: 0 }) };
            let (how, prompt_is) = (all.rules.prompt.overflow, Overlong { ids, limit });
            let Fitted { ids, left_out } = match &prompt {
                Prompt::Chat(conversation) => {
                    let ids_of = |shorter: &Conversation| all.ids(&Prompt::Chat(shorter.clone()));
                    prompt_is.chat(how, conversation, ids_of)?
                }
                Prompt::Text(_) | Prompt::Tokens(_) => {
                    prompt_is.plain(how, all.text.tokenizer.bos_id())?
                }
            };
            Ok(Read { ids, left_out })
        })
        .await
    }

    /// Most tokens of a prompt, where there is such a rule: the operator's, and if prompts are
    /// shortened, what the context holds beside the answer. That is as long as it asks, or a
    /// quarter of the context, and never counts as more than half of it.
    fn limit(&self, answer: Option<u32>) -> Option<usize> {
        let PromptRules { limit, overflow, .. } = *self.rules.prompt;
        let context = self.card.max_model_len;
        let room = context - answer.unwrap_or(context / 4).clamp(1, (context / 2).max(1));
        let limit = match overflow {
            Overflow::Refuse => limit,
            _ => Some(limit.map_or(room, |limit| limit.min(room))),
        };
        limit.map(|limit| limit.max(1) as usize)
    }

    /// Refuses lists of texts that are too long, or of what is no text, and numbers that the model
    /// does not have.
    fn check_texts(&self, inputs: &[Prompt], dimensions: Option<u32>) -> Result<(), Status> {
        let invalid = |message: String| Err(Status::invalid("input", message));
        if inputs.is_empty() {
            return invalid("is empty: give at least one text".to_owned());
        }
        if inputs.len() > MAX_EMBED_INPUTS {
            return invalid(format!("has {} texts, at most {MAX_EMBED_INPUTS}", inputs.len()));
        }
        let hidden = self.card.hidden;
        if let Some(d) = dimensions.filter(|d| !(1..=hidden).contains(d)) {
            let message = format!("must be between 1 and {hidden}, which the model has; got {d}");
            return Err(Status::invalid("dimensions", message));
        }
        let numbers = inputs.len() * dimensions.unwrap_or(hidden) as usize;
        if numbers > MAX_EMBEDDED_NUMBERS {
            return invalid(format!(
                "asks for {numbers} numbers in all, at most {MAX_EMBEDDED_NUMBERS}: send fewer \
                 texts at once, or ask for fewer dimensions"
            ));
        }
        if inputs.iter().any(|input| matches!(input, Prompt::Chat(_))) {
            return invalid("a conversation cannot be embedded: give its text".to_owned());
        }
        inputs.iter().try_for_each(|input| self.check_size(input)).map_err(of_input)
    }

    /// The ids of texts, elsewhere where they are long. None is empty or longer than the context.
    async fn texts_ids(self: &Arc<Self>, inputs: Vec<Prompt>) -> Result<Vec<Vec<u32>>, Status> {
        let bytes = |input: &Prompt| if let Prompt::Text(text) = input { text.len() } else { 0 };
        let long = inputs.iter().map(bytes).sum::<usize>() > LONG_TEXT;
        let prompts = Arc::clone(self);
        let encode = move || {
            let ids = |(index, input)| prompts.text_ids(index, input);
            inputs.iter().enumerate().map(ids).collect::<Result<Vec<_>, Status>>()
        };
        let texts = match long {
            false => encode()?,
            true => {
                let encoding = tokio::task::spawn_blocking(encode);
                encoding.await.unwrap_or_else(|e| Err(Status::internal(e.to_string())))?
            }
        };
        let tokens: usize = texts.iter().map(Vec::len).sum();
        if tokens > MAX_EMBEDDED_TOKENS {
            let message = format!("has {tokens} tokens in all, at most {MAX_EMBEDDED_TOKENS}");
            return Err(Status::invalid("input", message));
        }
        Ok(texts)
    }

    fn text_ids(&self, index: usize, input: &Prompt) -> Result<Vec<u32>, Status> {
        let ids = self.ids(input).map_err(of_input)?;
        // Texts that are too long are refused, not shortened: a vector is of all of a text.
        let context = self.card.max_model_len;
        let most = self.rules.prompt.limit.map_or(context, |limit| limit.min(context));
        let message = match ids.len() {
            0 => format!("text {index} has no tokens: at least one is needed"),
            n if n > most as usize => {
                format!("text {index} has {n} tokens, at most {most} are possible; shorten it")
            }
            _ => return Ok(ids),
        };
        Err(Status::invalid("input", message))
    }

    /// What the answer is read for where there are tools, and the grammar that it follows.
    fn plan_calls(
        &self,
        prompt: &Prompt,
        asked: Option<Grammar>,
    ) -> Result<(Option<CallForm>, Option<Grammar>), Status> {
        match (prompt, &self.text.template) {
            (Prompt::Chat(conversation), Ok(template)) => {
                template.plan_calls(conversation, asked, &self.text.tokenizer)
            }
            // Without a template, the conversation is refused anyway.
            _ => Ok((None, asked)),
        }
    }

    /// Compiles a grammar, elsewhere: the first one takes some tenths of a second.
    async fn matcher(&self, grammar: Option<&Grammar>) -> Result<Option<Matcher>, Status> {
        let Some(grammar) = grammar.cloned() else { return Ok(None) };
        let tokenizer = Arc::clone(&self.text.tokenizer);
        let compiling =
            tokio::task::spawn_blocking(move || tokenizer.grammars()?.compile(&grammar));
        let compiled = compiling.await.map_err(|e| Status::internal(e.to_string()))?;
        compiled.map(Some).map_err(|e| Status::invalid("grammar", e.to_string()))
    }

    fn ids(&self, prompt: &Prompt) -> Result<Vec<u32>, Status> {
        match self.prepare(prompt)? {
            Prepared::Ids(ids) => Ok(ids),
            Prepared::Text(param, text) => self
                .text
                .tokenizer
                .encode_prompt(&text)
                .map_err(|e| Status::invalid(param, e.to_string())),
        }
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

    /// Texts to embed as the operator's rules have them.
    async fn ruled_texts(&self, inputs: Vec<Prompt>) -> Result<Vec<Prompt>, Status> {
        let mut texts = Vec::with_capacity(inputs.len());
        for input in inputs {
            let ruled = self.prompts.ruled(input).await.map_err(of_input)?;
            let (text, touched) = ruled
                .inspect_err(|_| self.metrics.on_rules_of_prompt("blocked"))
                .map_err(of_input)?;
            if touched.redacted {
                self.metrics.on_rules_of_prompt("redacted");
            }
            texts.push(text);
        }
        Ok(texts)
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
        async move {
            self.prompts.check_model(&request.model)?;
            self.prompts.check_ids("tokens", &request.tokens)?;
            if request.top_k > MAX_TOP_LOGITS {
                return Err(Status::invalid(
                    "top_k",
                    format!("{} logits per position, at most {MAX_TOP_LOGITS}", request.top_k),
                ));
            }
            let hides = self.prompts.rules.answer.as_ref().is_some_and(AnswerRules::hides);
            if hides && request.top_k > 0 {
                let why = "must be 0 here: the operator's rules hide text of answers, which the \
                           largest logits would tell";
                return Err(Status::invalid("top_k", why));
            }
            let id = RequestId(Uuid::now_v7());
            let caller = self.enter(id, caller).await?;
            let submit = SubmitScore { id, tokens: request.tokens, top_k: request.top_k, caller };
            let reply = self.batcher.send(submit).await.map_err(crossed)??;
            reply.await.unwrap_or_else(|_| {
                Err(Status::unavailable("the coordinator is shutting down", 5000))
            })
        }
        .boxed()
    }

    fn ruled(&self, prompt: Prompt) -> BoxFuture<'_, Result<Prompt, Status>> {
        async move { Ok(self.prompts.ruled(prompt).await??.0) }.boxed()
    }

    fn embed(
        &self,
        request: EmbedRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Embeddings, Status>> {
        async move {
            let EmbedRequest { model, inputs, pooling, dimensions } = request;
            self.prompts.check_model(&model)?;
            self.prompts.check_texts(&inputs, dimensions)?;
            let inputs = self.ruled_texts(inputs).await?;
            let texts = self.prompts.texts_ids(inputs).await?;
            let counts: Vec<u32> = texts.iter().map(|ids| ids.len() as u32).collect();
            let id = caller.fresh.unwrap_or_else(|| RequestId(Uuid::now_v7()));
            let caller = self.enter(id, caller).await?;
            let submit = SubmitEmbed { id, texts, pooling, dimensions, caller };
            let vectors = self.batcher.send(submit).await.map_err(crossed)??;
            Ok(Embeddings::new(counts, vectors))
        }
        .boxed()
    }

    fn tokenize(&self, model: &str, prompt: &Prompt) -> Result<Vec<u32>, Status> {
        self.prompts.check_model(model)?;
        self.prompts.ids(prompt)
    }

    fn detokenize(&self, ids: &[u32]) -> Result<String, Status> {
        self.prompts.check_ids("tokens", ids)?;
        Ok(self.prompts.text.tokenizer.decode(ids, false))
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
