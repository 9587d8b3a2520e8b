//! `/v1/responses`: answers that can be asked for again, go on in the background, and follow one
//! another.
//!
//! A response is a request with a note: the conversation it belongs to, and what the client said.
//! Both lie in the journal, for as long as that keeps requests; nothing is kept here. What was asked
//! with `"store": false` is found by nobody. Events are numbered by [`events`].

mod events;
mod read;

use std::convert::Infallible;
use std::time::Duration;

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures::Stream;
use futures::stream;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{AttachRequest, ChatMessage, GenerateRequest, Prompt};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use self::events::{Growing, name_of};
use self::read::Asked;
use super::AppState;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{self, cut_short};
use super::request::{Body, MAX_BODY_BYTES, caller, read_body, with_ignored, with_left_out};
use crate::api::quic::MAX_KEEP;
use crate::service::{Caller, EventStream};

/// Marks requests that are responses.
pub(super) const TAG: u32 = 1 << 8;
/// Longest note: a few bodies' worth of conversation.
const MAX_NOTE_BYTES: usize = 2 * MAX_BODY_BYTES;

/// How long the beginning of a request may take to be told of.
const BEGINNING: Duration = Duration::from_secs(10);

/// What is kept with a response.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    /// The conversation without instructions and answer.
    messages: Vec<ChatMessage>,
    model: String,
    /// Fields that repeat the request.
    said: Map<String, Value>,
    /// Whether it can be asked for.
    store: bool,
}

/// How a response is asked for.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Query {
    #[serde(default)]
    stream: bool,
    starting_after: Option<u64>,
}

/// Makes a response.
pub(crate) async fn create(
    state: web::Data<AppState>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let read = || read::read(Fields::parse(&read_body(body)?)?, state.service.sampling());
    let asked = state.counted(read())?;
    state.counted(state.refuse_while_draining().map_err(ApiError::from))?;
    let mut caller = caller(&request)?;
    let Asked { options, mut conversation, mut instructions, previous, mut said, .. } = asked;
    // What is kept of the conversation is what the operator's rules leave.
    let system = instructions.take().map(|text| ChatMessage::new("system", text));
    let instructed = system.is_some();
    conversation.messages.splice(0..0, system);
    let ruled = state.service.ruled(Prompt::Chat(conversation)).await?;
    let Prompt::Chat(mut conversation) = ruled else {
        return Err(Status::internal("rules made something else of a conversation").into());
    };
    if instructed {
        let text = conversation.messages.remove(0).content;
        if let Some(told) = said.get_mut("instructions") {
            *told = json!(text);
        }
        instructions = Some(text);
    }
    if let Some(previous) = previous {
        let mut messages = earlier(&state, &previous, &caller).await?;
        messages.append(&mut conversation.messages);
        conversation.messages = messages;
    }
    let known = |m: &String| !m.is_empty();
    let served = || generation::only_model(&state);
    let note = Note {
        messages: conversation.messages.clone(),
        model: Some(options.model.clone()).filter(known).unwrap_or_else(served),
        said,
        store: asked.store,
    };
    conversation.messages.splice(0..0, instructions.map(|text| ChatMessage::new("system", text)));
    caller.note = written(&note)?.into();
    caller.tag = TAG;
    caller.request_id.get_or_insert_with(|| RequestId(Uuid::now_v7()));
    if asked.background {
        caller.keep = Some(MAX_KEEP);
    }
    let prompt = Prompt::Chat(conversation);
    let (model, choices) = (options.model, options.choices);
    let request = GenerateRequest { model, prompt, params: options.params, choices };
    let events = state.service.generate(request, caller).await.map_err(ApiError::of_model)?;
    if asked.background {
        events.lost();
    }
    let left_out = events.origin().left_out;
    let growing = growing(&events, note, None);
    let response = match (options.stream, asked.background) {
        (true, _) => streamed(events, growing, state.keep_alive).await?,
        (false, true) => {
            let mut response = growing.response();
            response["status"] = json!("queued");
            HttpResponse::Ok().json(response)
        }
        (false, false) => HttpResponse::Ok().json(collect(events, growing).await?.response()),
    };
    Ok(with_ignored(with_left_out(response, left_out), &asked.ignored))
}

/// Tells of a response, or streams its events after a number.
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    request: HttpRequest,
    name: web::Path<String>,
    query: Result<web::Query<Query>, actix_web::Error>,
) -> Result<HttpResponse, ApiError> {
    let wrong = |e: actix_web::Error| ApiError::invalid("starting_after", e.to_string());
    let query = query.map_err(wrong)?.into_inner();
    let (events, note) = attach(&state, &name, caller(&request)?).await?;
    if query.stream {
        let growing = growing(&events, note, query.starting_after);
        return streamed(events, growing, state.keep_alive).await;
    }
    Ok(HttpResponse::Ok().json(so_far(events, note).await.response()))
}

/// Ends a response; one that has ended stays as it is.
pub(crate) async fn cancel(
    state: web::Data<AppState>,
    request: HttpRequest,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let caller = caller(&request)?;
    // Only what is a response, and somebody's own.
    drop(attach(&state, &name, caller.clone()).await?);
    match state.service.cancel(id_of(&name)?, caller.clone()).await {
        Err(status) if status.code != ErrorCode::NotFound => return Err(status.into()),
        _ => {}
    }
    let (events, note) = attach(&state, &name, caller).await?;
    Ok(HttpResponse::Ok().json(so_far(events, note).await.response()))
}

