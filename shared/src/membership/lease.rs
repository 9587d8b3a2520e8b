//! Leases of nodes.
//!
//! ```text
//!            hello              heartbeat              silent for suspect_after
//!  (absent) ──────▶ Joining ───────────────▶ Ready ──────────────────────────▶ Suspect
//!     ▲                │                       │  ◀──────────────────────────    │
//!     │                │                       │           heartbeat             │
//!     └────────────────┴───────────────────────┴─────────────────────────────────┘
//!        silent for lease, disconnected, left, or replaced by a new session: Lost
//! ```
//!
//! A killed node closes nothing, so the lease is what detects it; a closed connection is only
//! faster. A heartbeat that is handled late still renews: a stalled coordinator does not lose nodes
//! whose heartbeats wait in its queue.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::id::NodeId;

/// Between heartbeats. A few hundred bytes a second per node, and small against the lease.
pub const HEARTBEAT: Duration = Duration::from_millis(250);
/// Silence after which a node gets no new work: three heartbeats missed, more than one lost packet.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(750);
/// Silence after which a node is lost. Six heartbeats: long enough for a garbage-collecting
/// neighbour or a busy link, short enough that a client sees a pause and not a breakdown.
pub const LEASE: Duration = Duration::from_millis(1500);

/// Longest wait of a frame at the last stage for the announcement of its sequences: longer than a
/// lease by so much that a node which is cut off from the coordinator loses its epoch first, and
/// with it no request. 5 s by the usual lease.
pub fn open_wait(lease: Duration) -> Duration {
    3 * lease + 2 * HEARTBEAT
}

/// Times of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MembershipConfig {
    /// Silence after which a node is suspect; at most `lease`.
    pub suspect_after: Duration,
    /// Silence after which it is lost.
    pub lease: Duration,
}

impl MembershipConfig {
    /// With another lease; a node is suspect after half of it.
    pub fn of_lease(lease: Duration) -> Self {
        Self { suspect_after: lease / 2, lease }
    }
}

impl Default for MembershipConfig {
    fn default() -> Self {
        Self { suspect_after: SUSPECT_AFTER, lease: LEASE }
    }
}

/// One presence of a node: from a hello until it is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Session(pub u64);

/// How a present node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Its hello was accepted, no heartbeat yet.
    Joining,
    /// It sends heartbeats.
    Ready,
    /// It has been silent for a while.
    Suspect,
}

/// Why a node is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostReason {
    /// It was silent for too long.
    LeaseExpired {
        /// For how long.
        silent: Duration,
    },
    /// Its connection closed.
    Disconnected,
    /// It said goodbye.
    Left,
    /// It came back with a new connection.
    Replaced,
}

impl std::fmt::Display for LostReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::LeaseExpired { silent } => {
                write!(f, "no heartbeat for {} ms", silent.as_millis())
            }
            Self::Disconnected => f.write_str("its connection closed"),
            Self::Left => f.write_str("it left"),
            Self::Replaced => f.write_str("it connected anew"),
        }
    }
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A node is there.
    Joined {
        /// Which.
        node: NodeId,
        /// Its presence.
        session: Session,
    },
    /// It is silent.
    Suspect {
        /// Which.
        node: NodeId,
    },
    /// It is not silent any more.
    Recovered {
        /// Which.
        node: NodeId,
    },
    /// It is gone.
    Lost {
        /// Which.
        node: NodeId,
        /// The presence that ended.
        session: Session,
        /// Why.
        reason: LostReason,
    },
}

#[derive(Clone, Copy, Debug)]
struct Member {
    session: Session,
    state: MemberState,
    heard: Duration,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Membership {
    config: MembershipConfig,
    members: BTreeMap<NodeId, Member>,
    events: VecDeque<Event>,
    last_session: u64,
}

impl Membership {
    /// Nobody is there.
    pub fn new(config: MembershipConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// A node introduced itself; an older session of the same node ends.
    pub fn handle_hello(&mut self, node: NodeId, now: Duration) -> Session {
        self.lose(node, LostReason::Replaced);
        self.last_session += 1;
        let session = Session(self.last_session);
        self.members.insert(node, Member { session, state: MemberState::Joining, heard: now });
        self.events.push_back(Event::Joined { node, session });
        session
    }

    /// A sign of life. `false` where the session is over: the node must introduce itself again.
    pub fn handle_heartbeat(&mut self, node: NodeId, session: Session, now: Duration) -> bool {
        let Some(member) = self.members.get_mut(&node).filter(|m| m.session == session) else {
            return false;
        };
        member.heard = member.heard.max(now);
        if std::mem::replace(&mut member.state, MemberState::Ready) == MemberState::Suspect {
            self.events.push_back(Event::Recovered { node });
        }
        true
    }

    /// The connection closed.
    pub fn handle_disconnect(&mut self, node: NodeId, session: Session) {
        self.end(node, session, LostReason::Disconnected);
    }

    /// The node leaves on purpose.
    pub fn handle_leaving(&mut self, node: NodeId, session: Session) {
        self.end(node, session, LostReason::Left);
    }

    /// What happened until `now`, oldest first. Call until `None` after every `handle_*` and at
    /// [`Self::next_timeout`].
    pub fn poll_event(&mut self, now: Duration) -> Option<Event> {
        if self.events.is_empty() {
            self.check_leases(now);
        }
        self.events.pop_front()
    }

    /// What the last `handle_*` did, oldest first, without looking at the time: between messages
    /// that have waited in a queue together, silence means nothing yet.
    pub fn poll_handled(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The owner itself was held up until `now`: nobody's silence before that counts, but silence
    /// from here on does.
    pub fn handle_own_delay(&mut self, now: Duration) {
        for member in self.members.values_mut() {
            member.heard = member.heard.max(now.saturating_sub(self.config.suspect_after / 2));
        }
    }

    /// When silence will next mean something.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.members.values().map(|m| m.heard + self.patience(m.state)).min()
    }

    /// How a node does; `None` where it is absent.
    pub fn state(&self, node: NodeId) -> Option<MemberState> {
        self.members.get(&node).map(|m| m.state)
    }

    /// Nodes present.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether nobody is there.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    fn patience(&self, state: MemberState) -> Duration {
        match state {
            MemberState::Suspect => self.config.lease,
            _ => self.config.suspect_after.min(self.config.lease),
        }
    }

    fn check_leases(&mut self, now: Duration) {
        let silent = |m: &Member| now.saturating_sub(m.heard);
        let expired: Vec<_> = (self.members.iter())
            .filter(|(_, m)| silent(m) >= self.config.lease)
            .map(|(&node, m)| (node, LostReason::LeaseExpired { silent: silent(m) }))
            .collect();
        for (node, reason) in expired {
            self.lose(node, reason);
        }
        for (&node, member) in &mut self.members {
            if member.state != MemberState::Suspect && silent(member) >= self.config.suspect_after {
                member.state = MemberState::Suspect;
                self.events.push_back(Event::Suspect { node });
            }
        }
    }

    fn end(&mut self, node: NodeId, session: Session, reason: LostReason) {
        if self.members.get(&node).is_some_and(|m| m.session == session) {
            self.lose(node, reason);
        }
    }

    fn lose(&mut self, node: NodeId, reason: LostReason) {
        if let Some(member) = self.members.remove(&node) {
            self.events.push_back(Event::Lost { node, session: member.session, reason });
        }
    }
}
