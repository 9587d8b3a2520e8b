//! What can go wrong between two peers, sorted by what the caller does next.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::codec::CodecError;
use millrace_shared::wire::data::FrameError;

/// An error of the network layer.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address is taken: choose another.
    #[error("{addr}/udp is already in use: stop the program that holds it, or choose another port")]
    InUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The socket cannot be bound.
    #[error("cannot bind {addr}/udp: {source}")]
    Bind {
        /// The address asked for.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Certificates, keys or TLS settings are unusable.
    #[error("{0}")]
    Identity(String),
    /// A name does not resolve.
    #[error("cannot resolve {host}: {message}")]
    Resolve {
        /// `host:port` as given.
        host: String,
        /// Why.
        message: String,
    },
    /// A connection could not be made.
    #[error("cannot connect to {addr}: {message}")]
    Connect {
        /// Address dialled.
        addr: SocketAddr,
        /// Why.
        message: String,
    },
    /// Nothing came back: nobody listens there, or something on the way swallows UDP.
    #[error("no UDP answer at {addr} within {after:?}")]
    NoAnswer {
        /// Address dialled.
        addr: SocketAddr,
        /// The deadline.
        after: Duration,
    },
    /// A peer's handshake failed.
    #[error("handshake with {addr} failed: {message}")]
    Handshake {
        /// Where it came from.
        addr: SocketAddr,
        /// Why.
        message: String,
    },
    /// A deadline passed.
    #[error("{what} took longer than {after:?}")]
    Deadline {
        /// What was awaited.
        what: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The connection is gone.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The peer ended the stream, or its half of it, before the exchange was complete.
    #[error("stream ended by the peer: {0}")]
    Ended(&'static str),
    /// The peer sent a malformed or too long message.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The peer sent a malformed frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer broke a rule of the protocol.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// A file operation failed.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl NetError {
    /// Whether the peer, not the network, is at fault: its connection should be closed.
    pub fn is_violation(&self) -> bool {
        matches!(self, Self::Codec(_) | Self::Frame(_) | Self::Protocol(_))
    }

    /// Whether the other side says that our certificate was revoked. Only of a connection that stood:
    /// what closes one before that is signed by nobody.
    pub fn is_revocation(&self) -> bool {
        matches!(self, Self::Lost(message) if message.contains("revoked"))
    }

    /// As a client sees it.
    pub fn to_status(&self) -> Status {
        match self {
            Self::Deadline { .. } => Status::new(ErrorCode::DeadlineExceeded, self.to_string()),
            Self::Codec(_) | Self::Frame(_) | Self::Protocol(_) => {
                Status::new(ErrorCode::InvalidArgument, self.to_string())
            }
            Self::Identity(_) | Self::File { .. } => {
                Status::new(ErrorCode::FailedPrecondition, self.to_string())
            }
            _ => Status::unavailable(self.to_string(), 1000),
        }
    }

    pub(crate) fn file(path: &std::path::Path, source: io::Error) -> Self {
        Self::File { path: path.display().to_string(), source }
    }
}

impl From<quinn::ConnectionError> for NetError {
    fn from(e: quinn::ConnectionError) -> Self {
        Self::Lost(describe(&e))
    }
}

impl From<quinn::ReadError> for NetError {
    fn from(e: quinn::ReadError) -> Self {
        match e {
            quinn::ReadError::ConnectionLost(e) => e.into(),
            quinn::ReadError::Reset(_) => Self::Ended("reset"),
            _ => Self::Ended("already closed"),
        }
    }
}

impl From<quinn::WriteError> for NetError {
    fn from(e: quinn::WriteError) -> Self {
        match e {
            quinn::WriteError::ConnectionLost(e) => e.into(),
            quinn::WriteError::Stopped(_) => Self::Ended("it no longer reads"),
            _ => Self::Ended("already closed"),
        }
    }
}

/// A connection error in words; quinn's own text for application closes hides the reason.
pub(crate) fn describe(e: &quinn::ConnectionError) -> String {
    match e {
        quinn::ConnectionError::ApplicationClosed(close) => {
            let reason = String::from_utf8_lossy(&close.reason);
            if reason.is_empty() {
                "closed by the peer".to_owned()
            } else {
                format!("closed by the peer: {reason}")
            }
        }
        quinn::ConnectionError::TimedOut => "the peer is silent (timed out)".to_owned(),
        quinn::ConnectionError::LocallyClosed => "closed on this side".to_owned(),
        other => {
            let text = other.to_string();
            // The alert's number: its name comes from the other side's text, if at all.
            if text.contains("CertificateRevoked") || text.contains("error 44") {
                format!("{text} (this certificate was revoked)")
            } else if text.contains("UnknownIssuer") || text.contains("unknown_ca") {
                format!("{text} (it belongs to another cluster)")
            } else {
                text
            }
        }
    }
}

/// Runs a future under a deadline.
pub(crate) async fn within<T>(
    after: Duration,
    what: &'static str,
    work: impl Future<Output = Result<T, NetError>>,
) -> Result<T, NetError> {
    match tokio::time::timeout(after, work).await {
        Ok(result) => result,
        Err(_) => Err(NetError::Deadline { what, after }),
    }
}
