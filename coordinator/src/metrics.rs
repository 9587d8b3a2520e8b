//! What one coordinator measures about itself, in its own registry.
//!
//! The scheduler side calls the cheap `on_*` methods; [`Metrics::set_cluster`] copies the state of
//! the cluster just before [`Metrics::render`]. There is no global registry, so that several
//! coordinators can live in one process. Names are in `millrace_shared::names::metric`; the only
//! labels are the model, the reason of an end and the stage, never a request.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use millrace_shared::error::ErrorCode;
use millrace_shared::names::metric;
use millrace_shared::wire::rpc::{ClusterStatus, FinishReason};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// 1 ms to 60 s, fine where people notice: time to first token, queueing.
const WAIT_BUCKETS: [f64; 17] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0,
    60.0,
];
/// 0.5 ms to 5 s: the pace of one stream.
const ITL_BUCKETS: [f64; 13] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// 50 ms to 20 min: whole answers.
const E2E_BUCKETS: [f64; 14] =
    [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 1200.0];

/// Media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishedLabels {
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailedLabels {
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: String,
    node: String,
}

type RatioGauge = Gauge<f64, AtomicU64>;
type SecondsCounter = Counter<f64, AtomicU64>;

/// The metrics of one coordinator.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    running: Gauge<i64, AtomicI64>,
    waiting: Gauge<i64, AtomicI64>,
    kv_blocks: Gauge<i64, AtomicI64>,
    kv_blocks_used: Gauge<i64, AtomicI64>,
    kv_usage: RatioGauge,
    nodes: Gauge<i64, AtomicI64>,
    plan_epoch: Gauge<i64, AtomicI64>,
    received: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    drafts: Counter,
    drafts_accepted: Counter,
    preemptions: Counter,
    stale_dropped: Counter,
    success: Family<FinishedLabels, Counter>,
    failure: Family<FailedLabels, Counter>,
    stage_busy: Family<StageLabels, SecondsCounter>,
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    queue: Histogram,
}

fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

impl Metrics {
    /// An empty set; every metric carries the label `model_name`.
    pub fn new(model_name: &str) -> Self {
        let labels = [("model_name".into(), model_name.to_owned().into())];
        let mut registry = Registry::with_labels(labels.into_iter());
        let r = &mut registry;
        Self {
            running: add(r, metric::REQUESTS_RUNNING, "Requests running", Gauge::default()),
            waiting: add(r, metric::REQUESTS_WAITING, "Requests waiting", Gauge::default()),
            kv_blocks: add(r, metric::KV_BLOCKS, "KV blocks in all", Gauge::default()),
            kv_blocks_used: add(r, metric::KV_BLOCKS_USED, "KV blocks in use", Gauge::default()),
            kv_usage: add(r, metric::KV_USAGE, "Share of KV blocks in use", Gauge::default()),
            nodes: add(r, metric::NODES, "Nodes joined", Gauge::default()),
            plan_epoch: add(r, metric::PLAN_EPOCH, "Epoch of the pipeline", Gauge::default()),
            received: add(r, metric::REQUESTS, "Requests received", Counter::default()),
            prompt_tokens: add(r, metric::PROMPT_TOKENS, "Prompt tokens", Counter::default()),
            generation_tokens: add(
                r,
                metric::GENERATION_TOKENS,
                "Tokens generated",
                Counter::default(),
            ),
            prefix_queries: add(
                r,
                metric::PREFIX_CACHE_QUERY_TOKENS,
                "Tokens looked for in the prefix cache",
                Counter::default(),
            ),
            prefix_hits: add(
                r,
                metric::PREFIX_CACHE_HIT_TOKENS,
                "Tokens found in the prefix cache",
                Counter::default(),
            ),
            drafts: add(r, metric::DRAFT_TOKENS, "Tokens guessed", Counter::default()),
            drafts_accepted: add(
                r,
                metric::DRAFT_TOKENS_ACCEPTED,
                "Tokens guessed rightly",
                Counter::default(),
            ),
            preemptions: add(r, metric::PREEMPTIONS, "Sequences preempted", Counter::default()),
            stale_dropped: add(
                r,
                metric::STALE_DROPPED,
                "Messages of an older epoch dropped",
                Counter::default(),
            ),
            success: add(r, metric::REQUEST_SUCCESS, "Requests finished", Family::default()),
            failure: add(r, metric::REQUEST_FAILURE, "Requests failed", Family::default()),
            stage_busy: add(
                r,
                metric::STAGE_BUSY,
                "CPU seconds of a stage's engine threads inside steps",
                Family::default(),
            ),
            ttft: add(r, metric::TTFT, "Time to first token", Histogram::new(WAIT_BUCKETS)),
            itl: add(r, metric::ITL, "Time between tokens", Histogram::new(ITL_BUCKETS)),
            e2e: add(r, metric::E2E, "Time of a whole request", Histogram::new(E2E_BUCKETS)),
            queue: add(r, metric::QUEUE_TIME, "Time waiting to run", Histogram::new(WAIT_BUCKETS)),
            registry,
        }
    }

