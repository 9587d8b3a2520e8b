//! Plans for 3 to 6 stages: each stage measured alone, the times replayed around the scheduler.

use std::time::Duration;

use millrace_coordinator::plan::best;
use millrace_shared::id::SequenceId;
use millrace_shared::model::Dtype;
use millrace_shared::partition::{Choice, Goal, LayerRange, Problem, StageCut, Wish};
use millrace_shared::scheduler::cost::StageCost;
use millrace_shared::scheduler::{Kind, NewSequence, Policy, Priority, SchedulerConfig};
use millrace_shared::sim::{PipelineModel, Simulation};

use super::stages::{Bench, Part};
use super::{LINK, Outcome, nodes, parts};

/// Streams of each node.
const STREAMS: u32 = 16;

/// Speeds of the nodes, and the name of the list.
fn clusters() -> Vec<(&'static str, Vec<f64>)> {
    let turns = |n: usize| (0..n).map(|i| if i % 3 == 0 { 2.0 } else { 1.0 }).collect();
    (3..=6).flat_map(|n| [("alike", vec![1.0; n]), ("2:1:1", turns(n))]).collect()
}

/// A cut of a cluster, with what is predicted of it.
struct Case {
    name: String,
    speeds: Vec<f64>,
    choice: Choice,
}

impl Case {
    /// The stages, as they are measured.
    fn parts(&self) -> Vec<Part> {
        let last = self.choice.stages.len() - 1;
        let stages = self.choice.stages.iter().enumerate();
        stages
            .map(|(i, s)| Part { first: s.range.first, end: s.range.end, last: i == last })
            .collect()
    }

    /// Rows at which a stage is measured: those of the plan, and fewer, for the scheduler's own
    /// micro-batches differ from them by a few.
    fn rows(&self) -> [u32; 2] {
        [self.choice.forecast.rows / 2, self.choice.forecast.rows].map(|r| r.max(1))
    }
}

/// The largest error.
pub(crate) fn run() -> f64 {
    let mut bench = Bench::new();
    let files = bench.files.clone();
    let parts = parts(&files);
    let profile = bench.profile(&parts.profile_spec(1));
    let model = parts.costs(65_536, Dtype::F16, 256, None);
    let mut cases = Vec::new();
    for (name, speeds) in clusters() {
        let (nodes, network) = nodes(&profile, &speeds);
        let problem = Problem { model: &model, nodes: &nodes, network: &network, rows: 1.0 };
        let wish = Wish {
            goal: Goal::Throughput,
            streams: STREAMS * speeds.len() as u32,
            stages: Some(speeds.len()),
            micro_batches: None,
        };
        let name = format!("{} {name}", speeds.len());
        let planned = best(&problem, &wish, &[]).unwrap();
        let equal = Choice::of(&problem, &wish, equal(bench.layers(), speeds.len()));
        cases.push((
            Case { name, speeds: speeds.clone(), choice: planned },
            Case { name: "  equal split".into(), speeds, choice: equal },
        ));
    }
    for case in cases.iter().flat_map(|(a, b)| [a, b]) {
        case.parts().into_iter().for_each(|part| bench.want(part, case.rows()));
    }
    bench.measure();
    let mut worst: f64 = 0.0;
    for (planned, equal) in &cases {
        let [planned, equal] = [planned, equal].map(|case| outcome(&bench, case));
        println!("{}\n{}", planned.line(Some(&equal)), equal.line(None));
        worst = worst.max(planned.error().abs()).max(equal.error().abs());
    }
    worst
}

/// As many layers for each, in the order of the nodes.
fn equal(layers: u32, nodes: usize) -> Vec<StageCut> {
    let n = nodes as u32;
    let at = |i: u32| layers * i / n;
    let stage =
        |i| StageCut { node: i as usize, range: LayerRange { first: at(i), end: at(i + 1) } };
    (0..n).map(stage).collect()
}

fn outcome(bench: &Bench, case: &Case) -> Outcome {
    let f = &case.choice.forecast;
    let [few, all] = case.rows();
    let cost = |(part, stage): (Part, &StageCut)| {
        let (least, most) = (bench.seconds(part, few), bench.seconds(part, all));
        let row = ((most - least) / f64::from(all - few).max(1.0)).max(0.0);
        let scale = 1.0 / case.speeds[stage.node];
        StageCost {
            fixed: (most - row * f64::from(all)) * scale,
            decode_row: row * scale,
            prefill_token: row * scale,
            ..StageCost::default()
        }
    };
    let measured =
        |(part, stage): (Part, &StageCut)| bench.seconds(part, all) / case.speeds[stage.node] * 1e3;
    let stages = case.parts().into_iter().zip(&case.choice.stages).map(measured);
    let stages = f.stage_seconds.iter().zip(stages).map(|(p, m)| [p * 1e3, m]).collect();
    let costs: Vec<StageCost> =
        case.parts().into_iter().zip(&case.choice.stages).map(cost).collect();
    Outcome {
        name: case.name.clone(),
        cut: case.choice.stages.iter().map(|s| s.range.len()).collect(),
        micro_batches: f.micro_batches,
        rows: f.rows,
        predicted: f.tokens_per_second,
        measured: replayed(costs, f.streams, f.micro_batches, f.period_seconds),
        stages,
    }
}

/// Tokens a second of a closed loop in virtual time.
fn replayed(stages: Vec<StageCost>, streams: u32, micro_batches: u32, period: f64) -> f64 {
    let link = Duration::from_secs_f64(LINK.rtt_seconds / 2.0);
    let config = SchedulerConfig {
        num_blocks: streams * 80,
        block_size: 64,
        max_num_seqs: streams,
        max_waiting: streams,
        max_in_flight: micro_batches,
        prefill_chunk: 64,
        max_batch_tokens: streams + 64,
        max_model_len: 4096,
        policy: Policy { prefix_cache: false.into(), speculate: false, ..Policy::DEFAULT },
    };
    let mut sim = Simulation::new(config, PipelineModel { stages, link, jitter: 0.0 });
    for id in 0..u64::from(streams) {
        sim.submit(NewSequence {
            id: SequenceId(id),
            prompt: vec![1; 8],
            max_new_tokens: 4000,
            kind: Kind::Generate,
            submitted: Duration::ZERO,
            deadline: None,
            client: id % 16,
            priority: Priority::Normal,
        });
    }
    // Every stream decodes from the first until the last of these moments.
    let round = period * f64::from(micro_batches);
    let (from, until) = (round * 400.0, round * 1600.0);
    sim.run(Duration::from_secs_f64(until), |_, _| None);
    let during = |t: &&Duration| (from..until).contains(&t.as_secs_f64());
    let tokens = sim.records().values().flat_map(|r| &r.tokens).filter(during).count();
    tokens as f64 / (until - from)
}
