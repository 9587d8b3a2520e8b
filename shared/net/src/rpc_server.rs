//! The server's half of the client API: one call per stream.
//!
//! Reads the call, hands out a [`ReplySender`], and notices when the client goes away. What a
//! method does, who may call it and when its deadline passes is the caller's business.

use millrace_shared::error::Status;
use millrace_shared::wire::MAX_RPC_BYTES;
use millrace_shared::wire::rpc::{Call, GenerateEvent, Reply};

use crate::error::within;
use crate::{IncomingStream, MessageReceiver, MessageSender, NetError, RecvStream, timing};

/// Reads the call of a stream that a client has opened.
///
/// # Errors
/// If the call is late, too long or malformed; the client has been told then.
pub async fn accept_call(stream: IncomingStream) -> Result<(Call, ReplySender), NetError> {
    let (send, recv) = stream.into_halves();
    let mut messages = MessageReceiver::new(recv);
    let received =
        within(timing::FIRST_MESSAGE, "the call of a stream", messages.recv_one(MAX_RPC_BYTES))
            .await;
    let replies = ReplySender { out: MessageSender::new(send), _call: messages.into_stream() };
    match received {
        Ok(call) => Ok((call, replies)),
        Err(e) => {
            let _ = replies.fail(e.to_status()).await;
            Err(e)
        }
    }
}

/// The secret of a call's `authorization: Bearer SECRET`.
pub fn bearer(call: &Call) -> Option<&str> {
    let (_, value) =
        call.metadata.iter().find(|(name, _)| name.eq_ignore_ascii_case("authorization"))?;
    let (scheme, secret) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
}

/// Where the replies of one call go. Dropping it without [`ReplySender::done`] or
/// [`ReplySender::fail`] shows as an incomplete answer at the client.
#[derive(Debug)]
pub struct ReplySender {
    out: MessageSender,
    /// Kept so that the client's half is not refused while the call runs.
    _call: RecvStream,
}

impl ReplySender {
    /// Sends part of a continuation.
    ///
    /// # Errors
    /// If the client is gone, or reads nothing for [`timing::REPLY_WRITE`].
    pub async fn event(&mut self, event: GenerateEvent) -> Result<(), NetError> {
        self.reply(&Reply::Event(event)).await
    }

    /// Sends a reply.
    ///
    /// # Errors
    /// As [`ReplySender::event`].
    pub async fn reply(&mut self, reply: &Reply) -> Result<(), NetError> {
        within(timing::REPLY_WRITE, "a client that reads its replies", self.out.send(reply)).await
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
