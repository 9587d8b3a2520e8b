//! What clients see when the pipeline under their requests changes: a killed node that comes back,
//! one that does not. Coordinator and nodes are processes; deaths are `kill -9`.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use harness::ask::{self, Answer};
use harness::local::{Local, Shape};
use harness::processes::{Coordinator, Process};
use harness::{alone, block_on, http};
use millrace_net::client::ClientConfig;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{Choices, GenerateRequest, Prompt, TokenizeRequest};
use serde_json::{Value, json};

/// Enough that every answer is still under way when the first tokens of all have come.
const TOKENS: u32 = 160;

/// Greedy ones and sampled ones, with penalties, log-probabilities, and stop strings of which answers
/// hold the beginning time and again; JSON that follows a schema; short prompts and longer ones.
fn requests() -> Vec<(String, SamplingParams)> {
    let sentence = "The wheel turns slowly while the water runs below the old stone bridge. ";
    let request = |i: usize| {
        let prompt = format!("{}Story {i}:", sentence.repeat(i * 4));
        let params = match i {
            1 => SamplingParams {
                repetition_penalty: 1.1,
                presence_penalty: 0.3,
                frequency_penalty: 0.2,
                ..ask::sampled(7, TOKENS)
            },
            2 => SamplingParams { logprobs: Some(3), ..ask::greedy(TOKENS) },
            3 => SamplingParams {
                stop: vec![" the Qq".to_owned(), ". And so it never".to_owned()],
                logprobs: Some(0),
                ..ask::sampled(7, TOKENS)
            },
            4 => SamplingParams { logprobs: Some(1), ..ask::constrained(7, TOKENS) },
            _ => ask::greedy(TOKENS),
        };
        (prompt, params)
    };
    (0..5).map(request).collect()
}

fn answer(config: &ClientConfig, prompt: &str, params: SamplingParams) -> Answer {
    block_on(async {
        let client = ask::connect(config).await;
        let prompt = Prompt::Text(prompt.to_owned());
        let answer = ask::generate(&client, prompt, params).await.unwrap();
        client.close().await;
        answer
    })
}

fn several_of(prompt: Prompt, params: SamplingParams, n: u32) -> GenerateRequest {
    GenerateRequest { model: String::new(), prompt, params, choices: Choices::of(n) }
}

/// All full blocks of a prompt are computed for one choice and found by the others.
fn the_prompt_is_shared(config: &ClientConfig) {
    let prompt = "A long way to go, and many a stone upon it. ".repeat(20);
    block_on(async {
        let client = ask::connect(config).await;
        let text = TokenizeRequest { model: String::new(), prompt: Prompt::Text(prompt.clone()) };
        let tokens = client.tokenize(text).await.unwrap().len() as u64;
        let before = ask::idle(&client).await;
        let (prompt, params) = (Prompt::Text(prompt), ask::sampled(3, 4));
        let answers = ask::choices(&client, several_of(prompt, params, 4), |_| {}).await.unwrap();
        assert_eq!(answers.len(), 4);
        let after = ask::idle(&client).await;
        client.close().await;
        let size = u64::from(after.kv_block_size);
        // The last token is computed for each, for its logits.
        let shared = (tokens - 1) / size * size;
        assert!(shared > 2 * size, "{tokens} tokens");
        assert_eq!(after.prefix_hit_tokens - before.prefix_hit_tokens, 3 * shared);
        let computed = after.prompt_tokens - before.prompt_tokens;
        assert_eq!(computed, tokens + 3 * (tokens - shared));
    });
}

/// What one stage says that nothing happens to: to each request, and several times to one.
fn truth() -> (Vec<Answer>, Vec<Answer>) {
    let single = Local::start(Shape::default());
    the_prompt_is_shared(single.client());
    let one = |(prompt, params): (String, _)| answer(single.client(), &prompt, params);
    (requests().into_iter().map(one).collect(), several(single.client()))
}

/// Three choices of one request, sampled and penalised, with log-probabilities.
fn several(config: &ClientConfig) -> Vec<Answer> {
    let (prompt, params) = requests().remove(1);
    let params = SamplingParams { logprobs: Some(1), ..params };
    block_on(async {
        let client = ask::connect(config).await;
        let prompt = Prompt::Text(prompt);
        let answers = ask::choices(&client, several_of(prompt, params, 3), |_| {}).await.unwrap();
        client.close().await;
        answers
    })
}

fn start(root: &std::path::Path, extra: &[&str]) -> (Coordinator, Vec<Process>) {
    let options = [&["--kv-cache-tokens", "16384"], extra].concat();
    let coordinator = Coordinator::start(root, 3, &options);
    let nodes = ["first", "middle", "last"].map(|name| coordinator.node(name, &[])).into();
    coordinator.wait_ready();
    (coordinator, nodes)
}

