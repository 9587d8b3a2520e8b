//! What the API tests share: a service that plays a script, and an HTTP client that shows every
//! byte. Each test file uses a part of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use millrace_coordinator::service::{
    Caller, Embeddings, EventStream, Framing, Meter, Origin, Service, unknown_request,
};
use millrace_coordinator::text::TokenizerInfo;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{
    AttachRequest, ClusterStatus, EmbedRequest, FinishReason, GenerateEvent, GenerateRequest,
    ModelCard, PositionScore, Prompt, ScoreRequest, Timings, TokenLogprobs, Usage,
};
use serde_json::Value;
use tokio::sync::oneshot;
use uuid::Uuid;

/// How long a test waits for something that must come.
pub const DEADLINE: Duration = Duration::from_secs(20);
pub const KEY: &str = "mlr-secret";
pub const MODEL: &str = "org/tiny:1b";

/// What becomes of the next request.
#[derive(Clone, Debug)]
pub struct Script {
    /// Refuse it at once.
    pub refusal: Option<Status>,
    /// Otherwise send these,
    pub events: Vec<Result<GenerateEvent, Status>>,
    /// and then say nothing until the stream is dropped.
    pub hang: bool,
}

/// A service that plays its script for every request and remembers what it was asked.
pub struct Fake {
    script: Mutex<Script>,
    pub ready: AtomicBool,
    /// Whether texts become ids.
    pub cuts: AtomicBool,
    pub seen: Mutex<Vec<(GenerateRequest, Caller)>>,
    pub cancelled: Mutex<Vec<RequestId>>,
    pub embedded: Mutex<Vec<(EmbedRequest, Caller)>>,
    pub scored: Mutex<Vec<(ScoreRequest, Caller)>>,
    dropped: mpsc::Sender<RequestId>,
}

impl Fake {
    /// The service, and where it tells of streams dropped before their end.
    pub fn new(script: Script) -> (Arc<Self>, mpsc::Receiver<RequestId>) {
        let (dropped, told) = mpsc::channel();
        let fake = Self {
            script: Mutex::new(script),
            ready: AtomicBool::new(true),
            cuts: AtomicBool::new(true),
            seen: Mutex::default(),
            cancelled: Mutex::default(),
            embedded: Mutex::default(),
            scored: Mutex::default(),
            dropped,
        };
        (Arc::new(fake), told)
    }

    pub fn set(&self, script: Script) {
        *self.script.lock().unwrap() = script;
    }

    pub fn last(&self) -> (GenerateRequest, Caller) {
        self.seen.lock().unwrap().last().expect("a request").clone()
    }
}

pub fn refuse(status: Status) -> Script {
    Script { refusal: Some(status), events: Vec::new(), hang: false }
}

pub fn play(events: Vec<Result<GenerateEvent, Status>>) -> Script {
    Script { refusal: None, events, hang: false }
}

/// Starts, sends one token, and then hangs.
pub fn hang() -> Script {
    Script { hang: true, ..play(vec![started(), token(0, 7, "Hello", None)]) }
}

/// "Hello world" of three tokens, the second of which has no text yet.
pub fn hello() -> Script {
    play(vec![
        started(),
        token(0, 7, "Hello", None),
        token(1, 8, "", None),
        token(2, 9, " wor", None),
        finished(FinishReason::Stop, "ld"),
    ])
}

pub fn hello_with_logprobs() -> Script {
    let first = TokenLogprobs { logprob: -0.1, top: vec![(7, -0.1), (3, -2.5)] };
    let second = TokenLogprobs { logprob: -3.5, top: vec![(HALF, -0.2), (HALF, -0.3)] };
    play(vec![
        started(),
        token(0, 7, "<7>", Some(first)),
        token(1, 8, "<8>", Some(second)),
        finished(FinishReason::Length, ""),
    ])
}

/// A token that is only part of a character.
pub const HALF: u32 = 255;

/// `Started` with a place for the request's id, filled in by the fake.
pub fn started() -> Result<GenerateEvent, Status> {
    let prompt_token_ids = vec![1, 2, 3, 4, 5];
    let request_id = RequestId(Uuid::nil());
    Ok(GenerateEvent::Started { request_id, prompt_token_ids, seed: 1, choices: 1, left_out: 0 })
}

pub fn token(
    index: u32,
    token_id: u32,
    text: &str,
    logprobs: Option<TokenLogprobs>,
) -> Result<GenerateEvent, Status> {
    Ok(GenerateEvent::Token {
        choice: 0,
        index,
        token_id,
        text: text.into(),
        logprobs,
        calls: Vec::new(),
    })
}

pub fn finished(reason: FinishReason, text: &str) -> Result<GenerateEvent, Status> {
    let usage =
        Usage { prompt_tokens: 5, completion_tokens: 3, cached_tokens: 2, discarded_tokens: 0 };
    let (text, calls, timings) = (text.into(), Vec::new(), Timings::default());
    Ok(GenerateEvent::Finished { choice: 0, reason, text, calls, usage, timings })
}

