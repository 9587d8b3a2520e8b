//! What one coordinator measures about itself, in its own registry.
//!
//! The scheduler side calls the cheap `on_*` methods; [`Metrics::set_cluster`] copies the state of
//! the cluster just before [`Metrics::render`]. There is no global registry, so that several
//! coordinators can live in one process. Names are in `millrace_shared::names::metric`; the only
//! labels are the model, the reason of an end and the stage, never a request.

mod labels;
pub mod timeline;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use millrace_shared::error::ErrorCode;
use millrace_shared::names::metric;
use millrace_shared::scheduler::SchedulerStats;
use millrace_shared::wire::data::StageTime;
use millrace_shared::wire::rpc::{ClusterStatus, FinishReason};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

pub use self::labels::Shed;
use self::labels::{
    E2E_BUCKETS, FailedLabels, FinishedLabels, HOP_BUCKETS, ITL_BUCKETS, PlaceLabels, RulesLabels,
    ShedLabels, StageLabels, WAIT_BUCKETS,
};
use self::timeline::Timeline;
use crate::chronicle::Chronicle;
use crate::names::Names;
use crate::request::RulesDid;
use crate::spans::Spans;

/// Media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type RatioGauge = Gauge<f64, AtomicU64>;
type SecondsCounter = Counter<f64, AtomicU64>;

