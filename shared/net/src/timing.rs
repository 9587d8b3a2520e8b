//! Every deadline and interval of the network layer, with its reason.
//!
//! Detection of dead members is not here: that is the lease's job (heartbeats on the control
//! plane). These values only make sure that nobody waits for ever.

use std::time::Duration;

/// QUIC keep-alive. Below every common NAT timeout (30 s), and five per [`IDLE_TIMEOUT`], so that
/// single losses do not end a connection.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// QUIC idle timeout: a connection whose peer is silent this long is gone. Far above the lease
/// (1.5 s), which is what detects dead nodes; this one cleans up after it.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// A whole handshake, both sides. Three lost initial packets at quinn's first timeouts (1, 2, 4 s
/// in the worst case) still fit.
pub const HANDSHAKE: Duration = Duration::from_secs(8);

/// From the opening of a stream to its first whole message. The opener sends it at once, so this
/// is one round trip with losses; longer is a peer that holds a slot and says nothing.
pub const FIRST_MESSAGE: Duration = Duration::from_secs(5);

/// A request that waits for room beside other clients' requests. Below [`FIRST_MESSAGE`], so that the
/// client learns what the matter is.
pub const BODY_ROOM: Duration = Duration::from_secs(3);

/// From a client's handshake to its first call with a valid key; longer is somebody who only holds
/// a place. A client that was slower, such as a person before the first question, connects again.
pub const FIRST_CALL: Duration = Duration::from_secs(10);

/// Opening a stream when the peer's limit is reached: streams end quickly or not at all.
pub const OPEN_STREAM: Duration = Duration::from_secs(5);

/// Name resolution before a connection attempt.
pub const RESOLVE: Duration = Duration::from_secs(5);

/// A mebibyte and its answer on the slowest way that a pipeline could live with, 4 Mbit/s.
pub const BURST: Duration = Duration::from_secs(2);

/// The whole join exchange: one handshake, one message each way, one signature.
pub const JOIN: Duration = Duration::from_secs(15);

/// A reply frame to a client that does not read. Its stream window (hundreds of tokens) is full by
/// then; it is treated as gone, so that it cannot hold KV blocks for ever.
pub const REPLY_WRITE: Duration = Duration::from_secs(30);

/// A unary client call without a deadline of its own.
pub const UNARY_CALL: Duration = Duration::from_secs(30);

/// Silence on a streaming client call without a deadline of its own, before and between tokens.
/// A long queue or a pipeline that forms again are legitimate reasons to wait.
pub const STREAM_SILENCE: Duration = Duration::from_secs(300);

/// From the loss of a connection until a client gives a continuation up that it could hear on: a
/// coordinator that was killed is noticed by [`IDLE_TIMEOUT`] at the latest, and has read its model
/// and journal again by then.
pub const REATTACH: Duration = Duration::from_secs(30);

/// First wait before a client tries to attach again; doubles up to [`REATTACH_MAX`].
pub const REATTACH_MIN: Duration = Duration::from_millis(100);

/// Longest wait between two tries to attach again.
pub const REATTACH_MAX: Duration = Duration::from_secs(2);

/// Waiting for close frames to leave when a program ends.
pub const DRAIN: Duration = Duration::from_secs(2);
