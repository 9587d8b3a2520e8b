//! From a request to an answer, for both generating endpoints, whole or streamed.
//!
//! An [`Answer`] knows how bodies and chunks look; this module and [`super::sse`] feed it the
//! service's events. Both hold the event stream, so that dropping the HTTP response (the client
//! went away) drops it too, which cancels the request, at once or after the time that it named.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{
    AttachRequest, FinishReason, GenerateEvent, GenerateRequest, HIDDEN_TOKEN, Prompt,
    TokenLogprobs, ToolCall, Usage,
};

use super::AppState;
use super::error::ApiError;
use super::logprobs::LogprobWriter;
use super::options::Options;
use super::request::{with_ignored, with_left_out};
use super::several::{Events, further};
use super::sse;
use super::tools;
use super::types::{Choice, Delta, Envelope, LogprobsBody, Message, UsageBody};
use crate::service::{Caller, EventStream, Service};
use crate::text::tools::Piece;

/// Under which id the request can be attached to.
const REQUEST: HeaderName = HeaderName::from_static("x-millrace-request-id");
/// When to try again, told to clients of a coordinator that stops.
const RETRY_MS: u32 = 5000;

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
    /// What to continue, each for itself.
    pub(crate) prompts: Vec<Prompt>,
    /// Answers begin with their prompts.
    pub(crate) echo: bool,
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
    prompts: u32,
    echo: bool,
    /// The prompts, as far as they are known.
    said: Vec<String>,
    /// By choice.
    logprobs: Vec<LogprobWriter>,
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
    let Asked { options, prompts, echo, mut caller, ignored } = asked;
    let Options { model, params, choices, stream, include_usage } = options;
    let shown_model = if model.is_empty() { only_model(state) } else { model.clone() };
    caller.tag = tag(kind, include_usage, echo);
    let kept = caller.keep.is_some() || caller.request_id.is_some();
    let mut said = if echo { said(state, &prompts)? } else { Vec::new() };
    let mut all: Vec<EventStream> = Vec::with_capacity(prompts.len());
    for (number, prompt) in prompts.into_iter().enumerate() {
        let (model, params) = (model.clone(), params.clone());
        let request = GenerateRequest { model, prompt, params, choices };
        let request_id =
            caller.request_id.map(|id| if number == 0 { id } else { further(id, number) });
        let fresh = caller.fresh.filter(|_| number == 0);
        let caller = Caller { request_id, fresh, ..caller.clone() };
        all.push(state.service.generate(request, caller).await.map_err(ApiError::of_model)?);
    }
    if kept {
        // A connection that closes says nothing of why.
        all.iter().for_each(EventStream::lost);
    }
    let Some(first) = all.first() else {
        return Err(ApiError::invalid("prompt", "is empty: give at least one"));
    };
    let id = first.request_id();
    let left_out = all.iter().map(|events| events.origin().left_out).sum();
    // What the model reads, where that is not what was sent.
    for (text, events) in said.iter_mut().zip(&all) {
        if let Some(ids) = &events.origin().read {
            *text = state.service.detokenize(ids)?;
        }
    }
    let mut answer = Answer::new(state, kind, first, shown_model, include_usage);
    (answer.prompts, answer.echo, answer.said) = (all.len() as u32, echo, said);
    let events = Events::several(all, choices.n);
    let single = events.prompts() == 1;
    let response = match stream {
        true => streamed(state, answer, events, &[]).await?,
        false => {
            let body = collect(answer, events).await?;
            HttpResponse::Ok().content_type("application/json").body(body)
        }
    };
    // Of several requests none can stand for all.
    let response = if single { with_id(response, id) } else { response };
    Ok(with_ignored(with_left_out(response, left_out), &ignored))
}

/// The events of a request that was submitted before, of each choice from the token in `from` on.
///
/// # Errors
/// If there is none that is the caller's.
pub(crate) async fn attach(
    state: &AppState,
    request_id: RequestId,
    from: &[u32],
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    // From the first token on: what is sent of a token depends on those before it.
    let request = AttachRequest { request_id, next: Vec::new() };
    let events = state.service.attach(request, caller).await?;
    events.lost();
    let (kind, include_usage, echo) = of_tag(events.origin().tag);
    let mut answer = Answer::new(state, kind, &events, only_model(state), include_usage);
    answer.echo = echo;
    let left_out = events.origin().left_out;
    let response = streamed(state, answer, Events::one(events), from).await?;
    Ok(with_left_out(with_id(response, request_id), left_out))
}

