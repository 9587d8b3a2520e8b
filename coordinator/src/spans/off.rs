//! A build without traces.

use std::time::Duration;

use millrace_shared::wire::data::StageTime;

use super::Parent;
use crate::request::Generation;

/// No spans.
#[derive(Debug, Default)]
pub struct Spans(());

/// There is none.
#[derive(Clone, Copy, Debug)]
pub enum RequestSpan {}

impl Spans {
    /// Says that this build has none, where an endpoint was named.
    ///
    /// # Errors
    /// Never.
    pub fn to(endpoint: Option<&str>, _: &str) -> anyhow::Result<Self> {
        if endpoint.is_some() {
            tracing::warn!("--otlp-endpoint: this build has no traces; build with --features otel");
        }
        Ok(Self(()))
    }

    /// Whether there are any.
    pub fn are_made(&self) -> bool {
        false
    }

    /// Spans that were not delivered.
    pub fn lost(&self) -> u64 {
        0
    }

    /// None.
    pub fn begin(&self, _: Option<&Parent>, _: &Generation) -> Option<RequestSpan> {
        None
    }

    /// Nothing to tell.
    pub fn step(&self, _: (u64, Duration), _: &[&RequestSpan], _: &[StageTime], _: &[String]) {}

    /// Nothing to tell.
    pub fn end(&self, span: RequestSpan, _: &Generation) {
        match span {}
    }
}
