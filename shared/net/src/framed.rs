//! Messages and stage frames on streams.
//!
//! Receivers keep their progress, so that dropping a `recv` future (in a `select!`) loses nothing.
//! Senders keep what a dropped `send` future had not written, and write it first next time. Every
//! length is checked against a limit before memory is allocated for it. A receiver that returned
//! an error is out of step: close the stream.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use millrace_shared::wire::codec;
use millrace_shared::wire::data::{FrameError, FrameHeader, HEADER_BYTES};
use millrace_shared::wire::frame::{Frame, FrameBuffer};
use serde::{Serialize, de::DeserializeOwned};

use crate::NetError;
use crate::transport::{LocalItem, RecvInner, RecvStream, SendInner, SendStream, local_permit};

/// Bodies grow by at most this much at a time, so that a peer must send what it announces.
const GROWTH_BYTES: usize = 64 << 10;

/// Sends length-prefixed messages.
#[derive(Debug)]
pub struct MessageSender {
    stream: SendStream,
    pending: Bytes,
}

impl MessageSender {
    /// Messages on this stream.
    pub fn new(stream: SendStream) -> Self {
        Self { stream, pending: Bytes::new() }
    }

    /// Sends one message. If the future is dropped, the message goes out with the next call.
    ///
    /// # Errors
    /// If the stream or the connection is gone.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), NetError> {
        self.send_bytes(codec::encode_frame(message).into()).await
    }

    /// Sends bytes without a length, where a message before them has told it.
    ///
    /// # Errors
    /// If the stream or the connection is gone.
    pub async fn send_bytes(&mut self, bytes: Bytes) -> Result<(), NetError> {
        self.stream.write(&mut self.pending).await?;
        self.pending = bytes;
        self.stream.write(&mut self.pending).await
    }

    /// Says that nothing follows.
    pub fn finish(&mut self) {
        self.stream.finish();
    }

    /// The stream below.
    pub fn stream(&mut self) -> &mut SendStream {
        &mut self.stream
    }

    /// The stream below, for other use.
    pub fn into_stream(self) -> SendStream {
        self.stream
    }

    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        self.stream.stopped()
    }
}

/// Receives length-prefixed messages.
#[derive(Debug)]
pub struct MessageReceiver {
    stream: RecvStream,
    prefix: [u8; 4],
    prefix_filled: usize,
    body: Vec<u8>,
    body_filled: usize,
}

impl MessageReceiver {
    /// Messages on this stream.
    pub fn new(stream: RecvStream) -> Self {
        Self { stream, prefix: [0; 4], prefix_filled: 0, body: Vec::new(), body_filled: 0 }
    }

    /// The next message of at most `limit` bytes; `None` when the peer has finished. Cancel-safe.
    ///
    /// # Errors
    /// If it is too long or malformed, or the stream or connection is gone.
    pub async fn recv<T: DeserializeOwned>(&mut self, limit: usize) -> Result<Option<T>, NetError> {
        let Some(len) = self.announced(limit).await? else { return Ok(None) };
        self.fill(len).await?;
        let message = codec::decode(&self.body[..len])?;
        self.prefix_filled = 0;
        self.body_filled = 0;
        self.body.clear();
        self.body.shrink_to(GROWTH_BYTES);
        Ok(Some(message))
    }

    /// The length of the next message, of at most `limit` bytes, before it is received; `None` when
    /// the peer has finished. Cancel-safe.
    ///
    /// # Errors
    /// If it is too long, or the stream or connection is gone.
    pub async fn announced(&mut self, limit: usize) -> Result<Option<usize>, NetError> {
        while self.prefix_filled < 4 {
            match self.stream.read(&mut self.prefix[self.prefix_filled..]).await? {
                Some(n) => self.prefix_filled += n,
                None if self.prefix_filled == 0 => return Ok(None),
                None => return Err(NetError::Ended("in the middle of a message")),
            }
        }
        Ok(Some(codec::check_len(self.prefix, limit)?))
    }

