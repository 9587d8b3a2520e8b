//! Spans by the crates of OpenTelemetry.
//!
//! Ended spans wait in a bounded queue for a thread of the SDK's, which sends them; what finds the
//! queue full, or cannot be delivered, is lost and counted. Nothing else ever waits for a collector.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::data::StageTime;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Link, Span as _, SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, Span, SpanData,
    SpanProcessor,
};

use super::Parent;
use crate::journal::End;
use crate::request::Generation;

/// Spans that wait to be sent; the SDK's own default.
const QUEUE: usize = 2048;
/// Micro-batches of a request whose stages are told of: a long answer's are all alike.
const MAX_STEPS: u32 = 256;
/// For a collector to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer of a collector that is read.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// Makes spans, where an endpoint was named.
#[derive(Debug, Default)]
pub struct Spans {
    tracer: Option<SdkTracer>,
    provider: Option<SdkTracerProvider>,
    lost: Arc<AtomicU64>,
}

/// The span of a request that is sampled.
#[derive(Debug)]
pub struct RequestSpan {
    span: Span,
    begun: SystemTime,
    steps: AtomicU32,
}

impl Spans {
    /// Spans that go to the collector at `endpoint`; none where there is none. `model` is what is
    /// served.
    ///
    /// # Errors
    /// If the endpoint is no address.
    pub fn to(endpoint: Option<&str>, model: &str) -> anyhow::Result<Self> {
        let Some(endpoint) = endpoint.filter(|text| !text.is_empty()) else {
            return Ok(Self::default());
        };
        let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
        let sent = SpanExporter::builder()
            .with_http()
            .with_http_client(Http::new())
            .with_endpoint(url)
            .with_timeout(TIMEOUT)
            .build()
            .with_context(|| format!("--otlp-endpoint {endpoint}"))?;
        let (lost, waiting) = (Arc::<AtomicU64>::default(), Arc::<AtomicUsize>::default());
        let exporter = Counted { sent, lost: Arc::clone(&lost), waiting: Arc::clone(&waiting) };
        let batches = BatchConfigBuilder::default().with_max_queue_size(QUEUE).build();
        let batches = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        let bounded = Bounded { batches, lost: Arc::clone(&lost), waiting };
        let mut resource = Resource::builder();
        // The variable is the standard's, and wins.
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("millrace");
        }
        let resource = resource.with_attribute(KeyValue::new("millrace.model", model.to_owned()));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(bounded)
            .with_resource(resource.build())
            .build();
        let tracer = provider.tracer("millrace");
        Ok(Self { tracer: Some(tracer), provider: Some(provider), lost })
    }

    /// Whether there are any.
    pub fn are_made(&self) -> bool {
        self.tracer.is_some()
    }

    /// Waits until what has ended was sent, or lost.
    #[cfg(test)]
    pub(super) fn flush(&self) {
        let _ = self.provider.as_ref().map(SdkTracerProvider::force_flush);
    }

    /// Spans that were not delivered.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The span of a request that begins; `None` where it is not sampled.
    pub fn begin(&self, parent: Option<&Parent>, request: &Generation) -> Option<RequestSpan> {
        let tracer = self.tracer.as_ref()?;
        let begun = SystemTime::now();
        let head = request.head();
        let operation = if head.chat { "chat" } else { "text_completion" };
        let id = head.id.to_string();
        let mut attributes = vec![
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", "millrace"),
            KeyValue::new("gen_ai.response.id", id),
            KeyValue::new("gen_ai.request.choice.count", i64::from(head.n)),
            KeyValue::new("gen_ai.usage.input_tokens", head.prompt.len() as i64),
        ];
        attributes.extend(asked(&head.params, head.seed));
        let builder = tracer
            .span_builder(operation)
            .with_kind(SpanKind::Server)
            .with_start_time(begun)
            .with_attributes(attributes);
        let span = tracer.build_with_context(builder, &context(parent));
        let sampled = span.span_context().is_sampled();
        sampled.then(|| RequestSpan { span, begun, steps: AtomicU32::new(0) })
    }

    /// A micro-batch came back, `round_trip` after it was issued. Its stages' spans belong to the
    /// first of these requests, with links to the others; `nodes` are the names of who computed.
    pub fn step(
        &self,
        (micro_batch, round_trip): (u64, Duration),
        requests: &[&RequestSpan],
        times: &[StageTime],
        nodes: &[String],
    ) {
        let Some(tracer) = &self.tracer else { return };
        let goes_on = |r: &&&RequestSpan| r.steps.fetch_add(1, Ordering::Relaxed) < MAX_STEPS;
        let mut all = requests.iter().filter(goes_on).map(|r| r.span.span_context().clone());
        let Some(first) = all.next() else { return };
        let links: Vec<Link> = all.map(Link::with_context).collect();
        let parent = Context::new().with_remote_span_context(first);
        // What no stage spent the links did, as much before each stage as behind the last one,
        // where stages do not know it better.
        let spent: Duration = times.iter().map(|t| t.wait() + t.step()).sum();
        let known: Duration = times.iter().filter_map(StageTime::hop).sum();
        let unknown = times.iter().filter(|t| t.hop().is_none()).count() as u32 + 1;
        let link = round_trip.saturating_sub(spent + known) / unknown;
        let mut at = SystemTime::now() - round_trip.max(spent + known);
        for (stage, time) in (0i64..).zip(times) {
            at += time.hop().unwrap_or(link);
            let end = at + time.wait() + time.step();
            let node =
                nodes.get(stage as usize).map(|name| KeyValue::new("millrace.node", name.clone()));
            let attributes = [
                KeyValue::new("millrace.stage", stage),
                KeyValue::new("millrace.micro_batch", micro_batch as i64),
                KeyValue::new("millrace.wait_seconds", time.wait().as_secs_f64()),
                KeyValue::new("millrace.step_seconds", time.step().as_secs_f64()),
                KeyValue::new("millrace.requests", requests.len() as i64),
            ];
            let builder = tracer
                .span_builder("stage")
                .with_kind(SpanKind::Internal)
                .with_start_time(at)
                .with_links(links.clone())
                .with_attributes(attributes.into_iter().chain(node));
            tracer.build_with_context(builder, &parent).end_with_timestamp(end);
            at = end;
        }
    }

    /// The request has ended.
    pub fn end(&self, span: RequestSpan, request: &Generation) {
        let Some(tracer) = &self.tracer else { return };
        let RequestSpan { mut span, begun, steps } = span;
        let entry = request.entry();
        let tokens: usize = entry.tokens.iter().map(|log| log.len()).sum();
        span.set_attribute(KeyValue::new("gen_ai.usage.output_tokens", tokens as i64));
        let steps = i64::from(steps.into_inner());
        span.set_attribute(KeyValue::new("millrace.micro_batches", steps));
        let mut reasons: Vec<StringValue> = Vec::new();
        for (_, end) in entry.ends.iter().flatten() {
            match end {
                End::Finished { reason, .. } => reasons.push(reason.as_str().into()),
                End::Failed(status) => {
                    span.set_attribute(KeyValue::new("error.type", status.code.name()));
                    // The code alone: a message may have what a client said.
                    span.set_status(Status::error(status.code.name()));
                }
            }
        }
        let reasons = Value::Array(Array::String(reasons));
        span.set_attribute(KeyValue::new("gen_ai.response.finish_reasons", reasons));
        let below = Context::new().with_remote_span_context(span.span_context().clone());
        let now = SystemTime::now();
        let first = |time: fn(&Generation, u32) -> Option<Duration>| {
            (0..entry.head.choices).filter_map(|choice| time(request, choice)).min()
        };
        let scheduled = first(Generation::queue_time).map(|t| begun + t);
        let token = first(Generation::first_token).map(|t| begun + t);
        let phases = [
            ("queue", Some(begun), scheduled.or(Some(now))),
            ("prefill", scheduled, token.or(Some(now))),
            ("decode", token, Some(now)),
        ];
        for (name, from, to) in phases {
            let (Some(from), Some(to)) = (from, to) else { continue };
            let phase = tracer.span_builder(name).with_start_time(from);
            tracer.build_with_context(phase, &below).end_with_timestamp(to.max(from));
        }
        span.end_with_timestamp(now);
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            // What is left is sent, or lost, within this time; a collector must not keep a
            // coordinator from ending.
            let _ = provider.shutdown_with_timeout(TIMEOUT);
        }
    }
}

