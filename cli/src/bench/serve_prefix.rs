//! `bench serve --shared-prefix`: requests that begin alike, and what of their prompts is computed.
//!
//! Twice: one request alone, and when it has its answer the others at once; then, with another
//! beginning, all at once.

use serde::Serialize;

use super::serve::{Percentiles, ServeArgs, percentiles};
use super::serve_load::{Clients, Load};
use crate::output::{self, TableOrJson};
use crate::table::Align::{Left, Right};
use crate::table::{Table, figure};
use crate::target::{self, Needs, Session};

/// Requests where nothing is said.
const REQUESTS: u32 = 64;

/// What was measured, and on what.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    stages: usize,
    shared_tokens: u32,
    own_tokens: u32,
    requests: u32,
    results: Vec<Case>,
}

/// One order of requests.
#[derive(Debug, Serialize)]
struct Case {
    order: &'static str,
    /// Prompt tokens of all requests.
    asked: u64,
    /// Those of them that the stages computed.
    computed: u64,
    /// What was not computed, as a share.
    saved: f64,
    wall_s: f64,
    ttft_ms: Percentiles,
}

pub(super) async fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let requests = args.requests.unwrap_or(REQUESTS);
    let shared = args.shared_prefix.unwrap_or(1);
    let length = shared.saturating_add(args.suffix).saturating_add(args.max_tokens.most());
    let positions = length.next_multiple_of(64).checked_mul(requests);
    let needs = Needs { requests, positions };
    let measure = async |session: &Session| measure(args, (requests, shared), session).await;
    let report = target::with_session(&args.target, needs, measure).await?;
    print(args.output, &report)
}

async fn measure(
    args: &ServeArgs,
    (requests, shared): (u32, u32),
    session: &Session,
) -> anyhow::Result<Report> {
    let model = session.model().await?;
    let load = Load { prompt_tokens: shared + args.suffix, ..args.like_load(model.vocab) };
    let mut clients = Clients::connect(session, load, requests).await?;
    let mut results = Vec::new();
    for (order, first) in [("one, then the others", 1), ("all at once", 0)] {
        let beginning = (clients.fresh_stream(), shared);
        let before = session.status().await?.prompt_tokens;
        if first > 0 {
            clients.run_shared(first, beginning).await?;
        }
        let seen = clients.run_shared(requests - first, beginning).await?;
        let computed = session.status().await?.prompt_tokens.saturating_sub(before);
        let asked = u64::from(requests) * u64::from(load.prompt_tokens);
        results.push(Case {
            order,
            asked,
            computed,
            saved: 1.0 - computed as f64 / asked as f64,
            wall_s: seen.wall.as_secs_f64(),
            ttft_ms: percentiles(&seen.ttft_us),
        });
    }
    Ok(Report {
        model: model.id,
        stages: session.status().await?.stages.len(),
        shared_tokens: shared,
        own_tokens: args.suffix,
        requests,
        results,
    })
}

fn print(format: TableOrJson, report: &Report) -> anyhow::Result<()> {
    if format == TableOrJson::Json {
        return output::json(report);
    }
    let mut table = Table::new(&[
        ("order", Left),
        ("asked", Right),
        ("computed", Right),
        ("saved", Right),
        ("ttft p50 ms", Right),
        ("p99", Right),
        ("wall s", Right),
    ]);
    for case in &report.results {
        table.row([
            case.order.to_owned(),
            case.asked.to_string(),
            case.computed.to_string(),
            format!("{:.1} %", 100.0 * case.saved),
            figure(case.ttft_ms.p50),
            figure(case.ttft_ms.p99),
            figure(Some(case.wall_s)),
        ]);
    }
    output::write(format_args!(
        "{}, {} stage(s), {} requests of {} shared prompt tokens and {} of their own\n\n{table}",
        report.model, report.stages, report.requests, report.shared_tokens, report.own_tokens,
    ))
}