    /// A request was admitted.
    pub fn on_submit(&self) {
        self.received.inc();
    }

    /// A request was refused: it counts as received and as failed.
    pub fn on_refused(&self, code: ErrorCode) {
        self.received.inc();
        self.on_failed(code);
    }

    /// Prompt tokens were computed.
    pub fn on_prompt_tokens(&self, n: u64) {
        self.prompt_tokens.inc_by(n);
    }

    /// A request's first token: how long it waited to run, and how long until the token.
    pub fn on_first_token(&self, queue: Duration, ttft: Duration) {
        self.queue.observe(queue.as_secs_f64());
        self.ttft.observe(ttft.as_secs_f64());
        self.generation_tokens.inc();
    }

    /// A further token, `itl` after the one before.
    pub fn on_token(&self, itl: Duration) {
        self.itl.observe(itl.as_secs_f64());
        self.generation_tokens.inc();
    }

    /// A request ended as it should, `e2e` after its submission.
    pub fn on_finished(&self, reason: FinishReason, e2e: Duration) {
        self.success.get_or_create(&FinishedLabels { finished_reason: reason.as_str() }).inc();
        self.e2e.observe(e2e.as_secs_f64());
    }

    /// An admitted request failed.
    pub fn on_failed(&self, code: ErrorCode) {
        self.failure.get_or_create(&FailedLabels { code: code.name() }).inc();
    }

    /// Copies the state of the cluster. Counters only ever rise: a total of the status that is
    /// ahead of what was counted here replaces it, one that is behind changes nothing.
    pub fn set_cluster(&self, status: &ClusterStatus) {
        self.running.set(status.running.into());
        self.waiting.set(status.waiting.into());
        self.kv_blocks.set(status.kv_blocks.into());
        self.kv_blocks_used.set(status.kv_blocks_used.into());
        let used = f64::from(status.kv_blocks_used) / f64::from(status.kv_blocks.max(1));
        self.kv_usage.set(used);
        self.nodes.set(status.nodes.into());
        self.plan_epoch.set(i64::try_from(status.epoch).unwrap_or(i64::MAX));
        raise(&self.preemptions, status.preemptions);
        raise(&self.prefix_queries, status.prefix_query_tokens);
        raise(&self.prefix_hits, status.prefix_hit_tokens);
        raise(&self.drafts, status.draft_tokens);
        raise(&self.drafts_accepted, status.draft_tokens_accepted);
        raise(&self.prompt_tokens, status.prompt_tokens);
        raise(&self.generation_tokens, status.generation_tokens);
        raise(&self.stale_dropped, status.stale_dropped);
        // Stages of an earlier plan must not linger; a stage's own counter starts with it.
        self.stage_busy.clear();
        for (index, stage) in status.stages.iter().enumerate() {
            let labels = StageLabels { stage: index.to_string(), node: stage.node_name.clone() };
            let seconds = stage.busy_seconds.max(0.0);
            self.stage_busy.get_or_create(&labels).inc_by(seconds);
        }
    }

    /// The OpenMetrics text.
    pub fn render(&self) -> String {
        let mut text = String::with_capacity(8 << 10);
        encode(&mut text, &self.registry).expect("invariant: writing to a String cannot fail");
        text
    }
}

