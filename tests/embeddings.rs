//! Embeddings of whole clusters: on the real model the same to the bit wherever it is cut, over HTTP and
//! QUIC, and when a node is killed half-way; on mocks, what steps that fail, scarce memory and clients
//! that leave do to them.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use futures::future::{join, join_all, try_join_all};
use harness::local::{Local, Shape};
use harness::mocked::{self, Mocked};
use harness::processes::{Coordinator, command, run};
use harness::{alone, ask, block_on, http, model_arg};
use millrace_engine::mock::Fault;
use millrace_net::client::ClientConfig;
use millrace_shared::error::ErrorCode;
use millrace_shared::pooling::{Pooling, shortened};
use millrace_shared::wire::rpc::{EmbedRequest, Prompt};
use serde_json::{Value, json};

const BOTH: [Pooling; 2] = [Pooling::Mean, Pooling::Last];

fn text(text: &str) -> Prompt {
    Prompt::Text(text.to_owned())
}

/// Texts of one token to some hundred, ids, and the same beginning several times.
fn texts() -> Vec<Prompt> {
    let sentence = "The miller opened the gate and the water came down the race. ";
    let mut texts: Vec<Prompt> = (0..6).map(|i| text(&sentence.repeat(1 + i * i))).collect();
    texts.push(text("The"));
    texts.push(Prompt::Tokens(vec![504, 1965, 281]));
    texts.push(text("Wasser läuft über den Stein. 水が流れる。"));
    texts
}

fn bits(vectors: &[Vec<f32>]) -> Vec<Vec<u32>> {
    vectors.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect()
}

