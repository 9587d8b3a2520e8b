//! Continuations as a client hears them: each event once, in order, also across lost connections.
//!
//! When the connection breaks, or the coordinator restarts, the stream connects again and asks for
//! the rest by the request's id, of each choice from the first token that it has not handed out;
//! where the answer had not begun, the request itself is sent again under the same id, which the
//! server takes for the same request. That goes on for [`timing::REATTACH`], and never beyond the
//! call's deadline. A coordinator that keeps nothing (`--journal off`) does not know the id after a
//! restart: then the stream ends with the error of the loss.
//!
//! Invariant: whoever stops waiting for an event loses none, and breaks off no call: one that is
//! being made again belongs to the stream, for the server takes a call that is dropped for a client
//! that has gone.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{
    AttachRequest, GenerateEvent, GenerateRequest, MAX_CHOICES, META_KEEP_ALIVE, META_REQUEST_ID,
    Method, Reply,
};
use tokio::time::Instant;

use super::Client;
use super::call::Replies;
use crate::timing;

/// Answers that break off again without anything new, after which the stream is given up.
const MAX_VAIN: u32 = 4;

/// The events of a request, those of each choice in order. Dropping it cancels the request.
#[derive(Debug)]
pub struct GenerateStream {
    client: Client,
    id: RequestId,
    /// What was asked, to ask it again while nothing has come; `None` where we only attached.
    request: Option<GenerateRequest>,
    started: bool,
    /// What was handed out, by choice.
    heard: Vec<Heard>,
    call: Call,
    lost: Option<Lost>,
}

/// What was handed out of a choice.
#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    /// Index of the next token.
    next: u32,
    finished: bool,
}

/// Where events come from.
enum Call {
    /// A call that is answered.
    Open(Replies),
    /// One that is being made again; `None` comes of it where nobody can be reached yet.
    Again(Pin<Box<dyn Future<Output = Option<Replies>> + Send + Sync>>),
    /// None yet.
    Broken,
    /// The last event was handed out.
    Ended,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open(_) => "Open",
            Self::Again(_) => "Again",
            Self::Broken => "Broken",
            Self::Ended => "Ended",
        })
    }
}

/// A broken call.
#[derive(Debug)]
struct Lost {
    /// When to give up.
    until: Instant,
    wait: Duration,
    status: Status,
    /// Whether the call that was made since has brought an event.
    answered: bool,
    /// Calls that brought events, but none that was news.
    vain: u32,
}

/// Metadata of a call that may be repeated.
fn metadata(id: RequestId) -> Vec<(String, String)> {
    let keep = timing::REATTACH.as_secs().to_string();
    vec![(META_REQUEST_ID.to_owned(), id.to_string()), (META_KEEP_ALIVE.to_owned(), keep)]
}

impl GenerateStream {
    /// Asks; `client` is the one to ask on with, whose call has an end.
    pub(super) async fn ask(
        asking: &Client,
        client: &Client,
        id: RequestId,
        request: GenerateRequest,
    ) -> Result<Self, Status> {
        let method = Method::Generate(request);
        let replies = asking.call(&method, metadata(id), timing::STREAM_SILENCE).await?;
        let Method::Generate(request) = method else {
            return Err(Status::internal("a call changed its method"));
        };
        Ok(Self::new(client, id, Some(request), &[], replies))
    }

    /// Hears a request that was asked before, from the tokens `next` on.
    pub(super) async fn attach(
        asking: &Client,
        client: &Client,
        id: RequestId,
        next: &[u32],
    ) -> Result<Self, Status> {
        let method = Method::Attach(AttachRequest { request_id: id, next: next.to_vec() });
        let replies = asking.call(&method, Vec::new(), timing::STREAM_SILENCE).await?;
        Ok(Self::new(client, id, None, next, replies))
    }

    fn new(
        client: &Client,
        id: RequestId,
        request: Option<GenerateRequest>,
        next: &[u32],
        replies: Replies,
    ) -> Self {
        let heard = next.iter().map(|&next| Heard { next, finished: false });
        Self {
            client: client.clone(),
            id,
            request,
            started: false,
            heard: heard.collect(),
            call: Call::Open(replies),
            lost: None,
        }
    }

