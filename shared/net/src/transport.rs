//! The transport seam: typed streams on a connection, over QUIC or inside one process.
//!
//! [`SendStream`] and [`RecvStream`] are the halves of a bidirectional stream; what is above them
//! ([`crate::framed`], [`crate::edge`]) does not know which kind it has. In-process streams
//! ([`local_stream_pair`]) hold a bounded number of items, like QUIC's windows; they serve
//! simulation and unit tests. On a cluster connection the first message names the plane, and the
//! plane the priority: control > stage > blob.

use std::time::Duration;

use bytes::{Buf, Bytes};
use millrace_shared::wire::Plane;
use millrace_shared::wire::frame::Frame;
use quinn::VarInt;
use tokio::sync::{mpsc, watch};

use crate::error::within;
use crate::{Connection, MessageReceiver, MessageSender, NetError, timing};

/// Longest first message; a [`Plane`] is a few dozen bytes.
const MAX_PLANE_BYTES: usize = 256;
/// Application error code of streams that are abandoned.
const RESET: VarInt = VarInt::from_u32(1);

/// What an in-process stream carries.
#[derive(Debug)]
pub(crate) enum LocalItem {
    /// Bytes, as QUIC would carry them.
    Bytes(Bytes),
    /// A frame, handed over as it is.
    Frame(Frame),
}

#[derive(Debug)]
pub(crate) enum SendInner {
    Quic(quinn::SendStream),
    Local { items: Option<mpsc::Sender<LocalItem>>, reader: watch::Receiver<()> },
}

/// The sending half of a stream. Dropping it ends the stream in order.
#[derive(Debug)]
pub struct SendStream {
    pub(crate) inner: SendInner,
}

#[derive(Debug)]
pub(crate) enum RecvInner {
    Quic(quinn::RecvStream),
    /// `alive` is dropped when nobody will read any more.
    Local {
        items: mpsc::Receiver<LocalItem>,
        rest: Bytes,
        alive: Option<watch::Sender<()>>,
    },
}

/// The receiving half of a stream. Dropping it tells the peer to stop.
#[derive(Debug)]
pub struct RecvStream {
    pub(crate) inner: RecvInner,
}

impl SendStream {
    /// Says that nothing follows; what was sent still arrives.
    pub fn finish(&mut self) {
        match &mut self.inner {
            SendInner::Quic(stream) => {
                let _ = stream.finish();
            }
            SendInner::Local { items, .. } => *items = None,
        }
    }

    /// Ends the stream at once; what was not yet received may be lost.
    pub fn reset(&mut self) {
        match &mut self.inner {
            SendInner::Quic(stream) => {
                let _ = stream.reset(RESET);
            }
            SendInner::Local { items, .. } => *items = None,
        }
    }

    /// Completes when the peer will read no more: it dropped its half, the connection is gone, or
    /// (after [`SendStream::finish`]) everything has arrived. Independent of the stream's borrow.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        enum Wait<Q> {
            Quic(Q),
            Local(watch::Receiver<()>),
        }
        let wait = match &self.inner {
            SendInner::Quic(stream) => Wait::Quic(stream.stopped()),
            SendInner::Local { reader, .. } => Wait::Local(reader.clone()),
        };
        async move {
            match wait {
                Wait::Quic(stopped) => {
                    let _ = stopped.await;
                }
                // Nothing is ever sent on it: it only ends.
                Wait::Local(mut reader) => while reader.changed().await.is_ok() {},
            }
        }
    }

    /// Writes all of `pending`. Cancel-safe: what is left in `pending` has not been written.
    pub(crate) async fn write(&mut self, pending: &mut Bytes) -> Result<(), NetError> {
        while pending.has_remaining() {
            match &mut self.inner {
                SendInner::Quic(stream) => {
                    stream.write_chunks(std::slice::from_mut(pending)).await?;
                }
                SendInner::Local { items, .. } => {
                    let permit = local_permit(items).await?;
                    permit.send(LocalItem::Bytes(std::mem::take(pending)));
                }
            }
        }
        Ok(())
    }
}

/// Room for one item on a local stream.
pub(crate) async fn local_permit(
    sender: &mut Option<mpsc::Sender<LocalItem>>,
) -> Result<mpsc::Permit<'_, LocalItem>, NetError> {
    let sender = sender.as_mut().ok_or(NetError::Ended("already closed"))?;
    sender.reserve().await.map_err(|_| NetError::Ended("it no longer reads"))
}

impl RecvStream {
    /// Tells the peer to stop sending.
    pub fn stop(&mut self) {
        match &mut self.inner {
            RecvInner::Quic(stream) => {
                let _ = stream.stop(RESET);
            }
            RecvInner::Local { items, alive, .. } => {
                items.close();
                *alive = None;
            }
        }
    }

