//! Whether plans come true: what the planner predicts for a real model beside what is measured.
//!
//! `cargo bench --bench prediction` (the model: `$MILLRACE_TEST_MODEL`, else from the cache). First
//! live: a coordinator, two node processes with a core each and as many clients as the plan is for,
//! all of them decoding, until the coordinator has brought the nodes' measurements up to date by what
//! it sees (they share a machine, and were measured alone); then predicted and measured. Then 3 to 6 stages, which have no cores here: every stage of the plan is
//! measured alone on one core, with the real weights and the rows that the plan gives it, and the
//! times are replayed in virtual time around the real scheduler. The equal split is judged in the
//! same way. Nodes that are twice as fast as others are made by scaling times. `live` or `replay`
//! after `--` runs one part alone.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod live;
mod replay;
mod stages;

use std::ffi::OsString;

use millrace_coordinator::plan::costs::{ModelParts, node_costs};
use millrace_shared::partition::{Link, Network, NodeCosts};
use millrace_shared::wire::control::StageProfile;

/// Link between stages in virtual time: what a hop costs on a good local network.
const LINK: Link = Link { rtt_seconds: 0.000_2, bytes_per_second: 1.25e9 };

/// Largest error of a prediction that is good enough.
const MOST_ERROR: f64 = 0.10;

/// A prediction beside what came of it.
struct Outcome {
    name: String,
    cut: Vec<u32>,
    micro_batches: u32,
    rows: u32,
    predicted: f64,
    measured: f64,
    /// Milliseconds of each stage for the plan's rows, predicted and measured.
    stages: Vec<[f64; 2]>,
}

impl Outcome {
    fn error(&self) -> f64 {
        self.predicted / self.measured - 1.0
    }

    fn line(&self, equal: Option<&Self>) -> String {
        let cut = self.cut.iter().map(u32::to_string).collect::<Vec<_>>().join("+");
        let gain = equal.map_or_else(String::new, |equal| {
            let gain = |of: fn(&Self) -> f64| (of(self) / of(equal) - 1.0) * 100.0;
            format!("   {:+6.1} % ({:+.1} %)", gain(|o| o.measured), gain(|o| o.predicted))
        });
        let wrong = |[a, b]: &[f64; 2]| format!("{a:.2}/{b:.2}");
        let stages: Vec<String> = self.stages.iter().map(wrong).collect();
        let stages = match self.error().abs() > MOST_ERROR {
            true => format!("   ms by stage, predicted/measured: {}", stages.join(" ")),
            false => String::new(),
        };
        format!(
            "{:<24} {cut:<18} {:>2} x {:<3} {:>9.1} {:>9.1} {:>+7.1} %{gain}{stages}",
            self.name,
            self.micro_batches,
            self.rows,
            self.predicted,
            self.measured,
            self.error() * 100.0
        )
    }
}

/// The heading of the lines of [`Outcome`].
const HEADING: &str = "                         layers of stages   m x rows  predicted  measured     error   gain over equal split (predicted)";

/// Nodes of these speeds, by one node's measurements, linked alike.
fn nodes(profile: &StageProfile, speeds: &[f64]) -> (Vec<NodeCosts>, Network) {
    let node = |(i, speed): (usize, &f64)| {
        node_costs(&format!("node-{i}"), &profile.slower(1.0 / speed), 1 << 40)
    };
    (speeds.iter().enumerate().map(node).collect(), Network::uniform(speeds.len(), LINK))
}

/// What the planner needs of the model, for so many streams.
fn parts(files: &millrace_shared::model::ModelFiles) -> ModelParts<'_> {
    ModelParts { config: &files.config, tensors: &files.tensors }
}

fn main() {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let told = |word: &str| args.iter().any(|a| a == word);
    if told(live::NODE) {
        return live::node(&args);
    }
    let both = !told("live") && !told("replay");
    println!("tokens a second of all streams; m: micro-batches in flight\n\n{HEADING}");
    let mut worst: f64 = 0.0;
    if both || told("live") {
        worst = worst.max(live::run());
    }
    if both || told("replay") {
        worst = worst.max(replay::run());
    }
    println!("\nlargest error {:.1} % (at most 10 % is asked for)", worst * 100.0);
    if worst > MOST_ERROR {
        std::process::exit(1);
    }
}
