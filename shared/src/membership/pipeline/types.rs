//! What a pipeline needs, where it stands, and what it asks of the coordinator.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{Epoch, NodeId};
use crate::wire::control::StageProfile;

/// For measuring one layer and the head: seconds on slow machines.
pub const PROFILE_TIMEOUT: Duration = Duration::from_secs(30);
/// For fetching, checking and loading a stage's weights: gigabytes over a slow link.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// A node that failed is not asked again for this long: it may have been short of memory for a
/// moment, but asking it at once would fail at once.
pub const RETRY_NODE: Duration = Duration::from_secs(5);
/// Between the end of an epoch and the next try, but for one that the loss of a node ended: stages
/// let go of their edges meanwhile, and of a node that died the silence begins to show.
pub const RETRY_PIPELINE: Duration = Duration::from_millis(500);

/// A node that was lost so often within [`FLAP_MEMORY`] stays a stand-by where others suffice.
pub const FLAPS: usize = 3;
/// See [`FLAPS`].
pub const FLAP_MEMORY: Duration = Duration::from_secs(600);

/// What a pipeline needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipelineConfig {
    /// Stages, each on its own node; at least 1.
    pub stages: u16,
    /// `stages` is the most; fewer nodes are taken where no more are there.
    pub flexible: bool,
    /// See [`PROFILE_TIMEOUT`].
    pub profile_timeout: Duration,
    /// See [`LOAD_TIMEOUT`].
    pub load_timeout: Duration,
    /// See [`RETRY_NODE`].
    pub retry_node: Duration,
    /// See [`RETRY_PIPELINE`].
    pub retry_pipeline: Duration,
}

impl PipelineConfig {
    /// `stages` stages and the default times.
    pub fn new(stages: u16) -> Self {
        Self {
            stages: stages.max(1),
            flexible: false,
            profile_timeout: PROFILE_TIMEOUT,
            load_timeout: LOAD_TIMEOUT,
            retry_node: RETRY_NODE,
            retry_pipeline: RETRY_PIPELINE,
        }
    }
}

/// Why a node gets no layers. Each stands for itself: a node is used when none is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CordonReason {
    /// An operator took it out of use, until an operator takes it back.
    Operator,
    /// It wants to leave.
    Drain,
    /// A step failed on it.
    Quarantine,
}

impl CordonReason {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Operator, Self::Drain, Self::Quarantine];

    /// A word for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Drain => "drain",
            Self::Quarantine => "quarantine",
        }
    }
}

/// Where a pipeline stands; see the transition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipelinePhase {
    /// For nodes.
    Waiting,
    /// For measurements.
    Profiling,
    /// For the cut.
    Planning,
    /// For stages to load.
    Assigning,
    /// Serving.
    Running,
}

/// What the coordinator must do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Ask a node to measure; answer with `handle_profiled` or `handle_profile_failed`.
    Profile {
        /// Whom.
        node: NodeId,
    },
    /// Cut the model; answer with `handle_planned` or `handle_plan_failed`.
    Plan {
        /// For this epoch.
        epoch: Epoch,
        /// Over these nodes, in the order in which they joined.
        nodes: Vec<(NodeId, StageProfile)>,
    },
    /// Send assignments; nodes answer with `handle_ready` or `handle_load_failed`.
    Assign {
        /// For this epoch.
        epoch: Epoch,
        /// In the order of the stages.
        nodes: Vec<NodeId>,
    },
    /// All stages are loaded: open the edges and serve.
    Start {
        /// This epoch.
        epoch: Epoch,
        /// In the order of the stages.
        nodes: Vec<NodeId>,
    },
    /// The epoch is over: end what is in flight as unavailable.
    Stop {
        /// That epoch.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// Tell nodes to give up the stage they have made ready for an epoch that will not begin.
    Abandon {
        /// That epoch alone.
        epoch: Epoch,
        /// Whom.
        nodes: Vec<NodeId>,
    },
    /// Tell nodes to give their stages up.
    Release {
        /// Every assignment up to this epoch.
        epoch: Epoch,
        /// Whom: those of the epoch that are still there.
        nodes: Vec<NodeId>,
    },
}
