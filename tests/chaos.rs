//! A short run of faults under load. Longer ones: `cargo bench --bench chaos -- --faults 200`, or this
//! with `MILLRACE_CHAOS_FAULTS` and `MILLRACE_CHAOS_SEED`.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use harness::alone;
use harness::chaos::{Dice, Plan, run};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |v| v.parse().unwrap())
}

#[test]
fn clients_lose_nothing_whatever_breaks() {
    let _turn = alone();
    let plan = Plan {
        seed: number("MILLRACE_CHAOS_SEED", 5),
        faults: number("MILLRACE_CHAOS_FAULTS", 12) as usize,
        streams: 16,
        stages: 2,
        stand_bys: 1,
        patience: Duration::from_secs(number("MILLRACE_CHAOS_SECONDS", 90)),
    };
    let report = run(plan, |line| eprintln!("{line}"));
    eprintln!("{}", report.table());
    assert!(report.wrong.is_empty(), "{:#?}", report.wrong);
    assert!(report.faults.values().sum::<usize>() > 0 && report.requests > 0, "{report:?}");
}

#[test]
fn a_schedule_follows_from_its_seed() {
    let faults = |seed| {
        let mut dice = Dice::new(seed);
        (0..200).map(|_| dice.fault(3)).collect::<Vec<_>>()
    };
    assert_eq!(faults(1), faults(1));
    assert_ne!(faults(1), faults(2));
    let mut kinds: Vec<_> = faults(1).iter().map(|f| f.name()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), 10, "{kinds:?}");
}