/// What one stage says of each text alone.
fn truth(config: &ClientConfig) -> Vec<Vec<Vec<f32>>> {
    block_on(async {
        let client = ask::connect(config).await;
        let mut all = Vec::new();
        for pooling in BOTH {
            let mut vectors = Vec::new();
            for one in texts() {
                vectors.extend(ask::embed(&client, &[one], pooling).await.unwrap());
            }
            all.push(vectors);
        }
        client.close().await;
        all
    })
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn the_same_vectors_wherever_the_model_is_cut() {
    let _turn = alone();
    let single = Local::start(Shape::default());
    let truth = truth(single.client());
    for vector in truth.iter().flatten() {
        assert_eq!(vector.len(), 576);
        assert!((cosine(vector, vector) - 1.0).abs() < 1e-5);
    }
    what_vectors_say(single.client());
    drop(single);
    for shape in [
        Shape { prefill_chunk: 5, ..Shape::default() },
        Shape { stages: 2, threads: 2, ..Shape::default() },
        Shape { stages: 3, prefill_chunk: 17, ..Shape::default() },
    ] {
        let cluster = Local::start(shape);
        block_on(async {
            let client = ask::connect(cluster.client()).await;
            // All at once, beside answers.
            let prompt = || text("Once upon a time");
            let answers = (0..3).map(|_| ask::generate(&client, prompt(), ask::greedy(30)));
            let all = texts();
            let found = BOTH.map(|pooling| ask::embed(&client, &all, pooling));
            let (found, answers) = join(try_join_all(found), try_join_all(answers)).await;
            for (found, truth) in found.unwrap().iter().zip(&truth) {
                assert!(bits(found) == bits(truth), "{shape:?}");
            }
            assert!(answers.unwrap().iter().all(|a| a.tokens.len() == 30));
            client.close().await;
        });
    }
}

/// Texts that say the same lie nearer to each other than to others.
fn what_vectors_say(config: &ClientConfig) {
    let pairs = [
        ("The cat sleeps on the sofa.", "A cat is sleeping on a couch."),
        ("The company's stock fell sharply today.", "Shares of the firm dropped a lot today."),
        ("How do I bake bread at home?", "What is the recipe for homemade bread?"),
    ];
    let all: Vec<Prompt> = pairs.iter().flat_map(|(a, b)| [text(a), text(b)]).collect();
    let vectors = block_on(async {
        let client = ask::connect(config).await;
        let vectors = ask::embed(&client, &all, Pooling::Mean).await.unwrap();
        client.close().await;
        vectors
    });
    for (i, pair) in vectors.chunks(2).enumerate() {
        let near = cosine(&pair[0], &pair[1]);
        for (j, other) in vectors.iter().enumerate().filter(|(j, _)| j / 2 != i) {
            let far = cosine(&pair[0], other);
            assert!(near > far, "{:?} lies nearer to text {j}: {far} > {near}", pairs[i]);
        }
    }
}

fn post(config: &ClientConfig, body: &Value) -> http::Response {
    let addr: SocketAddr = config.http.trim_start_matches("http://").parse().unwrap();
    http::post(addr, "/v1/embeddings", &config.api_key, body.to_string().as_bytes())
}

fn numbers(response: &http::Response) -> Vec<Vec<f32>> {
    assert_eq!(response.status, 200, "{}", response.text());
    let float = |x: &Value| x.as_f64().unwrap() as f32;
    let vector = |one: &Value| one["embedding"].as_array().unwrap().iter().map(float).collect();
    response.json()["data"].as_array().unwrap().iter().map(vector).collect()
}

/// Processes: HTTP as QUIC, and each stage killed once while a long list is under way.
#[test]
fn a_killed_node_changes_no_vector() {
    let _turn = alone();
    let single = Local::start(Shape::default());
    let long: Vec<Prompt> = (0..10)
        .map(|i| text(&format!("Part {i}. {}", "The river ran on past the mill. ".repeat(60))))
        .collect();
    let expected = block_on(async {
        let client = ask::connect(single.client()).await;
        let found = ask::embed(&client, &long, Pooling::Mean).await.unwrap();
        client.close().await;
        found
    });
    drop(single);
    let root = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(root.path(), 3, &["--kv-cache-tokens", "16384"]);
    let mut nodes = ["first", "middle", "last"].map(|name| coordinator.node(name, &[]));
    coordinator.wait_ready();
    let config = &coordinator.client;
    http_says_what_quic_says(config);
    wrong_requests_harm_nobody(config);
    for victim in [1, 2] {
        thread::scope(|scope| {
            let asked = scope.spawn(|| {
                block_on(async {
                    let client = ask::connect(config).await;
                    let found = ask::embed(&client, &long, Pooling::Mean).await.unwrap();
                    client.close().await;
                    found
                })
            });
            block_on(async {
                let client = ask::connect(config).await;
                let before = client.status().await.unwrap().prompt_tokens;
                ask::until(&client, "half-way", |s| s.prompt_tokens > before + 700).await;
                client.close().await;
            });
            assert!(!asked.is_finished(), "it is over before the node is killed");
            nodes[victim].kill();
            coordinator.wait_not_ready();
            nodes[victim] = coordinator.node(["first", "middle", "last"][victim], &[]);
            assert!(bits(&asked.join().unwrap()) == bits(&expected), "stage {victim}");
        });
    }
    coordinator.wait_nothing_left();
}

fn http_says_what_quic_says(config: &ClientConfig) {
    let said = ["A first text.", "And another one, which is longer than the first."];
    let (quic, short) = block_on(async {
        let client = ask::connect(config).await;
        let inputs = said.map(text).to_vec();
        let quic = ask::embed(&client, &inputs, Pooling::Last).await.unwrap();
        let (model, pooling, dimensions) = (String::new(), Pooling::Last, Some(64));
        let short = EmbedRequest { model, inputs, pooling, dimensions };
        let short = client.embed(short).await.unwrap();
        client.close().await;
        (quic, short)
    });
    let answer = post(config, &json!({"model": "model", "input": said, "pooling": "last"}));
    assert!(bits(&numbers(&answer)) == bits(&quic));
    let tokens: u32 = short.iter().map(|e| e.prompt_tokens).sum();
    assert_eq!(answer.json()["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
    let short: Vec<Vec<f32>> = short.into_iter().map(|e| e.vector).collect();
    let cut: Vec<Vec<f32>> = quic.iter().map(|v| shortened(v, 64).unwrap()).collect();
    assert!(bits(&short) == bits(&cut) && (cosine(&short[0], &short[0]) - 1.0).abs() < 1e-5);
    let body = json!({"input": said, "pooling": "last", "dimensions": 64});
    assert!(bits(&numbers(&post(config, &body))) == bits(&short));
}

fn wrong_requests_harm_nobody(config: &ClientConfig) {
    for (body, param, part) in [
        (json!({"input": []}), "input", "at least one"),
        (json!({"input": ""}), "input", "text 0 has no tokens"),
        (json!({"input": [[5], []]}), "input", "text 1 has no tokens"),
        (json!({"input": [[5], [999_999]]}), "input", "999999 is outside the vocabulary"),
        (json!({"input": vec![5; 9000]}), "input", "at most"),
        (json!({"input": "a", "dimensions": 0}), "dimensions", "between 1 and 576"),
        (json!({"input": "a", "dimensions": 577}), "dimensions", "between 1 and 576"),
    ] {
        let answer = post(config, &body);
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    assert_eq!(numbers(&post(config, &json!({"input": "a"}))).len(), 1);
}

fn of_mocks(faults: Vec<(u64, Fault)>) -> mocked::Shape {
    let mut shape = mocked::Shape::of_layers([Duration::from_millis(1); 2], 2);
    shape.nodes[0].faults = faults;
    shape
}

fn ids(n: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| 1 + (n * 31 + i * 7) % 90).collect()
}

/// A step that failed is tried again elsewhere; none of its positions counts twice.
#[test]
fn a_sick_node_changes_no_vector() {
    let _turn = alone();
    for fault in [Fault::Nan, Fault::Panic, Fault::Fail] {
        let shape = mocked::Shape { max_batch_tokens: Some(16), ..of_mocks(vec![(3, fault)]) };
        let cluster = Mocked::start(&shape);
        let all: Vec<Vec<u32>> = (0..6).map(|n| ids(n, 40)).collect();
        for pooling in BOTH {
            let inputs: Vec<Prompt> = all.iter().cloned().map(Prompt::Tokens).collect();
            let found = block_on(async {
                let client = ask::connect(cluster.client()).await;
                let found = ask::embed(&client, &inputs, pooling).await.unwrap();
                client.close().await;
                found
            });
            for (ids, found) in all.iter().zip(&found) {
                assert_eq!(*found, cluster.expected_embedding(ids, pooling), "{fault:?}");
            }
        }
    }
}

/// More texts than the queue and the cache hold, beside answers that take blocks away; a client that
/// leaves, and one whose time is up.
#[test]
fn long_lists_scarce_memory_and_impatience() {
    let _turn = alone();
    let shape = mocked::Shape {
        max_num_seqs: 8,
        kv_cache_tokens: Some(512),
        max_batch_tokens: Some(32),
        ..of_mocks(Vec::new())
    };
    let cluster = Mocked::start(&shape);
    let all: Vec<Vec<u32>> = (0..300).map(|n| ids(n, 1 + n % 60)).collect();
    let inputs: Vec<Prompt> = all.iter().cloned().map(Prompt::Tokens).collect();
    block_on(async {
        let client = &ask::connect(cluster.client()).await;
        let answers = join_all((0..6).map(|n| async move {
            let prompt = Prompt::Tokens(ids(n, 30));
            ask::generate(client, prompt, ask::greedy(60)).await.unwrap().tokens
        }));
        let (found, answers) = join(ask::embed(client, &inputs, Pooling::Mean), answers).await;
        for (ids, found) in all.iter().zip(&found.unwrap()) {
            assert_eq!(*found, cluster.expected_embedding(ids, Pooling::Mean));
        }
        for (n, tokens) in (0..6).zip(answers) {
            assert_eq!(tokens, cluster.expected(&ids(n, 30), 60));
        }
        // Who leaves takes all of its texts along.
        {
            let other = ask::connect(cluster.client()).await;
            let leaving = ask::embed(&other, &inputs, Pooling::Mean);
            let seen = ask::until(client, "computing", |s| s.running > 0);
            let left = futures::future::select(Box::pin(leaving), Box::pin(seen)).await;
            assert!(matches!(left, futures::future::Either::Right(_)), "it is over too soon");
            drop(left);
            other.close().await;
        }
        ask::idle(client).await;
        let hasty = client.with_deadline(Duration::from_millis(150));
        let status = ask::embed(&hasty, &inputs, Pooling::Mean).await.unwrap_err();
        // It is too late, or foreseen to be.
        let late = [ErrorCode::DeadlineExceeded, ErrorCode::ResourceExhausted];
        assert!(late.contains(&status.code), "{status}");
        ask::idle(client).await;
        let found = ask::embed(client, &inputs[..3], Pooling::Last).await.unwrap();
        assert_eq!(found[2], cluster.expected_embedding(&all[2], Pooling::Last));
        client.close().await;
    });
}

#[test]
fn the_command_prints_what_the_client_gets() {
    let _turn = alone();
    let lines = ["The miller opened the gate", "and the water came down."];
    let single = Local::start(Shape::default());
    let expected = block_on(async {
        let client = ask::connect(single.client()).await;
        let inputs = lines.map(text);
        let all = ask::embed(&client, &inputs, Pooling::Last).await.unwrap();
        client.close().await;
        all
    });
    drop(single);
    let home = tempfile::tempdir().unwrap();
    let embed = |more: &[&str]| {
        let mut embed = command("millrace", home.path());
        embed.args(["embed", "--model", model_arg(), "--stages", "2", "--pooling", "last"]);
        embed.args(more);
        embed
    };
    let output = run(embed(&[&lines[..], &["--output", "json"]].concat()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = answer["embeddings"].as_array().unwrap();
    assert_eq!(found[0]["prompt_tokens"], 6, "The, mill, er, opened, the, gate");
    let vector = |one: &Value| serde_json::from_value(one["vector"].clone()).unwrap();
    assert_eq!(bits(&found.iter().map(vector).collect::<Vec<_>>()), bits(&expected));

    let mut child =
        embed(&["--dimensions", "3"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let typed = lines.map(|line| format!("{line}\n")).concat();
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let printed = String::from_utf8(output.stdout).unwrap();
    let numbers = |line: &str| line.split(' ').map(|x| x.parse().unwrap()).collect::<Vec<f32>>();
    let short: Vec<_> = expected.iter().map(|v| shortened(v, 3).unwrap()).collect();
    assert_eq!(bits(&printed.lines().map(numbers).collect::<Vec<_>>()), bits(&short));
}
