//! What the scheduler makes of a pipeline, in virtual time: efficiency by stages, speeds and links,
//! and what each policy is worth. `cargo run --release -p millrace-shared --example pipeline [DIR]`
//! prints two tables and, with DIR, writes `efficiency.svg` and `ablation.svg` there.
//!
//! First table: 128 equal layers; a step takes 20 ms x the stage's share of the layers x stages /
//! speed of its node (mean 1), whatever the rows; efficiency = tokens/s over the sum of what each
//! node alone would do with the whole model. Second: four stages that compute like processors, chats
//! among long prompts; one policy at a time is turned off.

#![allow(clippy::print_stdout, reason = "it prints tables")]

mod model;
mod plot;

use std::time::Duration;

use millrace_shared::scheduler::SchedulerConfig;
use millrace_shared::scheduler::cost::StageCost;
use millrace_shared::sim::{PipelineModel, Simulation, percentile};
use model::{LINKS_MS, config, efficiency, sequence};
use plot::{Bar, Series};

const STAGES: [u32; 5] = [2, 4, 8, 16, 32];

fn efficiencies() -> Vec<Series> {
    let mut all = Vec::new();
    println!("Efficiency: tokens/s over the sum of what each node alone does, saturated");
    println!("{:<10} {:>8} {}", "nodes", "link", STAGES.map(|s| format!("{s:>8}")).concat());
    for even in [true, false] {
        let name = if even { "equal" } else { "2:1:1" };
        for link in LINKS_MS {
            let values = STAGES.map(|stages| efficiency(stages, even, link, |_| {}));
            let cells = values.map(|v| format!("{:>7.1}%", v * 100.0)).concat();
            println!("{name:<10} {:>8} {cells}", format!("{link} ms"));
            let values = values.to_vec();
            all.push(Series { name: format!("{name}, {link} ms"), dashed: !even, values });
        }
    }
    let values = STAGES.map(|s| efficiency(s, true, 20, |p| p.measured_from = None));
    let cells = values.map(|v| format!("{:>7.1}%", v * 100.0)).concat();
    println!("{:<10} {:>8} {cells}   one micro-batch per stage, not measured", "equal", "20 ms");
    let values = values.to_vec();
    all.push(Series { name: "20 ms, one per stage".into(), dashed: true, values });
    all
}

/// A stage of a processor with this share of the model, at this speed.
fn processor(share: f64) -> StageCost {
    StageCost {
        fixed: 8e-3 * share,
        decode_row: 2.4e-3 * share,
        prefill_token: 2.2e-3 * share,
        context: 1.2e-6 * share,
        head_row: 1e-4 * share,
    }
}

/// One row of the second table.
struct Outcome {
    name: &'static str,
    tokens_per_second: f64,
    busy: f64,
    gap: [f64; 2],
    first: f64,
}

/// Chats of 16 clients and long prompts of one, on four stages.
fn mixed(
    name: &'static str,
    shares: [f64; 4],
    link_ms: u64,
    change: impl Fn(&mut SchedulerConfig),
) -> Outcome {
    let mut config =
        SchedulerConfig { prefill_chunk: 64, max_batch_tokens: 320, ..config(4, 64, 64) };
    change(&mut config);
    let stages = shares.map(processor).to_vec();
    let link = Duration::from_millis(link_ms);
    let mut sim = Simulation::new(config, PipelineModel { stages, link, jitter: 0.05 });
    const LONG: u64 = 1 << 32;
    for n in 0..32 {
        sim.submit(sequence(
            n,
            Duration::from_millis(37 * n),
            40,
            40 + (n * 7 % 50) as u32,
            n % 16,
        ));
    }
    for n in 0..3 {
        sim.submit(sequence(LONG + n, Duration::ZERO, 1000, 8, 99));
    }
    let (from, until) = (Duration::from_secs(20), Duration::from_secs(120));
    let mut next = 1000;
    sim.run(until, |id, record| {
        next += 1;
        let (at, client) = (record.ended?, record.client);
        Some(if id.0 >= LONG {
            sequence(LONG + next, at, 1000, 8, client)
        } else {
            sequence(next, at, 40, 40 + (next * 7 % 50) as u32, client)
        })
    });
    let chats = || sim.records().iter().filter(|(id, r)| id.0 < LONG && r.submitted >= from);
    let mut gaps: Vec<Duration> = chats().flat_map(|(_, r)| r.gaps()).collect();
    let mut firsts: Vec<Duration> = chats().filter_map(|(_, r)| r.first_token()).collect();
    let seconds = (until - from).as_secs_f64();
    let all = sim.records().values();
    // Work done: generated tokens, and prompts by what they cost beside a decode.
    let work: f64 = all
        .map(|r| {
            let tokens = r.tokens.iter().filter(|t| **t >= from).count() as f64;
            let prompt = r.tokens.first().is_some_and(|t| *t >= from);
            tokens + if prompt { f64::from(r.prompt) * 2.2 / 2.4 } else { 0.0 }
        })
        .sum();
    let busy: f64 = sim.busy().iter().map(Duration::as_secs_f64).sum();
    let ms = |d: Option<Duration>| d.map_or(f64::NAN, |d| d.as_secs_f64() * 1e3);
    Outcome {
        name,
        tokens_per_second: work / seconds,
        busy: busy / (4.0 * sim.now().as_secs_f64()),
        gap: [ms(percentile(&mut gaps, 0.5)), ms(percentile(&mut gaps, 0.99))],
        first: ms(percentile(&mut firsts, 0.5)),
    }
}

