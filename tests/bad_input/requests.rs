//! Requests that make no sense, over QUIC and over HTTP.

use harness::{ask, http};
use millrace_shared::error::ErrorCode;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::Prompt;
use serde_json::{Value, json};

use crate::cluster::under_attack;

#[test]
fn requests_over_quic() {
    under_attack(async |cluster| {
        let greedy = || ask::greedy(4);
        let long = Prompt::Text("word ".repeat(3000));
        let hot = SamplingParams { temperature: 9.0, ..greedy() };
        let cases = [
            (long, greedy(), "prompt", "at most"),
            (Prompt::Tokens(vec![7; 2049]), greedy(), "prompt", "at most"),
            (Prompt::Text("x".repeat(1 << 20)), greedy(), "prompt", "cannot fit"),
            (Prompt::Text(String::new()), greedy(), "prompt", "empty"),
            (Prompt::Tokens(Vec::new()), greedy(), "prompt", "empty"),
            (Prompt::Tokens(vec![1, 49_152]), greedy(), "prompt", "token id 49152"),
            (Prompt::Tokens(vec![u32::MAX]), greedy(), "prompt", "outside the vocabulary"),
            (Prompt::Text("a".into()), hot, "temperature", "between 0 and 2"),
        ];
        for (prompt, params, param, message) in cases {
            let status = ask::generate(&cluster.client, prompt, params).await.unwrap_err();
            assert_eq!(status.code, ErrorCode::InvalidArgument, "{status}");
            assert_eq!(status.param.as_deref(), Some(param), "{status}");
            assert!(status.message.contains(message), "'{message}' is not in: {status}");
            cluster.is_unharmed(message).await;
        }
        for tokens in [vec![], vec![1, 49_152]] {
            let status = ask::score(&cluster.client, tokens, 1).await.unwrap_err();
            assert_eq!(status.code, ErrorCode::InvalidArgument, "{status}");
        }
        cluster.is_unharmed("scores").await;
    });
}

#[test]
fn requests_over_http() {
    under_attack(async |cluster| {
        let (addr, key) = (cluster.coordinator.http(), cluster.coordinator.client.api_key.clone());
        let of = |prompt: Value| json!({"prompt": prompt}).to_string().into_bytes();
        let cases: [(Vec<u8>, &str); 8] = [
            (b"{\"prompt\": \"caf\xe9\"}".to_vec(), "UTF-8"),
            (of(json!("word ".repeat(3000))), "at most"),
            (of(json!("")), "empty"),
            (of(json!([])), "empty"),
            (of(json!([1, 49_152])), "49152"),
            (of(json!([-1])), "entry 0"),
            (b"{\"prompt\": ".to_vec(), ""),
            (b"{}".to_vec(), "is missing"),
        ];
        for (body, message) in cases {
            let response = http::post(addr, "/v1/completions", &key, &body);
            let text = response.text();
            assert_eq!(response.status, 400, "{text}");
            assert_eq!(response.json()["error"]["type"], "invalid_request_error", "{text}");
            assert!(text.contains(message), "'{message}' is not in: {text}");
            cluster.is_unharmed(message).await;
        }
        let stranger = http::post(addr, "/v1/completions", "no-key", &of(json!("a")));
        assert_eq!(stranger.status, 401, "{}", stranger.text());
        cluster.is_unharmed("a wrong key").await;
    });
}
