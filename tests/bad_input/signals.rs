//! Told to stop twice: the first signal waits for what is in flight, the second one does not.

use harness::processes::{Coordinator, Process};
use harness::{alone, http};
use nix::sys::signal::Signal;

/// The exit status of programs that were told twice.
const AT_ONCE: i32 = 130;

fn cluster(root: &std::path::Path) -> (Coordinator, Process) {
    let flags = ["--engine", "mock", "--kv-cache-tokens", "8192"];
    let coordinator = Coordinator::start(root, 1, &flags);
    let node = coordinator.node("node-a", &["--engine", "mock"]);
    coordinator.wait_ready();
    (coordinator, node)
}

/// Sends the first signal, waits until the program says what it does, and sends the second one.
fn twice(process: &mut Process, says: &str, signals: [Signal; 2]) -> Option<i32> {
    process.signal(signals[0]);
    process.wait_log(says, |log| {
        (log.contains(says) && log.contains("once more to stop at once")).then_some(())
    });
    // It would wait for tens of seconds.
    assert!(process.is_alive(), "{}", process.log());
    process.signal(signals[1]);
    process.wait().code()
}

/// A node that hands its layers over waits for the coordinator, which says nothing here.
#[test]
fn a_node_that_is_told_twice_ends_at_once() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let (coordinator, mut node) = cluster(root.path());
    coordinator.process.signal(Signal::SIGSTOP);
    let ended = twice(&mut node, "handing the layers over", [Signal::SIGTERM; 2]);
    coordinator.process.signal(Signal::SIGCONT);
    assert_eq!(ended, Some(AT_ONCE), "{}", node.log());
}

/// A coordinator waits for the streams of plain HTTP clients; this one's node says nothing.
#[test]
fn a_coordinator_that_is_told_twice_ends_at_once() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, mut node) = cluster(root.path());
    node.signal(Signal::SIGSTOP);
    let key = coordinator.client.api_key.clone();
    let body = br#"{"prompt": "a", "max_tokens": 50, "stream": true}"#;
    let stream = http::begin_post(coordinator.http(), "/v1/completions", &key, body);
    assert_eq!(stream.status, 200);
    let signals = [Signal::SIGTERM, Signal::SIGINT];
    let ended = twice(&mut coordinator.process, "stopping", signals);
    node.signal(Signal::SIGCONT);
    assert_eq!(ended, Some(AT_ONCE), "{}", coordinator.process.log());
    drop(stream);
    // What was cut short is whole: it starts again, and its node comes back.
    coordinator.start_again(1, &["--engine", "mock", "--kv-cache-tokens", "8192"]);
    coordinator.wait_ready();
    assert!(node.is_alive());
    assert_eq!(coordinator.process.terminate().code(), Some(0));
}
