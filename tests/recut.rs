//! A new cut while requests run: nobody waits long, no token changes; who may ask for it; ways that
//! are closed. Coordinator and nodes are processes.
#![allow(clippy::unwrap_used)]

use std::sync::mpsc::channel;
use std::thread;

use harness::ask::{self, Answer};
use harness::local::{Local, Shape};
use harness::processes::{self, Coordinator};
use harness::{alone, block_on, wait_for};
use millrace_net::client::ClientConfig;
use millrace_net::keys::ApiKeyStore;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, NewKey, NodeRole, NodeStatus, Scope};
use millrace_shared::wire::rpc::Prompt;

const TOKENS: u32 = 240;

fn requests() -> Vec<(Prompt, SamplingParams)> {
    let request = |i: usize| {
        let prompt = format!("{}Tale {i}:", "The sluice was open all night. ".repeat(i * 6));
        let params =
            if i.is_multiple_of(2) { ask::greedy(TOKENS) } else { ask::sampled(3, TOKENS) };
        (Prompt::Text(prompt), params)
    };
    (0..4).map(request).collect()
}

fn truth() -> Vec<Answer> {
    let single = Local::start(Shape::default());
    block_on(async {
        let client = ask::connect(single.client()).await;
        let mut answers = Vec::new();
        for (prompt, params) in requests() {
            answers.push(ask::generate(&client, prompt, params).await.unwrap());
        }
        client.close().await;
        answers
    })
}

fn admin(config: &ClientConfig, request: AdminRequest) -> Result<AdminReply, Status> {
    block_on(async {
        let client = ask::connect(config).await;
        let reply = client.admin(request).await;
        client.close().await;
        reply
    })
}

fn nodes(config: &ClientConfig) -> Vec<NodeStatus> {
    match admin(config, AdminRequest::Nodes).unwrap() {
        AdminReply::Nodes(nodes) => nodes,
        other => panic!("{other:?}"),
    }
}

fn role(config: &ClientConfig, name: &str) -> NodeRole {
    nodes(config).into_iter().find(|n| n.name == name).unwrap().role
}

/// Asks everything at once, changes something when all have begun, and checks every answer.
fn under_load(config: &ClientConfig, truth: &[Answer], change: impl FnOnce()) {
    thread::scope(|scope| {
        let (runs, running) = channel();
        let asked: Vec<_> = (requests().into_iter())
            .map(|(prompt, params)| {
                let runs = runs.clone();
                scope.spawn(move || {
                    block_on(async {
                        let client = ask::connect(config).await;
                        let mut stream = ask::begin(&client, prompt, params).await.unwrap();
                        let begun = ask::take_tokens(&mut stream, 2).await.unwrap();
                        runs.send(()).unwrap();
                        let answer = ask::finish_from(stream, begun).await;
                        client.close().await;
                        answer
                    })
                })
            })
            .collect();
        (0..asked.len()).for_each(|_| running.recv_timeout(harness::DEADLINE).unwrap());
        change();
        for (i, thread) in asked.into_iter().enumerate() {
            assert_eq!(thread.join().unwrap().unwrap(), truth[i], "request {i}");
        }
    });
}

#[test]
fn a_cordoned_node_hands_over_while_requests_run() {
    let _turn = alone();
    let truth = truth();
    let root = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(root.path(), 2, &["--kv-cache-tokens", "16384"]);
    let names = ["one", "two", "spare"];
    let mut running: Vec<_> = names[..2].iter().map(|name| coordinator.node(name, &[])).collect();
    coordinator.wait_ready();
    coordinator.renew_token();
    running.push(coordinator.node("spare", &[]));
    let config = &coordinator.client;
    wait_for("stand-by", || {
        let there = nodes(config).iter().any(|n| n.name == "spare" && n.role == NodeRole::StandBy);
        there.then_some(())
    });
    let epoch = || coordinator.metric("millrace_plan_epoch");
    let mut before = epoch();

    // With the stand-by measured the stage moves; its new owner fetches weights meanwhile.
    under_load(config, &truth, || {
        let report = wait_for("an offer", || {
            match admin(config, AdminRequest::Cordon { node: "one".into() }) {
                Ok(AdminReply::Recut(report)) => Some(report),
                Ok(other) => panic!("{other:?}"),
                Err(status) => {
                    assert_eq!(status.code, ErrorCode::FailedPrecondition, "{status}");
                    None // Not measured yet.
                }
            }
        });
        assert!(report.applied && report.beside, "{report:?}");
        assert!(report.proposed.iter().all(|s| s.node != "one"), "{report:?}");
        assert!(report.bytes_to_move > 0, "{report:?}");
    });
    wait_for("the new cut", || (epoch() > before).then_some(()));
    assert!(coordinator.process.log().contains("switched to a new cut"));
    assert_eq!(role(config, "one"), NodeRole::Cordoned);
    assert!(matches!(role(config, "spare"), NodeRole::Stage { .. }));

    // One more would leave too few.
    let refused = admin(config, AdminRequest::Cordon { node: "two".into() }).unwrap_err();
    assert_eq!(refused.code, ErrorCode::FailedPrecondition, "{refused}");
    assert!(refused.message.contains("2 nodes are needed"), "{refused}");
    assert!(matches!(role(config, "two"), NodeRole::Stage { .. }), "nothing has changed");

    // The death of a node of both cuts while the next is made ready is a loss like any other.
    admin(config, AdminRequest::Uncordon { node: "one".into() }).unwrap();
    before = epoch();
    under_load(config, &truth, || {
        admin(config, AdminRequest::Cordon { node: "spare".into() }).unwrap();
        running[1].kill();
        running[1] = coordinator.node("two", &[]);
    });
    assert!(epoch() > before);
    coordinator.wait_nothing_left();
}

