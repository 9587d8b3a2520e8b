//! The coordinator's actors. They translate; what is decided is decided by the machines of
//! `millrace-shared`.
//!
//! ```text
//!   Cluster ── one per coordinator: members, plan, epochs
//!     │  hears   every node's control stream (a reader task each, bounded mailbox)
//!     │  says    assignments to nodes (a bounded channel each), pipeline up / down to Batcher
//!     ▼
//!   Batcher ── one per pipeline: scheduler, requests, micro-batches
//!        hears   submissions and cancellations (APIs), result frames (the last stage's edge)
//!        says    step frames (first stage's edge), opened sequences (last stage's edge), events
//! ```
//! Both live on the coordinator's main thread, beside the QUIC endpoints: no message between them
//! crosses a thread. Edges are tasks with credits; they hold at most one epoch's frames.

pub mod batcher;
pub mod cluster;
mod edges;
pub mod member;

pub use batcher::Batcher;
pub use cluster::Cluster;
