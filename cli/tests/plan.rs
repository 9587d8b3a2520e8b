//! `millrace plan` as it is typed: what is wrong is named, with status 2, before any model is looked
//! for. What plans say is tested in `coordinator/tests/plan_report.rs`.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn plan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace")).arg("plan").args(args).output().unwrap()
}

#[track_caller]
fn refused(args: &[&str], says: &[&str]) {
    let output = plan(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    for part in says {
        assert!(text.contains(part), "{part} in: {text}");
    }
}

#[test]
fn wrong_usage_is_named() {
    refused(&["--model", "m.gguf"], &["--cluster"]);
    refused(&["--model", "m.gguf", "--nodes", "3xfoo"], &["no kind 'foo'", "3xh100-80g"]);
    refused(&["--model", "m.gguf", "--nodes", "l4-24g", "--slo", "ttft=1"], &["ttft=1s,itl=60ms"]);
    refused(&["--model", "m.gguf", "--cluster", "/nowhere.toml"], &["/nowhere.toml"]);
    refused(&["--model", "m.gguf", "--nodes", "l4-24g", "--pin", "l4=5"], &["m.gguf"]);
    refused(&["--model", "m.gguf", "--nodes", "l4-24g", "--pin", "l4:5"], &["NAME=FIRST-LAST"]);
    refused(&["--model", "nowhere.gguf", "--nodes", "l4-24g"], &["nowhere.gguf"]);

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(&file, "[[node]]\nname = \"a\"\nmemory = 1\n").unwrap();
    let path = file.to_str().unwrap();
    refused(&["--model", "m.gguf", "--cluster", path], &["c.toml", "line 3", "memory"]);
}

#[test]
fn help_teaches_by_examples() {
    let output = plan(&["--help"]);
    let text = String::from_utf8_lossy(&output.stdout);
    for part in ["--nodes 3xcpu-4c-16g", "millrace-node probe", "--cluster live", "[[link]]"] {
        assert!(text.contains(part), "{part} in: {text}");
    }
}
