//! The long run of damaged inputs: `cargo bench --bench fuzz -- --seconds 3600 --seed 1`.
//!
//! Every target, or the one that `--only NAME` names, or those from `--from NAME` on, gets its share of the time; an input that breaks one is printed and ends the run.
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
    let named = |option| {
        let at = words.iter().position(|w| w == option)?;
        let name = words.get(at + 1);
        let found = all.iter().position(|target| name.is_some_and(|name| name == target.name));
        Some(found.unwrap_or_else(|| panic!("{option} names no target")))
    };
    let (only, from) = (named("--only"), named("--from"));
    if let Some(at) = only {
        all = vec![all.swap_remove(at)];
    } else if let Some(at) = from {
        all.drain(..at);
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
