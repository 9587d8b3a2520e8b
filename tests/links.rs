//! A cluster over links that delay and lose datagrams gives the tokens that it would give without.

use std::time::Duration;

use futures::future::join_all;
use harness::mocked::{Mocked, Shape};
use harness::relay::Way;
use harness::{alone, ask, block_on};
use millrace_shared::wire::rpc::Prompt;

#[test]
fn every_token_is_right_over_links_that_delay_and_lose() {
    let _alone = alone();
    let micros = Duration::from_micros;
    let link = Way { delay: Duration::from_millis(3), loss: 0.01 };
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
