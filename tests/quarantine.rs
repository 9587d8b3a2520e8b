//! Steps that fail: on a sick node the requests are none the wiser, and a poisonous request takes
//! nobody along. Nodes are mocks that fail when they are told to.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use futures::future::join_all;
use harness::mocked::{Mocked, Shape};
use harness::{alone, ask, block_on, wait_for};
use millrace_engine::mock::Fault;
use millrace_net::client::Client;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::membership::CordonReason;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, NodeRole};
use millrace_shared::wire::rpc::Prompt;

const TOKENS: u32 = 60;

fn prompt() -> Vec<u32> {
    (1..20).collect()
}

/// One stage and a stand-by; each fails as told.
fn start(first: Vec<(u64, Fault)>, stand_by: Vec<(u64, Fault)>) -> Mocked {
    let mut shape = Shape::of_layers([Duration::from_millis(1); 2], 2);
    shape.nodes[0].faults = first;
    shape.nodes[1].faults = stand_by;
    start_two(shape)
}

/// The same, of this shape.
fn start_two(shape: Shape) -> Mocked {
    let cluster = Mocked::start(&Shape { stand_bys: 1, ..shape });
    wait_for("a measured stand-by", || {
        let described = block_on(async {
            let client = ask::connect(cluster.client()).await;
            let reply = client.admin(AdminRequest::Describe).await.unwrap();
            client.close().await;
            reply
        });
        match described {
            AdminReply::Description(text) => (text.matches("[[node]]").count() == 2).then_some(()),
            other => panic!("{other:?}"),
        }
    });
    cluster
}

async fn roles(client: &Client) -> Vec<NodeRole> {
    match client.admin(AdminRequest::Nodes).await.unwrap() {
        AdminReply::Nodes(nodes) => nodes.into_iter().map(|n| n.role).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sick_node_is_left_out_and_nobody_notices() {
    let _alone = alone();
    for fault in [Fault::Nan, Fault::Panic, Fault::Fail] {
        let cluster = start(vec![(20, fault)], vec![]);
        block_on(async {
            let client = ask::connect(cluster.client()).await;
            let asked = Prompt::Tokens(prompt());
            let answer = ask::generate(&client, asked, ask::greedy(TOKENS)).await.unwrap();
            assert_eq!(answer.tokens, cluster.expected(&prompt(), TOKENS as usize), "{fault:?}");
            let roles = roles(&client).await;
            let cordoned = roles.iter().filter(|r| **r == NodeRole::Cordoned).count();
            assert_eq!(cordoned, 1, "{roles:?}");
            client.close().await;
        });
    }
}

#[test]
fn what_fails_on_two_nodes_is_the_request() {
    let _alone = alone();
    let cluster = start(vec![(20, Fault::Nan)], vec![(0, Fault::Nan)]);
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        let asked = || Prompt::Tokens(prompt());
        let status = ask::generate(&client, asked(), ask::greedy(TOKENS)).await.unwrap_err();
        assert_eq!(status.code, ErrorCode::Internal, "{status}");
        assert!(status.message.contains("not finite"), "{status}");
        // The next one is served, and nobody is in quarantine.
        let answer = ask::generate(&client, asked(), ask::greedy(TOKENS)).await.unwrap();
        assert_eq!(answer.tokens, cluster.expected(&prompt(), TOKENS as usize));
        let roles = roles(&client).await;
        assert!(!roles.contains(&NodeRole::Cordoned), "{roles:?}");
        client.close().await;
    });
}

/// Prompts of harmless requests, and a token that neither they nor their answers hold.
fn harmless(cluster: &Mocked) -> (Vec<Vec<u32>>, u32) {
    let prompts: Vec<Vec<u32>> = (0..4).map(|n| (1..6 + n).collect()).collect();
    let all: Vec<u32> = (prompts.iter())
        .flat_map(|p| [p.clone(), cluster.expected(p, TOKENS as usize)].concat())
        .collect();
    let free = (1..cluster.vocab()).find(|token| !all.contains(token));
    (prompts, free.expect("a token that nobody uses"))
}

