//! What takes one pass through the model and makes no text: scores of tokens, vectors of texts.

use std::sync::Arc;

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{
    EmbedRequest, MAX_EMBED_INPUTS, PositionScore, Prompt, ScoreRequest,
};
use uuid::Uuid;

use super::prompts::LONG_TEXT;
use super::{Prompts, Serving, crossed};
use crate::actors::batcher::{SubmitEmbed, SubmitScore};
use crate::service::{Caller, Embeddings, Framing};
use crate::text::rules::AnswerRules;

/// Most logits per scored position.
const MAX_TOP_LOGITS: u8 = 64;

/// Most tokens of all texts of a request for embeddings.
const MAX_EMBEDDED_TOKENS: usize = 300_000;
/// Most numbers of all vectors of an answer: 32 MiB.
const MAX_EMBEDDED_NUMBERS: usize = 8 << 20;

/// The same trouble, of texts that are to be embedded.
fn of_input(status: Status) -> Status {
    Status { param: status.param.map(|_| "input".to_owned()), ..status }
}

impl Prompts {
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
        let ids = self.ids(input, Framing::Prompt).map_err(of_input)?;
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
}

impl Serving {
    /// Scores given tokens, all positions in order.
    pub(super) async fn scores(
        &self,
        request: ScoreRequest,
        caller: Caller,
    ) -> Result<Vec<PositionScore>, Status> {
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
        reply
            .await
            .unwrap_or_else(|_| Err(Status::unavailable("the coordinator is shutting down", 5000)))
    }

    /// Accepts texts, to become vectors.
    pub(super) async fn vectors(
        &self,
        request: EmbedRequest,
        caller: Caller,
    ) -> Result<Embeddings, Status> {
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
}