    /// The bytes of the next message, which must come, for decoding elsewhere. Cancel-safe.
    ///
    /// # Errors
    /// As [`MessageReceiver::recv_one`], but for what only decoding finds.
    pub async fn recv_body(&mut self, limit: usize) -> Result<Vec<u8>, NetError> {
        let len = self.announced(limit).await?;
        self.fill(len.ok_or(NetError::Ended("before a message came"))?).await?;
        self.prefix_filled = 0;
        self.body_filled = 0;
        Ok(std::mem::take(&mut self.body))
    }

    /// Receives what is missing of a body of `len` bytes.
    async fn fill(&mut self, len: usize) -> Result<(), NetError> {
        while self.body_filled < len {
            if self.body.len() == self.body_filled {
                self.body.resize(len.min(self.body_filled + GROWTH_BYTES), 0);
            }
            match self.stream.read(&mut self.body[self.body_filled..]).await? {
                Some(n) => self.body_filled += n,
                None => return Err(NetError::Ended("in the middle of a message")),
            }
        }
        Ok(())
    }

    /// The next message, which must come.
    ///
    /// # Errors
    /// As [`MessageReceiver::recv`], and [`NetError::Ended`] if the peer has finished.
    pub async fn recv_one<T: DeserializeOwned>(&mut self, limit: usize) -> Result<T, NetError> {
        self.recv(limit).await?.ok_or(NetError::Ended("before a message came"))
    }

    /// Fills `buf` with bytes that have no length before them. Not cancel-safe.
    ///
    /// # Errors
    /// If the peer sends fewer.
    pub async fn recv_bytes(&mut self, mut buf: &mut [u8]) -> Result<(), NetError> {
        while !buf.is_empty() {
            let n = self
                .stream
                .read(buf)
                .await?
                .ok_or(NetError::Ended("before all announced bytes came"))?;
            buf = &mut buf[n..];
        }
        Ok(())
    }

    /// The stream below, for other use; call it between messages only.
    pub fn into_stream(self) -> RecvStream {
        self.stream
    }
}

/// Frame buffers to use again. Clones share the pool.
#[derive(Clone, Debug)]
pub struct FramePool {
    free: Arc<Mutex<Vec<FrameBuffer>>>,
    keep: usize,
}

impl FramePool {
    /// A pool that keeps at most `keep` free buffers.
    pub fn new(keep: usize) -> Self {
        Self { free: Arc::new(Mutex::new(Vec::new())), keep }
    }

    /// A buffer of `len` bytes with unspecified (initialised) contents.
    pub fn take(&self, len: usize) -> FrameBuffer {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = free.pop().unwrap_or_default();
        drop(free);
        // Only growth is zeroed: a pooled buffer of the same length is not touched.
        buffer.resize(len, 0);
        buffer
    }

    /// Gives a buffer back.
    pub fn put(&self, buffer: FrameBuffer) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.keep && buffer.capacity() > 0 {
            free.push(buffer);
        }
    }

    /// Gives a frame's buffer back.
    pub fn recycle(&self, frame: Frame) {
        self.put(frame.into_buffer());
    }
}

/// A frame's buffer on its way out: returns to the pool when QUIC has had it acknowledged.
struct Outgoing {
    buffer: FrameBuffer,
    pool: Option<FramePool>,
}

impl AsRef<[u8]> for Outgoing {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.put(std::mem::take(&mut self.buffer));
        }
    }
}

/// Sends stage frames without copying them.
#[derive(Debug)]
pub struct FrameSender {
    stream: SendStream,
    pending: Bytes,
    pending_frame: Option<Frame>,
    pool: Option<FramePool>,
}

impl FrameSender {
    /// Frames on this stream; sent buffers go to `pool`, if there is one.
    pub fn new(stream: SendStream, pool: Option<FramePool>) -> Self {
        Self { stream, pending: Bytes::new(), pending_frame: None, pool }
    }

    /// Sends one sealed frame. If the future is dropped, the frame goes out with the next call of
    /// this or [`FrameSender::flush`].
    ///
    /// # Errors
    /// If the stream or the connection is gone.
    pub async fn send(&mut self, frame: Frame) -> Result<(), NetError> {
        self.flush().await?;
        match self.stream.inner {
            SendInner::Quic(_) => {
                let buffer = frame.into_buffer();
                self.pending = Bytes::from_owner(Outgoing { buffer, pool: self.pool.clone() });
            }
            SendInner::Local { .. } => self.pending_frame = Some(frame),
        }
        self.flush().await
    }

