//! The long run of damaged inputs: `cargo bench --bench fuzz -- --seconds 3600 --seed 1`.
//!
//! Every target, or the one that `--only NAME` names, gets its share of the time; an input that breaks one is printed and ends the run.
#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use harness::fuzz::{Counting, Http, Run, targets};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Inputs between looks at the clock.
const ROUND: u64 = 50;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let number = |name: &str, default: u64| {
        let at = words.iter().position(|w| w == name);
        let word = at.and_then(|at| words.get(at + 1));
        word.map_or(default, |w| w.parse().unwrap_or_else(|e| panic!("{name} {w}: {e}")))
    };
    let (seconds, seed) = (number("--seconds", 60), number("--seed", 1));
    let mut all = targets();
    all.push(Http::start().target);
    if let Some(at) = words.iter().position(|w| w == "--only") {
        all.retain(|target| words.get(at + 1).is_some_and(|name| name == target.name));
        assert!(!all.is_empty(), "--only names no target");
    }
    let share = Duration::from_secs(seconds) / all.len() as u32;
    println!("{:<20} {:>12} {:>12}", "target", "inputs", "accepted");
    let mut sum = 0;
    for target in &all {
        let mut run = Run::start(target, seed);
        let begun = Instant::now();
        while begun.elapsed() < share {
            run.go_on(ROUND);
        }
        sum += run.counts.inputs;
        println!("{:<20} {:>12} {:>12}", target.name, run.counts.inputs, run.counts.accepted);
    }
    println!("{sum} inputs in {seconds} s, seed {seed}: nothing broke");
}
