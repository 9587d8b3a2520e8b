//! The pipelines of the efficiency tables: nodes that take a fixed time for a layer, links that delay.
//! Shared by the tables in virtual time and by the one over real QUIC.

use std::time::Duration;

use millrace_shared::id::SequenceId;
use millrace_shared::scheduler::{Kind, NewSequence, Policy, Priority, SchedulerConfig};
use millrace_shared::sim::{PipelineModel, Simulation};

/// Equal layers of the model.
pub(crate) const LAYERS: u32 = 128;
/// Most rows of a micro-batch.
pub(crate) const ROWS: u32 = 8;
/// Every link's delay, each way.
pub(crate) const LINKS_MS: [u32; 4] = [0, 1, 5, 20];

pub(crate) fn config(stages: u32, rows: u32, sequences: u32) -> SchedulerConfig {
    SchedulerConfig {
        num_blocks: sequences * 80,
        block_size: 16,
        max_num_seqs: sequences,
        max_waiting: sequences,
        max_in_flight: 2 * stages + 2,
        prefill_chunk: rows,
        max_batch_tokens: rows,
        max_model_len: 4096,
        policy: Policy {
            measured_from: Some(stages + 1),
            prefix_cache: false.into(),
            speculate: false,
            ..Policy::DEFAULT
        },
    }
}

pub(crate) fn sequence(
    id: u64,
    at: Duration,
    prompt: u32,
    answer: u32,
    client: u64,
) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        prompt: vec![1; prompt as usize],
        max_new_tokens: answer,
        kind: Kind::Generate,
        submitted: at,
        deadline: None,
        client,
        priority: Priority::Normal,
    }
}

/// Speeds in the ratio 2:1:1, over and over, or all the same; mean 1.
pub(crate) fn speeds(stages: u32, even: bool) -> Vec<f64> {
    let one = |i| if !even && i % 3 == 0 { 2.0 } else { 1.0 };
    let all: Vec<f64> = (0..stages).map(one).collect();
    let mean = all.iter().sum::<f64>() / f64::from(stages);
    all.iter().map(|s| s / mean).collect()
}

/// What a layer takes a node of this speed among so many: a stage of an equal share takes 20 ms at
/// speed 1.
pub(crate) fn layer_seconds(stages: u32, speed: f64) -> f64 {
    20e-3 / f64::from(LAYERS) * f64::from(stages) / speed
}

/// As many streams as keep `2 x stages + 4` micro-batches full, and a quarter more.
pub(crate) fn streams(stages: u32) -> u32 {
    (2 * stages + 4) * ROWS * 5 / 4
}

/// Tokens of an answer: different ones, so that streams do not stay in step.
pub(crate) fn answer_tokens(n: u64) -> u32 {
    24 + (n * 17 % 32) as u32
}

/// The best cut of equal layers: the next layer goes where it makes the least difference.
fn cut(speeds: &[f64]) -> Vec<u32> {
    let mut layers = vec![0u32; speeds.len()];
    for _ in 0..LAYERS {
        let time = |i: usize| f64::from(layers[i] + 1) / speeds[i];
        let best = (0..layers.len()).min_by(|&a, &b| time(a).total_cmp(&time(b)));
        layers[best.unwrap_or(0)] += 1;
    }
    layers
}

/// Tokens per second of stages that take so many seconds each, with as many streams as they take.
fn tokens_per_second(seconds: &[f64], link: Duration, change: impl Fn(&mut Policy)) -> f64 {
    let stages = seconds.len() as u32;
    let streams = streams(stages);
    let mut config = config(stages, ROWS, streams);
    change(&mut config.policy);
    if config.policy.measured_from.is_none() {
        config.max_in_flight = stages;
    }
    let mut sim = Simulation::new(config, PipelineModel::constant(seconds.to_vec(), link));
    for n in 0..u64::from(streams) {
        sim.submit(sequence(n, Duration::ZERO, 1, answer_tokens(n), n % 16));
    }
    let slowest = seconds.iter().copied().fold(0.0, f64::max);
    let (from, until) = (slowest * 600.0, slowest * 1800.0);
    let mut next = u64::from(streams);
    sim.run(Duration::from_secs_f64(until), |_, record| {
        next += 1;
        Some(sequence(next, record.ended?, 1, answer_tokens(next), next % 16))
    });
    let during = |t: &&Duration| (from..until).contains(&t.as_secs_f64());
    let tokens = sim.records().values().flat_map(|r| &r.tokens).filter(during).count();
    tokens as f64 / (until - from)
}

/// Tokens per second over the sum of what each node alone does with the whole model.
pub(crate) fn efficiency(
    stages: u32,
    even: bool,
    link_ms: u32,
    change: impl Fn(&mut Policy),
) -> f64 {
    let speeds = speeds(stages, even);
    let step = |layers: u32, speed: f64| f64::from(layers) * layer_seconds(stages, speed);
    let seconds: Vec<f64> = cut(&speeds).iter().zip(&speeds).map(|(&l, &s)| step(l, s)).collect();
    let alone: f64 =
        speeds.iter().map(|&s| tokens_per_second(&[step(LAYERS, s)], Duration::ZERO, |_| {})).sum();
    let link = Duration::from_millis(link_ms.into());
    tokens_per_second(&seconds, link, change) / alone
}
