//! `millrace demo`, as a newcomer types it.
#![allow(clippy::unwrap_used)]

use harness::processes::{command, run};
use harness::{alone, model_arg};

fn demo(flags: &[&str]) -> (String, String) {
    let home = tempfile::tempdir().unwrap();
    let mut demo = command("millrace", home.path());
    demo.arg("demo").args(["--model", model_arg(), "--max-tokens", "40"]).args(flags);
    let output = run(demo);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    (out, err)
}

#[test]
fn a_stage_dies_and_no_token_is_lost() {
    let _turn = alone();
    let (out, err) = demo(&["--at", "10"]);
    let last = out.lines().last().unwrap();
    assert!(last.starts_with("stage 2 died at token 10, pause "), "{out}\n{err}");
    assert!(last.contains("40 of 40 tokens identical to the run without the fault"), "{out}");
    assert!(out.contains("[kill -9 node-") && out.contains("[goes on after "), "{out}\n{err}");
}

#[test]
fn the_coordinator_dies_and_no_token_is_lost() {
    let _turn = alone();
    let (out, err) = demo(&["--kill", "coordinator", "--at", "10"]);
    let last = out.lines().last().unwrap();
    assert!(last.starts_with("the coordinator died at token 10, pause "), "{out}\n{err}");
    assert!(last.contains("40 of 40 tokens identical to the run without the fault"), "{out}");
}

#[test]
fn nobody_dies_where_nobody_should() {
    let _turn = alone();
    let (out, err) = demo(&["--no-kill"]);
    assert!(out.lines().last().unwrap().contains("40 of 40 tokens identical"), "{out}\n{err}");
    assert!(!out.contains("kill -9"), "{out}");
}