/// What a request asks for, as the conventions for generative AI name it.
fn asked(params: &SamplingParams, seed: u64) -> Vec<KeyValue> {
    let mut all = vec![
        KeyValue::new("gen_ai.request.temperature", f64::from(params.temperature)),
        KeyValue::new("gen_ai.request.top_p", f64::from(params.top_p)),
        KeyValue::new("gen_ai.request.top_k", f64::from(params.top_k)),
        KeyValue::new("gen_ai.request.seed", seed as i64),
    ];
    let most = params.max_tokens.map(|n| KeyValue::new("gen_ai.request.max_tokens", i64::from(n)));
    all.extend(most);
    all
}

fn context(parent: Option<&Parent>) -> Context {
    let Some(Parent { parent, state }) = parent else { return Context::new() };
    let fields = [("traceparent", parent), ("tracestate", state)];
    let fields: HashMap<String, String> =
        fields.into_iter().map(|(name, value)| (name.to_owned(), value.clone())).collect();
    TraceContextPropagator::new().extract_with_context(&Context::new(), &fields)
}

/// Sends by the HTTP client that everything else here uses; on the SDK's own thread, which may wait.
#[derive(Debug)]
struct Http(ureq::Agent);

impl Http {
    fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .build();
        Self(config.into())
    }
}

#[async_trait::async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let request = Request::from_parts(head, body.to_vec());
        let mut response = self.0.run(request)?;
        let body = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
        let (head, _) = response.into_parts();
        Ok(Response::from_parts(head, body.into()))
    }
}

/// Counts what is not delivered.
#[derive(Debug)]
struct Counted {
    sent: SpanExporter,
    lost: Arc<AtomicU64>,
    waiting: Arc<AtomicUsize>,
}

impl opentelemetry_sdk::trace::SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.sent.export(batch).await;
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        if result.is_err() {
            self.lost.fetch_add(spans as u64, Ordering::Relaxed);
        }
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.sent.set_resource(resource);
    }
}

/// A queue that counts what finds no room.
#[derive(Debug)]
struct Bounded {
    batches: BatchSpanProcessor,
    lost: Arc<AtomicU64>,
    waiting: Arc<AtomicUsize>,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) < QUEUE {
            self.batches.on_end(span);
        } else {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}
