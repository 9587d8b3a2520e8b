//! The bytes of the client protocol, as `clients/python/golden.json` pins them, so that a change of a
//! message is noticed, and the Python client is changed with it: its own test compares with the
//! same file.

use std::path::Path;
use std::process::Command;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::{Grammar, SamplingParams};
use millrace_shared::wire::ALPN_CLIENT;
use millrace_shared::wire::codec::encode;
use millrace_shared::wire::rpc::{
    CallHeader, CallPiece, ChatMessage, Choices, Conversation, EmbedRequest, Embedded,
    FinishReason, GenerateEvent, GenerateRequest, Method, Prompt, Reply, Timings, TokenLogprobs,
    ToolCall, ToolChoice, Usage,
};
use serde_json::json;

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").join("clients/python")
}

fn generate(model: &str, prompt: Prompt, params: SamplingParams, choices: Choices) -> Vec<u8> {
    let request = GenerateRequest { model: model.to_owned(), prompt, params, choices };
    encode(&Method::Generate(request))
}

fn asked() -> Vec<(&'static str, Vec<u8>)> {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let header = CallHeader {
        metadata: vec![pair("authorization", "Bearer key"), pair("millrace-priority", "high")],
        deadline_ms: Some(2500),
    };
    let params = SamplingParams {
        temperature: 0.5,
        top_k: 40,
        logit_bias: vec![(300, -1.5)],
        seed: Some(1 << 40),
        max_tokens: Some(70_000),
        stop: vec!["\n".to_owned(), "né".to_owned()],
        stop_token_ids: vec![2],
        ignore_eos: true,
        logprobs: Some(5),
        ..SamplingParams::default()
    };
    let chat = vec![ChatMessage::new("system", "Be brief."), ChatMessage::new("user", "Why?")];
    let call = ToolCall { id: "c1".into(), name: "f".into(), arguments: "{}".into() };
    let called = ChatMessage { tool_calls: vec![call], ..ChatMessage::new("assistant", "") };
    let answered = ChatMessage { tool_call_id: Some("c1".into()), ..ChatMessage::new("tool", "4") };
    let tools = Conversation {
        messages: vec![ChatMessage::new("user", "Why?"), called, answered],
        tools: vec![r#"{"name": "f"}"#.into()],
        tool_choice: ToolChoice::Named("f".into()),
        single_call: true,
    };
    let plain = SamplingParams::default();
    let regex =
        SamplingParams { grammar: Some(Grammar::Regex("a+".into())), ..SamplingParams::default() };
    let embed = EmbedRequest {
        model: "m".to_owned(),
        inputs: vec![Prompt::Text("né".to_owned()), Prompt::Tokens(vec![1, 300])],
        pooling: Pooling::Last,
        dimensions: Some(256),
    };
    let ids = vec![1, 250, 251, 65_535, 65_536];
    vec![
        ("header", encode(&header)),
        (
            "generate text",
            generate("", Prompt::Text("Once upon".into()), plain.clone(), Choices::of(1)),
        ),
        (
            "generate tokens",
            generate("m", Prompt::Tokens(ids), params.clone(), Choices { n: 2, best_of: 3 }),
        ),
        ("generate chat", generate("", Prompt::Chat(chat.into()), params, Choices::of(1))),
        ("generate tools", generate("", Prompt::Chat(tools), plain.clone(), Choices::of(1))),
        ("generate regex", generate("", Prompt::Text("x".into()), regex, Choices::of(1))),
        ("embed", encode(&Method::Embed(embed))),
    ]
}

fn heard() -> Vec<(&'static str, Vec<u8>)> {
    let event = |event: GenerateEvent| encode(&Reply::Event(event));
    let token = |choice, index, token_id, text: &str, logprobs| {
        let (text, calls) = (text.to_owned(), Vec::new());
        event(GenerateEvent::Token { choice, index, token_id, text, logprobs, calls })
    };
    let (id, name) = ("c1".to_owned(), "f".to_owned());
    let opened = CallPiece { call: 1, id, name, arguments: "{".to_owned() };
    let more = CallPiece { call: 1, arguments: "}".to_owned(), ..CallPiece::default() };
    let logprobs = TokenLogprobs { logprob: -0.5, top: vec![(42, -0.5), (43, -1.25)] };
    let failed = Status {
        code: ErrorCode::ResourceExhausted,
        message: "full".to_owned(),
        param: Some("n".to_owned()),
        retry_after_ms: Some(1000),
    };
    vec![
        (
            "started",
            event(GenerateEvent::Started {
                request_id: "0193a5b0-0000-7000-8000-000000000001".parse().expect("an id"),
                prompt_token_ids: vec![1, 2, 300],
                seed: 1 << 33,
                choices: 2,
                left_out: 5,
            }),
        ),
        ("token", token(1, 7, 42, " né", Some(logprobs))),
        ("token without", token(0, 8, 0, "", None)),
        (
            "token with a call",
            event(GenerateEvent::Token {
                choice: 0,
                index: 9,
                token_id: 1,
                text: String::new(),
                logprobs: None,
                calls: vec![opened],
            }),
        ),
        (
            "finished with a call",
            event(GenerateEvent::Finished {
                choice: 0,
                reason: FinishReason::ToolCalls,
                text: String::new(),
                calls: vec![more],
                usage: Usage::default(),
                timings: Timings::default(),
            }),
        ),
        (
            "finished",
            event(GenerateEvent::Finished {
                choice: 0,
                reason: FinishReason::Length,
                text: "end".to_owned(),
                calls: Vec::new(),
                usage: Usage {
                    prompt_tokens: 3,
                    completion_tokens: 260,
                    cached_tokens: 1,
                    discarded_tokens: 0,
                },
                timings: Timings { queue_ms: 0.5, ttft_ms: 12.25, decode_ms: 1e3 },
            }),
        ),
        (
            "embeddings",
            encode(&Reply::Embeddings(vec![
                Embedded { prompt_tokens: 3, vector: vec![0.75, -0.5] },
                Embedded { prompt_tokens: 300, vector: Vec::new() },
            ])),
        ),
        ("done", encode(&Reply::Done)),
        ("failed", encode(&Reply::Failed(failed))),
    ]
}

#[test]
fn the_python_client_speaks_the_protocol() {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let messages = asked().into_iter().chain(heard());
    let lines: Vec<String> = messages
        .map(|(name, bytes)| format!("  {}", json!({"hex": hex(&bytes), "name": name})))
        .collect();
    let golden = format!("[\n{}\n]\n", lines.join(",\n"));
    let file = folder().join("golden.json");
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        kept == golden,
        "messages have changed: raise ALPN_CLIENT, change docs/PROTOCOL.md and the Python client, \
         and make {} this:\n{golden}",
        file.display()
    );
    let client = folder().join("millrace_client.py");
    let alpn = format!("ALPN = \"{}\"", String::from_utf8_lossy(ALPN_CLIENT));
    let text = std::fs::read_to_string(&client).expect("the client");
    assert!(text.contains(&alpn), "the Python client speaks another version than {alpn}");
    let protocol = folder().join("../../docs/PROTOCOL.md");
    let page = std::fs::read_to_string(protocol).expect("the page");
    assert!(page.contains(&*String::from_utf8_lossy(ALPN_CLIENT)), "docs/PROTOCOL.md is older");
    let run = Command::new("python3").arg(&client).arg("--self-test").arg(&file).output();
    let run = run.expect("python3, with which the client is tested, cannot be started");
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "the Python client disagrees: {said}");
}
