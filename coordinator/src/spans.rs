//! Traces: what happened to a request, for a collector that speaks OpenTelemetry's protocol (OTLP).
//!
//! Where an endpoint was named, each request that is sampled has a span, below that of its client (W3C
//! `traceparent`), with the times that it waited, read its prompt and wrote its answer; and each
//! micro-batch that it was in has a span for every stage, made of the times that stages report with
//! results, so that nodes know nothing of traces. Elsewhere all of this is nothing. Prompts and answers
//! are never in a span.

mod otel;
#[cfg(test)]
mod tests;

use clap::Args;
use millrace_shared::names::env;
use millrace_shared::wire::rpc::{META_TRACEPARENT, META_TRACESTATE};

pub use otel::{RequestSpan, Spans};

/// Where traces go.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Traces")]
pub struct TraceArgs {
    /// Collector of traces, OTLP over HTTP, such as http://127.0.0.1:4318
    #[arg(long, value_name = "URL", env = env::OTLP_ENDPOINT)]
    pub otlp_endpoint: Option<String>,
}

/// The span that a client's call belongs to, as it says (W3C Trace Context).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    /// `traceparent`.
    pub parent: String,
    /// `tracestate`; may be empty.
    pub state: String,
}

/// Longest of what clients say of their traces that is looked at.
const MAX_BYTES: usize = 512;

impl Parent {
    /// As `named` finds it by these names; `None` where there is none, or one that is too long. One
    /// that makes no sense counts as none, as the standard has it.
    pub fn of<'a>(named: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let short = |name| named(name).filter(|value| value.len() <= MAX_BYTES);
        let parent = short(META_TRACEPARENT)?.to_owned();
        Some(Self { parent, state: short(META_TRACESTATE).unwrap_or_default().to_owned() })
    }
}
