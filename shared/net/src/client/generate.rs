//! A continuation as a client hears it: each event once, in order, also across lost connections.
//!
//! When the connection breaks, or the coordinator restarts, the stream connects again and asks for
//! the rest by the request's id, from the first token that it has not handed out; where the answer
//! had not begun, the request itself is sent again under the same id, which the server takes for the
//! same request. That goes on for [`timing::REATTACH`], and never beyond the call's deadline. A
//! coordinator that keeps nothing (`--journal off`) does not know the id after a restart: then the
//! stream ends with the error of the loss.

use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{
    AttachRequest, GenerateEvent, GenerateRequest, META_KEEP_ALIVE, META_REQUEST_ID, Method, Reply,
};
use tokio::time::Instant;

use super::Client;
use super::call::Replies;
use crate::timing;

/// Answers that break off again without anything new, after which the stream is given up.
const MAX_VAIN: u32 = 4;

/// The events of a continuation, in order. Dropping it cancels the request.
#[derive(Debug)]
pub struct GenerateStream {
    client: Client,
    id: RequestId,
    /// What was asked, to ask it again while nothing has come; `None` where we only attached.
    request: Option<GenerateRequest>,
    started: bool,
    /// Index of the next token to hand out.
    next: u32,
    /// `None` while there is no call.
    replies: Option<Replies>,
    lost: Option<Lost>,
    ended: bool,
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
        Ok(Self::new(client, id, Some(request), 0, replies))
    }

    /// Hears a request that was asked before, from token `next` on.
    pub(super) async fn attach(
        asking: &Client,
        client: &Client,
        id: RequestId,
        next: u32,
    ) -> Result<Self, Status> {
        let method = Method::Attach(AttachRequest { request_id: id, next: vec![next] });
        let replies = asking.call(&method, Vec::new(), timing::STREAM_SILENCE).await?;
        Ok(Self::new(client, id, None, next, replies))
    }

    fn new(
        client: &Client,
        id: RequestId,
        request: Option<GenerateRequest>,
        next: u32,
        replies: Replies,
    ) -> Self {
        Self {
            client: client.clone(),
            id,
            request,
            started: false,
            next,
            replies: Some(replies),
            lost: None,
            ended: false,
        }
    }

    /// Name of the request, for [`Client::attach`] and [`Client::cancel`].
    pub fn request_id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after the last one. After an error nothing follows. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        while !self.ended {
            let Some(replies) = &mut self.replies else {
                if let Err(status) = self.call_again().await {
                    self.ended = true;
                    return Some(Err(status));
                }
                continue;
            };
            match replies.next().await {
                Ok(Reply::Event(event)) => {
                    if self.is_news(&event) {
                        self.lost = None;
                        return Some(Ok(event));
                    }
                    if let Some(lost) = &mut self.lost {
                        lost.answered = true;
                    }
                }
                Ok(Reply::Done) => self.ended = true,
                Ok(other) => {
                    self.ended = true;
                    return Some(Err(replies.unexpected(&other)));
                }
                Err(status) => {
                    let cut = replies.was_cut();
                    self.replies = None;
                    if let Err(status) = self.failed(status, cut) {
                        self.ended = true;
                        return Some(Err(status));
                    }
                }
            }
        }
        self.replies = None;
        None
    }

    /// Whether an event was not handed out yet; from now on it is.
    fn is_news(&mut self, event: &GenerateEvent) -> bool {
        match event {
            GenerateEvent::Started { .. } => !std::mem::replace(&mut self.started, true),
            GenerateEvent::Token { index, .. } => {
                let news = *index >= self.next;
                self.next = self.next.max(index + 1);
                news
            }
            GenerateEvent::Finished { .. } => true,
        }
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

    /// Waits a little, then asks for the rest.
    async fn call_again(&mut self) -> Result<(), Status> {
        let Some(lost) = &mut self.lost else {
            return Err(Status::internal("a stream without a call"));
        };
        let deadline = self.client.ends_at();
        let late = |until: Instant| Instant::now() + lost.wait > until;
        if late(lost.until) || deadline.is_some_and(late) || self.client.is_closed() {
            return Err(lost.status.clone());
        }
        tokio::time::sleep(lost.wait).await;
        lost.wait = (lost.wait * 2).min(timing::REATTACH_MAX);
        lost.answered = false;
        let (method, metadata) = match (&self.request, self.started) {
            (Some(request), false) => (Method::Generate(request.clone()), metadata(self.id)),
            _ => {
                let next = vec![self.next];
                (Method::Attach(AttachRequest { request_id: self.id, next }), Vec::new())
            }
        };
        // Whoever cannot be reached yet is tried again.
        self.replies = self.client.call(&method, metadata, timing::STREAM_SILENCE).await.ok();
        Ok(())
    }
}
