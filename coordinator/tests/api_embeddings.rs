//! Embeddings over HTTP and QUIC, against a service that makes them up.
#![allow(clippy::unwrap_used)]

mod api_common;

use std::net::SocketAddr;
use std::sync::Arc;

use api_common::*;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use millrace_coordinator::api::http::{HttpConfig, HttpServerHandle, start};
use millrace_coordinator::metrics::Metrics;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::pooling::Pooling;
use millrace_shared::wire::rpc::{MAX_EMBED_INPUTS, Prompt};
use serde_json::{Value, json};

const PATH: &str = "/v1/embeddings";

struct Server {
    fake: Arc<Fake>,
    handle: HttpServerHandle,
    addr: SocketAddr,
}

fn server() -> Server {
    let (fake, _) = Fake::new(hello());
    let config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    let metrics = Arc::new(Metrics::new(MODEL));
    let handle = start(config, fake.clone(), metrics).expect("a free port");
    let addr = handle.addr;
    Server { fake, handle, addr }
}

fn floats(list: &Value) -> Vec<f32> {
    list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn every_form_of_input() {
    let s = server();
    for (input, inputs) in [
        (json!("abc"), vec![Prompt::Text("abc".into())]),
        (json!(["abc", "d"]), vec![Prompt::Text("abc".into()), Prompt::Text("d".into())]),
        (json!([5, 6]), vec![Prompt::Tokens(vec![5, 6])]),
        (json!([[5], [6, 7]]), vec![Prompt::Tokens(vec![5]), Prompt::Tokens(vec![6, 7])]),
    ] {
        let answer = post(s.addr, PATH, &json!({"model": MODEL, "input": input}));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(!answer.headers.contains_key("x-millrace-ignored"));
        let body = answer.json();
        assert_eq!((&body["object"], &body["model"]), (&json!("list"), &json!(MODEL)));
        let data = body["data"].as_array().unwrap();
        assert_eq!(data.len(), inputs.len());
        for (index, one) in data.iter().enumerate() {
            assert_eq!((&one["object"], &one["index"]), (&json!("embedding"), &json!(index)));
            let tokens = match &inputs[index] {
                Prompt::Tokens(ids) => ids.len(),
                Prompt::Text(text) => text.len(),
                Prompt::Chat(_) => 0,
            };
            let vector = [tokens as f32, 0.1, -1.0 / 3.0, f32::MIN_POSITIVE];
            assert_eq!(floats(&one["embedding"]), vector, "in order, every bit of it");
        }
        let all: f32 = data.iter().map(|one| floats(&one["embedding"])[0]).sum();
        assert_eq!(body["usage"], json!({"prompt_tokens": all as u64, "total_tokens": all as u64}));
        let (request, _) = s.fake.embedded.lock().unwrap().pop().unwrap();
        assert_eq!((request.inputs, request.pooling), (inputs, Pooling::Mean));
        assert_eq!(request.dimensions, None);
    }
}

#[test]
fn base64_is_the_same_numbers() {
    let s = server();
    let ask = |format: &str| {
        let body = json!({"input": ["abc", "de"], "encoding_format": format});
        post(s.addr, PATH, &body).json()["data"].clone()
    };
    let (plain, coded) = (ask("float"), ask("base64"));
    for index in 0..2 {
        let bytes = STANDARD.decode(coded[index]["embedding"].as_str().unwrap()).unwrap();
        let numbers: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(numbers, floats(&plain[index]["embedding"]));
    }
}

#[test]
fn what_else_a_request_says() {
    let s = server();
    let body = json!({
        "input": "a", "pooling": "last", "dimensions": 3, "user": "u", "input_type": "query",
        "truncate_prompt_tokens": 5,
    });
    let headers = "x-millrace-priority: low\r\nx-request-timeout-ms: 4000\r\n";
    let answer = exchange(s.addr, post_text(PATH, &body.to_string(), headers).as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut ignored: Vec<&str> = answer.headers["x-millrace-ignored"].split(", ").collect();
    ignored.sort_unstable();
    assert_eq!(ignored, ["input_type", "truncate_prompt_tokens"]);
    assert_eq!(answer.json()["model"], MODEL, "the only one");
    let (request, caller) = s.fake.embedded.lock().unwrap().pop().unwrap();
    assert_eq!((request.pooling, request.dimensions), (Pooling::Last, Some(3)));
    assert_eq!(caller.priority, millrace_shared::scheduler::Priority::Low);
    assert_eq!(caller.deadline, Some(std::time::Duration::from_secs(4)));
}

#[test]
fn wrong_requests_are_named() {
    let s = server();
    for (body, param) in [
        (json!({}), json!("input")),
        (json!({"input": null}), json!("input")),
        (json!({"input": {"text": "a"}}), json!("input")),
        (json!({"input": ["a", 1]}), json!("input")),
        (json!({"input": [1, "a"]}), json!("input")),
        (json!({"input": [-1]}), json!("input")),
        (json!({"input": vec!["a"; MAX_EMBED_INPUTS + 1]}), json!("input")),
        (json!({"input": "a", "encoding_format": "int8"}), json!("encoding_format")),
        (json!({"input": "a", "dimensions": -1}), json!("dimensions")),
        (json!({"input": "a", "dimensions": "all"}), json!("dimensions")),
        (json!({"input": "a", "pooling": "cls"}), json!("pooling")),
        (json!({"input": "a", "model": 1}), json!("model")),
    ] {
        let answer = post(s.addr, PATH, &body);
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["param"]), (400, &param), "{answer:?}");
        assert_eq!(error["type"], "invalid_request_error", "{answer:?}");
    }
    assert!(s.fake.embedded.lock().unwrap().is_empty(), "none of them went further");
    let missing = post(s.addr, PATH, &json!({"input": "a", "model": "other"}));
    assert_eq!(
        (missing.status, &missing.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    s.fake.set(refuse(Status::exhausted("full", 1500)));
    let full = post(s.addr, PATH, &json!({"input": "a"}));
    assert_eq!((full.status, full.headers["retry-after"].as_str()), (429, "2"));
    s.handle.drain();
    assert_eq!(post(s.addr, PATH, &json!({"input": "a"})).status, 503);
    assert_eq!(ErrorCode::Unavailable.http_status(), 503);
}