    /// Name of the request, for [`Client::attach`] and [`Client::cancel`].
    pub fn request_id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after the last one. After an error nothing follows. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        loop {
            let event = match &mut self.call {
                Call::Ended => return None,
                Call::Broken => self.begin_again(),
                Call::Again(calling) => {
                    // Whoever cannot be reached yet is tried again.
                    self.call = calling.await.map_or(Call::Broken, Call::Open);
                    Ok(None)
                }
                Call::Open(replies) => {
                    let reply = replies.next().await;
                    self.take(reply)
                }
            };
            if event.is_err() {
                self.call = Call::Ended;
            }
            if let Some(event) = event.transpose() {
                return Some(event);
            }
        }
    }

    /// A reply of the open call; the event in it where that is news.
    fn take(&mut self, reply: Result<Reply, Status>) -> Result<Option<GenerateEvent>, Status> {
        let Call::Open(replies) = &self.call else { return Ok(None) };
        match reply {
            Ok(Reply::Event(event)) => {
                if self.is_news(&event)? {
                    self.lost = None;
                    return Ok(Some(event));
                }
                if let Some(lost) = &mut self.lost {
                    lost.answered = true;
                }
            }
            Ok(Reply::Done) => self.call = Call::Ended,
            Ok(other) => return Err(replies.unexpected(&other)),
            Err(status) => {
                let cut = replies.was_cut();
                self.call = Call::Broken;
                self.failed(status, cut)?;
            }
        }
        Ok(None)
    }

    /// Whether an event was not handed out yet; from now on it is.
    fn is_news(&mut self, event: &GenerateEvent) -> Result<bool, Status> {
        match event {
            GenerateEvent::Started { .. } => Ok(!std::mem::replace(&mut self.started, true)),
            GenerateEvent::Token { choice, index, .. } => {
                let heard = self.heard_of(*choice)?;
                let news = *index >= heard.next;
                heard.next = heard.next.max(index.saturating_add(1));
                Ok(news)
            }
            GenerateEvent::Finished { choice, .. } => {
                Ok(!std::mem::replace(&mut self.heard_of(*choice)?.finished, true))
            }
        }
    }

    fn heard_of(&mut self, choice: u32) -> Result<&mut Heard, Status> {
        let index = choice as usize;
        if index >= MAX_CHOICES {
            let message = format!("the server sent choice {choice}, of at most {MAX_CHOICES}");
            return Err(Status::internal(message));
        }
        if self.heard.len() <= index {
            self.heard.resize(index + 1, Heard::default());
        }
        Ok(&mut self.heard[index])
    }

    /// A call ended with `status`; an error where that is the end of the stream.
    fn failed(&mut self, status: Status, cut: bool) -> Result<(), Status> {
        let Some(lost) = &mut self.lost else {
            if !cut || self.client.is_closed() {
                return Err(status);
            }
            let until = Instant::now() + timing::REATTACH;
            self.lost =
                Some(Lost { until, wait: timing::REATTACH_MIN, status, answered: false, vain: 0 });
            return Ok(());
        };
        lost.vain += u32::from(cut && lost.answered);
        match status.code {
            // It answers, and has nothing more to say.
            _ if lost.vain >= MAX_VAIN => Err(lost.status.clone()),
            _ if cut => Ok(()),
            // Nobody knows it any more: what ended the stream is the loss.
            ErrorCode::NotFound => Err(lost.status.clone()),
            // The coordinator stops, or is not ready yet; it is not what became of the request.
            ErrorCode::Unavailable if !lost.answered => Ok(()),
            _ => Err(status),
        }
    }

    /// Begins to ask for the rest, after a little time.
    fn begin_again(&mut self) -> Result<Option<GenerateEvent>, Status> {
        let Some(lost) = &mut self.lost else {
            return Err(Status::internal("a stream without a call"));
        };
        let deadline = self.client.ends_at();
        let late = |until: Instant| Instant::now() + lost.wait > until;
        if late(lost.until) || deadline.is_some_and(late) || self.client.is_closed() {
            return Err(lost.status.clone());
        }
        let wait = lost.wait;
        lost.wait = (lost.wait * 2).min(timing::REATTACH_MAX);
        lost.answered = false;
        let (method, metadata) = match (&self.request, self.started) {
            (Some(request), false) => (Method::Generate(request.clone()), metadata(self.id)),
            _ => {
                let next = self.heard.iter().map(|heard| heard.next).collect();
                (Method::Attach(AttachRequest { request_id: self.id, next }), Vec::new())
            }
        };
        let client = self.client.clone();
        self.call = Call::Again(Box::pin(async move {
            tokio::time::sleep(wait).await;
            client.call(&method, metadata, timing::STREAM_SILENCE).await.ok()
        }));
        Ok(None)
    }
}
