//! From a request to an answer, for both generating endpoints, whole or streamed.
//!
//! An [`Answer`] knows how bodies and chunks look; this module and [`super::sse`] feed it the
//! service's events. Both hold the event stream, so that dropping the HTTP response (the client
//! went away) drops it too, which cancels the request.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::rpc::{
    FinishReason, GenerateEvent, GenerateRequest, Prompt, TokenLogprobs, Usage,
};

use super::AppState;
use super::error::ApiError;
use super::logprobs::LogprobWriter;
use super::options::Options;
use super::request::with_ignored;
use super::sse;
use super::types::{Choice, Delta, Envelope, LogprobsBody, Message, UsageBody};
use crate::service::{Caller, EventStream, Service};

/// Which endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What a request's body and headers ask for.
pub(crate) struct Asked {
    /// Everything but the prompt.
    pub(crate) options: Options,
    /// What to continue.
    pub(crate) prompt: Prompt,
    /// Who asks.
    pub(crate) caller: Caller,
    /// Names of the fields that were ignored.
    pub(crate) ignored: Vec<String>,
}

/// How one answer looks: its identity, and the pieces it is made of.
pub(crate) struct Answer {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    include_usage: bool,
    logprobs: LogprobWriter,
    service: Arc<dyn Service>,
}

/// Sends the request to the service and answers as the client asked.
///
/// # Errors
/// If the service refuses, or fails before the first byte of the answer is sent.
pub(crate) async fn respond(
    state: &AppState,
    kind: Kind,
    asked: Asked,
) -> Result<HttpResponse, ApiError> {
    state.counted(state.refuse_while_draining().map_err(ApiError::from))?;
    let Asked { options, prompt, caller, ignored } = asked;
    let Options { model, params, stream, include_usage } = options;
    let shown_model = if model.is_empty() { only_model(state) } else { model.clone() };
    let request = GenerateRequest { model, prompt, params };
    let mut events = state.service.generate(request, caller).await.map_err(ApiError::of_model)?;
    let answer = Answer::new(state, kind, &events, shown_model, include_usage);
    if !stream {
        let body = collect(answer, events).await?;
        let response = HttpResponse::Ok().content_type("application/json").body(body);
        return Ok(with_ignored(response, &ignored));
    }
    // A request that fails at once still gets a proper HTTP status.
    let first = match events.next().await {
        None => return Err(cut_short().into()),
        Some(Err(status)) => return Err(ApiError::of_model(status)),
        Some(Ok(event)) => event,
    };
    let body = sse::stream(answer, events, first, state.keep_alive);
    let response = HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
        .insert_header((CACHE_CONTROL, "no-cache"))
        // Otherwise nginx collects the stream before it passes it on.
        .insert_header(("x-accel-buffering", "no"))
        .streaming(body);
    Ok(with_ignored(response, &ignored))
}

/// What a stream that ends without `Finished` means.
pub(crate) fn cut_short() -> Status {
    Status::internal("the answer ended without saying why; please report this")
}

/// What becomes of an answer that somebody cancelled.
pub(crate) fn cancelled() -> Status {
    Status::new(ErrorCode::Cancelled, "the request was cancelled")
}

fn only_model(state: &AppState) -> String {
    state.service.models().into_iter().next().map(|card| card.id).unwrap_or_default()
}

/// Reads the whole answer; gives the JSON body.
async fn collect(mut answer: Answer, mut events: EventStream) -> Result<String, ApiError> {
    let mut text = String::new();
    let mut logprobs: Option<LogprobsBody> = None;
    loop {
        match events.next().await {
            None => return Err(cut_short().into()),
            Some(Err(status)) => return Err(ApiError::of_model(status)),
            Some(Ok(GenerateEvent::Started { .. })) => {}
            Some(Ok(GenerateEvent::Token { token_id, text: piece, logprobs: found, .. })) => {
                text.push_str(&piece);
                let entry = answer.logprobs(token_id, found.as_ref())?;
                match (&mut logprobs, entry) {
                    (Some(all), Some(entry)) => all.append(entry),
                    (all @ None, entry) => *all = entry,
                    (Some(_), None) => {}
                }
            }
            Some(Ok(GenerateEvent::Finished { reason, text: rest, usage, .. })) => {
                if reason == FinishReason::Cancelled {
                    return Err(cancelled().into());
                }
                text.push_str(&rest);
                return Ok(answer.whole(text, logprobs, reason, usage));
            }
        }
    }
}

impl Answer {
    fn new(
        state: &AppState,
        kind: Kind,
        events: &EventStream,
        model: String,
        include_usage: bool,
    ) -> Self {
        let prefix = match kind {
            Kind::Chat => "chatcmpl",
            Kind::Completion => "cmpl",
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            kind,
            id: format!("{prefix}-{}", events.request_id()),
            created: now.map(|d| d.as_secs()).unwrap_or_default(),
            model,
            include_usage,
            logprobs: LogprobWriter::new(kind),
            service: state.service.clone(),
        }
    }

    /// The log-probabilities of the next token, where the request asked for them.
    pub(crate) fn logprobs(
        &mut self,
        token_id: u32,
        found: Option<&TokenLogprobs>,
    ) -> Result<Option<LogprobsBody>, Status> {
        let service = self.service.as_ref();
        found.map(|found| self.logprobs.next(service, token_id, found)).transpose()
    }

    fn whole(
        &self,
        text: String,
        logprobs: Option<LogprobsBody>,
        reason: FinishReason,
        usage: Usage,
    ) -> String {
        let (object, message, text) = match self.kind {
            Kind::Chat => {
                let message = Message { role: "assistant", content: text, refusal: None };
                ("chat.completion", Some(message), None)
            }
            Kind::Completion => ("text_completion", None, Some(text)),
        };
        let choice = Choice {
            message,
            text,
            logprobs,
            finish_reason: Some(reason.as_str()),
            ..Choice::default()
        };
        self.render(object, vec![choice], Some(Some(usage.into())))
    }

    /// The chunk that opens a chat; completions have none.
    pub(crate) fn opening(&self) -> Option<String> {
        let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
        let choice = Choice { delta: Some(delta), ..Choice::default() };
        (self.kind == Kind::Chat).then(|| self.chunk(vec![choice], None))
    }

    /// A chunk with text, the last of which says why the answer ended.
    pub(crate) fn piece(
        &self,
        text: String,
        logprobs: Option<LogprobsBody>,
        reason: Option<FinishReason>,
    ) -> String {
        let (delta, text) = match self.kind {
            Kind::Chat => {
                let content = (reason.is_none() || !text.is_empty()).then_some(text);
                (Some(Delta { role: None, content }), None)
            }
            Kind::Completion => (None, Some(text)),
        };
        let finish_reason = reason.map(FinishReason::as_str);
        let choice = Choice { delta, text, logprobs, finish_reason, ..Choice::default() };
        self.chunk(vec![choice], None)
    }

    /// The chunk with the token counts, where the request asked for it.
    pub(crate) fn usage(&self, usage: Usage) -> Option<String> {
        self.include_usage.then(|| self.chunk(Vec::new(), Some(usage.into())))
    }

    fn chunk(&self, choices: Vec<Choice>, usage: Option<UsageBody>) -> String {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let usage = self.include_usage.then_some(usage);
        self.render(object, choices, usage)
    }

    fn render(
        &self,
        object: &'static str,
        choices: Vec<Choice>,
        usage: Option<Option<UsageBody>>,
    ) -> String {
        let envelope = Envelope {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            choices,
            usage,
        };
        serde_json::to_string(&envelope).expect("invariant: our own bodies are serialisable")
    }
}
