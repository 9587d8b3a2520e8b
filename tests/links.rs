//! A cluster over links that delay and lose datagrams gives the tokens that it would give without;
//! one whose stages take their time leaves out what was cancelled.

use std::time::Duration;

use futures::future::join_all;
use harness::mocked::{Mocked, Shape};
use harness::relay::Way;
use harness::{alone, ask, block_on};
use millrace_shared::wire::rpc::{ClusterStatus, Prompt};

#[test]
fn every_token_is_right_over_links_that_delay_and_lose() {
    let _alone = alone();
    let micros = Duration::from_micros;
    let link = Way { delay: Duration::from_millis(3), loss: 0.01, ..Way::default() };
    let shape = Shape {
        link: Some(link),
        max_batch_tokens: Some(8),
        ..Shape::of_layers([micros(200), micros(100), micros(200)], 12)
    };
    let cluster = Mocked::start(&shape);
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        let prompt = |n: u32| (0..1 + 7 * n).map(|i| (i * i + n) % cluster.vocab()).collect();
        let answers = join_all((0..24u32).map(|n| {
            let (client, prompt): (_, Vec<u32>) = (&client, prompt(n % 5));
            let tokens = 10 + n % 7;
            async move {
                let answer =
                    ask::generate(client, Prompt::Tokens(prompt.clone()), ask::greedy(tokens));
                (prompt, tokens, answer.await.expect("an answer"))
            }
        }));
        for (prompt, tokens, answer) in answers.await {
            assert_eq!(answer.tokens, cluster.expected(&prompt, tokens as usize));
        }
        let status = ask::idle(&client).await;
        assert_eq!(status.stages.len(), 3);
    });
    let metrics = cluster.metrics();
    let hops = metrics.lines().find_map(|l| l.strip_prefix("millrace_hop_seconds_count{"));
    let hops = hops.and_then(|l| l.rsplit(' ').next()).and_then(|n| n.parse::<u64>().ok());
    assert!(hops.is_some_and(|n| n > 20), "stages of one host know their hops: {hops:?}");
    let lost: u64 = cluster.relays().iter().map(|r| r.carried().lost).sum();
    let passed: u64 = cluster.relays().iter().map(|r| r.carried().passed).sum();
    assert!(lost > 0 && passed > 1000, "the links were used: {passed} passed, {lost} lost");
}

/// A long prompt is cancelled on its way: the stages do not compute what is under way.
#[test]
fn what_is_cancelled_is_not_computed() {
    let _alone = alone();
    let layer = Duration::from_millis(25);
    let shape = Shape {
        max_batch_tokens: Some(8),
        kv_cache_tokens: Some(1024),
        ..Shape::of_layers([layer; 3], 12)
    };
    let cluster = Mocked::start(&shape);
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        // Each of 100 chunks takes each of 3 stages 0.1 s.
        let prompt = (0..800).map(|i| i % cluster.vocab()).collect();
        let mut stream =
            ask::begin(&client, Prompt::Tokens(prompt), ask::greedy(4)).await.expect("accepted");
        stream.next().await.expect("an event").expect("it has started");
        ask::until(&client, "computing", |s| s.stages.iter().all(|s| s.steps > 0)).await;
        drop(stream);
        ask::idle(&client).await;
        let left_out = |s: &ClusterStatus| s.stages.iter().any(|s| s.rows_left_out > 0);
        ask::until(&client, "without what was cancelled", left_out).await;
        let short: Vec<u32> = vec![5, 3, 9];
        let answer = ask::generate(&client, Prompt::Tokens(short.clone()), ask::greedy(3)).await;
        assert_eq!(answer.expect("an answer").tokens, cluster.expected(&short, 3));
    });
}

/// The way between the stages closes for good while they serve: it is tried, and gone around.
#[test]
fn a_way_that_closes_while_it_serves_is_gone_around() {
    let _alone = alone();
    let shape =
        Shape { link: Some(Way::default()), ..Shape::of_layers([Duration::from_millis(2); 2], 4) };
    let cluster = Mocked::start(&shape);
    let order =
        |s: &ClusterStatus| s.stages.iter().map(|s| s.node_name.clone()).collect::<Vec<_>>();
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        let before = order(&ask::idle(&client).await);
        let prompt: Vec<u32> = (1..20).collect();
        let asked = Prompt::Tokens(prompt.clone());
        let mut stream = ask::begin(&client, asked, ask::greedy(100)).await.expect("accepted");
        let begun = ask::take_tokens(&mut stream, 5).await.expect("tokens");
        // The relay before the second node carries what other nodes send it, and nothing else.
        let second = usize::from(before[1] == "mock-1");
        cluster.relays()[2 * second + 1].set_ways(Way::cut(), Way::cut());
        let answer = ask::finish_from(stream, begun).await.expect("an answer");
        assert_eq!(answer.tokens, cluster.expected(&prompt, 100));
        let after = order(&ask::idle(&client).await);
        assert_eq!(after, before.iter().rev().cloned().collect::<Vec<_>>(), "the other way");
    });
}
