//! `millrace bench serve`: a whole pipeline under load, seen by its clients.
//!
//! Here the closed loop of like clients, and what every mode needs; [`super::serve_mixed`],
//! [`super::serve_prefix`] and [`super::load`] are the other modes.

use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use millrace_net::cpu_time::process_seconds;
use millrace_shared::wire::rpc::{ClusterStatus, StageStatus};
use serde::Serialize;

use super::load::{self, Lengths, LoadArgs};
use super::serve_load::{Clients, Load, Seen};
use super::{serve_mixed, serve_prefix};
use crate::error::usage;
use crate::output::{self, TableOrJson};
use crate::serving::layers;
use crate::table::Align::{Left, Right};
use crate::table::{Table, figure};
use crate::target::{self, Needs, Session, TargetArgs};

/// Flags of `bench serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Clients at once, one run each; a client sends its next request when it has an answer
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,4,16")]
    pub(super) concurrency: Vec<u32>,
    /// Tokens of each prompt; all prompts are different. With --rate or --duration also a range
    /// (64-256), or a median and a spread (lognormal:128:0.6)
    #[arg(long, value_name = "TOKENS", default_value_t = Lengths::Fixed(128))]
    pub(super) prompt_tokens: Lengths,
    /// Tokens of each answer, said in the same way; end-of-text tokens do not end it
    #[arg(long, value_name = "TOKENS", default_value_t = Lengths::Fixed(64))]
    pub(super) max_tokens: Lengths,
    /// Requests of each client, one after the other [default: 2]; with --shared-prefix, requests
    /// at once [default: 64]; with --rate, requests in all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) requests: Option<u32>,
    /// Prompts repeat themselves after so many tokens: what drafts are good for (compare with
    /// --speculate off)
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) repeat_after: Option<u32>,
    /// Each run twice: the clients alone, then beside so many more that send long prompts
    #[arg(long, value_name = "CLIENTS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(super) mixed: Option<u32>,
    /// Tokens of the long prompts
    #[arg(long, value_name = "TOKENS", requires = "mixed", default_value_t = 1200, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) long_prompt: u32,
    /// Instead: requests that begin with the same so many tokens, after one of them finished and
    /// all at once
    #[arg(long, value_name = "TOKENS", conflicts_with_all = ["mixed", "concurrency", "prompt_tokens", "repeat_after"], value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) shared_prefix: Option<u32>,
    /// Tokens after the shared ones
    #[arg(long, value_name = "TOKENS", requires = "shared_prefix", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) suffix: u32,
    /// Print tables, or one JSON object
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub(super) output: TableOrJson,
    #[command(flatten)]
    pub(super) load: LoadArgs,
    #[command(flatten)]
    pub(super) target: TargetArgs,
}

/// Requests of each client where nothing is said.
const REQUESTS: u32 = 2;

impl ServeArgs {
    /// The most clients at once.
    fn check_concurrency(&self) -> anyhow::Result<u32> {
        let most = self.concurrency.iter().copied().max().unwrap_or(0);
        if self.concurrency.contains(&0) || !(1..=4096).contains(&most) {
            return Err(usage("--concurrency takes numbers from 1 to 4096, for example 1,4,16"));
        }
        Ok(most)
    }

    /// What each client of the closed loop asks for, all lengths being the same.
    pub(super) fn like_load(&self, vocab: u32) -> Load {
        Load {
            prompt_tokens: self.prompt_tokens.most(),
            max_tokens: self.max_tokens.most(),
            requests: self.requests.unwrap_or(REQUESTS),
            vocab,
            period: self.repeat_after,
        }
    }
}

/// What was measured, and on what.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    stages: usize,
    prompt_tokens: u32,
    max_tokens: u32,
    requests_per_client: u32,
    results: Vec<Level>,
}