async fn streamed(
    state: &AppState,
    answer: Answer,
    mut events: Events,
    from: &[u32],
) -> Result<HttpResponse, ApiError> {
    // A request that fails at once still gets a proper HTTP status.
    let first = match events.next().await {
        None => return Err(cut_short().into()),
        Some(Err(status)) => return Err(ApiError::of_model(status)),
        Some(Ok(event)) => event,
    };
    let body = sse::stream(answer, events, first, state.keep_alive, from);
    Ok(HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
        .insert_header((CACHE_CONTROL, "no-cache"))
        // Otherwise nginx collects the stream before it passes it on.
        .insert_header(("x-accel-buffering", "no"))
        .streaming(body))
}

/// Tells the client under which id it can attach.
fn with_id(mut response: HttpResponse, id: RequestId) -> HttpResponse {
    if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().insert(REQUEST, value);
    }
    response
}

/// How an answer looked, to be remembered with the request: [`Kind`], whether usage is wanted, and
/// whether it begins with the prompt.
fn tag(kind: Kind, include_usage: bool, echo: bool) -> u32 {
    let kind = match kind {
        Kind::Completion => 0,
        Kind::Chat => 1,
    };
    kind | (u32::from(include_usage) << 1) | (u32::from(echo) << 2)
}

fn of_tag(tag: u32) -> (Kind, bool, bool) {
    let kind = if tag & 1 == 1 { Kind::Chat } else { Kind::Completion };
    (kind, tag & 2 == 2, tag & 4 == 4)
}

/// Prompts as text.
fn said(state: &AppState, prompts: &[Prompt]) -> Result<Vec<String>, ApiError> {
    let text = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => Ok(text.clone()),
        Prompt::Tokens(ids) => Ok(state.service.detokenize(ids)?),
        Prompt::Chat(_) => Ok(String::new()),
    };
    prompts.iter().map(text).collect()
}

/// What a stream that ends without `Finished` means: the coordinator goes down, and goes on with the
/// request when it is back.
pub(crate) fn cut_short() -> Status {
    Status::unavailable(
        "the coordinator stops before the answer is complete: attach to the request again when it \
         is back (GET /v1/requests/ID/events), or send it again",
        RETRY_MS,
    )
}

/// What becomes of an answer that somebody cancelled.
pub(crate) fn cancelled() -> Status {
    Status::new(ErrorCode::Cancelled, "the request was cancelled")
}

pub(crate) fn only_model(state: &AppState) -> String {
    state.service.models().into_iter().next().map(|card| card.id).unwrap_or_default()
}

/// What is there of a choice.
#[derive(Debug, Default)]
struct Whole {
    text: String,
    calls: Vec<ToolCall>,
    logprobs: Option<LogprobsBody>,
    reason: Option<FinishReason>,
}

impl Whole {
    fn push(&mut self, piece: Piece, entry: Option<LogprobsBody>) {
        self.text.push_str(&piece.text);
        tools::gather(&mut self.calls, piece.calls);
        match (&mut self.logprobs, entry) {
            (Some(all), Some(entry)) => all.append(entry),
            (all @ None, entry) => *all = entry,
            (Some(_), None) => {}
        }
    }
}

/// A choice that was not announced.
pub(crate) fn no_such_choice(choice: u32) -> Status {
    Status::internal(format!("an event of choice {choice}, which was not asked for"))
}

