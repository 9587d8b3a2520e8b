//! `millrace demo`, as a newcomer types it.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use harness::processes::{Process, command, succeeds};
use harness::{alone, model_arg, wait_for};
use nix::sys::signal::Signal;

fn demo(flags: &[&str]) -> (String, String) {
    let home = tempfile::tempdir().unwrap();
    let mut demo = command("millrace", home.path());
    demo.arg("demo").args(["--model", model_arg(), "--max-tokens", "40"]).args(flags);
    succeeds(demo)
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

/// Processes that were started with a path below `folder`.
fn living(folder: &Path) -> Vec<String> {
    let folder = folder.to_str().unwrap();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|e| std::fs::read(e.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(folder)).collect()
}

#[test]
fn ctrl_c_ends_all_of_it_whenever_it_comes() {
    let _turn = alone();
    let home = tempfile::tempdir().unwrap();
    let parts = home.path().join("parts");
    std::fs::create_dir(&parts).unwrap();
    // While the coordinator starts, while nodes do, and in the middle of the answer.
    let moments: [&dyn Fn(&str) -> bool; 3] = [
        &|_| living(&parts).iter().any(|line| line.contains("demo-part coordinator")),
        &|_| living(&parts).iter().any(|line| line.contains("demo-part node")),
        &|log| log.contains("[kill -9 node-"),
    ];
    for (i, has_come) in moments.into_iter().enumerate() {
        let mut demo = command("millrace", home.path());
        demo.env("TMPDIR", &parts).args(["demo", "--model", model_arg(), "--at", "10"]);
        let mut demo = Process::start(&format!("demo-{i}"), demo, home.path());
        demo.wait_log("the moment", |log| has_come(log).then_some(()));
        demo.signal(Signal::SIGINT);
        let status = demo.wait();
        assert_eq!(status.code(), Some(130), "{}", demo.log());
        wait_for("end of its processes", || living(&parts).is_empty().then_some(()));
        let left: Vec<_> = std::fs::read_dir(&parts).unwrap().collect();
        assert!(left.is_empty(), "moment {i}: {left:?}");
    }
}
