//! Damaged inputs for everything that reads bytes of others; a bounded number, the same each time.
//! The long run: `cargo bench --bench fuzz -- --seconds 3600`; `MILLRACE_FUZZ_TIMES` makes this one
//! longer, `MILLRACE_FUZZ_SEED` another one.
#![allow(clippy::unwrap_used)]

use harness::fuzz::{Counting, Http, Run, targets};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |v| v.parse().unwrap())
}

#[test]
fn no_input_breaks_what_reads_it() {
    for target in targets() {
        let mut run = Run::start(&target, number("MILLRACE_FUZZ_SEED", 1));
        run.go_on(1500 * number("MILLRACE_FUZZ_TIMES", 1));
        eprintln!("{:<20} {:?}", target.name, run.counts);
    }
}

#[test]
fn no_body_breaks_the_http_api() {
    let http = Http::start();
    let mut run = Run::start(&http.target, number("MILLRACE_FUZZ_SEED", 1));
    run.go_on(300 * number("MILLRACE_FUZZ_TIMES", 1));
    eprintln!("{:<20} {:?}", http.target.name, run.counts);
}