    /// Reads at most `buf.len()` bytes; `None` when the peer has finished. Cancel-safe.
    pub(crate) async fn read(&mut self, buf: &mut [u8]) -> Result<Option<usize>, NetError> {
        match &mut self.inner {
            RecvInner::Quic(stream) => Ok(stream.read(buf).await?),
            RecvInner::Local { items, rest, .. } => {
                while !rest.has_remaining() {
                    match items.recv().await {
                        Some(LocalItem::Bytes(bytes)) => *rest = bytes,
                        Some(LocalItem::Frame(_)) => {
                            return Err(NetError::Protocol("a frame where bytes belong".into()));
                        }
                        None => return Ok(None),
                    }
                }
                let n = rest.remaining().min(buf.len());
                rest.copy_to_slice(&mut buf[..n]);
                Ok(Some(n))
            }
        }
    }
}

/// A bidirectional stream inside one process: two ends, each direction holding at most `capacity`
/// items (messages or frames).
pub fn local_stream_pair(capacity: usize) -> ((SendStream, RecvStream), (SendStream, RecvStream)) {
    let (left_out, right_in) = local_pipe(capacity);
    let (right_out, left_in) = local_pipe(capacity);
    ((left_out, left_in), (right_out, right_in))
}

fn local_pipe(capacity: usize) -> (SendStream, RecvStream) {
    let (sender, items) = mpsc::channel(capacity.max(1));
    let (alive, reader) = watch::channel(());
    (
        SendStream { inner: SendInner::Local { items: Some(sender), reader } },
        RecvStream { inner: RecvInner::Local { items, rest: Bytes::new(), alive: Some(alive) } },
    )
}

/// Priority of a plane's streams; QUIC sends higher ones first.
fn priority(plane: &Plane) -> i32 {
    match plane {
        Plane::Control => 2,
        Plane::Stage { .. } => 1,
        Plane::Blob | Plane::Burst => 0,
    }
}

fn prioritise(stream: &SendStream, priority: i32) {
    if let SendInner::Quic(stream) = &stream.inner {
        let _ = stream.set_priority(priority);
    }
}

impl Connection {
    /// Opens a bidirectional stream without a first message (client and join protocols).
    ///
    /// # Errors
    /// If the connection is gone, or the peer allows no more streams within the deadline.
    pub async fn open_bare(&self) -> Result<(SendStream, RecvStream), NetError> {
        let (send, recv) = within(timing::OPEN_STREAM, "opening a stream", async {
            Ok(self.inner.open_bi().await?)
        })
        .await?;
        Ok(wrap(send, recv))
    }

    /// Opens a stream of a plane, with its priority, and announces it.
    ///
    /// # Errors
    /// If the connection is gone or the peer lets it wait too long.
    pub async fn open_stream(&self, plane: &Plane) -> Result<(SendStream, RecvStream), NetError> {
        let (send, recv) = self.open_bare().await?;
        prioritise(&send, priority(plane));
        let mut messages = MessageSender::new(send);
        within(timing::FIRST_MESSAGE, "announcing a stream", messages.send(plane)).await?;
        Ok((messages.into_stream(), recv))
    }

    /// The next stream the peer opens. Cancel-safe.
    ///
    /// # Errors
    /// If the connection is gone.
    pub async fn accept_incoming(&self) -> Result<IncomingStream, NetError> {
        let (send, recv) = self.inner.accept_bi().await?;
        let (send, recv) = wrap(send, recv);
        Ok(IncomingStream { send, recv })
    }

    /// Waits for the next stream and its plane. A peer that opens a stream and says nothing blocks
    /// this for [`timing::FIRST_MESSAGE`]; where that matters, take
    /// [`Connection::accept_incoming`] and await [`IncomingStream::plane`] elsewhere.
    ///
    /// # Errors
    /// If the connection is gone or the first message is missing or malformed.
    pub async fn accept_stream(&self) -> Result<(Plane, SendStream, RecvStream), NetError> {
        self.accept_incoming().await?.plane(timing::FIRST_MESSAGE).await
    }
}

fn wrap(send: quinn::SendStream, recv: quinn::RecvStream) -> (SendStream, RecvStream) {
    (SendStream { inner: SendInner::Quic(send) }, RecvStream { inner: RecvInner::Quic(recv) })
}

/// A stream that the peer has opened, its first message not yet read.
#[derive(Debug)]
pub struct IncomingStream {
    send: SendStream,
    recv: RecvStream,
}

impl IncomingStream {
    /// Reads the first message and sets the priority of our half accordingly.
    ///
    /// # Errors
    /// If the message is late, too long or malformed.
    pub async fn plane(
        self,
        deadline: Duration,
    ) -> Result<(Plane, SendStream, RecvStream), NetError> {
        let mut messages = MessageReceiver::new(self.recv);
        let plane: Plane = within(deadline, "the first message of a stream", async {
            messages.recv_one(MAX_PLANE_BYTES).await
        })
        .await?;
        prioritise(&self.send, priority(&plane));
        Ok((plane, self.send, messages.into_stream()))
    }

    /// The halves, for protocols without planes.
    pub fn into_halves(self) -> (SendStream, RecvStream) {
        (self.send, self.recv)
    }
}
