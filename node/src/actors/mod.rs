//! The node's actors.
//!
//! ```text
//!   Node ── one per process: link to the coordinator, at most one assignment
//!     │  hears   control messages (a reader task, reconnecting), offered edges (an accept task per
//!     │          connection), what becomes of loads
//!     │  says    hello, heartbeats, ready … (a bounded channel to a writer task)
//!     ▼
//!   Stage ── one per assignment: epoch and order of frames
//!        hears   frames of its inbound edges (a task each, under credits)
//!        says    frames to the engine's thread (bounded queue); results leave through the outbound
//!                edge's task
//! ```
//! All of them live on one thread beside the QUIC endpoint; the only cross-thread hop is to the
//! engine. Compute never runs here, so heartbeats go out while the engine works.

pub mod link;
pub mod node;
pub mod stage;

pub use node::Node;
pub use stage::Stage;
