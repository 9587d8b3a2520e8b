//! What is served and how it fares, as clients hear it.

use serde::{Deserialize, Serialize};

use crate::id::NodeId;

/// A served model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Name clients use.
    pub id: String,
    /// Seconds since the epoch at which it began to be served.
    pub created: u64,
    /// Longest sequence, tokens.
    pub max_model_len: u32,
    /// Vocabulary size.
    pub vocab: u32,
    /// Weights in bytes.
    pub weight_bytes: u64,
    /// Numbers in an embedding.
    pub hidden: u32,
}

/// One stage as it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageStatus {
    /// The node.
    pub node_id: NodeId,
    /// Its name for people.
    pub node_name: String,
    /// First layer.
    pub first_layer: u32,
    /// One past the last layer.
    pub end_layer: u32,
    /// Whether it holds the embedding.
    pub embed: bool,
    /// Whether it holds the head.
    pub head: bool,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// CPU seconds of the engine's threads inside `step`, spinning excluded, since the stage began.
    pub busy_seconds: f64,
    /// Seconds of wall clock since the stage began.
    pub wall_seconds: f64,
    /// CPU seconds of the node's whole process.
    pub process_seconds: f64,
    /// Micro-batches computed.
    pub steps: u64,
    /// Threads of the engine.
    pub threads: u32,
    /// Rows left out since the stage began, because nobody wanted them any more.
    pub rows_left_out: u64,
    /// Frames that the edge to the next stage, or to the coordinator, may hold.
    pub credits: u32,
    /// Round trip to the next stage in seconds, as last tried; `None` where it was not, and for the
    /// last stage.
    pub round_trip: Option<f64>,
}

/// The state of the cluster.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Whether requests are served now.
    pub ready: bool,
    /// What it waits for, when not.
    pub detail: String,
    /// Epoch of the pipeline.
    pub epoch: u64,
    /// The stages in order.
    pub stages: Vec<StageStatus>,
    /// Nodes joined, whether used or not.
    pub nodes: u32,
    /// Requests running.
    pub running: u32,
    /// Requests waiting.
    pub waiting: u32,
    /// KV blocks in all.
    pub kv_blocks: u32,
    /// KV blocks in use.
    pub kv_blocks_used: u32,
    /// Positions per KV block.
    pub kv_block_size: u32,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Prompt tokens computed so far.
    pub prompt_tokens: u64,
    /// Tokens generated so far.
    pub generation_tokens: u64,
    /// Messages of an older epoch that were dropped so far.
    pub stale_dropped: u64,
    /// CPU seconds of the coordinator's whole process.
    pub process_seconds: f64,
    /// Positions of sequences that began, so far: what the prefix cache was asked for.
    pub prefix_query_tokens: u64,
    /// Those of them that the prefix cache had.
    pub prefix_hit_tokens: u64,
    /// Tokens that were guessed so far.
    pub draft_tokens: u64,
    /// Those of them that were right.
    pub draft_tokens_accepted: u64,
}
