//! The planner: which nodes hold which layers of a model, in which order.
//!
//! [`Problem`] is a model, nodes and links at one size of micro-batches; [`solve`] finds the best cut
//! for an [`Objective`]; [`choose`] finds the plan for a wish (so many streams), where the size of the
//! micro-batches follows from their number; [`forecast`] says what a plan will do, [`left_out`] why a
//! node has no stage, [`improvements`] what would help. Everything is in seconds and bytes that were
//! measured elsewhere; nothing here knows how fast a processor is.
//!
//! Invariant: the ranges of a solution cover each layer once, in order; every stage but the last has
//! a layer; the last one carries the head and may have none. Exact where the module `solve` says so,
//! and the gap is reported where it is not.

mod bounds;
mod check;
mod choose;
mod classes;
mod costs;
mod even;
mod forecast;
mod greedy;
mod keep;
mod order;
mod paths;
mod reach;
mod solve;

use std::ops::Range;

pub use check::check_memory;
pub use choose::{Change, Choice, Goal, LeftOut, Wish, choose, improvements, left_out};
pub use costs::{Curve, Link, ModelCosts, Network, NodeCosts, Problem};
pub use forecast::{Forecast, Promise, first_token_seconds, forecast, load_within};
pub use keep::{Kept, Stood, keep};
pub use order::in_order;
pub use solve::{Objective, Solution, StageCut, solve};

/// Layers `first..end` of a stage; empty for a stage that only holds the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRange {
    /// First layer.
    pub first: u32,
    /// One past the last layer.
    pub end: u32,
}

impl LayerRange {
    /// How many layers.
    pub fn len(&self) -> u32 {
        self.end - self.first
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.first == self.end
    }
    /// As a range.
    pub fn range(&self) -> Range<u32> {
        self.first..self.end
    }
}

/// Why a model cannot be cut.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PartitionError {
    /// A pipeline has at least one stage.
    #[error("0 stages were asked for: a pipeline has at least 1")]
    NoStages,
    /// Every stage needs a node.
    #[error("{stages} stages need {stages} nodes, there are {nodes}; start more nodes")]
    TooFewNodes {
        /// Stages asked for.
        stages: usize,
        /// Nodes there are.
        nodes: usize,
    },
    /// Every stage but the last needs a layer.
    #[error("{stages} stages are too many for {layers} layers: at most {} are possible", layers + 1)]
    TooManyStages {
        /// Stages asked for.
        stages: usize,
        /// Layers of the model.
        layers: u32,
    },
    /// All memory together is too small.
    #[error(
        "model does not fit: weights and KV cache need {}, the nodes have {}, {} are missing; add a node, or lower --kv-cache-tokens",
        Gib(*needed), Gib(*available), Gib(needed - available)
    )]
    DoesNotFit {
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Memory suffices in sum, but no cut respects each node's.
    #[error(
        "model does not fit: it needs {} and the nodes have {}, but whole layers of up to {} cannot be laid out on them in order; add a node, or lower --kv-cache-tokens",
        Gib(*needed), Gib(*available), Gib(*largest_layer)
    )]
    DoesNotFitInOrder {
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        available: u64,
        /// Bytes of the largest layer with its share of the KV cache.
        largest_layer: u64,
    },
    /// Memory suffices in sum, but links are forbidden.
    #[error(
        "no pipeline can be laid out: the model needs {}, the nodes have {}, but {forbidden} links between them are forbidden; open those links, or add memory to nodes that can reach each other",
        Gib(*needed), Gib(*available)
    )]
    NoWay {
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        available: u64,
        /// Pairs of places without a link in one direction or both.
        forbidden: usize,
    },
    /// A stage of a given cut exceeds its node's memory.
    #[error(
        "stage {stage} (layers {}..{}) does not fit: it needs {}, node {node} has {}, {} are missing; move the cut, or lower --kv-cache-tokens",
        range.first, range.end, Gib(*needed), Gib(*available), Gib(needed - available)
    )]
    StageDoesNotFit {
        /// Which stage, 0 first.
        stage: usize,
        /// Its layers.
        range: LayerRange,
        /// Its node.
        node: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes the node has.
        available: u64,
    },
    /// A node is pinned to layers that the model does not have.
    #[error("node {node} cannot have layers {}: the model has layers 0-{}", Ends(range), layers - 1)]
    PinBeyond {
        /// The node.
        node: String,
        /// What it is pinned to.
        range: LayerRange,
        /// Layers of the model.
        layers: u32,
    },
    /// Two nodes are pinned to the same layer.
    #[error("nodes {} and {} are both pinned to layer {layer}: a layer has one node", nodes[0], nodes[1])]
    PinsOverlap {
        /// Those nodes.
        nodes: [String; 2],
        /// The first such layer.
        layer: u32,
    },
    /// A node cannot hold what it is pinned to.
    #[error(
        "layers {} do not fit on node {node}, which is pinned to them: they need {}, it has {}, {} are missing; pin fewer layers, or lower --kv-cache-tokens",
        Ends(range), Gib(*needed), Gib(*available), Gib(needed - available)
    )]
    PinDoesNotFit {
        /// The node.
        node: String,
        /// What it is pinned to.
        range: LayerRange,
        /// Bytes needed.
        needed: u64,
        /// Bytes the node has.
        available: u64,
    },
    /// Memory suffices in sum, but not around the pins.
    #[error(
        "the model cannot be cut around the pinned layers ({pins}): the layers that are left need nodes, memory and open links between the pinned ones; pin fewer, or add nodes"
    )]
    NoCutAroundPins {
        /// Nodes with their layers.
        pins: String,
    },
    /// Explicit cuts that make no sense.
    #[error("cut {cut} is not possible: cuts must rise, from 1 to {layers} (the number of layers)")]
    BadCut {
        /// The first wrong one.
        cut: u32,
        /// Layers of the model.
        layers: u32,
    },
    /// The input is not a model or not a node.
    #[error("cannot plan: {0}")]
    BadInput(&'static str),
}

/// Layers as pins are written: the first and the last.
struct Ends<'a>(&'a LayerRange);

impl std::fmt::Display for Ends<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.0.first, self.0.end.saturating_sub(1))
    }
}

/// Bytes for people.
struct Gib(u64);

impl std::fmt::Display for Gib {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const GIB: f64 = (1u64 << 30) as f64;
        const MIB: f64 = (1u64 << 20) as f64;
        let bytes = self.0 as f64;
        if bytes >= GIB {
            write!(f, "{:.2} GiB", bytes / GIB)
        } else {
            write!(f, "{:.1} MiB", bytes / MIB)
        }
    }
}

/// The ranges that explicit cuts make: `[5, 17]` of 30 layers is `0..5, 5..17, 17..30`. A cut at
/// `layers` leaves the last stage with the head alone.
///
/// # Errors
/// If the cuts do not rise from 1 to `layers`.
pub fn from_cuts(layers: u32, cuts: &[u32]) -> Result<Vec<LayerRange>, PartitionError> {
    let mut ranges = Vec::with_capacity(cuts.len() + 1);
    let mut first = 0;
    for &cut in cuts {
        if cut <= first || cut > layers {
            return Err(PartitionError::BadCut { cut, layers });
        }
        ranges.push(LayerRange { first, end: cut });
        first = cut;
    }
    ranges.push(LayerRange { first, end: layers });
    Ok(ranges)
}
