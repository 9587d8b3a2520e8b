//! The runbook's commands (`deploy/README.md`), in its order, by a shell, against a cluster of processes.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use harness::processes::{Coordinator, Process, command, succeeds};
use harness::{alone, http, model_arg, program, wait_for};

/// What sets a machine up, talks to an orchestrator, or is a screen. A test of the command line's parses
/// those of our programs.
const NOT_HERE: [&str; 6] =
    ["cargo build", "install ", "docker compose", "helm install", "kubectl ", "millrace top"];
/// What adds a node, and goes on.
const ADDS: &str = "millrace-node run --coordinator ";
/// The request that the page looks at.
const REQUEST: &str = "0199a5b0-0000-7000-8000-000000000000";

/// Every line of the `sh` blocks of the page.
fn lines() -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/README.md");
    let page = std::fs::read_to_string(page).unwrap();
    let blocks = page.split("```").skip(1).step_by(2).filter_map(|b| b.strip_prefix("sh\n"));
    blocks.flat_map(str::lines).filter(|l| !l.trim().is_empty()).map(str::to_owned).collect()
}

/// A shell that finds this workspace's programs, and this cluster.
fn shell(line: &str, cluster: &Coordinator) -> Command {
    let programs = program("millrace");
    let path = std::env::var("PATH").unwrap();
    let mut shell = command("/bin/sh", &cluster.root);
    shell.env("PATH", format!("{}:{path}", programs.parent().unwrap().display()));
    shell.env("MILLRACE_DIR", cluster.dir()).args(["-c", line]);
    shell
}

#[test]
fn its_commands_do_what_it_says() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let cluster = Coordinator::start(root, 1, &[]);
    let _first = cluster.node("gpu-1", &[]);
    cluster.wait_ready();
    let body = br#"{"prompt": "Once", "max_tokens": 4}"#;
    let named = format!("x-request-id: {REQUEST}\r\n");
    let key = &cluster.client.api_key;
    let asked = http::begin_post_with(cluster.http(), "/v1/completions", key, &named, body).whole();
    assert_eq!((asked.status, asked.header("x-request-id")), (200, Some(REQUEST)));

    let places = [
        ("/usr/share/bash-completion/completions/millrace", root.join("completions")),
        ("/var/lib/private/millrace", cluster.dir()),
        ("/var/lib/millrace", root.join("restored")),
        ("/backup/cluster.backup", root.join("cluster.backup")),
        ("10.0.0.1:8001", cluster.client.quic.clone().into()),
        ("smollm2:135m", model_arg().into()),
    ];
    let (mut token, mut added, mut done) = (String::new(), None::<Process>, 0);
    for page_line in lines() {
        if NOT_HERE.iter().any(|what| page_line.starts_with(what)) {
            continue;
        }
        let mut line = page_line.replace("mlrj1.TOKEN", &token);
        for (there, here) in &places {
            line = line.replace(there, here.to_str().unwrap());
        }
        done += 1;
        if line.starts_with(ADDS) {
            let own =
                format!("exec {line} --dir gpu-2 --name gpu-2 --threads 1 --listen 127.0.0.1:0");
            let mut node = Process::start("gpu-2", shell(&own, &cluster), root);
            node.wait_log("link", |log| log.contains("linked to the coordinator").then_some(()));
            added = Some(node);
            continue;
        }
        let (out, _) = succeeds(shell(&line, &cluster));
        match page_line.as_str() {
            l if l.starts_with("millrace-coordinator token create") => {
                out.trim().clone_into(&mut token);
            }
            "millrace nodes drain gpu-2" => {
                let code = added.as_mut().unwrap().wait().code();
                assert_eq!(code, Some(0), "{}", added.as_ref().unwrap().log());
            }
            "millrace nodes" => assert!(out.contains("gpu-1"), "{out}"),
            l if l.contains("request show") => assert!(out.contains(REQUEST), "{out}"),
            _ => {}
        }
    }
    assert!(done > 20, "the page has commands: {done}");
    for made in
        ["completions", "cluster.backup", "restored/client.toml", "help.zip", "cluster.toml"]
    {
        assert!(root.join(made).metadata().is_ok_and(|m| m.len() > 0), "{made}");
    }
    // Nothing of it has harmed the cluster.
    let asked = http::post(cluster.http(), "/v1/completions", key, body);
    assert_eq!(asked.status, 200, "{}", asked.text());
    wait_for("one node", || {
        let (nodes, _) = succeeds(shell("millrace nodes", &cluster));
        (!nodes.contains("gpu-2")).then_some(())
    });
}
