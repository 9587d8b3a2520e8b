//! Whole clusters with the torch engine, on the processor: the real model by the rule for f32, stages of
//! both engines in one pipeline, and what is refused.
#![cfg(feature = "torch")]
#![allow(clippy::unwrap_used)]

use futures::future::try_join_all;
use harness::fixtures::{self, Reference};
use harness::local::{Local, Shape};
use harness::processes::{self, Coordinator, fails_with};
use harness::{alone, ask, block_on, model_arg};
use millrace_net::client::{Client, ClientConfig};
use millrace_shared::model::Dtype;
use millrace_shared::options::EngineKind;
use millrace_shared::wire::rpc::{PositionScore, Prompt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

async fn scores(client: &Client, cases: &[Reference]) -> Vec<Vec<PositionScore>> {
    let all = cases.iter().map(|case| ask::score(client, case.forced(), fixtures::TOP));
    try_join_all(all).await.unwrap()
}

/// Every case as given tokens, then freely.
fn ask_all(config: &ClientConfig, cases: &[Reference]) -> (Vec<Vec<PositionScore>>, Vec<Vec<u32>>) {
    block_on(async {
        let client = ask::connect(config).await;
        let scores = scores(&client, cases).await;
        let mut answers = Vec::new();
        for case in cases {
            let prompt = Prompt::Tokens(case.token_ids.clone());
            let params = ask::greedy(case.greedy.len() as u32);
            answers.push(ask::generate(&client, prompt, params).await.unwrap().tokens);
        }
        ask::idle(&client).await;
        client.close().await;
        (scores, answers)
    })
}

#[test]
fn the_reference_is_met_in_f32_at_any_number_of_stages() {
    let _turn = alone();
    let cases = fixtures::references();
    for stages in [1, 2, 5] {
        let engine = EngineKind::Torch;
        let shape = Shape { stages, engine, kv_cache_dtype: Dtype::F32, ..Shape::default() };
        let cluster = Local::start(shape);
        let (scores, answers) = ask_all(cluster.client(), &cases);
        fixtures::check_exact(&format!("torch, {stages} stages"), &cases, &scores);
        for (case, answer) in cases.iter().zip(&answers) {
            assert_eq!(*answer, case.greedy, "{stages} stages, {}", case.name);
        }
    }
}

#[test]
fn nodes_of_both_engines_serve_together() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let cases = fixtures::references();
    let mut cluster = Coordinator::start(root.path(), 2, &["--kv-cache-tokens", "8192"]);
    let weights = ["--weights", model_arg()];
    let mut torch = cluster.node("torch", &[&weights[..], &["--engine", "torch"]].concat());
    cluster.renew_token();
    let mut cpu = cluster.node("cpu", &weights);
    cluster.wait_ready();
    let (scores, answers) = ask_all(&cluster.client, &cases);
    // Half of it quantises activations.
    fixtures::check("both engines", &cases, &scores);
    for (case, answer) in cases.iter().zip(&answers) {
        let certain = case.certain_steps();
        assert_eq!(answer[..certain], case.greedy[..certain], "{}", case.name);
    }
    assert!(torch.log().contains("torch/1;approximate;cpu;f32"), "{}", torch.log());
    assert!(torch.terminate().success() && cpu.terminate().success());
}

#[test]
fn what_is_not_there_is_refused_with_what_to_type() {
    let _turn = alone();
    let home = tempfile::tempdir().unwrap();
    let refused = |flags: &[&str], parts: &[&str]| {
        let mut generate = processes::command("millrace", home.path());
        generate.args(["generate", "--model", model_arg(), "--prompt", "a", "-n", "1"]).args(flags);
        fails_with(&processes::run(generate), parts);
    };
    let torch = |more: &[&'static str]| [&["--engine", "torch"], more].concat();
    refused(&torch(&["--device", "cuda:63"]), &["--device cuda:63", "--device c"]);
    refused(&["--device", "cuda:0"], &["--engine torch"]);
    refused(&torch(&["--kv-cache-dtype", "int8"]), &["--kv-cache-dtype f16"]);
    let little = torch(&["--memory-fraction", "0.001"]);
    refused(&little, &["--memory-fraction 0.001", "more stages", "--torch-dtype"]);
}

/// The processor stands for two devices.
#[test]
fn all_devices_of_a_machine_run_under_one_command() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let cases = fixtures::references();
    let cluster = Coordinator::start(root.path(), 2, &["--kv-cache-tokens", "8192"]);
    // The token admits one machine.
    let flags = ["--weights", model_arg(), "--engine", "torch", "--device", "cpu,cpu"];
    let mut machine = cluster.node("gpus", &flags);
    cluster.wait_ready();
    let nodes = processes::nodes(&cluster);
    let named = |name: &str| nodes.iter().any(|n| n.name == name);
    assert!(nodes.len() == 2 && named("gpus-cpu0") && named("gpus-cpu1"), "{nodes:?}");
    assert!(nodes[0].host == nodes[1].host && nodes[0].id != nodes[1].id, "{nodes:?}");
    let (scores, _) = ask_all(&cluster.client, &cases[..1]);
    fixtures::check("two devices", &cases[..1], &scores);

    // One that ends takes nobody with it, and is back.
    let process = |log: &str, turn: usize| {
        let started = log.match_indices("node started").map(|(at, _)| &log[at..]);
        let pid = |line: &str| {
            line.split("pid=").nth(1)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        started.filter_map(pid).nth(turn)
    };
    let first: i32 = machine.wait_log("a node", |log| process(log, 0));
    let second: i32 = machine.wait_log("a node", |log| process(log, 1));
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let third: i32 = machine.wait_log("the node again", |log| process(log, 2));
    assert!(third != first && third != second);
    assert!(kill(Pid::from_raw(second), None).is_ok(), "the other one runs on");
    let (scores, _) = ask_all(&cluster.client, &cases[..1]);
    fixtures::check("two devices, one of them anew", &cases[..1], &scores);
    assert!(machine.terminate().success());
    for gone in [second, third] {
        assert!(kill(Pid::from_raw(gone), None).is_err(), "{gone} is left");
    }
}