/// One number of clients.
#[derive(Debug, Serialize)]
struct Level {
    concurrency: u32,
    requests: u64,
    wall_s: f64,
    /// Prompt tokens per second of the time in which some client waited for its first token.
    prefill_tokens_per_s: f64,
    /// Generated tokens of all clients per second of the whole run.
    decode_tokens_per_s: f64,
    ttft_ms: Percentiles,
    /// Between one token of an answer and the next, as the client sees them.
    inter_token_ms: Percentiles,
    /// CPU time of engine threads inside `step` over all compute threads' time: 1 is a pipeline
    /// without a bubble. Absent where the pipeline changed meanwhile.
    stage_busy: Option<f64>,
    /// The same where what coordinator, nodes and clients took beside it is not counted as time
    /// that the stages could have had: right where all of them share the processors.
    stage_busy_corrected: Option<f64>,
    /// Tokens that were guessed.
    drafts: u64,
    /// Those of them that were right.
    drafts_accepted: u64,
    stages: Vec<StageLoad>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: Option<f64>,
    pub(super) p99: Option<f64>,
}

/// What a stage did during a run.
#[derive(Debug, PartialEq, Serialize)]
struct StageLoad {
    stage: usize,
    node: String,
    layers: String,
    threads: u32,
    micro_batches: u64,
    /// CPU seconds of the engine's threads inside `step` per second; up to the number of threads.
    /// Absent where the stage was replaced meanwhile.
    busy_share: Option<f64>,
}

pub(super) async fn run(args: ServeArgs) -> anyhow::Result<()> {
    if args.load.is_asked() {
        args.check_concurrency()?;
        return load::run(&args).await;
    }
    args.load.refuse()?;
    let fixed = |lengths| matches!(lengths, Lengths::Fixed(_));
    if !fixed(args.prompt_tokens) || !fixed(args.max_tokens) {
        return Err(usage("lengths that differ go with --rate or --duration"));
    }
    if args.shared_prefix.is_some() {
        return serve_prefix::run(&args).await;
    }
    let most = args.check_concurrency()?;
    if let Some(others) = args.mixed {
        return serve_mixed::run(&args, most, others).await;
    }
    let length = args.prompt_tokens.most().saturating_add(args.max_tokens.most());
    let positions = most.checked_mul(length.next_multiple_of(64));
    let needs = Needs { requests: most, positions };
    let report =
        target::with_session(&args.target, needs, async |session| measure(&args, session).await)
            .await?;
    print(args.output, &report)
}

async fn measure(args: &ServeArgs, session: &Session) -> anyhow::Result<Report> {
    let model = session.model().await?;
    let load = args.like_load(model.vocab);
    let most = args.concurrency.iter().copied().max().unwrap_or(1);
    let mut clients = Clients::connect(session, load, most).await?;
    clients.warm_up().await?;
    let mut results = Vec::new();
    for &concurrency in &args.concurrency {
        let before = Moment::now(session).await?;
        let seen = clients.run(concurrency).await?;
        let after = Moment::now(session).await?;
        let level = level(args, concurrency, &seen, &before, &after);
        output::remark(&format!(
            "concurrency {concurrency}: {} requests in {:.1} s, {:.1} tokens/s",
            level.requests, level.wall_s, level.decode_tokens_per_s
        ));
        results.push(level);
    }
    Ok(Report {
        model: model.id,
        stages: session.status().await?.stages.len(),
        prompt_tokens: args.prompt_tokens.most(),
        max_tokens: args.max_tokens.most(),
        requests_per_client: load.requests,
        results,
    })
}

/// The cluster's counters and this process's own.
pub(super) struct Moment {
    status: ClusterStatus,
    own_seconds: f64,
    at: Instant,
    /// The cluster runs in this process.
    embedded: bool,
}

/// Processor seconds between two moments.
pub(super) struct Spent {
    /// Those of this process.
    pub(super) own: f64,
    /// Those of the coordinator and of all nodes; `None` where the pipeline changed meanwhile, or
    /// they are this process.
    pub(super) cluster: Option<(f64, f64)>,
}

