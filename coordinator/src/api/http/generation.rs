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
use super::echo::{self, Echo, Said};
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
    /// What answers tell of their prompts.
    pub(crate) echo: Echo,
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
    echo: Echo,
    /// The prompts, as far as they are known.
    said: Vec<Said>,
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
    let shown_model =
        if options.model.is_empty() { only_model(state) } else { options.model.clone() };
    let mut said = echo::read(state, &prompts, (echo, &options), &caller).await?;
    if echo == Echo::Alone {
        return Ok(with_ignored(
            echo::alone(state, said, (&options, shown_model), &caller),
            &ignored,
        ));
    }
    let Options { model, params, choices, stream, include_usage } = options;
    let scored = params.logprobs.filter(|_| echo == Echo::Before);
    caller.tag = tag(kind, include_usage, echo, scored);
    let kept = caller.keep.is_some() || caller.request_id.is_some();
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
    for (said, events) in said.iter_mut().zip(&all) {
        if let Some(ids) = &events.origin().read {
            said.altered(state.service.as_ref(), ids)?;
        }
    }
    let begun = (id, first.origin().submitted_ms);
    let mut answer = Answer::new(state, kind, begun, shown_model, include_usage).after(said, echo);
    answer.prompts = all.len() as u32;
    let events = Events::several(all, choices.n);
    let single = events.prompts() == 1;
    let response = match stream {
        true => streamed(state, answer, events, (&[], None)).await?,
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
    let events = state.service.attach(request, caller.clone()).await?;
    events.lost();
    let (kind, include_usage, echo, scored) = of_tag(events.origin().tag);
    let begun = (request_id, events.origin().submitted_ms);
    let answer = Answer::new(state, kind, begun, only_model(state), include_usage);
    let answer = answer.after(Vec::new(), echo);
    // Who has heard a token has heard of the prompt.
    let again = scored.filter(|_| from.is_empty() || from.contains(&0)).map(|top| (top, caller));
    let left_out = events.origin().left_out;
    let response = streamed(state, answer, Events::one(events), (from, again)).await?;
    Ok(with_left_out(with_id(response, request_id), left_out))
}

/// `again` asks for the prompt's log-probabilities, of which it names the rivals.
async fn streamed(
    state: &AppState,
    mut answer: Answer,
    mut events: Events,
    (from, again): (&[u32], Option<(u8, Caller)>),
) -> Result<HttpResponse, ApiError> {
    // A request that fails at once still gets a proper HTTP status.
    let first = match events.next().await {
        None => return Err(cut_short().into()),
        Some(Err(status)) => return Err(ApiError::of_model(status)),
        Some(Ok(event)) => event,
    };
    if let (Some((top, caller)), GenerateEvent::Started { prompt_token_ids, .. }) = (again, &first)
    {
        let caller = Caller { request_id: None, fresh: None, ..caller };
        let said = Said::of_ids(state.service.as_ref(), prompt_token_ids)?;
        answer.said = vec![said.scored(state.service.as_ref(), "", top, caller).await?];
    }
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
/// whether it begins with the prompt, and then the rivals that are told of each of its tokens.
fn tag(kind: Kind, include_usage: bool, echo: Echo, scored: Option<u8>) -> u32 {
    let kind = match kind {
        Kind::Completion => 0,
        Kind::Chat => 1,
    };
    let scored = scored.map_or(0, |top| u32::from(top) + 1);
    kind | (u32::from(include_usage) << 1) | (u32::from(echo != Echo::No) << 2) | (scored << 8)
}

fn of_tag(tag: u32) -> (Kind, bool, Echo, Option<u8>) {
    let kind = if tag & 1 == 1 { Kind::Chat } else { Kind::Completion };
    let echo = if tag & 4 == 4 { Echo::Before } else { Echo::No };
    let scored = (tag >> 8).checked_sub(1).and_then(|top| u8::try_from(top).ok());
    (kind, tag & 2 == 2, echo, scored)
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
        self.logprobs = joined(self.logprobs.take(), entry);
    }
}

/// Entries, and those of later tokens of the same answer.
fn joined(first: Option<LogprobsBody>, later: Option<LogprobsBody>) -> Option<LogprobsBody> {
    match (first, later) {
        (Some(mut all), Some(later)) => {
            all.append(later);
            Some(all)
        }
        (first, later) => first.or(later),
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
    /// `submitted_ms` is the time of the request since 1970; 0 stands for now.
    pub(crate) fn new(
        state: &AppState,
        kind: Kind,
        (id, submitted_ms): (RequestId, u64),
        model: String,
        include_usage: bool,
    ) -> Self {
        let prefix = match kind {
            Kind::Chat => "chatcmpl",
            Kind::Completion => "cmpl",
        };
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs());
        let submitted = Some(submitted_ms / 1000).filter(|s| *s > 0);
        Self {
            kind,
            id: format!("{prefix}-{id}"),
            created: submitted.or_else(|| now().ok()).unwrap_or_default(),
            model,
            include_usage,
            prompts: 1,
            echo: Echo::No,
            said: Vec::new(),
            logprobs: Vec::new(),
            service: state.service.clone(),
        }
    }

    /// The same after these prompts.
    pub(crate) fn after(self, said: Vec<Said>, echo: Echo) -> Self {
        Self { prompts: (said.len() as u32).max(1), echo, said, ..self }
    }

    /// So many choices come, the first of a prompt of these ids.
    pub(crate) fn expect(&mut self, choices: u32, prompt: &[u32]) -> Result<(), Status> {
        if self.echo != Echo::No && self.said.is_empty() {
            self.said.push(Said::of_ids(self.service.as_ref(), prompt)?);
        }
        let each = (choices / self.prompts).max(1);
        let before = |choice: u32| self.said.get((choice / each) as usize);
        let text = |choice| before(choice).map_or("", |said| said.text.as_str());
        let writers = (0..choices).map(|choice| LogprobWriter::after(self.kind, text(choice)));
        self.logprobs = writers.collect();
        Ok(())
    }

    /// Choices of each prompt.
    fn each(&self) -> u32 {
        (self.logprobs.len() as u32 / self.prompts).max(1)
    }

    /// The prompt with which a choice begins; nothing where it is not wanted.
    fn said_before(&self, choice: u32) -> &str {
        self.prompt_of(choice).map_or("", |said| said.text.as_str())
    }

    fn prompt_of(&self, choice: u32) -> Option<&Said> {
        self.said.get((choice / self.each()) as usize)
    }

    /// The log-probabilities of a choice's prompt, where they are told.
    fn logprobs_before(&self, choice: u32) -> Option<LogprobsBody> {
        self.prompt_of(choice)?.logprobs.clone()
    }

    /// The body of an answer that is its prompts, as many times as there are `usages`.
    pub(crate) fn prompts_alone(mut self, usages: &[(u32, Usage)]) -> String {
        let end = || Whole { reason: Some(FinishReason::Length), ..Whole::default() };
        let kind = self.kind;
        self.logprobs.resize_with(usages.len(), || LogprobWriter::after(kind, ""));
        self.whole(usages.iter().map(|_| end()).collect(), usages)
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
            let logprobs = joined(self.logprobs_before(index), whole.logprobs);
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
            return Some(self.piece(
                index,
                Piece::of_text(said.to_owned()),
                self.logprobs_before(index),
                None,
            ));
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
