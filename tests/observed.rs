//! What operators see: a request by the name on its response, the node that holds it up, and the
//! bundle that they send to somebody who helps.
#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::path::Path;

use harness::processes::{Coordinator, Process, command, run};
use harness::{alone, http, wait_for};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Stands for what is nobody's business.
const PRIVATE: &str = "zanzibarquux";

fn completion(tokens: u32) -> Vec<u8> {
    let prompt = format!("The secret word {PRIVATE} opens the gate. Why");
    let body = json!({
        "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "stream": true
    });
    body.to_string().into_bytes()
}

fn report(coordinator: &Coordinator, name: &str) -> http::Response {
    let path = format!("/admin/requests/{name}");
    http::get_with(coordinator.http(), &path, &coordinator.client.api_key)
}

/// A request is found by the name that its client gave it, and so is one that was turned away.
fn names(coordinator: &mut Coordinator) -> http::Exchange {
    let (addr, key) = (coordinator.http(), coordinator.client.api_key.clone());
    let named = |name: &str| format!("x-request-id: {name}\r\n");
    let path = "/v1/completions";
    let stream = http::begin_post_with(addr, path, &key, &named("seen-1"), &completion(1500));
    assert_eq!((stream.status, stream.header("x-request-id")), (200, Some("seen-1")));
    let shown = report(coordinator, "seen-1").json();
    assert_eq!(shown["id"], "seen-1", "{shown}");
    let uuid = stream.header("x-millrace-request-id").unwrap();
    assert_eq!(shown["request"], uuid);
    assert_eq!(report(coordinator, uuid).json()["id"], "seen-1", "its id is a name too");
    let wrong = br#"{"model": "nobody's", "prompt": "x"}"#;
    let refused = http::begin_post_with(addr, path, &key, &named("seen-2"), wrong).whole();
    assert_eq!(refused.status, 404);
    let shown = report(coordinator, "seen-2").json();
    assert!(shown["state"].as_str().unwrap().starts_with("turned away: "), "{shown}");
    coordinator.process.wait_log("the refusal", |log| {
        log.lines().find(|l| l.contains("refused: ") && l.contains("seen-2")).map(|_| ())
    });
    assert_eq!(report(coordinator, "seen-3").status, 404);
    stream
}

/// A node that is stopped is named, whether the words are of a stage that does not answer or of the
/// recovery from its loss.
fn a_stopped_node(coordinator: &Coordinator, node: &Process) {
    node.signal(Signal::SIGSTOP);
    let shown = wait_for("the name of the node that is stopped", || {
        let shown = report(coordinator, "seen-1").json();
        (shown["node"] == "second" && shown["stuck"] == true).then_some(shown)
    });
    assert!(shown["state"].as_str().unwrap().contains("second"), "{shown}");
    let lost = wait_for("the loss", || {
        let shown = report(coordinator, "seen-1").json();
        let state = shown["state"].as_str().unwrap_or_default().to_owned();
        state.contains("waiting for a node").then_some(shown)
    });
    assert_eq!(lost["node"], "second", "{lost}");
    node.signal(Signal::SIGCONT);
}

/// All that is in a zip file: names and contents.
fn unpacked(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut archive = zip::ZipArchive::new(std::fs::File::open(path).unwrap()).unwrap();
    let mut files = Vec::new();
    for at in 0..archive.len() {
        let mut file = archive.by_index(at).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        let name = file.name().unwrap().into_owned();
        files.push((name, bytes));
    }
    files
}

fn a_bundle(coordinator: &Coordinator, text: &str) {
    let path = coordinator.root.join("bundle.zip");
    let mut doctor = command("millrace", &coordinator.root);
    doctor.arg("doctor").arg("--cluster").arg(coordinator.dir().join("client.toml"));
    doctor.arg("--bundle").arg(&path);
    let output = run(doctor);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let files = unpacked(&path);
    let with = |part: &str| files.iter().filter(|(name, _)| name.contains(part)).count();
    for name in ["about.txt", "plan.txt", "metrics.txt", "ring.csv", "status.json", "events.json"] {
        assert_eq!(with(&format!("coordinator/{name}")), 1, "{name}");
    }
    assert_eq!((with("nodes/first-"), with("nodes/second-")), (2, 2));
    let steps = files.iter().filter(|(name, _)| name.ends_with("/ring.csv"));
    for (name, bytes) in steps {
        assert!(bytes.iter().filter(|b| **b == b'\n').count() > 2, "{name} has no steps");
    }
    let secrets = [PRIVATE, text, &coordinator.client.api_key, &coordinator.token, "PRIVATE KEY"];
    for (name, bytes) in &files {
        let found = |secret: &&&str| bytes.windows(secret.len()).any(|w| w == secret.as_bytes());
        assert_eq!(secrets.iter().find(found), None, "in {name}");
    }
}

#[test]
fn operators_see_what_holds_a_request_up() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(root.path(), 2, &["--kv-cache-tokens", "8192"]);
    let nodes = [coordinator.node("first", &[]), coordinator.node("second", &[])];
    coordinator.wait_ready();
    let mut stream = names(&mut coordinator);
    a_stopped_node(&coordinator, &nodes[1]);
    coordinator.wait_ready();
    let mut text = String::new();
    while text.len() < 40 {
        let chunk: Value = serde_json::from_str(&stream.event().expect("more text")).unwrap();
        text.push_str(chunk["choices"][0]["text"].as_str().expect("no error"));
    }
    a_bundle(&coordinator, text.trim());
}
