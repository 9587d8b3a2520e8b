//! A coordinator process and three node processes on loopback, as an operator would start them:
//! many clients at once, cancellations, a node that comes back, orderly ends.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::thread;

use harness::ask::{self, Answer};
use harness::fixtures;
use harness::local::{Local, Shape};
use harness::processes::{Coordinator, Process};
use harness::{alone, block_on, http, model_arg};
use millrace_net::client::ClientConfig;
use millrace_shared::wire::rpc::{FinishReason, Prompt};
use serde_json::{Value, json};

/// Clients at once.
const CLIENTS: usize = 16;
/// Tokens of an answer that is not cancelled.
const TOKENS: u32 = 24;
/// Tokens of a request that outlives what happens to it.
const ENDLESS: u32 = 1500;

/// Prompts of 1 to some 400 tokens.
fn prompts() -> Vec<String> {
    let sentence = "The miller opened the gate and the water came down the race. ";
    let prompt = |i: usize| match i {
        0 => "The".to_owned(),
        i => format!("{}Question {i}: why", sentence.repeat((i * i) / 8)),
    };
    (0..CLIENTS).map(prompt).collect()
}

/// What one stage says, one request after the other.
fn truth(prompts: &[String]) -> Vec<Answer> {
    let single = Local::start(Shape::default());
    block_on(async {
        let client = ask::connect(single.client()).await;
        let mut answers = Vec::new();
        for prompt in prompts {
            let prompt = Prompt::Text(prompt.clone());
            answers.push(ask::generate(&client, prompt, ask::greedy(TOKENS)).await.unwrap());
        }
        client.close().await;
        answers
    })
}

/// A coordinator and three nodes: one fetches its weights, one has the model, one fetches too.
fn start(root: &Path) -> (Coordinator, Vec<Process>) {
    let coordinator = Coordinator::start(root, 3, &["--kv-cache-tokens", "16384"]);
    let nodes = vec![
        coordinator.node("fetches", &[]),
        coordinator.node("has-the-model", &["--weights", model_arg()]),
        coordinator.node("fetches-too", &[]),
    ];
    coordinator.wait_ready();
    (coordinator, nodes)
}

/// Where the tensors of a node's last load came from: bytes as its log has them.
fn source(node: &mut Process, from: &str) -> String {
    node.wait_log("tensors", |log| {
        let line = log.lines().rfind(|l| l.contains("tensors are here"))?;
        let (_, rest) = line.split_once(&format!("{from}="))?;
        Some(rest.split(" at ").next()?.to_owned())
    })
}

const NOTHING: &str = "0 B";

fn completion(prompt: &str, tokens: u32, stream: bool) -> Vec<u8> {
    let body = json!({
        "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "stream": stream
    });
    body.to_string().into_bytes()
}

/// How a client of a number asks.
#[derive(Clone, Copy, Debug)]
enum Way {
    Quic,
    QuicCancelled,
    Http,
    Sse,
    SseCancelled,
}

fn way(i: usize) -> Way {
    match i % 8 {
        0 | 2 | 4 => Way::Quic,
        6 => Way::QuicCancelled,
        1 | 5 => Way::Http,
        3 => Way::Sse,
        _ => Way::SseCancelled,
    }
}

/// A text, and its ids where the way of asking shows them.
type Said = (String, Option<Vec<u32>>);

/// Asks; `None` where the request was cancelled half-way.
fn ask(way: Way, config: &ClientConfig, prompt: &str) -> Option<Said> {
    let addr: SocketAddr = config.http.trim_start_matches("http://").parse().unwrap();
    let path = "/v1/completions";
    match way {
        Way::Quic => block_on(async {
            let client = ask::connect(config).await;
            let prompt = Prompt::Text(prompt.to_owned());
            let answer = ask::generate(&client, prompt, ask::greedy(TOKENS)).await.unwrap();
            client.close().await;
            Some((answer.text, Some(answer.tokens)))
        }),
        Way::QuicCancelled => block_on(async {
            let client = ask::connect(config).await;
            let prompt = Prompt::Text(prompt.to_owned());
            let mut stream = ask::begin(&client, prompt, ask::greedy(ENDLESS)).await.unwrap();
            ask::take_tokens(&mut stream, 5).await.unwrap();
            drop(stream);
            client.close().await;
            None
        }),
        Way::Http => {
            let body = completion(prompt, TOKENS, false);
            let response = http::post(addr, path, &config.api_key, &body);
            assert_eq!(response.status, 200, "{}", response.text());
            let answer = response.json();
            Some((answer["choices"][0]["text"].as_str().unwrap().to_owned(), None))
        }
        Way::Sse => {
            let body = completion(prompt, TOKENS, true);
            let mut stream = http::begin_post(addr, path, &config.api_key, &body);
            let (mut text, mut done) = (String::new(), false);
            while let Some(event) = stream.event() {
                done = event == "[DONE]";
                if !done {
                    let chunk: Value = serde_json::from_str(&event).unwrap();
                    text.push_str(chunk["choices"][0]["text"].as_str().expect("no error"));
                }
            }
            assert!(done, "the stream ended without [DONE] after: {text}");
            Some((text, None))
        }
        Way::SseCancelled => {
            let body = completion(prompt, ENDLESS, true);
            let mut stream = http::begin_post(addr, path, &config.api_key, &body);
            for _ in 0..5 {
                stream.event().expect("more text");
            }
            None
        }
    }
}