/// Forgets a response, and ends it where it goes on.
pub(crate) async fn delete(
    state: web::Data<AppState>,
    request: HttpRequest,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let caller = caller(&request)?;
    drop(attach(&state, &name, caller.clone()).await?);
    let id = id_of(&name)?;
    state.service.forget(id, caller).await?;
    let body = json!({"id": name_of(id), "object": "response", "deleted": true});
    Ok(HttpResponse::Ok().json(body))
}

fn written(note: &Note) -> Result<Vec<u8>, ApiError> {
    let bytes = serde_json::to_vec(note).map_err(|e| Status::internal(e.to_string()))?;
    if bytes.len() > MAX_NOTE_BYTES {
        let why = format!(
            "the conversation is longer than {MAX_NOTE_BYTES} bytes by now; begin a new one"
        );
        return Err(ApiError::invalid("previous_response_id", why));
    }
    Ok(bytes)
}

fn unknown(name: &str) -> ApiError {
    let name: String = name.chars().take(80).collect();
    let message = format!(
        "no response '{name}' of this key is known here: it was never made, was not stored, was \
         deleted, or ended too long ago (--journal and --retain of the coordinator say what is kept)"
    );
    Status::new(ErrorCode::NotFound, message).into()
}

fn id_of(name: &str) -> Result<RequestId, ApiError> {
    let id = name.strip_prefix("resp_").and_then(|id| id.parse::<Uuid>().ok());
    id.map(RequestId).ok_or_else(|| unknown(name))
}

/// The events of a response from the first on.
async fn attach(
    state: &AppState,
    name: &str,
    caller: Caller,
) -> Result<(EventStream, Note), ApiError> {
    let request = AttachRequest { request_id: id_of(name)?, next: Vec::new() };
    let events = match state.service.attach(request, caller).await {
        Err(status) if status.code == ErrorCode::NotFound => return Err(unknown(name)),
        events => events?,
    };
    // Whoever looks and goes says nothing of whether the answer is wanted.
    events.lost();
    let origin = events.origin();
    let note: Note = match origin.tag {
        TAG => serde_json::from_slice(&origin.note).map_err(|_| unknown(name))?,
        _ => return Err(unknown(name)),
    };
    if note.store { Ok((events, note)) } else { Err(unknown(name)) }
}

fn growing(events: &EventStream, note: Note, after: Option<u64>) -> Growing {
    let created = events.origin().submitted_ms / 1000;
    Growing::new(events.request_id(), created, note.model, note.said, after)
}

/// The conversation up to the end of a response.
async fn earlier(
    state: &AppState,
    name: &str,
    caller: &Caller,
) -> Result<Vec<ChatMessage>, ApiError> {
    let (events, mut note) = attach(state, name, caller.clone()).await.map_err(|e| {
        let missing = e.code() == ErrorCode::NotFound;
        if missing { e.about("previous_response_id") } else { e }
    })?;
    let mut messages = std::mem::take(&mut note.messages);
    let growing = so_far(events, note).await;
    if !growing.is_over() {
        let why = "is still being answered: go on from it when it has ended";
        return Err(ApiError::invalid("previous_response_id", why));
    }
    let (content, tool_calls) = growing.said();
    messages.push(ChatMessage { tool_calls, ..ChatMessage::new("assistant", content) });
    Ok(messages)
}

/// What has happened of a response.
async fn so_far(mut events: EventStream, note: Note) -> Growing {
    let mut growing = growing(&events, note, Some(u64::MAX));
    // That it began is told of every request, as soon as that is on the disk.
    if let Ok(Some(event)) = tokio::time::timeout(BEGINNING, events.next()).await {
        growing.take(event);
    }
    while let Some(event) = events.next_there().await {
        growing.take(event);
    }
    growing
}

/// The whole response.
async fn collect(mut events: EventStream, mut growing: Growing) -> Result<Growing, ApiError> {
    while !growing.is_over() {
        let event = events.next().await.ok_or_else(cut_short)?;
        growing.take(Ok(event.map_err(ApiError::of_model)?));
        growing.take_out();
    }
    Ok(growing)
}

/// The response as server-sent events. It closes after the last one; where the coordinator stops, an
/// event of the type `error` says so, and the rest is told when it is back.
async fn streamed(
    mut events: EventStream,
    mut growing: Growing,
    keep_alive: Duration,
) -> Result<HttpResponse, ApiError> {
    // A request that fails at once still gets a proper HTTP status.
    let first = events.next().await.ok_or_else(cut_short)?;
    growing.take(Ok(first.map_err(ApiError::of_model)?));
    Ok(HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header(("x-accel-buffering", "no"))
        .streaming(body(events, growing, keep_alive)))
}

fn body(
    events: EventStream,
    growing: Growing,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold((events, growing, false), move |(mut events, mut growing, ended)| async move {
        loop {
            let text = growing.take_out();
            if !text.is_empty() {
                return Some((Ok(text.into()), (events, growing, ended)));
            }
            if ended || growing.is_over() {
                return None;
            }
            match tokio::time::timeout(keep_alive, events.next()).await {
                Ok(Some(event)) => growing.take(event),
                Ok(None) => {
                    let error = ApiError::from(cut_short());
                    let body = json!({"type": "error", "code": error.stable_code(),
                        "message": error.message(), "param": null, "sequence_number": null});
                    let text = format!("event: error\ndata: {body}\n\n");
                    return Some((Ok(text.into()), (events, growing, true)));
                }
                Err(_) => {
                    let comment = Bytes::from_static(b": keep-alive\n\n");
                    return Some((Ok(comment), (events, growing, ended)));
                }
            }
        }
    })
}