    /// Writes what an abandoned [`FrameSender::send`] left. Cancel-safe.
    ///
    /// # Errors
    /// If the stream or the connection is gone.
    pub async fn flush(&mut self) -> Result<(), NetError> {
        if self.pending_frame.is_some()
            && let SendInner::Local { items, .. } = &mut self.stream.inner
        {
            let permit = local_permit(items).await?;
            if let Some(frame) = self.pending_frame.take() {
                permit.send(LocalItem::Frame(frame));
            }
        }
        self.stream.write(&mut self.pending).await
    }

    /// The stream below.
    pub fn stream(&mut self) -> &mut SendStream {
        &mut self.stream
    }
}

/// Receives stage frames into pooled, aligned buffers.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: RecvStream,
    pool: FramePool,
    max_frame_bytes: usize,
    head: [u8; HEADER_BYTES],
    head_filled: usize,
    body: Option<(FrameHeader, FrameBuffer)>,
    body_filled: usize,
}

impl FrameReceiver {
    /// Frames of at most `max_frame_bytes` (header included) on this stream.
    pub fn new(stream: RecvStream, pool: FramePool, max_frame_bytes: usize) -> Self {
        Self {
            stream,
            pool,
            max_frame_bytes,
            head: [0; HEADER_BYTES],
            head_filled: 0,
            body: None,
            body_filled: 0,
        }
    }

    /// The next frame, checked; `None` when the peer has finished. Cancel-safe.
    ///
    /// # Errors
    /// If header, lengths or checksum are wrong, or the stream or connection is gone.
    pub async fn recv(&mut self) -> Result<Option<Frame>, NetError> {
        if let RecvInner::Local { items, .. } = &mut self.stream.inner {
            return match items.recv().await {
                Some(LocalItem::Frame(frame)) => {
                    self.check_len(frame.header())?;
                    Ok(Some(frame))
                }
                Some(LocalItem::Bytes(bytes)) => self.parse(&bytes).map(Some),
                None => Ok(None),
            };
        }
        while self.head_filled < HEADER_BYTES {
            match self.stream.read(&mut self.head[self.head_filled..]).await? {
                Some(n) => self.head_filled += n,
                None if self.head_filled == 0 => return Ok(None),
                None => return Err(NetError::Ended("in the middle of a frame")),
            }
        }
        if self.body.is_none() {
            let header = FrameHeader::decode(&self.head)?;
            let len = self.check_len(&header)?;
            let mut buffer = self.pool.take(len);
            buffer[..HEADER_BYTES].copy_from_slice(&self.head);
            self.body = Some((header, buffer));
            self.body_filled = HEADER_BYTES;
        }
        if let Some((_, buffer)) = &mut self.body {
            while self.body_filled < buffer.len() {
                match self.stream.read(&mut buffer[self.body_filled..]).await? {
                    Some(n) => self.body_filled += n,
                    None => return Err(NetError::Ended("in the middle of a frame")),
                }
            }
        }
        self.head_filled = 0;
        match self.body.take() {
            Some((header, buffer)) => Ok(Some(Frame::from_received(header, buffer)?)),
            None => Ok(None),
        }
    }

    /// A frame from bytes on a local stream (tests of bad input).
    fn parse(&self, bytes: &[u8]) -> Result<Frame, NetError> {
        let mut buffer = self.pool.take(bytes.len());
        buffer.copy_from_slice(bytes);
        let frame = Frame::parse(buffer)?;
        self.check_len(frame.header())?;
        Ok(frame)
    }

    fn check_len(&self, header: &FrameHeader) -> Result<usize, FrameError> {
        let len = header.frame_len();
        if len > self.max_frame_bytes {
            return Err(FrameError::TooLong {
                what: "stage frame",
                len: len as u64,
                limit: self.max_frame_bytes as u64,
            });
        }
        Ok(len)
    }
}