/// All clients at once; every answer that was waited for is the single stage's.
fn sixteen_clients(config: &ClientConfig, prompts: &[String], truth: &[Answer]) {
    let finished: usize = thread::scope(|scope| {
        let asking: Vec<_> =
            (0..CLIENTS).map(|i| scope.spawn(move || ask(way(i), config, &prompts[i]))).collect();
        let answers = asking.into_iter().map(|thread| thread.join().unwrap()).enumerate();
        let check = |(i, answer): (usize, Option<Said>)| {
            let Some((text, tokens)) = answer else { return 0 };
            assert_eq!(text, truth[i].text, "{:?}, prompt {i}", way(i));
            if let Some(tokens) = tokens {
                assert_eq!(tokens, truth[i].tokens, "{:?}, prompt {i}", way(i));
            }
            1
        };
        answers.map(check).sum()
    });
    assert_eq!(finished, 12);
}

#[test]
fn one_coordinator_three_nodes_sixteen_clients() {
    let _turn = alone();
    let prompts = prompts();
    let truth = truth(&prompts);
    assert!(truth.iter().all(|a| a.reason == FinishReason::Length));
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, mut nodes) = start(root.path());
    let config = coordinator.client.clone();

    assert_ne!(source(&mut nodes[0], "coordinator"), NOTHING);
    assert_eq!(source(&mut nodes[0], "file"), NOTHING);
    assert_ne!(source(&mut nodes[1], "file"), NOTHING);
    assert_eq!(source(&mut nodes[1], "coordinator"), NOTHING);

    sixteen_clients(&config, &prompts, &truth);
    coordinator.wait_nothing_left();
    let first_epoch = coordinator.metric("millrace_plan_epoch");

    nodes[0].kill();
    coordinator.wait_not_ready();
    assert!(coordinator.process.is_alive());

    // The same folder, no token: the node is known, its tensors are in its cache, and it gets as much
    // of its old stage as costs next to nothing.
    nodes[0] = coordinator.node("fetches", &[]);
    coordinator.wait_ready();
    assert!(coordinator.metric("millrace_plan_epoch") > first_epoch);
    sixteen_clients(&config, &prompts, &truth);
    coordinator.wait_nothing_left();
    assert_ne!(source(&mut nodes[0], "cache"), NOTHING);

    // Orderly ends: the nodes outlive their coordinator, and leave when told.
    assert_eq!(coordinator.process.terminate().code(), Some(0), "{}", coordinator.process.log());
    for node in &mut nodes {
        assert!(node.is_alive());
        assert_eq!(node.terminate().code(), Some(0), "{}", node.log());
    }
}

/// What `echo` with `logprobs` says of prompts over HTTP: as right as the reference, and at three
/// stages, each prompt beside the others, the same to the bit as at one stage over QUIC.
#[test]
fn prompts_are_scored_as_by_one_stage() {
    let _turn = alone();
    let cases = fixtures::references();
    let single = Local::start(Shape::default());
    let truth = block_on(async {
        let client = ask::connect(single.client()).await;
        let mut truth = Vec::new();
        for case in &cases {
            truth.push(ask::score(&client, case.token_ids.clone(), 2).await.unwrap());
        }
        client.close().await;
        truth
    });
    drop(single);
    let root = tempfile::tempdir().unwrap();
    let (coordinator, _nodes) = start(root.path());
    let prompts: Vec<_> = cases.iter().map(|case| &case.token_ids).collect();
    let body = json!({"prompt": prompts, "max_tokens": 0, "echo": true, "logprobs": 2});
    let key = &coordinator.client.api_key;
    let answer =
        http::post(coordinator.http(), "/v1/completions", key, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let body = answer.json();
    for ((case, scores), choice) in
        cases.iter().zip(&truth).zip(body["choices"].as_array().unwrap())
    {
        let of = &choice["logprobs"];
        let told: Vec<Option<f32>> = serde_json::from_value(of["token_logprobs"].clone()).unwrap();
        let expected = scores[..scores.len() - 1].iter().map(|score| score.next_logprob);
        let expected: Vec<Option<f32>> = [None].into_iter().chain(expected).collect();
        assert_eq!(told, expected, "{}", case.name);
        let tops = of["top_logprobs"].as_array().unwrap();
        assert!(tops[0].is_null() && tops[1..].iter().all(|t| !t.as_object().unwrap().is_empty()));
        if let Some(mean) = case.mean_nll {
            let own = -told.iter().flatten().sum::<f32>() / (told.len() - 1) as f32;
            assert!((own - mean).abs() < 0.015, "{}: {own}, the reference has {mean}", case.name);
        }
        // Every token's text is where it is said to be.
        let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
        let offsets = of["text_offset"].as_array().unwrap();
        for (token, offset) in of["tokens"].as_array().unwrap().iter().zip(offsets) {
            let (token, from) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
            let here: String = text[from..].iter().take(token.chars().count()).collect();
            assert!(token == here || token.contains('\u{FFFD}'), "{}: {token:?}", case.name);
        }
    }
}
