//! Prompts with which answers begin, with the log-probabilities of their tokens where those are asked
//! for.
//!
//! What is told is the prompt as the operator's rules have it. It is scored before the answer is asked
//! for, so that the answer finds the prompt in the prefix cache. Scoring and answering count as two
//! requests of a key.

use actix_web::{HttpResponse, web};
use futures::future::try_join_all;
use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{Prompt, ScoreRequest, Usage};
use uuid::Uuid;

use super::AppState;
use super::error::ApiError;
use super::generation::{Answer, Kind};
use super::logprobs::prompt_logprobs;
use super::options::Options;
use super::types::LogprobsBody;
use crate::service::{Caller, Framing, Service};

/// What an answer tells of its prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Echo {
    /// Nothing.
    #[default]
    No,
    /// The answer begins with it.
    Before,
    /// It is all that is told: no token is generated.
    Alone,
}

/// A prompt with which an answer begins.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// Its text.
    pub(crate) text: String,
    /// Of its tokens, the first of which has none; where they were asked for.
    pub(crate) logprobs: Option<LogprobsBody>,
    /// Its ids, as far as they were needed.
    ids: Vec<u32>,
}

impl Said {
    /// A prompt that the model reads as these ids.
    ///
    /// # Errors
    /// If an id is none of the model's.
    pub(crate) fn of_ids(service: &dyn Service, ids: &[u32]) -> Result<Self, Status> {
        Ok(Self { text: service.detokenize(ids)?, logprobs: None, ids: ids.to_vec() })
    }

    /// The same with the log-probabilities of its tokens and of `top` rivals each.
    ///
    /// # Errors
    /// If the scoring is refused or fails.
    pub(crate) async fn scored(
        mut self,
        service: &dyn Service,
        model: &str,
        top: u8,
        caller: Caller,
    ) -> Result<Self, ApiError> {
        let request =
            ScoreRequest { model: model.to_owned(), tokens: self.ids.clone(), top_k: top };
        let scores = service.score(request, caller).await.map_err(of_prompt)?;
        self.logprobs = Some(prompt_logprobs(service, &self.text, &self.ids, &scores)?);
        Ok(self)
    }

    /// What the model reads is not what was sent.
    ///
    /// # Errors
    /// If it is not what was scored either.
    pub(crate) fn altered(&mut self, service: &dyn Service, ids: &[u32]) -> Result<(), ApiError> {
        if self.logprobs.is_none() {
            *self = Self::of_ids(service, ids)?;
        } else if self.ids != ids {
            let why = "is longer than the operator's rules leave it: logprobs with 'echo' are of \
                       whole prompts only; shorten it";
            return Err(ApiError::invalid("prompt", why));
        }
        Ok(())
    }
}

/// A refusal to score in the words of this endpoint.
fn of_prompt(status: Status) -> ApiError {
    let param = status.param.map(|param| match param.as_str() {
        "top_k" => "logprobs".to_owned(),
        "tokens" => "prompt".to_owned(),
        _ => param,
    });
    ApiError::of_model(Status { param, ..status })
}

/// The prompts of a call, scored where that is asked for.
///
/// # Errors
/// If the operator's rules refuse one, or the scoring is refused or fails.
pub(crate) async fn read(
    state: &AppState,
    prompts: &[Prompt],
    (echo, options): (Echo, &Options),
    caller: &Caller,
) -> Result<Vec<Said>, ApiError> {
    let top = options.params.logprobs;
    let one = async |prompt: &Prompt| {
        if echo == Echo::Before && top.is_none() {
            let text = text_of(state, prompt)?;
            return Ok(Said { text, ..Said::default() });
        }
        let prompt = state.service.ruled(prompt.clone()).await?;
        let text = text_of(state, &prompt)?;
        let (service, model) = (state.service.clone(), options.model.clone());
        // A long text takes seconds; this thread also serves every stream.
        let ids = web::block(move || service.tokenize(&model, &prompt, Framing::Prompt)).await;
        let ids = ids.map_err(|_| super::shutting_down())?.map_err(ApiError::of_model)?;
        let said = Said { text, logprobs: None, ids };
        match top {
            None => Ok(said),
            Some(top) => {
                let caller = Caller { request_id: None, fresh: None, ..caller.clone() };
                said.scored(state.service.as_ref(), &options.model, top, caller).await
            }
        }
    };
    match echo {
        Echo::No => Ok(Vec::new()),
        Echo::Before | Echo::Alone => try_join_all(prompts.iter().map(one)).await,
    }
}

fn text_of(state: &AppState, prompt: &Prompt) -> Result<String, ApiError> {
    match prompt {
        Prompt::Text(text) => Ok(text.clone()),
        Prompt::Tokens(ids) => Ok(state.service.detokenize(ids)?),
        Prompt::Chat(_) => Ok(String::new()),
    }
}

/// The answer to a call that wants no token: its prompts.
pub(crate) fn alone(
    state: &AppState,
    said: Vec<Said>,
    (options, model): (&Options, String),
    caller: &Caller,
) -> HttpResponse {
    let n = options.choices.n;
    let usage = |said: &Said| Usage { prompt_tokens: said.ids.len() as u32, ..Usage::default() };
    let of_each = said.iter().flat_map(|s| std::iter::repeat_n(usage(s), n as usize));
    let usages: Vec<(u32, Usage)> = (0..).zip(of_each).collect();
    let id = caller.request_id.or(caller.fresh).unwrap_or_else(|| RequestId(Uuid::now_v7()));
    let answer =
        Answer::new(state, Kind::Completion, (id, 0), model, false).after(said, Echo::Alone);
    let body = answer.prompts_alone(&usages);
    HttpResponse::Ok().content_type("application/json").body(body)
}
