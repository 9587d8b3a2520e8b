//! What a hop takes in a running cluster: two stages on loopback QUIC, no relays.

use std::time::Duration;

use harness::mocked::{Mocked, Shape};
use harness::{ask, block_on};
use millrace_shared::names::metric;
use millrace_shared::options::MicroBatches;
use millrace_shared::wire::rpc::Prompt;

use crate::clients::run as drive;

/// SmolLM2-135M's width: 2,304 bytes a row.
const HIDDEN: u32 = 576;
const LAYERS: u32 = 4;
/// Of a stage: as long as small models take.
const STEP: Duration = Duration::from_millis(2);

fn cluster(micro_batches: MicroBatches, rows: u32, (step, busy_steps): (Duration, bool)) -> Mocked {
    let layer = step / (LAYERS / 2);
    let mut shape = Shape {
        hidden: HIDDEN,
        micro_batches,
        max_batch_tokens: Some(rows),
        ..Shape::of_layers([layer; 2], LAYERS)
    };
    shape.nodes.iter_mut().for_each(|n| n.busy_steps = busy_steps);
    Mocked::start(&shape)
}

/// A histogram of the coordinator: upper ends in seconds, and how many were not above them.
fn histogram(cluster: &Mocked) -> Vec<(f64, f64)> {
    let text = cluster.metrics();
    let start = format!("{}_bucket", metric::HOP);
    let bucket = |line: &str| {
        let end = line.split("le=\"").nth(1)?.split('"').next()?.parse().ok()?;
        let count = line.rsplit(' ').next()?.parse().ok()?;
        Some((end, count))
    };
    text.lines().filter(|l| l.starts_with(&start)).filter_map(bucket).collect()
}

/// Milliseconds below which this share lies, as Prometheus would say: even inside a bucket.
fn quantile(histogram: &[(f64, f64)], share: f64) -> f64 {
    let wanted = histogram.last().map_or(0.0, |(_, all)| all * share);
    let mut below = (0.0, 0.0);
    for &(end, count) in histogram {
        if count >= wanted && count > below.1 {
            let inside = (wanted - below.1) / (count - below.1);
            return (below.0 + inside * (end - below.0)) * 1e3;
        }
        below = (end, count);
    }
    f64::NAN
}

fn show(name: &str, before: &[(f64, f64)], after: &[(f64, f64)]) {
    let during: Vec<(f64, f64)> = after
        .iter()
        .enumerate()
        .map(|(i, &(end, count))| (end, count - before.get(i).map_or(0.0, |b| b.1)))
        .collect();
    let count = during.last().map_or(0.0, |(_, all)| *all);
    println!(
        "{name:<46} {count:>6} hops   p50 {:>6.3} ms   p99 {:>6.3} ms",
        quantile(&during, 0.5),
        quantile(&during, 0.99)
    );
}

/// One sequence after the other, nothing else in flight.
fn alone(cluster: &Mocked, prompt: u32, tokens: u32, times: u32) {
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        for n in 0..times {
            let prompt: Vec<u32> = (0..prompt).map(|i| (i * 7 + n) % cluster.vocab()).collect();
            let answer =
                ask::generate(&client, Prompt::Tokens(prompt.clone()), ask::greedy(tokens)).await;
            let wanted = cluster.expected(&prompt, tokens as usize);
            assert_eq!(answer.expect("an answer").tokens, wanted);
        }
    });
}

pub(crate) fn run() {
    println!("Hops, two stages on loopback QUIC, mock engine, {HIDDEN} floats a row");
    let kinds = [
        ("computes 2 ms", STEP, true),
        ("sleeps 2 ms", STEP, false),
        ("answers at once", Duration::ZERO, false),
    ];
    for (what, step, busy) in kinds {
        let one = cluster(MicroBatches::Fixed(1), 8, (step, busy));
        alone(&one, 1, 20, 1);
        let start = histogram(&one);
        alone(&one, 1, 400, 2);
        let decoded = histogram(&one);
        show(&format!("1 row, nothing else, engine {what}"), &start, &decoded);
        alone(&one, 800, 1, 6);
        show(&format!("8 rows, nothing else, engine {what}"), &decoded, &histogram(&one));
    }
    let many = cluster(MicroBatches::Auto, 8, (STEP, false));
    let warm = (Duration::from_millis(500), Duration::from_millis(2500));
    let seen = drive(&many, 40, |n| 24 + (n * 17 % 32) as u32, warm);
    let name =
        format!("under load: {:.1} rows, stages {:.0} % busy", seen.rows, seen.busiest * 100.0);
    show(&name, &[], &histogram(&many));
    println!();
}