/// Reads the whole answer; gives the JSON body.
async fn collect(mut answer: Answer, mut events: Events) -> Result<String, ApiError> {
    let mut choices: Vec<Whole> = Vec::new();
    let mut usages = Vec::new();
    loop {
        match events.next().await {
            None => return Err(cut_short().into()),
            Some(Err(status)) => return Err(ApiError::of_model(status)),
            Some(Ok(GenerateEvent::Started { choices: count, prompt_token_ids, .. })) => {
                answer.expect(count, &prompt_token_ids)?;
                choices.resize_with(count as usize, Whole::default);
            }
            Some(Ok(GenerateEvent::Token { choice, token_id, text, logprobs, calls, .. })) => {
                let entry = answer.logprobs(choice, (token_id, &text), logprobs.as_ref())?;
                let whole = choices.get_mut(choice as usize);
                whole.ok_or_else(|| no_such_choice(choice))?.push(Piece { text, calls }, entry);
            }
            Some(Ok(GenerateEvent::Finished { choice, reason, text, calls, usage, .. })) => {
                if reason == FinishReason::Cancelled {
                    return Err(cancelled().into());
                }
                let whole = choices.get_mut(choice as usize);
                let whole = whole.ok_or_else(|| no_such_choice(choice))?;
                whole.push(Piece { text, calls }, None);
                whole.reason = Some(reason);
                usages.push((choice, usage));
                if choices.iter().all(|c| c.reason.is_some()) {
                    return Ok(answer.whole(choices, &usages));
                }
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
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs());
        let submitted = Some(events.origin().submitted_ms / 1000).filter(|s| *s > 0);
        Self {
            kind,
            id: format!("{prefix}-{}", events.request_id()),
            created: submitted.or_else(|| now().ok()).unwrap_or_default(),
            model,
            include_usage,
            prompts: 1,
            echo: false,
            said: Vec::new(),
            logprobs: Vec::new(),
            service: state.service.clone(),
        }
    }

    /// So many choices come, the first of a prompt of these ids.
    pub(crate) fn expect(&mut self, choices: u32, prompt: &[u32]) -> Result<(), Status> {
        let kind = self.kind;
        self.logprobs.resize_with(choices as usize, || LogprobWriter::new(kind));
        if self.echo && self.said.is_empty() {
            self.said.push(self.service.detokenize(prompt)?);
        }
        Ok(())
    }

    /// Choices of each prompt.
    fn each(&self) -> u32 {
        (self.logprobs.len() as u32 / self.prompts).max(1)
    }

    /// The prompt with which a choice begins; nothing where it is not wanted.
    fn said_before(&self, choice: u32) -> &str {
        self.said.get((choice / self.each()) as usize).map_or("", String::as_str)
    }

    /// The log-probabilities of a choice's next token, where the request asked for them; `text` came
    /// with it.
    pub(crate) fn logprobs(
        &mut self,
        choice: u32,
        (token_id, text): (u32, &str),
        found: Option<&TokenLogprobs>,
    ) -> Result<Option<LogprobsBody>, Status> {
        let service = self.service.as_ref();
        let writer =
            self.logprobs.get_mut(choice as usize).ok_or_else(|| no_such_choice(choice))?;
        let Some(found) = found else {
            if token_id == HIDDEN_TOKEN {
                writer.skip(text);
            }
            return Ok(None);
        };
        writer.next(service, token_id, found).map(Some)
    }

    fn whole(&self, choices: Vec<Whole>, usages: &[(u32, Usage)]) -> String {
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        };
        let choice = |(index, whole): (u32, Whole)| {
            let (message, text) = match self.kind {
                Kind::Chat => {
                    let only_calls = whole.text.is_empty() && !whole.calls.is_empty();
                    let content = (!only_calls).then_some(whole.text);
                    let tool_calls = tools::whole(whole.calls);
                    (Some(Message { role: "assistant", content, tool_calls, refusal: None }), None)
                }
                Kind::Completion => {
                    (None, Some(format!("{}{}", self.said_before(index), whole.text)))
                }
            };
            let finish_reason = whole.reason.map(FinishReason::as_str);
            let logprobs = whole.logprobs;
            Choice { index, message, text, logprobs, finish_reason, ..Choice::default() }
        };
        let choices = (0..).zip(choices).map(choice).collect();
        self.render(object, choices, Some(Some(UsageBody::of(usages, self.each()))))
    }

    /// The chunk that opens a choice of a chat; of a completion the one with its prompt, where that
    /// is wanted.
    pub(crate) fn opening(&self, index: u32) -> Option<String> {
        let said = self.said_before(index);
        if self.kind == Kind::Completion && !said.is_empty() {
            return Some(self.piece(index, Piece::of_text(said.to_owned()), None, None));
        }
        let content = Some(String::new());
        let delta = Delta { role: Some("assistant"), content, ..Delta::default() };
        let choice = Choice { index, delta: Some(delta), ..Choice::default() };
        (self.kind == Kind::Chat).then(|| self.chunk(vec![choice], None))
    }

    /// A chunk with text or calls of a choice, the last of which says why it ended.
    pub(crate) fn piece(
        &self,
        index: u32,
        Piece { text, calls }: Piece,
        logprobs: Option<LogprobsBody>,
        reason: Option<FinishReason>,
    ) -> String {
        let (delta, text) = match self.kind {
            Kind::Chat => {
                let silent = reason.is_some() || !calls.is_empty();
                let content = (!silent || !text.is_empty()).then_some(text);
                let tool_calls = tools::deltas(calls);
                (Some(Delta { role: None, content, tool_calls }), None)
            }
            Kind::Completion => (None, Some(text)),
        };
        let finish_reason = reason.map(FinishReason::as_str);
        let choice = Choice { index, delta, text, logprobs, finish_reason, ..Choice::default() };
        self.chunk(vec![choice], None)
    }

    /// The chunk with the token counts, where the request asked for it.
    pub(crate) fn usage(&self, choices: &[(u32, Usage)]) -> Option<String> {
        let usage = || UsageBody::of(choices, self.each());
        self.include_usage.then(|| self.chunk(Vec::new(), Some(usage())))
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
