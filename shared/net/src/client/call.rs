//! The replies of one call.

use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::MAX_REPLY_BYTES;
use millrace_shared::wire::rpc::Reply;
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
    /// The connection or the stream broke, rather than that the server said no.
    cut: bool,
}

impl Replies {
    pub(super) fn new(
        call: SendStream,
        recv: RecvStream,
        address: String,
        ends: Option<(Instant, Duration)>,
        silence: Duration,
    ) -> Self {
        Self {
            messages: MessageReceiver::new(recv),
            _call: call,
            address,
            ends,
            silence,
            cut: false,
        }
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
            Ok(Ok(None)) => {
                self.cut = true;
                Err(self.broken("the answer ended before it was complete"))
            }
            Ok(Err(e)) if e.is_violation() => {
                Err(self.broken(&format!("{e}: client and server must be of the same release")))
            }
            Ok(Err(e)) => {
                self.cut = true;
                Err(self.broken(&match e {
                    NetError::Ended(_) => "the answer was cut off".to_owned(),
                    other => other.to_string(),
                }))
            }
        }
    }

    /// Whether the last error came of the network, so that the request may go on without us.
    pub(super) fn was_cut(&self) -> bool {
        self.cut
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
            Reply::Embeddings(_) => "embeddings",
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
