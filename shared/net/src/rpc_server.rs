//! The server's half of the client API: one call per stream.
//!
//! [`accept_call`] reads the header, which is short; the caller checks the key in it and only then
//! asks for the method with [`IncomingCall::method`]. The bytes of all methods in the making are
//! bounded over the whole process. A [`ReplySender`] answers and notices when the client goes away.
//! What a method does, who may call it and when its deadline passes is the caller's business.

use std::time::Duration;

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{CallHeader, GenerateEvent, Method, Reply};
use millrace_shared::wire::{MAX_CALL_HEADER_BYTES, MAX_RPC_BYTES, codec};

use crate::error::within;
use crate::room::Room;
use crate::{IncomingStream, MessageReceiver, MessageSender, NetError, RecvStream, timing};

/// Longer methods are decoded where they hold nobody up.
const LONG_BODY: usize = 64 << 10;

/// A call whose header has been read.
#[derive(Debug)]
pub struct IncomingCall {
    header: CallHeader,
    messages: MessageReceiver,
    out: MessageSender,
}

/// Reads the header of a stream that a client has opened.
///
/// # Errors
/// If it is late, too long or malformed; the client has been told then.
pub async fn accept_call(stream: IncomingStream) -> Result<IncomingCall, NetError> {
    let (send, recv) = stream.into_halves();
    let mut messages = MessageReceiver::new(recv);
    let out = MessageSender::new(send);
    let received = messages.recv_one(MAX_CALL_HEADER_BYTES);
    match within(timing::FIRST_MESSAGE, "the header of a call", received).await {
        Ok(header) => Ok(IncomingCall { header, messages, out }),
        Err(e) => {
            let _ = replies(out, messages).fail(e.to_status()).await;
            Err(e)
        }
    }
}

fn replies(out: MessageSender, messages: MessageReceiver) -> ReplySender {
    ReplySender { out, patience: timing::REPLY_WRITE, _call: messages.into_stream() }
}

impl IncomingCall {
    /// Who calls, and how long they wait.
    pub fn header(&self) -> &CallHeader {
        &self.header
    }

    /// The secret of the call's `authorization: Bearer SECRET`.
    pub fn bearer(&self) -> Option<&str> {
        let mut pairs = self.header.metadata.iter();
        let (_, value) = pairs.find(|(name, _)| name.eq_ignore_ascii_case("authorization"))?;
        let (scheme, secret) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
    }

    /// Ends the call with an error, without reading what is asked.
    ///
    /// # Errors
    /// As [`ReplySender::event`].
    pub async fn refuse(self, status: Status) -> Result<(), NetError> {
        replies(self.out, self.messages).fail(status).await
    }

    /// Reads what is asked.
    ///
    /// # Errors
    /// If it is late, too long or malformed, or finds no room; the client has been told then.
    pub async fn method(mut self) -> Result<(Method, Room, ReplySender), NetError> {
        let received = read_method(&mut self.messages);
        let received = within(timing::FIRST_MESSAGE, "the method of a call", received).await;
        let replies = replies(self.out, self.messages);
        let status = match received {
            Ok(Ok((method, room))) => return Ok((method, room, replies)),
            Ok(Err(full)) => (full.clone(), NetError::Protocol(full.message)),
            Err(e) => (e.to_status(), e),
        };
        let _ = replies.fail(status.0).await;
        Err(status.1)
    }
}

/// The inner error is that there is no room.
async fn read_method(
    messages: &mut MessageReceiver,
) -> Result<Result<(Method, Room), Status>, NetError> {
    let len = messages.announced(MAX_RPC_BYTES).await?;
    let len = len.ok_or(NetError::Ended("before the method came"))?;
    let room = match Room::of(len).await {
        Ok(room) => room,
        Err(full) => return Ok(Err(full)),
    };
    let body = messages.recv_body(MAX_RPC_BYTES).await?;
    let method = if len > LONG_BODY {
        let decoding = tokio::task::spawn_blocking(move || codec::decode(&body));
        decoding.await.map_err(|e| NetError::Protocol(format!("decoding the method: {e}")))?
    } else {
        codec::decode(&body)
    };
    Ok(Ok((method?, room)))
}

/// Where the replies of one call go. Dropping it without [`ReplySender::done`] or
/// [`ReplySender::fail`] shows as an incomplete answer at the client.
#[derive(Debug)]
pub struct ReplySender {
    out: MessageSender,
    /// How long the client may read nothing.
    patience: Duration,
    /// Kept so that the client's half is not refused while the call runs.
    _call: RecvStream,
}

impl ReplySender {
    /// With another time, instead of [`timing::REPLY_WRITE`], for which the client may read nothing.
    #[must_use]
    pub fn waiting(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sends part of a continuation.
    ///
    /// # Errors
    /// If the client is gone, or reads nothing for too long.
    pub async fn event(&mut self, event: GenerateEvent) -> Result<(), NetError> {
        self.reply(&Reply::Event(event)).await
    }

    /// Sends a reply.
    ///
    /// # Errors
    /// As [`ReplySender::event`].
    pub async fn reply(&mut self, reply: &Reply) -> Result<(), NetError> {
        within(self.patience, "a client that reads its replies", self.out.send(reply)).await
    }

    /// Ends the call well.
    ///
    /// # Errors
    /// As [`ReplySender::event`].
    pub async fn done(mut self) -> Result<(), NetError> {
        self.reply(&Reply::Done).await?;
        self.out.finish();
        Ok(())
    }

    /// Ends the call with an error.
    ///
    /// # Errors
    /// As [`ReplySender::event`].
    pub async fn fail(mut self, status: Status) -> Result<(), NetError> {
        self.reply(&Reply::Failed(status)).await?;
        self.out.finish();
        Ok(())
    }

    /// Completes when the client gave the call up or is gone. Independent of this value's borrow,
    /// so that it can be awaited beside sending.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.out.stopped()
    }
}