/// Answers of harmless requests, while a poisonous one is computed beside them, which fails.
async fn beside_poison(cluster: &Mocked, poison: u32, prompts: &[Vec<u32>]) -> Status {
    let client = &ask::connect(cluster.client()).await;
    let answers = join_all(prompts.iter().map(|prompt| async move {
        ask::generate(client, Prompt::Tokens(prompt.clone()), ask::greedy(TOKENS)).await
    }));
    let poisonous = async {
        ask::until(client, "harmless requests run", |s| s.running >= 4).await;
        let prompt = Prompt::Tokens(vec![1, 2, poison, 3]);
        ask::generate(client, prompt, ask::greedy(TOKENS)).await
    };
    let (answers, poisonous) = futures::future::join(answers, poisonous).await;
    for (prompt, answer) in prompts.iter().zip(answers) {
        let tokens = answer.unwrap_or_else(|e| panic!("company failed: {e}")).tokens;
        assert_eq!(tokens, cluster.expected(prompt, TOKENS as usize));
    }
    let roles = roles(client).await;
    assert!(!roles.contains(&NodeRole::Cordoned), "{roles:?}");
    poisonous.expect_err("it is poisonous")
}

#[test]
fn the_company_of_a_poisonous_request_does_not_fail_with_it() {
    let _alone = alone();
    // What is poisonous is known of the model alone.
    let calm = Mocked::start(&Shape::of_layers([Duration::ZERO], 2));
    let (prompts, poison) = harmless(&calm);
    drop(calm);
    let shape = |nodes: usize| {
        let mut shape = Shape::of_layers(vec![Duration::from_millis(4); nodes], 2);
        shape.nodes.iter_mut().for_each(|n| n.poison = Some((poison, Fault::Fail)));
        shape
    };
    // With a stand-by they are in two failed steps together, without one in one.
    for cluster in [start_two(shape(2)), Mocked::start(&shape(1))] {
        let status = block_on(beside_poison(&cluster, poison, &prompts));
        assert_eq!(status.code, ErrorCode::Internal, "{status}");
        assert!(status.message.contains("fault in step"), "{status}");
    }
}

#[test]
fn what_nodes_hang_of_runs_alone_and_then_fails() {
    let _alone = alone();
    let calm = Mocked::start(&Shape::of_layers([Duration::ZERO], 2));
    let (prompts, poison) = harmless(&calm);
    drop(calm);
    let mut shape = Shape::of_layers([Duration::from_millis(4)], 2);
    shape.nodes[0].poison = Some((poison, Fault::Hang));
    let cluster = Mocked::start(&shape);
    let status = block_on(beside_poison(&cluster, poison, &prompts));
    assert_eq!(status.code, ErrorCode::Internal, "{status}");
    assert!(status.message.contains("four times nodes died or hung"), "{status}");
}

#[test]
fn a_node_in_quarantine_serves_when_no_other_could() {
    let _alone = alone();
    let mut cluster = start(vec![(20, Fault::Fail)], vec![]);
    let ask = |cluster: &Mocked, tokens: u32| {
        block_on(async {
            let client = ask::connect(cluster.client()).await;
            let asked = Prompt::Tokens(prompt());
            let answer = ask::generate(&client, asked, ask::greedy(tokens)).await.unwrap();
            assert_eq!(answer.tokens, cluster.expected(&prompt(), tokens as usize));
            let nodes = match client.admin(AdminRequest::Nodes).await.unwrap() {
                AdminReply::Nodes(nodes) => nodes,
                other => panic!("{other:?}"),
            };
            // A node that shares its process with others says so, instead of doing nothing.
            let drain = AdminRequest::Drain { node: "mock-0".to_owned() };
            let refused = client.admin(drain).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::FailedPrecondition, "{refused}");
            assert!(refused.message.contains("shares its process"), "{refused}");
            client.close().await;
            nodes.into_iter().map(|n| (n.name, n.cordons)).collect::<Vec<_>>()
        })
    };
    let nodes = ask(&cluster, TOKENS);
    assert!(nodes.contains(&("mock-0".to_owned(), vec![CordonReason::Quarantine])), "{nodes:?}");
    cluster.stop(1);
    // Its new engine does not fail so soon.
    assert_eq!(ask(&cluster, 9), [("mock-0".to_owned(), vec![])]);
}
