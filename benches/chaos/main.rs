//! The long run of faults: `cargo bench --bench chaos -- --faults 200 --seed 1`.
//!
//! Ends with status 1 where a request failed or a token differed from the run without faults.
#![allow(clippy::print_stdout)]

use std::time::Duration;

use harness::chaos::{Plan, run};

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let number = |name: &str, default: u64| {
        let at = words.iter().position(|w| w == name);
        let word = at.and_then(|at| words.get(at + 1));
        word.map_or(default, |w| w.parse().unwrap_or_else(|e| panic!("{name} {w}: {e}")))
    };
    let plan = Plan {
        seed: number("--seed", 1),
        faults: number("--faults", 20) as usize,
        streams: number("--streams", 16) as usize,
        stages: number("--stages", 3) as u32,
        stand_bys: number("--stand-bys", 1) as usize,
        patience: Duration::from_secs(number("--seconds", 3600)),
    };
    println!("{plan:?}");
    let report = run(plan, |line| println!("{line}"));
    println!("\n{}", report.table());
    report.wrong.iter().for_each(|what| println!("wrong: {what}"));
    if !report.wrong.is_empty() {
        std::process::exit(1);
    }
}
