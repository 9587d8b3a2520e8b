//! A stage edge: frames forward, credits back, on one bidirectional stream.
//!
//! The sender starts with the edge's credits and spends one per frame; the receiver returns them
//! as frames leave its hands, so an edge never holds more frames than it has credits, wherever
//! they are. Both sides check the other: a frame without a credit and a credit that was never
//! spent are protocol violations. What frames mean, and which epoch is current, is not decided
//! here.

use millrace_shared::wire::data::Credit;
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::{Edge, Plane};

use crate::{
    Connection, FramePool, FrameReceiver, FrameSender, MessageReceiver, MessageSender, NetError,
    RecvStream, SendStream,
};

/// A credit message is at most five bytes.
const MAX_CREDIT_BYTES: usize = 16;

/// The upstream end of an edge.
#[derive(Debug)]
pub struct EdgeSender {
    frames: FrameSender,
    returns: MessageReceiver,
    credits: u32,
    available: u32,
}

impl EdgeSender {
    /// Opens an edge to the peer of `connection`. Sent buffers go to `pool`, if there is one.
    ///
    /// # Errors
    /// If the stream cannot be opened.
    pub async fn open(
        connection: &Connection,
        (pipeline, epoch, edge): (
            millrace_shared::id::PipelineId,
            millrace_shared::id::Epoch,
            Edge,
        ),
        credits: u32,
        pool: Option<FramePool>,
    ) -> Result<Self, NetError> {
        let plane = Plane::Stage { pipeline, epoch, edge };
        let (send, recv) = connection.open_stream(&plane).await?;
        Ok(Self::new(send, recv, credits, pool))
    }

    /// An edge on a stream that is open already.
    pub fn new(send: SendStream, recv: RecvStream, credits: u32, pool: Option<FramePool>) -> Self {
        Self {
            frames: FrameSender::new(send, pool),
            returns: MessageReceiver::new(recv),
            credits,
            available: credits,
        }
    }

    /// Credits at hand: frames that would leave without waiting for the receiver.
    pub fn available(&self) -> u32 {
        self.available
    }

    /// Waits for a credit, without spending it. Cancel-safe.
    ///
    /// # Errors
    /// If the edge is lost, or the receiver returned a credit it never had.
    pub async fn ready(&mut self) -> Result<(), NetError> {
        while self.available == 0 {
            self.read_return().await?;
        }
        Ok(())
    }

    /// Sends a frame as soon as there is a credit, taking returned credits meanwhile. A dropped
    /// future either has not taken the frame's credit (the frame is lost with it) or leaves the
    /// rest of the frame to the next call; so await [`EdgeSender::ready`] first where futures may
    /// be dropped.
    ///
    /// # Errors
    /// If the edge is lost, or the receiver returned a credit it never had.
    pub async fn send(&mut self, frame: Frame) -> Result<(), NetError> {
        self.ready().await?;
        self.available -= 1;
        self.frames.send(frame).await
    }

    /// Completes when the edge is lost; takes returned credits meanwhile. Cancel-safe, so that an
    /// idle sender notices loss: `select!` between this and the next frame to send.
    pub async fn lost(&mut self) -> NetError {
        loop {
            if let Err(e) = self.read_return().await {
                return e;
            }
        }
    }

    /// Ends the edge in order, after everything sent.
    pub fn finish(&mut self) {
        self.frames.stream().finish();
    }

    async fn read_return(&mut self) -> Result<(), NetError> {
        let Credit(n) = self
            .returns
            .recv(MAX_CREDIT_BYTES)
            .await?
            .ok_or(NetError::Ended("the receiver closed the edge"))?;
        let spent = self.credits - self.available;
        if n > spent {
            return Err(NetError::Protocol(format!(
                "{n} credits returned on an edge with {spent} frames outstanding"
            )));
        }
        self.available += n;
        Ok(())
    }
}

/// The downstream end of an edge.
#[derive(Debug)]
pub struct EdgeReceiver {
    frames: FrameReceiver,
    returns: MessageSender,
    credits: u32,
    outstanding: u32,
}

impl EdgeReceiver {
    /// An edge on an accepted stream. Frames come in buffers of `pool`; give them back to it.
    pub fn new(
        send: SendStream,
        recv: RecvStream,
        credits: u32,
        pool: FramePool,
        max_frame_bytes: usize,
    ) -> Self {
        Self {
            frames: FrameReceiver::new(recv, pool, max_frame_bytes),
            returns: MessageSender::new(send),
            credits,
            outstanding: 0,
        }
    }

    /// The next frame; `None` when the sender ended the edge in order. Cancel-safe.
    ///
    /// # Errors
    /// If the edge is lost, a frame does not check, or the sender exceeds its credits.
    pub async fn recv(&mut self) -> Result<Option<Frame>, NetError> {
        let Some(frame) = self.frames.recv().await? else { return Ok(None) };
        if self.outstanding == self.credits {
            return Err(NetError::Protocol(format!(
                "the sender exceeded the {} credits of the edge",
                self.credits
            )));
        }
        self.outstanding += 1;
        Ok(Some(frame))
    }

    /// Frames received and not yet released.
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Returns the credits of `n` received frames. If the future is dropped, the message goes out
    /// with the next call.
    ///
    /// # Errors
    /// If the edge is lost, or more is released than was received.
    pub async fn release(&mut self, n: u32) -> Result<(), NetError> {
        self.outstanding = self.outstanding.checked_sub(n).ok_or_else(|| {
            NetError::Protocol(format!("{n} frames released, {} are held", self.outstanding))
        })?;
        self.returns.send(&Credit(n)).await
    }
}