#[test]
fn nodes_that_drain_leave_nothing_behind() {
    let _turn = alone();
    let truth = truth();
    let root = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(root.path(), 2, &["--kv-cache-tokens", "16384"]);
    let mut running: Vec<_> = ["one", "two"].map(|name| coordinator.node(name, &[])).into();
    coordinator.wait_ready();
    for name in ["three", "four"] {
        coordinator.renew_token();
        running.push(coordinator.node(name, &[]));
    }
    let config = &coordinator.client;
    let measured = |count: usize| {
        wait_for("measured stand-bys", || {
            match admin(config, AdminRequest::Describe).unwrap() {
                AdminReply::Description(text) => text.matches("[[node]]").count() == count,
                other => panic!("{other:?}"),
            }
            .then_some(())
        });
    };
    // Who joined just now measures first; a drain waits for it.
    wait_for("all nodes", || (nodes(config).len() == 4).then_some(()));
    // A signal: the process ends by itself, with status 0, and nobody reads an error.
    under_load(config, &truth, || {
        assert_eq!(running[0].terminate().code(), Some(0), "{}", running[0].log());
        assert!(!running[0].log().contains("leaving with the layers"), "{}", running[0].log());
    });
    // An operator's word does the same.
    under_load(config, &truth, || {
        admin(config, AdminRequest::Drain { node: "two".into() }).unwrap();
        assert_eq!(running[1].wait().code(), Some(0), "{}", running[1].log());
        assert!(!running[1].log().contains("leaving with the layers"), "{}", running[1].log());
    });
    // In the order of their ids, which is that of their arrival.
    let mut names: Vec<String> = nodes(config).into_iter().map(|n| n.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["four", "three"]);
    // It comes back as a node like any other, and where nobody else can, its leaving is a loss.
    running[0] = coordinator.node("one", &[]);
    measured(3);
    assert_eq!(role(config, "one"), NodeRole::StandBy);
    assert_eq!(running[0].terminate().code(), Some(0), "a stand-by leaves at once");
    assert_eq!(running[2].terminate().code(), Some(0));
    assert!(running[2].log().contains("leaving with the layers"), "{}", running[2].log());
    coordinator.wait_not_ready();
}

#[test]
fn only_administrators_change_the_cluster() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(root.path(), 1, &["--engine", "mock"]);
    let _node = coordinator.node("only", &["--engine", "mock"]);
    coordinator.wait_ready();
    let key = NewKey::new("client", Scope::Generate);
    let (_, key) = ApiKeyStore::open(&coordinator.dir()).unwrap().create(&key, 1).unwrap();
    let client = ClientConfig { api_key: key, ..coordinator.client.clone() };
    for request in [
        AdminRequest::Nodes,
        AdminRequest::Cordon { node: "only".into() },
        AdminRequest::Recut { apply: true },
        AdminRequest::Doctor,
    ] {
        let refused = admin(&client, request).unwrap_err();
        assert_eq!(refused.code, ErrorCode::PermissionDenied, "{refused}");
        assert!(refused.message.contains("key create --scope admin"), "{refused}");
    }
    let unknown = AdminRequest::Cordon { node: "nobody".into() };
    let refused = admin(&coordinator.client, unknown).unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotFound);
    assert!(refused.message.contains("there are: only"), "{refused}");

    let file = coordinator.dir().join("client.toml");
    let mut list = processes::command("millrace", root.path());
    list.arg("nodes").arg("--cluster").arg(&file);
    let shown = processes::run(list);
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.status.success() && text.contains("layers 0-29 + head"), "{text}");
}

#[test]
fn a_closed_way_is_named_and_gone_around() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let mock = ["--engine", "mock"];
    let mut coordinator = Coordinator::start(root.path(), 3, &mock);
    // It reaches others, but nobody reaches it: it can only be the first stage.
    let hidden = [&mock[..], &["--advertise", "127.0.0.1:9"]].concat();
    let _nodes = [
        coordinator.node("near", &mock),
        coordinator.node("hidden", &hidden),
        coordinator.node("far", &mock),
    ];
    coordinator.wait_ready();
    let line = "hidden: no UDP answer at 127.0.0.1:9 within 8s; open UDP 9 inbound on hidden";
    coordinator.process.wait_log("the closed way", |log| log.contains(line).then_some(()));
    let stages = block_on(async {
        let client = ask::connect(&coordinator.client).await;
        let stages = client.status().await.unwrap().stages;
        client.close().await;
        stages
    });
    assert_eq!(stages[0].node_name, "hidden");

    let mut doctor = processes::command("millrace", root.path());
    doctor.arg("doctor").arg("--cluster").arg(coordinator.dir().join("client.toml"));
    processes::fails_with(&processes::run(doctor), &["2 ways between members are closed"]);
}
