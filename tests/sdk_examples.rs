//! The examples of the Rust SDK (`shared/net/examples`), run as somebody who tries them would.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use harness::alone;
use harness::processes::{Coordinator, Process, command, run, succeeds};

/// Runs an example to its end; what it printed on its two outputs.
fn example(name: &str, home: &Path, words: &[&str]) -> (String, String) {
    let mut example = command(&format!("examples/{name}"), home);
    example.args(words);
    succeeds(example)
}

#[test]
fn they_do_what_they_say() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let cluster = Coordinator::start(root, 2, &[]);
    let _nodes = [cluster.node("first", &[]), cluster.node("second", &[])];
    cluster.wait_ready();
    let config = cluster.dir().join("client.toml");
    let config = config.to_str().unwrap();

    let (said, counts) = example("chat", root, &[config, "What is the capital of France?"]);
    assert!(said.contains("Paris"), "{said}");
    assert!(counts.contains("completion_tokens"), "{counts}");

    let (said, _) = example("tools", root, &[config]);
    let (call, answer) = said.split_once('\n').unwrap();
    assert!(call.starts_with("weather({\"city\":\""), "{said}");
    assert!(!answer.trim().is_empty(), "{said}");

    let texts = ["A cat sleeps.", "A cat sleeps.", "The parliament passed a law on taxes."];
    let (near, _) = example("embed", root, &[&[config], &texts[..]].concat());
    let near: Vec<f32> = near.lines().map(|l| l[..6].parse().unwrap()).collect();
    assert_eq!(near.len(), 2);
    assert!((near[0] - 1.0).abs() < 1e-3 && near[1] < near[0], "{near:?}");

    // The program that asked is killed; another one hears the rest, and the same.
    let whole = example("resume", root, &[config, "Once upon a time"]).0;
    assert_eq!(whole.lines().count(), 200);
    let mut asks = command("examples/resume", root);
    asks.args([config, "Once upon a time"]);
    let mut asking = Process::start("asking", asks, root);
    let name = asking.wait_log("answer's begin", |log| {
        let begun = log.lines().any(|l| l.starts_with("5\t"));
        begun.then(|| log.lines().find(|l| l.len() == 36).unwrap().to_owned())
    });
    asking.kill();
    let (rest, end) = example("resume", root, &[config, &name, "6"]);
    let left_out = whole.lines().take(6).map(|l| l.len() + 1).sum::<usize>();
    assert_eq!(rest, whole[left_out..]);
    assert!(end.contains("Length"), "{end}");
}

#[test]
fn they_say_what_is_missing() {
    let root = tempfile::tempdir().unwrap();
    for name in ["chat", "embed", "resume", "tools"] {
        let output = run(command(&format!("examples/{name}"), root.path()));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("usage: {name} CLIENT.toml")), "{said}");
    }
}
