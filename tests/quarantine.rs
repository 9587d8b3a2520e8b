//! Steps that fail: on a sick node the requests are none the wiser, and a poisonous request takes
//! nobody along. Nodes are mocks that fail when they are told to.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use harness::mocked::{Mocked, Shape};
use harness::{alone, ask, block_on, wait_for};
use millrace_engine::mock::Fault;
use millrace_net::client::Client;
use millrace_shared::error::ErrorCode;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, NodeRole};
use millrace_shared::wire::rpc::Prompt;

const TOKENS: u32 = 60;

fn prompt() -> Vec<u32> {
    (1..20).collect()
}

/// One stage and a stand-by; each fails as told.
fn start(first: Vec<(u64, Fault)>, stand_by: Vec<(u64, Fault)>) -> Mocked {
    let mut shape = Shape::of_layers([Duration::from_millis(1); 2], 2);
    shape.stand_bys = 1;
    shape.nodes[0].faults = first;
    shape.nodes[1].faults = stand_by;
    let cluster = Mocked::start(&shape);
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
