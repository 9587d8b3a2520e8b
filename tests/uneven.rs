//! A node is slower than it was measured to be: the model is cut anew while requests run, and no
//! token changes.

use std::time::{Duration, Instant};

use futures::future::join_all;
use harness::mocked::{Mocked, Shape};
use harness::{alone, ask, block_on};
use millrace_net::client::Client;
use millrace_shared::options::Replan;
use millrace_shared::wire::rpc::{ClusterStatus, Prompt};

/// The coordinator watches for half a minute before it believes it.
const PATIENCE: Duration = Duration::from_secs(150);
const CLIENTS: u32 = 8;

/// Layers of the slow node.
fn slow_layers(status: &ClusterStatus) -> Option<u32> {
    let stage = status.stages.iter().find(|s| s.node_name == "mock-0")?;
    Some(stage.end_layer - stage.first_layer)
}

/// Asks one thing after the other, and checks the answers, until the slow node has fewer layers.
async fn ask_on(cluster: &Mocked, client: &Client, seed: u32, before: u32) -> ClusterStatus {
    let begun = Instant::now();
    for n in 0.. {
        let prompt: Vec<u32> = (0..6).map(|i| (i * i + n + 7 * seed) % cluster.vocab()).collect();
        let asked = ask::generate(client, Prompt::Tokens(prompt.clone()), ask::greedy(40));
        let answer = asked.await.expect("an answer");
        assert_eq!(answer.tokens, cluster.expected(&prompt, 40));
        let status = client.status().await.expect("a status");
        if slow_layers(&status).is_some_and(|layers| layers < before) {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "no new cut: {status:?}");
    }
    unreachable!("the loop has no end of its own")
}

#[test]
fn uneven_stages_are_cut_anew_while_requests_run() {
    let _alone = alone();
    let millis = Duration::from_millis;
    let alike = Shape::of_layers([millis(1); 2], 12);
    let mut shape = Shape { replan: Replan::Auto, max_batch_tokens: Some(4), ..alike };
    // It says what it was, not what it is.
    shape.nodes[0].layer_latency = millis(4);
    let cluster = Mocked::start(&shape);
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        let status = client.status().await.expect("a status");
        let (epoch, before) = (status.epoch, slow_layers(&status).expect("it has a stage"));
        assert_eq!(before, 6, "alike as measured: {status:?}");
        let asking = (0..CLIENTS).map(|seed| ask_on(&cluster, &client, seed, before));
        for status in join_all(asking).await {
            assert!(status.epoch > epoch);
            assert_eq!(status.stages.iter().map(|s| s.end_layer - s.first_layer).sum::<u32>(), 12);
        }
        ask::idle(&client).await;
    });
}