impl Moment {
    /// Time since another one.
    pub(super) fn since(&self, before: &Self) -> Duration {
        self.at.duration_since(before.at)
    }

    /// Processor time since another one.
    pub(super) fn spent_since(&self, before: &Self) -> Spent {
        let (now, then) = (&self.status, &before.status);
        let same = now.epoch == then.epoch && now.stages.len() == then.stages.len();
        let stages = now.stages.iter().zip(&then.stages);
        let nodes = stages.map(|(now, then)| now.process_seconds - then.process_seconds).sum();
        let head = now.process_seconds - then.process_seconds;
        let cluster = (same && !self.embedded).then_some((head, nodes));
        Spent { own: self.own_seconds - before.own_seconds, cluster }
    }

    pub(super) async fn now(session: &Session) -> anyhow::Result<Self> {
        let status = session.status().await?;
        let embedded = session.embedded().is_some();
        Ok(Self { status, own_seconds: process_seconds(), at: Instant::now(), embedded })
    }
}

/// Processors that everything but the engines' steps kept busy.
fn others_share(before: &Moment, after: &Moment) -> f64 {
    let wall = after.at.duration_since(before.at).as_secs_f64().max(1e-9);
    let own = (after.own_seconds - before.own_seconds) / wall;
    let stages = after.status.stages.iter().zip(&before.status.stages);
    if after.embedded {
        let busy: f64 = stages.map(|(now, then)| now.busy_seconds - then.busy_seconds).sum();
        return (own - busy / wall).max(0.0);
    }
    let beside = |(now, then): (&StageStatus, &StageStatus)| {
        let wall = (now.wall_seconds - then.wall_seconds).max(1e-9);
        let busy = now.busy_seconds - then.busy_seconds;
        ((now.process_seconds - then.process_seconds - busy) / wall).max(0.0)
    };
    let coordinator = after.status.process_seconds - before.status.process_seconds;
    own + coordinator / wall + stages.map(beside).sum::<f64>()
}

fn level(
    args: &ServeArgs,
    concurrency: u32,
    seen: &Seen,
    before: &Moment,
    after: &Moment,
) -> Level {
    let stages = stage_loads(&before.status, &after.status);
    let others = others_share(before, after);
    let (now, then) = (&after.status, &before.status);
    let threads = stages.iter().map(|s| f64::from(s.threads)).sum::<f64>().max(1.0);
    let busy: Option<f64> = stages.iter().map(|s| s.busy_share).sum();
    let wall_s = seen.wall.as_secs_f64();
    let prompts = seen.requests * u64::from(args.prompt_tokens.most());
    Level {
        concurrency,
        requests: seen.requests,
        wall_s,
        prefill_tokens_per_s: prompts as f64 / seen.prefilling().as_secs_f64(),
        decode_tokens_per_s: seen.tokens as f64 / wall_s,
        ttft_ms: percentiles(&seen.ttft_us),
        inter_token_ms: percentiles(&seen.inter_token_us),
        stage_busy: busy.map(|b| b / threads),
        stage_busy_corrected: busy.map(|b| b / (threads - others).max(b)),
        drafts: now.draft_tokens.saturating_sub(then.draft_tokens),
        drafts_accepted: now.draft_tokens_accepted.saturating_sub(then.draft_tokens_accepted),
        stages,
    }
}

pub(super) fn percentiles(us: &Histogram<u64>) -> Percentiles {
    let at = |q| (!us.is_empty()).then(|| us.value_at_quantile(q) as f64 / 1e3);
    Percentiles { p50: at(0.5), p99: at(0.99) }
}

