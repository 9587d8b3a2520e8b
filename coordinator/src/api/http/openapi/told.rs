//! What is answered, where no type of its own says it: bodies that are put together field by field, and
//! those of the pure core, which knows nothing of schemas. Tests hold them to real answers.
#![allow(dead_code, reason = "only their schemas are used")]

use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::super::types::ModelBody;
use crate::chronicle::Event;
use crate::metrics::timeline::Passage;

/// It is well.
#[derive(JsonSchema)]
pub(super) struct Health {
    /// `ok`.
    status: String,
}

/// Which program this is.
#[derive(JsonSchema)]
pub(super) struct Version {
    version: String,
    /// Of what members of the cluster speak.
    wire_version: u16,
}

/// All served models.
#[derive(JsonSchema)]
pub(super) struct ModelList {
    /// `list`.
    object: String,
    data: Vec<ModelBody>,
}

/// The tokens of a text.
#[derive(JsonSchema)]
pub(super) struct Tokens {
    count: u32,
    /// Longest sequence, tokens; null where the model is not known.
    max_model_len: Option<u32>,
    tokens: Vec<u32>,
}

/// The same text under two names.
#[derive(JsonSchema)]
pub(super) struct Text {
    prompt: String,
    content: String,
}

/// A response as it stands.
#[derive(JsonSchema)]
pub(super) struct Response {
    id: String,
    /// `response`.
    object: String,
    /// Seconds since 1970.
    created_at: u64,
    status: ResponseStatus,
    error: Option<ResponseError>,
    incomplete_details: Option<IncompleteDetails>,
    model: String,
    /// Messages and calls.
    output: Vec<OutputItem>,
    usage: Option<ResponseUsage>,
    background: bool,
    store: bool,
    parallel_tool_calls: bool,
    instructions: Option<Value>,
    max_output_tokens: Option<u32>,
    metadata: Map<String, Value>,
    previous_response_id: Option<String>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    text: Map<String, Value>,
    tool_choice: Value,
    tools: Vec<Value>,
    truncation: String,
    user: Option<String>,
}

/// How a response stands.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case")]
enum ResponseStatus {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Cancelled,
    Failed,
}

/// Why a response failed.
#[derive(JsonSchema)]
struct ResponseError {
    code: String,
    message: String,
}

/// Why a response is not complete.
#[derive(JsonSchema)]
struct IncompleteDetails {
    /// `max_output_tokens`.
    reason: String,
}

/// A message or a call.
#[derive(JsonSchema)]
#[schemars(tag = "type", rename_all = "snake_case")]
enum OutputItem {
    /// What the model says.
    Message { id: String, status: String, role: String, content: Vec<OutputText> },
    /// What it calls.
    FunctionCall {
        id: String,
        status: String,
        call_id: String,
        name: String,
        /// JSON.
        arguments: String,
    },
}

/// A part of a message.
#[derive(JsonSchema)]
struct OutputText {
    /// `output_text`.
    r#type: String,
    text: String,
    annotations: Vec<Value>,
    logprobs: Vec<Value>,
}

/// Exact token counts of a response.
#[derive(JsonSchema)]
struct ResponseUsage {
    input_tokens: u32,
    input_tokens_details: CachedTokens,
    output_tokens: u32,
    output_tokens_details: ReasoningTokens,
    total_tokens: u64,
}

#[derive(JsonSchema)]
struct CachedTokens {
    cached_tokens: u32,
}

#[derive(JsonSchema)]
struct ReasoningTokens {
    reasoning_tokens: u32,
}

/// An event of a response's stream; what else it has depends on its type.
#[derive(JsonSchema)]
pub(super) struct ResponseEvent {
    /// Such as `response.output_text.delta`.
    r#type: String,
    /// Counts from 0; `starting_after` takes it.
    sequence_number: u64,
}

/// A response is forgotten.
#[derive(JsonSchema)]
pub(super) struct Deleted {
    id: String,
    /// `response`.
    object: String,
    deleted: bool,
}

/// Requests that run or wait.
#[derive(JsonSchema)]
pub(super) struct ReportList {
    /// `list`.
    object: String,
    data: Vec<Report>,
}

/// Where a request is.
#[derive(JsonSchema)]
pub(super) struct Report {
    /// Its name, as `x-request-id` says.
    id: String,
    /// What it is attached to by; null of one that was turned away.
    request: Option<String>,
    /// What it waits for, in words.
    state: String,
    /// The node that it waits for.
    node: Option<String>,
    /// Seconds in this state.
    for_seconds: f64,
    /// Seconds since it was submitted.
    age_seconds: f64,
    /// Seconds in each state so far.
    spent: Vec<(String, f64)>,
    prompt_tokens: u32,
    generated_tokens: u32,
    /// Events that the client has not taken yet.
    unread: u32,
    /// Times that it was computed anew.
    restarts: u32,
    /// Whether it has not moved for long.
    stuck: bool,
}

/// Micro-batches that came back.
#[derive(JsonSchema)]
pub(super) struct Timeline {
    /// Seconds of the coordinator's clock.
    now: f64,
    /// To be sent as `after`.
    last: u64,
    passages: Vec<Passage>,
}

/// What happened, and the plan that serves.
#[derive(JsonSchema)]
pub(super) struct Events {
    /// To be sent as `after`.
    last: u64,
    events: Vec<Event>,
    /// For people.
    plan: String,
}

/// Stages, nodes and counters.
#[derive(JsonSchema)]
pub(super) struct Cluster {
    /// Whether requests are served now.
    ready: bool,
    /// What it waits for, when not.
    detail: String,
    epoch: u64,
    /// In order.
    stages: Vec<Stage>,
    /// Nodes joined.
    nodes: u32,
    /// Requests running.
    running: u32,
    /// Requests waiting.
    waiting: u32,
    kv_blocks: u32,
    kv_blocks_used: u32,
    /// Positions per KV block.
    kv_block_size: u32,
    preemptions: u64,
    prompt_tokens: u64,
    generation_tokens: u64,
    stale_dropped: u64,
    /// CPU seconds of the coordinator.
    process_seconds: f64,
    prefix_query_tokens: u64,
    prefix_hit_tokens: u64,
    draft_tokens: u64,
    draft_tokens_accepted: u64,
}

/// One stage as it runs.
#[derive(JsonSchema)]
struct Stage {
    node_id: String,
    node_name: String,
    first_layer: u32,
    /// One past the last layer.
    end_layer: u32,
    /// Whether it holds the embedding.
    embed: bool,
    /// Whether it holds the head.
    head: bool,
    weight_bytes: u64,
    /// CPU seconds inside steps.
    busy_seconds: f64,
    wall_seconds: f64,
    /// CPU seconds of the node.
    process_seconds: f64,
    steps: u64,
    threads: u32,
    rows_left_out: u64,
    credits: u32,
    /// To the next stage, seconds.
    round_trip: Option<f64>,
}