/// Asks; says so when three tokens are here; the rest.
fn ask_slowly(
    config: &ClientConfig,
    (prompt, params): (String, SamplingParams),
    runs: &Sender<()>,
) -> Result<Answer, Status> {
    block_on(async {
        let client = ask::connect(config).await;
        let mut stream = ask::begin(&client, Prompt::Text(prompt), params).await?;
        let begun = ask::take_tokens(&mut stream, 3).await?;
        runs.send(()).unwrap();
        let rest = ask::finish_from(stream, begun).await;
        client.close().await;
        rest
    })
}

fn completion(stream: bool) -> Vec<u8> {
    let body = json!({
        "model": "model", "prompt": "Story 0:", "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": true, "stream": stream
    });
    body.to_string().into_bytes()
}

/// The text of a stream, and its last event.
fn sse(addr: SocketAddr, key: &str, runs: &Sender<()>) -> (String, String) {
    let mut stream = http::begin_post(addr, "/v1/completions", key, &completion(true));
    let (mut text, mut last) = (String::new(), String::new());
    while let Some(event) = stream.event() {
        if let Ok(chunk) = serde_json::from_str::<Value>(&event)
            && let Some(piece) = chunk["choices"][0]["text"].as_str()
        {
            if text.is_empty() {
                let _ = runs.send(());
            }
            text.push_str(piece);
        }
        last = event;
    }
    (text, last)
}

#[test]
fn a_killed_node_that_comes_back_is_a_pause() {
    let _turn = alone();
    let (truth, choices) = truth();
    assert_eq!(choices[0].tokens, truth[1].tokens, "the first is what one alone is");
    let root = tempfile::tempdir().unwrap();
    let (coordinator, mut nodes) = start(root.path(), &[]);
    let config = &coordinator.client;
    let epoch = coordinator.metric("millrace_plan_epoch");
    // Each of the stages once: what is lost differs.
    for victim in 0..3 {
        thread::scope(|scope| {
            let (runs, running) = channel();
            let asked: Vec<_> = (requests().into_iter())
                .map(|request| {
                    let runs = runs.clone();
                    scope.spawn(move || ask_slowly(config, request, &runs))
                })
                .collect();
            let mixed = scope.spawn(move || several(config));
            let addr = coordinator.http();
            let streamed = scope.spawn(move || sse(addr, &config.api_key, &runs));
            (0..6).for_each(|_| running.recv_timeout(harness::DEADLINE).unwrap());
            nodes[victim].kill();
            coordinator.wait_not_ready();
            // Who comes now waits with the others.
            let (prompt, params) = requests().remove(1);
            let late = scope.spawn(move || answer(config, &prompt, params));
            let name = ["first", "middle", "last"][victim];
            nodes[victim] = coordinator.node(name, &[]);
            for (i, thread) in asked.into_iter().enumerate() {
                assert_eq!(thread.join().unwrap().unwrap(), truth[i], "{name}, request {i}");
            }
            let (text, last) = streamed.join().unwrap();
            assert_eq!((text, last.as_str()), (truth[0].text.clone(), "[DONE]"), "{name}");
            assert_eq!(late.join().unwrap(), truth[1], "{name}");
            assert_eq!(mixed.join().unwrap(), choices, "{name}");
        });
    }
    assert!(coordinator.metric("millrace_plan_epoch") >= epoch + 3.0);
    coordinator.wait_nothing_left();
}

#[test]
fn a_killed_node_that_stays_away_ends_requests_in_time() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, mut nodes) = start(root.path(), &["--recovery-timeout", "1"]);
    let (config, addr) = (coordinator.client.clone(), coordinator.http());
    thread::scope(|scope| {
        let (config, (runs, running)) = (&config, channel());
        let asked: Vec<_> = (requests().into_iter())
            .map(|(prompt, params)| {
                let runs = runs.clone();
                let params = SamplingParams { max_tokens: Some(1500), ..params };
                scope.spawn(move || ask_slowly(config, (prompt, params), &runs))
            })
            .collect();
        (0..5).for_each(|_| running.recv_timeout(harness::DEADLINE).unwrap());
        nodes[1].kill();
        for thread in asked {
            let status = thread.join().unwrap().unwrap_err();
            assert_eq!(status.code, ErrorCode::Unavailable, "{status}");
            assert!(status.retry_after_ms.is_some(), "{status:?}");
        }
    });
    assert!(coordinator.process.is_alive());
    let health = http::get(addr, "/health");
    assert_eq!(health.status, 503, "{}", health.text());
    for stream in [false, true] {
        let refused = http::post(addr, "/v1/completions", &config.api_key, &completion(stream));
        assert_eq!(refused.status, 503, "{}", refused.text());
        assert!(refused.header("retry-after").is_some(), "{refused:?}");
    }
    nodes[1] = coordinator.node("middle", &[]);
    coordinator.wait_ready();
    let whole = http::post(addr, "/v1/completions", &config.api_key, &completion(false));
    assert_eq!(whole.status, 200, "{}", whole.text());
}
