//! `bench serve --mixed`: what long prompts cost those who read along.
//!
//! Each number of chats runs twice: alone, and beside clients that send one long prompt after the
//! other. Two ratios say what a reader notices: the 99th percentile of the time between tokens over
//! its median, and that median over the one without long prompts.

use serde::Serialize;

use super::serve::{Percentiles, ServeArgs, percentiles, share};
use super::serve_load::{Clients, Load, Seen};
use crate::output::{self, TableOrJson};
use crate::table::Align::{Left, Right};
use crate::table::{Table, figure};
use crate::target::{self, Needs, Session};

/// Tokens of the answer to a long prompt: the prompt is what counts.
const LONG_ANSWER: u32 = 8;

/// What was measured, and on what.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    stages: usize,
    prompt_tokens: u32,
    max_tokens: u32,
    requests_per_client: u32,
    long_clients: u32,
    long_prompt_tokens: u32,
    results: Vec<Level>,
}

/// One number of chats.
#[derive(Debug, Serialize)]
struct Level {
    chats: u32,
    alone: Group,
    beside: Group,
    long: Group,
    /// Chats beside long prompts: the 99th percentile of the time between tokens over its median.
    tail_ratio: Option<f64>,
    /// The same of chats alone.
    tail_ratio_alone: Option<f64>,
    /// Median time between tokens beside long prompts over the one alone.
    median_ratio: Option<f64>,
}

/// Clients of one kind in one run.
#[derive(Debug, Serialize)]
struct Group {
    requests: u64,
    wall_s: f64,
    /// Tokens of prompts and answers per second of the whole run.
    tokens_per_s: f64,
    ttft_ms: Percentiles,
    inter_token_ms: Percentiles,
}

pub(super) async fn run(args: &ServeArgs, chats: u32, others: u32) -> anyhow::Result<()> {
    let positions = |clients: u32, length: u32| clients.checked_mul(length.next_multiple_of(64));
    let short = positions(chats, args.prompt_tokens.most().saturating_add(args.max_tokens.most()));
    let long = positions(others, args.long_prompt.saturating_add(LONG_ANSWER));
    let needs = Needs {
        requests: chats + others,
        positions: short.and_then(|short| short.checked_add(long?)),
    };
    let measure = async |session: &Session| measure(args, others, session).await;
    let report = target::with_session(&args.target, needs, measure).await?;
    print(args.output, &report)
}

async fn measure(args: &ServeArgs, others: u32, session: &Session) -> anyhow::Result<Report> {
    let model = session.model().await?;
    let load = args.like_load(model.vocab);
    let long = Load { prompt_tokens: args.long_prompt, max_tokens: LONG_ANSWER, ..load };
    let mut results = Vec::new();
    for &chats in &args.concurrency {
        let mut clients = Clients::connect(session, load, chats).await?;
        clients.warm_up().await?;
        let alone = clients.run(chats).await?;
        clients.add(session, others).await?;
        let (beside, seen) = clients.run_beside(chats, Some(long)).await?;
        results.push(level(chats, load, &alone, (&beside, &seen), long));
    }
    Ok(Report {
        model: model.id,
        stages: session.status().await?.stages.len(),
        prompt_tokens: load.prompt_tokens,
        max_tokens: load.max_tokens,
        requests_per_client: load.requests,
        long_clients: others,
        long_prompt_tokens: long.prompt_tokens,
        results,
    })
}

fn level(chats: u32, load: Load, alone: &Seen, beside: (&Seen, &Seen), long: Load) -> Level {
    let (beside, others) = (group(beside.0, load), group(beside.1, long));
    let alone = group(alone, load);
    let ratio = |a: Option<f64>, b: Option<f64>| Some(a? / b.filter(|&b| b > 0.0)?);
    let (loaded, usual) = (beside.inter_token_ms, alone.inter_token_ms);
    Level {
        chats,
        tail_ratio: ratio(loaded.p99, loaded.p50),
        tail_ratio_alone: ratio(usual.p99, usual.p50),
        median_ratio: ratio(loaded.p50, usual.p50),
        alone,
        beside,
        long: others,
    }
}

fn group(seen: &Seen, load: Load) -> Group {
    let wall_s = seen.wall.as_secs_f64();
    let prompts = seen.requests * u64::from(load.prompt_tokens);
    Group {
        requests: seen.requests,
        wall_s,
        tokens_per_s: (prompts + seen.tokens) as f64 / wall_s.max(1e-9),
        ttft_ms: percentiles(&seen.ttft_us),
        inter_token_ms: percentiles(&seen.inter_token_us),
    }
}

fn print(format: TableOrJson, report: &Report) -> anyhow::Result<()> {
    if format == TableOrJson::Json {
        return output::json(report);
    }
    output::write(format_args!(
        "{}, {} stage(s); chats: prompts of {} tokens, answers of {}, {} request(s) each; \
         {} client(s) with prompts of {}\n\n{}\n{}",
        report.model,
        report.stages,
        report.prompt_tokens,
        report.max_tokens,
        report.requests_per_client,
        report.long_clients,
        report.long_prompt_tokens,
        group_table(report),
        ratio_table(report)
    ))
}

fn group_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        ("chats", Right),
        ("who", Left),
        ("requests", Right),
        ("all tok/s", Right),
        ("ttft p50 ms", Right),
        ("p99", Right),
        ("inter-token p50 ms", Right),
        ("p99", Right),
    ]);
    for level in &report.results {
        let groups = [
            ("chats alone", &level.alone),
            ("chats beside", &level.beside),
            ("long prompts", &level.long),
        ];
        for (who, group) in groups {
            table.row([
                level.chats.to_string(),
                who.to_owned(),
                group.requests.to_string(),
                figure(Some(group.tokens_per_s)),
                figure(group.ttft_ms.p50),
                figure(group.ttft_ms.p99),
                figure(group.inter_token_ms.p50),
                figure(group.inter_token_ms.p99),
            ]);
        }
    }
    table
}

fn ratio_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        ("chats", Right),
        ("p99 over median", Right),
        ("alone", Right),
        ("median over alone", Right),
    ]);
    for level in &report.results {
        table.row([
            level.chats.to_string(),
            share(level.tail_ratio),
            share(level.tail_ratio_alone),
            share(level.median_ratio),
        ]);
    }
    table
}
