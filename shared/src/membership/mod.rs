//! Membership: which nodes are there, and what a pipeline does about it.
//!
//! Two small state machines in the style of quinn-proto (`handle_*` in, `poll_*` out, time as an
//! argument). [`Membership`] turns hellos, heartbeats and silence into joined, suspect and lost;
//! [`PipelineState`] turns nodes into the epochs of one pipeline. Neither knows addresses, models or
//! connections: the coordinator's actors translate.
//!
//! Invariant: a message of an ended session or epoch changes nothing.

mod balance;
mod deaths;
mod lease;
mod pace;
mod pipeline;
mod quarantine;
mod stall;

pub use balance::{Balance, PATIENCE, UNEVEN};
pub use deaths::{Deaths, Fate, PROOF};
pub use lease::{
    Event, HEARTBEAT, LEASE, LostReason, MemberState, Membership, MembershipConfig, SUSPECT_AFTER,
    Session, open_wait,
};
pub use pace::{Pace, Paces};
pub use pipeline::{
    Action, CordonReason, FLAP_MEMORY, FLAPS, LOAD_TIMEOUT, PROFILE_TIMEOUT, PipelineConfig,
    PipelinePhase, PipelineState, RETRY_NODE, RETRY_PIPELINE,
};
pub use quarantine::{Quarantine, SICK, Verdict};
pub use stall::{LinkTimes, Oldest, STALL_UNKNOWN, Stalls};
