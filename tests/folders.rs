//! Model folders as Hugging Face keeps them, served whole: every family at one stage and at three, and
//! weights in several files that travel to nodes which have none.
#![allow(clippy::unwrap_used)]

#[path = "../node/engine/tests/families/case.rs"]
mod case;
#[path = "../node/engine/tests/formats/store.rs"]
mod store;

use case::{CASES, Case};
use harness::ask;
use harness::local::{Local, Shape};
use harness::processes::Coordinator;
use harness::{alone, block_on};
use millrace_net::client::ClientConfig;
use millrace_shared::model::TensorType;
use millrace_shared::wire::rpc::Prompt;

/// The greedy answer is what `transformers` says.
fn check(config: &ClientConfig, case: &Case, how: &str) {
    let expected = case.tokens("answer");
    let answer = block_on(async {
        let client = ask::connect(config).await;
        let prompt = Prompt::Tokens(case.tokens("prompt"));
        let answer = ask::generate(&client, prompt, ask::greedy(expected.len() as u32)).await;
        client.close().await;
        answer.unwrap()
    });
    assert_eq!(answer.tokens, expected, "{}, {how}", case.name);
    let letter = |&id: &u32| char::from_u32(0x4e00 + id).unwrap();
    let text: String = expected.iter().map(letter).collect();
    // A vocabulary of words puts spaces between them.
    assert_eq!(answer.text.replace(' ', ""), text, "{}, {how}", case.name);
}

#[test]
fn every_family_says_the_same_at_one_stage_and_at_three() {
    let _turn = alone();
    // Clusters here admit sequences that are long for this one, and have the factors of those.
    for case in CASES.map(Case::read).into_iter().filter(|c| c.name != "phi3_short") {
        let folder = case.folder(TensorType::F32, 1);
        for stages in [1, 3] {
            let cluster = Local::serve(folder.path(), Shape { stages, ..Shape::default() });
            check(cluster.client(), &case, &format!("{stages} stages"));
        }
    }
}

/// Quants, scales and zeros of a matrix are tensors of their own, each fetched by its hash.
#[test]
fn quantised_matrices_travel_with_their_parts() {
    let _turn = alone();
    let case = Case::read("qwen3");
    let floats = case.folder(TensorType::F32, 1);
    let [folder, _] = store::store(floats.path(), store::How::Awq);
    let answer = |config: &ClientConfig| {
        block_on(async {
            let client = ask::connect(config).await;
            let prompt = Prompt::Tokens(case.tokens("prompt"));
            let answer = ask::generate(&client, prompt, ask::greedy(16)).await;
            client.close().await;
            answer.unwrap().tokens
        })
    };
    let alone = Local::serve(folder.path(), Shape::default());
    let expected = answer(alone.client());
    drop(alone);
    let root = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::serve(folder.path().to_str().unwrap(), root.path(), 2, &[]);
    let _nodes = [coordinator.node("one", &[]), coordinator.node("two", &[])];
    coordinator.wait_ready();
    assert_eq!(answer(&coordinator.client), expected);
}

#[test]
fn shards_travel_to_nodes_that_have_none() {
    let _turn = alone();
    let case = Case::read("qwen3");
    let folder = case.folder(TensorType::F32, 3);
    let root = tempfile::tempdir().unwrap();
    let model = folder.path().to_str().unwrap();
    let coordinator = Coordinator::serve(model, root.path(), 2, &[]);
    let mut nodes =
        [coordinator.node("empty", &[]), coordinator.node("own", &["--weights", model])];
    coordinator.wait_ready();
    check(&coordinator.client, &case, "in processes");
    for (node, from) in nodes.iter_mut().zip(["file=0 B", "coordinator=0 B"]) {
        node.wait_log("tensors", |log| {
            log.lines().rfind(|l| l.contains("tensors are here") && l.contains(from)).map(|_| ())
        });
    }
}
