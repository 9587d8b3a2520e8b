//! Damaged inputs for everything that reads bytes of others; a bounded number, the same each time.
//! The long run: `cargo bench --bench fuzz -- --seconds 3600`.
#![allow(clippy::unwrap_used)]

use harness::fuzz::{Http, Run, targets};

#[test]
fn no_input_breaks_what_reads_it() {
    for target in targets() {
        let mut run = Run::start(&target, 1);
        run.go_on(1500);
        eprintln!("{:<20} {:?}", target.name, run.counts);
    }
}

#[test]
fn no_body_breaks_the_http_api() {
    let http = Http::start();
    let mut run = Run::start(&http.target, 1);
    run.go_on(300);
    eprintln!("{:<20} {:?}", http.target.name, run.counts);
}
