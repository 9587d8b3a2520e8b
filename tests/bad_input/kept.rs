//! What is kept of requests, and for whom: the journal's modes, and whose prompts a prefix cache
//! gives away.

use std::path::Path;

use harness::processes::{Coordinator, Process, command, run};
use harness::{alone, ask, block_on, http};
use millrace_net::client::{Client, ClientConfig};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};

fn cluster(root: &Path, extra: &[&str]) -> (Coordinator, Process) {
    let flags = [&["--engine", "mock", "--kv-cache-tokens", "8192"], extra].concat();
    let coordinator = Coordinator::start(root, 1, &flags);
    let node = coordinator.node("node-a", &["--engine", "mock"]);
    coordinator.wait_ready();
    (coordinator, node)
}

fn request(prompt: &str, tokens: u32) -> GenerateRequest {
    let (prompt, choices) = (Prompt::Text(prompt.to_owned()), Choices::default());
    GenerateRequest { model: String::new(), prompt, params: ask::greedy(tokens), choices }
}

/// A request under an id of the client's own, and its whole answer.
async fn named(client: &Client, id: RequestId, asked: GenerateRequest) -> Result<Vec<u32>, Status> {
    Ok(ask::finish(client.generate_as(id, asked).await?).await?.tokens)
}

/// What an attachment hears.
async fn attached(client: &Client, id: RequestId) -> Result<Vec<u32>, Status> {
    Ok(ask::finish(client.attach(id, &[]).await?).await?.tokens)
}

/// The same request over HTTP under the same name, twice: the ids under which it ran, and the status
/// of another content under that name.
fn idempotent(coordinator: &Coordinator) -> ([String; 2], u16) {
    let post = |body: &str| {
        let key = &coordinator.client.api_key;
        let named = "Idempotency-Key: the mill\r\n";
        let path = "/v1/completions";
        http::begin_post_with(coordinator.http(), path, key, named, body.as_bytes())
    };
    let id = || {
        let answer = post(r#"{"prompt": "a mill", "max_tokens": 4}"#);
        assert_eq!(answer.status, 200);
        let id = answer.header("x-millrace-request-id").unwrap().to_owned();
        assert!(answer.whole().text().contains("\"text\""));
        id
    };
    let ids = [id(), id()];
    (ids, post(r#"{"prompt": "another mill", "max_tokens": 4}"#).status)
}

/// Whether a file below the folder holds this text.
fn holds(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, text);
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    })
}

/// Without a journal a request is known while it runs and forgotten at its end.
#[test]
fn without_a_journal_nothing_is_kept() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let (coordinator, _node) = cluster(root.path(), &["--journal", "off"]);
    block_on(async {
        let client = ask::connect(&coordinator.client).await;
        let id = RequestId(uuid::Uuid::now_v7());
        let secret = "Quixotic windmills at dawn";
        let first = named(&client, id, request(secret, 6)).await.unwrap();
        assert_eq!(attached(&client, id).await.unwrap_err().code, ErrorCode::NotFound);
        // The id is free again: the same request runs once more, and another one may have it.
        assert_eq!(named(&client, id, request(secret, 6)).await.unwrap(), first);
        assert_eq!(named(&client, id, request(secret, 3)).await.unwrap(), first[..3]);
        client.close().await;
    });
    let (ids, other) = idempotent(&coordinator);
    assert_eq!(other, 200, "the name is free again: {ids:?}");
    assert!(!coordinator.dir().join("journal.redb").exists());
    assert!(!holds(&coordinator.dir(), "Quixotic"));
}

/// In memory, a request is known as long as its coordinator lives.
#[test]
fn a_journal_in_memory_ends_with_the_coordinator() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let flags = ["--journal", "memory"];
    let (mut coordinator, _node) = cluster(root.path(), &flags);
    let id = RequestId(uuid::Uuid::now_v7());
    let secret = "Quixotic windmills at dawn";
    block_on(async {
        let client = ask::connect(&coordinator.client).await;
        let first = named(&client, id, request(secret, 6)).await.unwrap();
        assert_eq!(attached(&client, id).await.unwrap(), first);
        assert_eq!(named(&client, id, request(secret, 6)).await.unwrap(), first);
        let other = named(&client, id, request(secret, 3)).await.unwrap_err();
        assert_eq!(other.code, ErrorCode::InvalidArgument, "{other}");
        client.close().await;
    });
    let (ids, other) = idempotent(&coordinator);
    assert_eq!(ids[0], ids[1], "the same answer, not another one");
    assert_eq!(other, 400);
    assert!(!coordinator.dir().join("journal.redb").exists());
    assert!(!holds(&coordinator.dir(), "Quixotic"));
    coordinator.process.kill();
    coordinator
        .start_again(1, &["--engine", "mock", "--kv-cache-tokens", "8192", flags[0], flags[1]]);
    coordinator.wait_ready();
    block_on(async {
        let client = ask::connect(&coordinator.client).await;
        assert_eq!(attached(&client, id).await.unwrap_err().code, ErrorCode::NotFound);
        client.close().await;
    });
}

/// How many tokens of this prompt the cache had.
async fn cached(client: &Client, prompt: &str) -> u32 {
    let mut stream = client.generate(request(prompt, 2)).await.unwrap();
    let mut cached = None;
    while let Some(event) = stream.next().await {
        if let GenerateEvent::Finished { usage, .. } = event.unwrap() {
            cached = Some(usage.cached_tokens);
        }
    }
    cached.unwrap()
}

fn other_key(coordinator: &Coordinator) -> ClientConfig {
    let mut create = command("millrace-coordinator", &coordinator.root);
    create.args(["key", "create", "--label", "other", "--dir"]).arg(coordinator.dir());
    let output = run(create);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let api_key = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ClientConfig { api_key, ..coordinator.client.clone() }
}

/// What a key finds of its own prompts, and of another's, follows the flag.
#[test]
fn whose_prompts_a_prefix_cache_gives_away() {
    let prompt = "A mill stands at the river and grinds what the farmers bring. ".repeat(20);
    for (mode, own, others) in [("on", true, true), ("per-key", true, false), ("off", false, false)]
    {
        let _turn = alone();
        let root = tempfile::tempdir().unwrap();
        let (coordinator, _node) = cluster(root.path(), &["--prefix-cache", mode]);
        let other = other_key(&coordinator);
        block_on(async {
            let first = ask::connect(&coordinator.client).await;
            let second = ask::connect(&other).await;
            assert_eq!(cached(&first, &prompt).await, 0, "{mode}: nobody asked before");
            assert_eq!(cached(&second, &prompt).await > 0, others, "{mode}: another's");
            assert_eq!(cached(&first, &prompt).await > 0, own, "{mode}: its own");
            assert_eq!(cached(&second, &prompt).await > 0, own, "{mode}: its own");
            first.close().await;
            second.close().await;
        });
        let hits = coordinator.metric("millrace_prefix_cache_hit_tokens_total");
        assert_eq!(hits > 0.0, own, "{mode}");
    }
}
