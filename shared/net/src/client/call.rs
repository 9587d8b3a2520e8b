//! The replies of one call.

use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::MAX_REPLY_BYTES;
use millrace_shared::wire::rpc::{GenerateEvent, Reply};
use tokio::time::Instant;

use crate::{MessageReceiver, NetError, RecvStream, SendStream};

/// Reads the replies of a call. Dropping it tells the server that nobody listens.
#[derive(Debug)]
pub(super) struct Replies {
    messages: MessageReceiver,
    _call: SendStream,
    address: String,
    ends: Option<(Instant, Duration)>,
    silence: Duration,
}

impl Replies {
    pub(super) fn new(
        call: SendStream,
        recv: RecvStream,
        address: String,
        ends: Option<(Instant, Duration)>,
        silence: Duration,
    ) -> Self {
        Self { messages: MessageReceiver::new(recv), _call: call, address, ends, silence }
    }

    /// The next reply; a `Failed` one comes as the error. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Reply, Status> {
        let (until, limit) = match self.ends {
            Some((until, limit)) => (until, limit),
            None => (Instant::now() + self.silence, self.silence),
        };
        let received = tokio::time::timeout_at(until, self.messages.recv(MAX_REPLY_BYTES)).await;
        match received {
            Err(_) => Err(late(limit)),
            Ok(Ok(Some(Reply::Failed(status)))) => Err(status),
            Ok(Ok(Some(reply))) => Ok(reply),
            Ok(Ok(None)) => Err(self.broken("the answer ended before it was complete")),
            Ok(Err(e)) if e.is_violation() => {
                Err(self.broken(&format!("{e}: client and server must be of the same release")))
            }
            Ok(Err(e)) => Err(self.broken(&match e {
                NetError::Ended(_) => "the answer was cut off".to_owned(),
                other => other.to_string(),
            })),
        }
    }

    fn broken(&self, what: &str) -> Status {
        Status::unavailable(format!("the cluster at {}: {what}", self.address), 1000)
    }

    /// A reply that this call cannot have.
    pub(super) fn unexpected(&self, reply: &Reply) -> Status {
        let kind = match reply {
            Reply::Event(_) => "an event",
            Reply::Scores(_) => "scores",
            Reply::Tokens(_) => "tokens",
            Reply::Text(_) => "text",
            Reply::Models(_) => "models",
            Reply::Status(_) => "a status",
            Reply::Admin(_) => "an answer for administrators",
            Reply::Done => "an end without an answer",
            Reply::Failed(_) => "a failure",
        };
        Status::internal(format!(
            "the cluster at {} answered with {kind}: client and server must be of the same release",
            self.address
        ))
    }
}

pub(super) fn late(limit: Duration) -> Status {
    Status::new(ErrorCode::DeadlineExceeded, format!("no answer within {limit:?}"))
}

/// The events of a continuation, in order. Dropping it cancels the request.
#[derive(Debug)]
pub struct GenerateStream {
    /// `None` once the stream has ended or failed.
    replies: Option<Replies>,
}

impl GenerateStream {
    pub(super) fn new(replies: Replies) -> Self {
        Self { replies: Some(replies) }
    }

    /// The next event; `None` after the last one. After an error nothing follows. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        let replies = self.replies.as_mut()?;
        let result = match replies.next().await {
            Ok(Reply::Event(event)) => return Some(Ok(event)),
            Ok(Reply::Done) => None,
            Ok(other) => Some(Err(replies.unexpected(&other))),
            Err(status) => Some(Err(status)),
        };
        self.replies = None;
        result
    }
}