/// The same event of another choice.
pub fn of(number: u32, event: Result<GenerateEvent, Status>) -> Result<GenerateEvent, Status> {
    event.map(|mut event| {
        match &mut event {
            GenerateEvent::Started { choices, .. } => *choices = number,
            GenerateEvent::Token { choice, .. } | GenerateEvent::Finished { choice, .. } => {
                *choice = number;
            }
        }
        event
    })
}

/// "Hello world" and "Good bye", mixed; the second choice computed what the first one found.
pub fn two_choices() -> Script {
    let mut second = of(1, finished(FinishReason::Length, ""));
    if let Ok(GenerateEvent::Finished { usage, .. }) = &mut second {
        *usage = Usage { completion_tokens: 2, cached_tokens: 0, discarded_tokens: 4, ..*usage };
    }
    play(vec![
        of(2, started()),
        of(1, token(0, 5, "Good", None)),
        token(0, 7, "Hello", None),
        token(1, 8, "", None),
        of(1, token(1, 6, " bye", None)),
        second,
        token(2, 9, " wor", None),
        finished(FinishReason::Stop, "ld"),
    ])
}

fn unknown(model: &str) -> Status {
    Status::new(ErrorCode::NotFound, format!("no model '{model}'"))
}

impl Service for Fake {
    fn generate(
        &self,
        request: GenerateRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        let script = self.script.lock().unwrap().clone();
        let dropped = self.dropped.clone();
        let model = request.model.clone();
        self.seen.lock().unwrap().push((request, caller.clone()));
        async move {
            if let Some(status) = script.refusal {
                return Err(status);
            }
            if !model.is_empty() && model != MODEL {
                return Err(unknown(&model));
            }
            let id = caller.request_id.unwrap_or_else(|| RequestId(Uuid::now_v7()));
            let (sender, stream) = EventStream::new(id, 64);
            tokio::spawn(async move {
                for mut event in script.events {
                    if let Ok(GenerateEvent::Started { request_id, .. }) = &mut event {
                        *request_id = id;
                    }
                    if sender.send(event).await.is_err() {
                        let _ = dropped.send(id);
                        return;
                    }
                }
                if script.hang {
                    sender.closed().await;
                    let _ = dropped.send(id);
                }
            });
            Ok(stream)
        }
        .boxed()
    }

    /// Plays the script again for whoever names a request of this caller.
    fn attach(
        &self,
        request: AttachRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        let id = request.request_id;
        let seen = self.seen.lock().unwrap().clone();
        async move {
            let same = |c: &Caller| c.request_id == Some(id) && c.client == caller.client;
            let (asked, by) =
                seen.into_iter().find(|(_, c)| same(c)).ok_or_else(|| unknown_request(id))?;
            let origin =
                Origin { tag: by.tag, note: by.note.clone(), submitted_ms: 0, ..Origin::default() };
            Ok(self.generate(asked, by).await?.with_origin(origin))
        }
        .boxed()
    }

    /// The token after position `p` has the log-probability `-p - 0.5`; token 3 is the likeliest.
    fn score(
        &self,
        request: ScoreRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Vec<PositionScore>, Status>> {
        let tokens = request.tokens.clone();
        let score = move |position: u32| PositionScore {
            position,
            next_logprob: (position as usize + 1 < tokens.len()).then(|| -0.5 - position as f32),
            top_logits: [(3, 9.75), (7, 8.0)].into_iter().take(request.top_k.into()).collect(),
            log_sum_exp: 10.0,
        };
        let count = request.tokens.len() as u32;
        self.scored.lock().unwrap().push((request, caller));
        async move { Ok((0..count).map(score).collect()) }.boxed()
    }

    /// A vector of four numbers, the first of which is how many tokens there are.
    fn embed(
        &self,
        request: EmbedRequest,
        caller: Caller,
    ) -> BoxFuture<'_, Result<Embeddings, Status>> {
        let script = self.script.lock().unwrap().clone();
        self.embedded.lock().unwrap().push((request.clone(), caller));
        async move {
            if let Some(status) = script.refusal {
                return Err(status);
            }
            let mut counts = Vec::new();
            for input in &request.inputs {
                counts.push(self.tokenize(&request.model, input, Framing::Prompt)?.len() as u32);
            }
            let vector = |&n: &u32| vec![n as f32, 0.1, -1.0 / 3.0, f32::MIN_POSITIVE];
            let (reply, receiver) = oneshot::channel();
            reply.send(Ok(counts.iter().map(vector).collect())).unwrap();
            Ok(Embeddings::new(counts, receiver))
        }
        .boxed()
    }

    fn admit(&self, _: Caller) -> Result<Option<Box<dyn Meter>>, Status> {
        match self.cuts.load(Ordering::Relaxed) {
            true => Ok(None),
            false => Err(Status::exhausted("this key may have 1 requests a minute", 2500)),
        }
    }

    fn tokenizer_info(&self) -> TokenizerInfo {
        TokenizerInfo { eos_token: Some("</s>".into()), ..TokenizerInfo::default() }
    }