/// Differences of the stages' cumulative counters; without the shares where the pipeline changed.
fn stage_loads(before: &ClusterStatus, after: &ClusterStatus) -> Vec<StageLoad> {
    let load = |(stage, now): (usize, &StageStatus)| {
        let then = before.stages.get(stage).filter(|then| {
            before.epoch == after.epoch && then.node_id == now.node_id && then.steps <= now.steps
        });
        let share = then.and_then(|then| {
            let wall = now.wall_seconds - then.wall_seconds;
            (wall > 0.0).then(|| (now.busy_seconds - then.busy_seconds) / wall)
        });
        StageLoad {
            stage,
            node: now.node_name.clone(),
            layers: layers(now),
            threads: now.threads,
            micro_batches: now.steps - then.map_or(0, |t| t.steps),
            busy_share: share,
        }
    };
    after.stages.iter().enumerate().map(load).collect()
}

fn print(format: TableOrJson, report: &Report) -> anyhow::Result<()> {
    if format == TableOrJson::Json {
        return output::json(report);
    }
    output::write(format_args!(
        "{}, {} stage(s), prompts of {} tokens, answers of {}, {} request(s) per client\n\n{}\n{}",
        report.model,
        report.stages,
        report.prompt_tokens,
        report.max_tokens,
        report.requests_per_client,
        speed_table(report),
        stage_table(report)
    ))
}

fn speed_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        ("clients", Right),
        ("requests", Right),
        ("prefill tok/s", Right),
        ("decode tok/s", Right),
        ("ttft p50 ms", Right),
        ("p99", Right),
        ("inter-token p50 ms", Right),
        ("p99", Right),
        ("busy", Right),
        ("corrected", Right),
        ("drafts right", Right),
    ]);
    for level in &report.results {
        table.row([
            level.concurrency.to_string(),
            level.requests.to_string(),
            figure(Some(level.prefill_tokens_per_s)),
            figure(Some(level.decode_tokens_per_s)),
            figure(level.ttft_ms.p50),
            figure(level.ttft_ms.p99),
            figure(level.inter_token_ms.p50),
            figure(level.inter_token_ms.p99),
            share(level.stage_busy),
            share(level.stage_busy_corrected),
            format!("{}/{}", level.drafts_accepted, level.drafts),
        ]);
    }
    table
}

/// A share or a ratio with two decimals, or a dash where there is none.
pub(super) fn share(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"))
}

fn stage_table(report: &Report) -> Table {
    let mut table = Table::new(&[
        ("clients", Right),
        ("stage", Right),
        ("node", Left),
        ("layers", Left),
        ("threads", Right),
        ("steps", Right),
        ("busy", Right),
    ]);
    for level in &report.results {
        for stage in &level.stages {
            table.row([
                level.concurrency.to_string(),
                stage.stage.to_string(),
                stage.node.clone(),
                stage.layers.clone(),
                stage.threads.to_string(),
                stage.micro_batches.to_string(),
                share(stage.busy_share),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(epoch: u64, busy: f64, wall: f64, steps: u64) -> ClusterStatus {
        let stage = StageStatus {
            node_id: "0193a5b0-0000-7000-8000-000000000000".parse().unwrap(),
            node_name: "a".to_owned(),
            first_layer: 0,
            end_layer: 15,
            embed: true,
            head: false,
            weight_bytes: 1,
            busy_seconds: busy,
            wall_seconds: wall,
            process_seconds: busy + 1.0,
            steps,
            threads: 1,
            rows_left_out: 0,
            credits: 4,
            round_trip: None,
        };
        ClusterStatus { epoch, stages: vec![stage], ..ClusterStatus::default() }
    }

    #[test]
    fn busy_shares_are_differences() {
        let loads = stage_loads(&status(1, 2.0, 10.0, 5), &status(1, 5.0, 14.0, 25));
        assert_eq!(loads[0].busy_share, Some(0.75));
        assert_eq!(loads[0].micro_batches, 20);
        assert_eq!(loads[0].layers, "embed, 0-14");
        let replaced = stage_loads(&status(1, 2.0, 10.0, 5), &status(2, 5.0, 14.0, 25));
        assert_eq!(replaced[0].busy_share, None);
        let still = stage_loads(&status(1, 2.0, 10.0, 5), &status(1, 2.0, 10.0, 5));
        assert_eq!(still[0].busy_share, None);
    }
}