/// The metrics of one coordinator.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    timeline: Timeline,
    chronicle: Arc<Chronicle>,
    names: Arc<Names>,
    spans: Spans,
    spans_lost: Counter,
    running: Gauge<i64, AtomicI64>,
    waiting: Gauge<i64, AtomicI64>,
    kv_blocks: Gauge<i64, AtomicI64>,
    kv_blocks_used: Gauge<i64, AtomicI64>,
    kv_usage: RatioGauge,
    ready: Gauge<i64, AtomicI64>,
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
    journal_degraded: Gauge<i64, AtomicI64>,
    journal_commits: Counter,
    journal_tokens: Counter,
    journal_bytes: Gauge<i64, AtomicI64>,
    stale_dropped: Counter,
    success: Family<FinishedLabels, Counter>,
    failure: Family<FailedLabels, Counter>,
    shed: Family<ShedLabels, Counter>,
    rules: Family<RulesLabels, Counter>,
    stage_busy: Family<StageLabels, SecondsCounter>,
    stage_busy_ratio: Family<StageLabels, RatioGauge>,
    stage_step: Family<PlaceLabels, SecondsCounter>,
    stage_predicted: Family<PlaceLabels, SecondsCounter>,
    stage_wait: Family<PlaceLabels, SecondsCounter>,
    rows_left_out: Family<StageLabels, Counter>,
    edge_credits: Family<StageLabels, Gauge<i64, AtomicI64>>,
    edge_round_trip: Family<StageLabels, RatioGauge>,
    in_flight: Gauge<i64, AtomicI64>,
    window: Gauge<i64, AtomicI64>,
    links: RatioGauge,
    round_trip: Histogram,
    hop: Histogram,
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
            timeline: Timeline::default(),
            chronicle: Arc::default(),
            names: Arc::default(),
            spans: Spans::default(),
            spans_lost: add(
                r,
                metric::SPANS_LOST,
                "Spans of traces that could not be delivered",
                Counter::default(),
            ),
            running: add(r, metric::REQUESTS_RUNNING, "Requests running", Gauge::default()),
            waiting: add(r, metric::REQUESTS_WAITING, "Requests waiting", Gauge::default()),
            kv_blocks: add(r, metric::KV_BLOCKS, "KV blocks in all", Gauge::default()),
            kv_blocks_used: add(r, metric::KV_BLOCKS_USED, "KV blocks in use", Gauge::default()),
            kv_usage: add(r, metric::KV_USAGE, "Share of KV blocks in use", Gauge::default()),
            ready: add(r, metric::READY, "Whether requests are served", Gauge::default()),
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
            journal_degraded: add(
                r,
                metric::JOURNAL_DEGRADED,
                "Whether the journal cannot be written, so that requests would not survive a restart",
                Gauge::default(),
            ),
            journal_commits: add(
                r,
                metric::JOURNAL_COMMITS,
                "Commits of the journal",
                Counter::default(),
            ),
            journal_tokens: add(
                r,
                metric::JOURNAL_TOKENS,
                "Tokens in the journal's commits",
                Counter::default(),
            ),
            journal_bytes: add(
                r,
                metric::JOURNAL_BYTES,
                "Bytes of ended requests that are kept, and that running ones may come to",
                Gauge::default(),
            ),
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
            rules: add(
                r,
                metric::TEXT_RULES,
                "Requests whose prompt or answer the operator's rules changed or ended",
                Family::default(),
            ),
            shed: add(r, metric::REQUESTS_SHED, "Requests turned away", Family::default()),
            stage_busy_ratio: add(
                r,
                metric::STAGE_BUSY_RATIO,
                "Share of its threads' time that a stage spent inside steps since it began",
                Family::default(),
            ),
            stage_step: add(
                r,
                metric::STAGE_STEP,
                "Seconds of micro-batches inside a stage's steps, by the clock on the wall",
                Family::default(),
            ),
            stage_predicted: add(
                r,
                metric::STAGE_STEP_PREDICTED,
                "Seconds that the same micro-batches were predicted to take",
                Family::default(),
            ),
            stage_wait: add(
                r,
                metric::STAGE_WAIT,
                "Seconds that micro-batches waited at a stage",
                Family::default(),
            ),
            rows_left_out: add(
                r,
                metric::STAGE_ROWS_LEFT_OUT,
                "Rows that a stage left out because nobody wanted them any more",
                Family::default(),
            ),
            edge_credits: add(
                r,
                metric::EDGE_CREDITS,
                "Frames that the edge out of a stage may hold",
                Family::default(),
            ),
            edge_round_trip: add(
                r,
                metric::EDGE_ROUND_TRIP,
                "Round trip from a stage to the next one, as last tried",
                Family::default(),
            ),
            in_flight: add(
                r,
                metric::MICRO_BATCHES_IN_FLIGHT,
                "Micro-batches in flight",
                Gauge::default(),
            ),
            window: add(
                r,
                metric::MICRO_BATCHES_WINDOW,
                "Micro-batches that may be in flight, by measurement",
                Gauge::default(),
            ),
            links: add(
                r,
                metric::LINKS,
                "Seconds of a micro-batch's round trip that no stage spends",
                Gauge::default(),
            ),
            round_trip: add(
                r,
                metric::MICRO_BATCH_ROUND_TRIP,
                "Time from a micro-batch's issue to its result",
                Histogram::new(ITL_BUCKETS),
            ),
            hop: add(
                r,
                metric::HOP,
                "Time from a stage's output to the next stage's input, where both are on one host",
                Histogram::new(HOP_BUCKETS),
            ),
            ttft: add(r, metric::TTFT, "Time to first token", Histogram::new(WAIT_BUCKETS)),
            itl: add(r, metric::ITL, "Time between tokens", Histogram::new(ITL_BUCKETS)),
            e2e: add(r, metric::E2E, "Time of a whole request", Histogram::new(E2E_BUCKETS)),
            queue: add(r, metric::QUEUE_TIME, "Time waiting to run", Histogram::new(WAIT_BUCKETS)),
            registry,
        }
    }

    /// The same with somebody who makes traces.
    #[must_use]
    pub fn with_spans(mut self, spans: Spans) -> Self {
        self.spans = spans;
        self
    }

    /// Who makes traces.
    pub fn spans(&self) -> &Spans {
        &self.spans
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

    /// Texts have become vectors, `e2e` after they were submitted.
    pub fn on_embedded(&self, e2e: Duration) {
        self.success.get_or_create(&FinishedLabels { finished_reason: "embedded" }).inc();
        self.e2e.observe(e2e.as_secs_f64());
    }

    /// An admitted request failed.
    pub fn on_failed(&self, code: ErrorCode) {
        self.failure.get_or_create(&FailedLabels { code: code.name() }).inc();
    }

    /// A request was turned away for want of room or time; it also counts as refused or failed.
    pub fn on_shed(&self, why: Shed) {
        self.shed.get_or_create(&ShedLabels { reason: why.name() }).inc();
    }

    /// The rules for prompts did this to one: `redacted`, `blocked` or `shortened`.
    pub fn on_rules_of_prompt(&self, did: &'static str) {
        self.rules.get_or_create(&RulesLabels { of: "prompt", did }).inc();
    }

    /// The rules for answers did this to those of a request that has ended.
    pub fn on_rules_of_answer(&self, found: RulesDid) {
        let RulesDid { redacted, blocked, extracted } = found;
        for (done, did) in [(redacted, "redacted"), (blocked, "blocked"), (extracted, "extracted")]
        {
            if done {
                self.rules.get_or_create(&RulesLabels { of: "answer", did }).inc();
            }
        }
    }

    /// A group of records with so many tokens is durable.
    pub fn on_journal_commit(&self, tokens: u64) {
        self.journal_commits.inc();
        self.journal_tokens.inc_by(tokens);
    }

    /// Whether the journal cannot be written.
    pub fn set_journal_degraded(&self, degraded: bool) {
        self.journal_degraded.set(degraded.into());
    }

    /// What the journal holds and has promised.
    pub fn set_journal_bytes(&self, bytes: u64) {
        self.journal_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// The last micro-batches.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// What requests are called.
    pub fn names(&self) -> &Arc<Names> {
        &self.names
    }

    /// What happened to the cluster.
    pub fn chronicle(&self) -> &Arc<Chronicle> {
        &self.chronicle
    }

    /// A micro-batch came back: what each stage spent on it, and what had been predicted (seconds;
    /// empty where nothing was).
    pub fn on_micro_batch(&self, times: &[StageTime], predicted: &[f64], stats: &SchedulerStats) {
        for (stage, time) in (0u32..).zip(times) {
            let place = PlaceLabels { stage };
            self.stage_step.get_or_create(&place).inc_by(time.step().as_secs_f64());
            self.stage_wait.get_or_create(&place).inc_by(time.wait().as_secs_f64());
            if let Some(hop) = time.hop() {
                self.hop.observe(hop.as_secs_f64());
            }
        }
        if predicted.len() == times.len() {
            for (stage, seconds) in (0u32..).zip(predicted) {
                self.stage_predicted.get_or_create(&PlaceLabels { stage }).inc_by(*seconds);
            }
        }
        self.in_flight.set(stats.in_flight.into());
        self.window.set(stats.window.into());
        self.links.set(stats.link.as_secs_f64());
        self.round_trip.observe(stats.round_trip.as_secs_f64());
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
        self.ready.set(status.ready.into());
        self.nodes.set(status.nodes.into());
        self.plan_epoch.set(i64::try_from(status.epoch).unwrap_or(i64::MAX));
        raise(&self.spans_lost, self.spans.lost());
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
        self.stage_busy_ratio.clear();
        self.rows_left_out.clear();
        self.edge_credits.clear();
        self.edge_round_trip.clear();
        for (index, stage) in status.stages.iter().enumerate() {
            let labels = StageLabels { stage: index.to_string(), node: stage.node_name.clone() };
            let seconds = stage.busy_seconds.max(0.0);
            self.stage_busy.get_or_create(&labels).inc_by(seconds);
            let all = stage.wall_seconds * f64::from(stage.threads.max(1));
            let share = if all > 0.0 { seconds / all } else { 0.0 };
            self.stage_busy_ratio.get_or_create(&labels).set(share);
            self.rows_left_out.get_or_create(&labels).inc_by(stage.rows_left_out);
            self.edge_credits.get_or_create(&labels).set(stage.credits.into());
            if let Some(seconds) = stage.round_trip {
                self.edge_round_trip.get_or_create(&labels).set(seconds);
            }
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
mod tests;