    /// Of a conversation the lengths of its messages. Texts that start with '^' want token 1 before them.
    fn tokenize(&self, model: &str, prompt: &Prompt, framing: Framing) -> Result<Vec<u32>, Status> {
        if !model.is_empty() && model != MODEL {
            return Err(unknown(model));
        }
        Ok(match prompt {
            Prompt::Text(text) => {
                let begin = (framing == Framing::Prompt && text.starts_with('^')).then_some(1);
                begin.into_iter().chain(text.bytes().map(u32::from)).collect()
            }
            Prompt::Tokens(ids) => ids.clone(),
            Prompt::Chat(c) => c.messages.iter().map(|t| t.content.len() as u32).collect(),
        })
    }

    fn detokenize(&self, ids: &[u32]) -> Result<String, Status> {
        let one = |&id: &u32| match id {
            HALF => Ok("\u{FFFD}".to_owned()),
            0..=254 => Ok(format!("<{id}>")),
            _ => Err(Status::invalid("tokens", format!("no token {id}"))),
        };
        ids.iter().map(one).collect()
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        if id == HALF { vec![0xe2, 0x82] } else { format!("<{id}>").into_bytes() }
    }

    fn models(&self) -> Vec<ModelCard> {
        vec![ModelCard {
            id: MODEL.into(),
            created: 1_700_000_000,
            max_model_len: 2048,
            vocab: 256,
            weight_bytes: 1000,
            hidden: 4,
        }]
    }

    fn cancel(&self, request_id: RequestId, _: Caller) -> BoxFuture<'_, Result<(), Status>> {
        self.cancelled.lock().unwrap().push(request_id);
        async { Ok(()) }.boxed()
    }

    fn forget(&self, request_id: RequestId, _: Caller) -> BoxFuture<'_, Result<(), Status>> {
        self.seen.lock().unwrap().retain(|(_, by)| by.request_id != Some(request_id));
        async { Ok(()) }.boxed()
    }

    fn status(&self) -> BoxFuture<'_, ClusterStatus> {
        let ready = self.ready.load(Ordering::Relaxed);
        let detail = if ready { "" } else { "waiting for 1 more node" };
        let status = ClusterStatus {
            ready,
            detail: detail.into(),
            epoch: 3,
            running: 2,
            kv_blocks: 10,
            kv_blocks_used: 4,
            ..ClusterStatus::default()
        };
        async move { status }.boxed()
    }

    fn admin(
        &self,
        _: Option<&str>,
        request: AdminRequest,
    ) -> BoxFuture<'_, Result<AdminReply, Status>> {
        let message = format!("{request:?} is not for a client");
        async move { Err(Status::new(ErrorCode::PermissionDenied, message)) }.boxed()
    }

    fn authenticate(&self, key: Option<&str>) -> Result<(), Status> {
        match key {
            Some(KEY) => Ok(()),
            _ => Err(Status::new(ErrorCode::Unauthenticated, "no API key, or a wrong one")),
        }
    }
}

/// An HTTP answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The `data:` lines of a stream.
    pub fn data(&self) -> Vec<&str> {
        self.body.lines().filter_map(|l| l.strip_prefix("data: ")).collect()
    }

    /// The `data:` lines that are JSON.
    pub fn chunks(&self) -> Vec<Value> {
        let json = self.data().into_iter().filter(|d| *d != "[DONE]");
        json.map(|d| serde_json::from_str(d).unwrap()).collect()
    }
}

/// A connection, just opened.
pub fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).expect("the server listens");
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// The text of a request with a body and the usual headers.
pub fn post_text(path: &str, body: &str, extra: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\
         content-length: {}\r\n{extra}\r\n{body}",
        body.len()
    )
}

/// Sends raw bytes and reads the answer.
pub fn exchange(addr: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = connect(addr);
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request);
    read_answer(&mut BufReader::new(stream))
}

pub fn post(addr: SocketAddr, path: &str, body: &Value) -> Answer {
    exchange(addr, post_text(path, &body.to_string(), "").as_bytes())
}

/// GET with a key.
pub fn get(addr: SocketAddr, path: &str) -> Answer {
    let text =
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n");
    exchange(addr, text.as_bytes())
}

fn line(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).expect("an answer in time");
    line.trim_end().to_owned()
}

pub fn read_head(reader: &mut impl BufRead) -> (u16, HashMap<String, String>) {
    let first = line(reader);
    let status = first.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("not a status line: '{first}'"));
    let mut headers = HashMap::new();
    loop {
        let header = line(reader);
        let Some((name, value)) = header.split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    (status, headers)
}

pub fn read_answer(reader: &mut impl BufRead) -> Answer {
    let (status, headers) = read_head(reader);
    let mut body = Vec::new();
    if let Some(len) = headers.get("content-length") {
        body.resize(len.parse().unwrap(), 0);
        reader.read_exact(&mut body).expect("the whole body");
    } else if headers.get("transfer-encoding").is_some_and(|t| t == "chunked") {
        loop {
            let len = usize::from_str_radix(&line(reader), 16).expect("a chunk length");
            let start = body.len();
            body.resize(start + len, 0);
            reader.read_exact(&mut body[start..]).expect("the whole chunk");
            line(reader);
            if len == 0 {
                break;
            }
        }
    }
    Answer { status, headers, body: String::from_utf8(body).expect("UTF-8") }
}
