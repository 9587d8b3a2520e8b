//! The partitioner: cuts a model's layers into contiguous stages, one per node, in a given order.
//!
//! The bottleneck sets the pace of a pipeline, so the largest stage time is minimised; among the
//! cuts that reach it, the most even one is taken. The head counts as time, not only as memory: in a
//! small model it is worth many layers. Exact for the given order; choosing the order, links and
//! re-cutting by measurement are not its business yet.
//!
//! Invariant: the ranges cover each layer once, in order; every stage but the last has a layer; the
//! last one carries the head and may have none.

mod solver;

use std::ops::Range;

pub use solver::{check_memory, partition};

use crate::id::NodeId;

/// What a model costs.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCost {
    /// Layers.
    pub layers: u32,
    /// Bytes of weights of each layer; as many as `layers`.
    pub layer_bytes: Vec<u64>,
    /// Bytes of the embedding, on the first stage.
    pub embed_bytes: u64,
    /// Bytes of final norm and head, on the last stage (of a tied head: the matrix again).
    pub head_bytes: u64,
    /// Whether the head is the embedding matrix: one stage alone holds it once.
    pub tied_head: bool,
    /// Bytes of the whole KV cache in one layer.
    pub kv_bytes_per_layer: u64,
    /// Time of one layer on a node of speed 1.
    pub layer_cost: f64,
    /// Time of the head, in layers.
    pub head_cost_in_layers: f64,
}

/// What a node offers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodeCapacity {
    /// Which.
    pub node: NodeId,
    /// Bytes it may use for weights and KV cache.
    pub memory_bytes: u64,
    /// How fast, relative to the others; above 0.
    pub speed: f64,
}

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
        node: NodeId,
        /// Bytes needed.
        needed: u64,
        /// Bytes the node has.
        available: u64,
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