fn ablation() -> Vec<Outcome> {
    const EVEN: [f64; 4] = [0.25; 4];
    // Nodes of speeds 2:1:1:2, mean 1, cut by speed and in equal parts.
    const BY_SPEED: [f64; 4] = [0.25; 4];
    let equal = [1.5 / 8.0, 3.0 / 8.0, 3.0 / 8.0, 1.5 / 8.0];
    let rows = vec![
        mixed("all policies", EVEN, 1, |_| {}),
        mixed("throttling off", EVEN, 1, |c| {
            c.policy.cohorts = false;
            c.policy.timed_chunks = false;
        }),
        mixed("decodes not spread", EVEN, 1, |c| c.policy.cohorts = false),
        mixed("fixed chunks of 64", EVEN, 1, |c| c.policy.timed_chunks = false),
        mixed("fixed chunks of 256", EVEN, 1, |c| {
            c.policy.timed_chunks = false;
            c.prefill_chunk = 256;
        }),
        mixed("10 ms links", EVEN, 10, |_| {}),
        mixed("10 ms links, 4 in flight", EVEN, 10, |c| {
            c.policy.measured_from = None;
            c.max_in_flight = 4;
        }),
        mixed("2:1:1:2 by speed", BY_SPEED, 1, |_| {}),
        mixed("2:1:1:2 equal split", equal, 1, |_| {}),
    ];
    println!("\nFour stages, 32 chats among 3 streams of prompts of 1,000 tokens");
    println!(
        "{:<26} {:>12} {:>7} {:>10} {:>10} {:>10}",
        "", "work, tok/s", "busy", "ITL p50", "ITL p99", "TTFT p50"
    );
    for r in &rows {
        println!(
            "{:<26} {:>12.0} {:>6.1}% {:>7.0} ms {:>7.0} ms {:>7.0} ms",
            r.name,
            r.tokens_per_second,
            r.busy * 100.0,
            r.gap[0],
            r.gap[1],
            r.first
        );
    }
    rows
}

fn main() -> std::io::Result<()> {
    let series = efficiencies();
    let outcomes = ablation();
    let Some(folder) = std::env::args_os().nth(1).map(std::path::PathBuf::from) else {
        return Ok(());
    };
    std::fs::create_dir_all(&folder)?;
    let lines = plot::lines("Pipeline efficiency", &STAGES, &series);
    std::fs::write(folder.join("efficiency.svg"), lines)?;
    let bar = |value: fn(&Outcome) -> f64| -> Vec<Bar> {
        outcomes.iter().map(|o| Bar { name: o.name.into(), value: value(o) }).collect()
    };
    let panels = [
        ("work, tokens/s", bar(|o| o.tokens_per_second)),
        ("time between a chat's tokens, p99, ms", bar(|o| o.gap[1])),
        ("time to a chat's first token, p50, ms", bar(|o| o.first)),
    ];
    std::fs::write(folder.join("ablation.svg"), plot::bars(&panels))
}