/// Lifts a counter to a total counted elsewhere.
fn raise(counter: &Counter, total: u64) {
    counter.inner().fetch_max(total, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_shared::id::NodeId;
    use millrace_shared::wire::rpc::StageStatus;
    use uuid::Uuid;

    fn stage(name: &str, busy_seconds: f64) -> StageStatus {
        StageStatus {
            node_id: NodeId(Uuid::nil()),
            node_name: name.into(),
            first_layer: 0,
            end_layer: 1,
            embed: true,
            head: true,
            weight_bytes: 0,
            busy_seconds,
            wall_seconds: 9.0,
            process_seconds: 0.0,
            steps: 1,
            threads: 1,
        }
    }

    fn line(text: &str, start: &str) -> String {
        let found = text.lines().find(|l| l.starts_with(start));
        found.unwrap_or_else(|| panic!("no line '{start}' in\n{text}")).to_owned()
    }

    #[test]
    fn observations_appear_under_their_names() {
        let m = Metrics::new("tiny");
        m.on_submit();
        m.on_prompt_tokens(7);
        m.on_first_token(Duration::from_millis(2), Duration::from_millis(30));
        m.on_token(Duration::from_millis(4));
        m.on_finished(FinishReason::Length, Duration::from_millis(34));
        m.on_failed(ErrorCode::Unavailable);
        m.on_refused(ErrorCode::NotFound);
        let text = m.render();
        assert!(line(&text, "millrace_prompt_tokens_total{").contains("model_name=\"tiny\""));
        assert!(line(&text, "millrace_prompt_tokens_total{").ends_with("} 7"));
        assert!(line(&text, "millrace_generation_tokens_total{").ends_with(" 2"));
        assert!(line(&text, "millrace_time_to_first_token_seconds_count{").ends_with(" 1"));
        assert!(line(&text, "millrace_inter_token_latency_seconds_count{").ends_with(" 1"));
        assert!(line(&text, "millrace_request_queue_time_seconds_count{").ends_with(" 1"));
        assert!(line(&text, "millrace_e2e_request_latency_seconds_sum{").contains("0.034"));
        assert!(line(&text, "millrace_requests_total{").ends_with(" 2"), "refused ones count too");
        let success = line(&text, "millrace_request_success_total{");
        assert!(success.contains("finished_reason=\"length\""), "{success}");
        for code in ["UNAVAILABLE", "NOT_FOUND"] {
            let label = format!("code=\"{code}\"");
            let failures =
                text.lines().filter(|l| l.starts_with("millrace_request_failure_total{"));
            assert!(failures.clone().any(|l| l.contains(&label) && l.ends_with(" 1")), "{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn cluster_state_replaces_gauges_and_raises_counters() {
        let m = Metrics::new("tiny");
        m.on_prompt_tokens(10);
        let mut status = ClusterStatus {
            epoch: 4,
            nodes: 2,
            kv_blocks: 8,
            kv_blocks_used: 2,
            prompt_tokens: 6,
            preemptions: 5,
            prefix_hit_tokens: 7,
            draft_tokens_accepted: 9,
            stale_dropped: 3,
            stages: vec![stage("a", 1.5), stage("b", 2.0)],
            ..ClusterStatus::default()
        };
        m.set_cluster(&status);
        status.stages = vec![stage("c", 0.25)];
        m.set_cluster(&status);
        let text = m.render();
        assert!(line(&text, "millrace_prompt_tokens_total{").ends_with(" 10"));
        assert!(line(&text, "millrace_preemptions_total{").ends_with(" 5"));
        assert!(line(&text, "millrace_prefix_cache_hit_tokens_total{").ends_with(" 7"));
        assert!(line(&text, "millrace_draft_tokens_accepted_total{").ends_with(" 9"));
        assert!(line(&text, "millrace_stale_epoch_dropped_total{").ends_with(" 3"));
        assert!(line(&text, "millrace_kv_cache_usage_ratio{").ends_with(" 0.25"));
        assert!(line(&text, "millrace_plan_epoch{").ends_with(" 4"));
        let busy: Vec<_> =
            text.lines().filter(|l| l.starts_with("millrace_stage_busy_seconds_total{")).collect();
        assert_eq!(busy.len(), 1, "{busy:?}");
        assert!(busy[0].contains("node=\"c\"") && busy[0].ends_with(" 0.25"), "{busy:?}");
    }
}
