//! The HTTP API as a client sees it, over real connections, against a service that plays a script.
#![allow(clippy::unwrap_used)]

mod api_common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use api_common::*;
use millrace_coordinator::api::http::{HttpConfig, HttpServerHandle, start};
use millrace_coordinator::metrics::Metrics;
use millrace_coordinator::service::{Caller, Counted};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::scheduler::Priority;
use millrace_shared::wire::rpc::{
    CallPiece, Choices, FinishReason, GenerateEvent, Prompt, ToolChoice,
};
use serde_json::{Value, json};

struct Server {
    fake: Arc<Fake>,
    dropped: mpsc::Receiver<RequestId>,
    handle: HttpServerHandle,
    addr: SocketAddr,
}

fn server_with(script: Script, change: impl FnOnce(&mut HttpConfig)) -> Server {
    let (fake, dropped) = Fake::new(script);
    let mut config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    change(&mut config);
    let metrics = Arc::new(Metrics::new(MODEL));
    let handle = start(config, fake.clone(), metrics).expect("a free port");
    let addr = handle.addr;
    Server { fake, dropped, handle, addr }
}

fn server(script: Script) -> Server {
    server_with(script, |_| {})
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat_body(more: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn expect_error(answer: &Answer, status: u16, kind: &str, param: Value, code: &str) -> String {
    assert_eq!(answer.status, status, "{answer:?}");
    let error = answer.json()["error"].clone();
    assert_eq!(error["type"], kind, "{answer:?}");
    assert_eq!(error["param"], param, "{answer:?}");
    assert_eq!(error["code"], code, "{answer:?}");
    error["message"].as_str().expect("a message").to_owned()
}

#[test]
fn chat_whole() {
    let s = server(hello());
    let answer = post(s.addr, CHAT, &chat_body(json!({"max_tokens": 9, "temperature": 0})));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.headers["content-type"], "application/json");
    assert!(!answer.headers.contains_key("x-millrace-ignored"));
    assert!(answer.headers.contains_key("x-request-id"));
    let body = answer.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], MODEL);
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    let expected = json!({"index": 0, "logprobs": null, "finish_reason": "stop",
        "message": {"role": "assistant", "content": "Hello world", "refusal": null}});
    assert_eq!(body["choices"], json!([expected]));
    let usage = json!({"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2}});
    assert_eq!(body["usage"], usage);
    let (request, caller) = s.fake.last();
    assert!(matches!(&request.prompt, Prompt::Chat(c) if c.messages[0].content == "hi"));
    assert_eq!((request.params.max_tokens, request.params.temperature), (Some(9), 0.0));
    assert_eq!((caller.deadline, caller.priority), (None, Priority::Normal));
}

#[test]
fn chat_streamed_in_order() {
    let s = server(hello());
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let answer = post(s.addr, CHAT, &chat_body(options));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.headers["content-type"].starts_with("text/event-stream"));
    assert_eq!(*answer.data().last().unwrap(), "[DONE]");
    let chunks = answer.chunks();
    let deltas: Vec<_> = chunks.iter().map(|c| c["choices"][0]["delta"].clone()).collect();
    assert_eq!(
        deltas,
        [
            json!({"role": "assistant", "content": ""}),
            json!({"content": "Hello"}),
            json!({"content": " wor"}),
            json!({"content": "ld"}),
            json!(null),
        ]
    );
    let reasons: Vec<_> = chunks.iter().map(|c| c["choices"][0]["finish_reason"].clone()).collect();
    assert_eq!(reasons, [json!(null), json!(null), json!(null), json!("stop"), json!(null)]);
    for chunk in &chunks {
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert!(chunk.as_object().unwrap().contains_key("usage"));
    }
    assert!(chunks[..4].iter().all(|c| c["usage"].is_null()));
    assert_eq!(chunks[4]["choices"], json!([]));
    assert_eq!(chunks[4]["usage"]["total_tokens"], 8);

    let plain = post(s.addr, CHAT, &chat_body(json!({"stream": true}))).chunks();
    assert_eq!(plain.len(), 4);
    assert!(plain.iter().all(|c| !c.as_object().unwrap().contains_key("usage")));
}

/// "Well", and a call whose name comes before its arguments.
fn calling() -> Script {
    let piece = |id: &str, name: &str, arguments: &str| {
        let (id, name, arguments) = (id.into(), name.into(), arguments.into());
        vec![CallPiece { call: 0, id, name, arguments }]
    };
    let with = |event: Result<GenerateEvent, Status>, pieces| {
        event.map(|mut event| {
            if let GenerateEvent::Token { calls, .. } | GenerateEvent::Finished { calls, .. } =
                &mut event
            {
                *calls = pieces;
            }
            event
        })
    };
    play(vec![
        started(),
        token(0, 7, "Well", None),
        with(token(1, 8, "", None), piece("call_1", "add", "")),
        with(token(2, 9, "", None), piece("", "", "{\"a\":")),
        with(finished(FinishReason::ToolCalls, ""), piece("", "", " 1}")),
    ])
}

#[test]
fn tools_are_called() {
    let s = server(calling());
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {}}}]);
    let asked = chat_body(json!({"tools": tools, "tool_choice": "required"}));
    let answer = post(s.addr, CHAT, &asked);
    assert_eq!(answer.status, 200, "{answer:?}");
    let choice = answer.json()["choices"][0].clone();
    let function = json!({"name": "add", "arguments": "{\"a\": 1}"});
    let call = json!({"id": "call_1", "type": "function", "function": function});
    assert_eq!(choice["message"]["tool_calls"], json!([call]));
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Well"))
    );
    let (request, _) = s.fake.last();
    let Prompt::Chat(conversation) = request.prompt else { panic!("a conversation") };
    assert_eq!(conversation.tool_choice, ToolChoice::Required);
    assert_eq!(conversation.tools, [r#"{"name":"add","parameters":{}}"#]);

    let streamed = chat_body(json!({"tools": tools, "stream": true}));
    let chunks = post(s.addr, CHAT, &streamed).chunks();
    let deltas: Vec<_> = chunks.iter().map(|c| c["choices"][0]["delta"].clone()).collect();
    let more = |text: &str| json!({"tool_calls": [{"index": 0, "function": {"arguments": text}}]});
    let opened = json!({"index": 0, "id": "call_1", "type": "function",
        "function": {"name": "add", "arguments": ""}});
    assert_eq!(
        deltas,
        [
            json!({"role": "assistant", "content": ""}),
            json!({"content": "Well"}),
            json!({"tool_calls": [opened]}),
            more("{\"a\":"),
            more(" 1}"),
        ]
    );
    assert_eq!(chunks[4]["choices"][0]["finish_reason"], "tool_calls");

    for (more, param) in [
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"function_call": {"name": "f"}}), "function_call"),
        (json!({"tools": [{"type": "custom"}]}), "tools[0].type"),
    ] {
        let answer = post(s.addr, CHAT, &chat_body(more));
        let said =
            expect_error(&answer, 400, "invalid_request_error", json!(param), "invalid_argument");
        assert!(said.contains("use") || said.contains("tools"), "{said}");
    }
}

#[test]
fn completions_whole_and_streamed() {
    let s = server(hello());
    let answer = post(s.addr, COMPLETIONS, &json!({"prompt": [4, 5], "seed": 3, "user": "me"}));
    let body = answer.json();
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], MODEL, "the only model is named where the client named none");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    let expected =
        json!([{"index": 0, "text": "Hello world", "logprobs": null, "finish_reason": "stop"}]);
    assert_eq!(body["choices"], expected);
    let (request, _) = s.fake.last();
    assert_eq!(request.prompt, Prompt::Tokens(vec![4, 5]));
    assert_eq!((request.params.max_tokens, request.params.seed), (Some(16), Some(3)));

    let answer = post(s.addr, COMPLETIONS, &json!({"prompt": "x", "stream": true}));
    let texts: Vec<_> = answer.chunks().iter().map(|c| c["choices"][0]["text"].clone()).collect();
    assert_eq!(texts, ["Hello", " wor", "ld"]);
    assert_eq!(*answer.data().last().unwrap(), "[DONE]");
}

#[test]
fn several_prompts_and_their_echo() {
    let s = server(hello());
    let body = json!({"prompt": ["a", "b"], "echo": true});
    let answer = post(s.addr, COMPLETIONS, &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(!answer.headers.contains_key("x-millrace-request-id"), "none stands for both");
    let whole = answer.json();
    let found =
        |index: usize| (&whole["choices"][index]["index"], &whole["choices"][index]["text"]);
    assert_eq!(found(0), (&json!(0), &json!("aHello world")));
    assert_eq!(found(1), (&json!(1), &json!("bHello world")));
    let counts = |key: &str| whole["usage"][key].as_u64().unwrap();
    assert_eq!((counts("prompt_tokens"), counts("completion_tokens")), (10, 6));
    assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
    let seen = s.fake.seen.lock().unwrap().len();
    assert_eq!(seen, 2);

    s.fake.set(two_choices());
    let options = json!({"include_usage": true});
    let body = json!({"prompt": [[1], [2, 3]], "n": 2, "stream": true, "stream_options": options});
    let answer = post(s.addr, COMPLETIONS, &body);
    let chunks = answer.chunks();
    for (index, text) in ["Hello world", "Good bye", "Hello world", "Good bye"].iter().enumerate() {
        let of = |c: &&Value| c["choices"][0]["index"] == json!(index);
        let pieces = chunks.iter().filter(of).filter_map(|c| c["choices"][0]["text"].as_str());
        assert_eq!(pieces.collect::<String>(), *text, "{answer:?}");
    }
    assert_eq!(chunks.last().unwrap()["usage"]["prompt_tokens"], 10);
    assert_eq!(*answer.data().last().unwrap(), "[DONE]");
    let echoed = json!({"prompt": "a", "echo": true, "stream": true});
    s.fake.set(hello());
    let chunks = post(s.addr, COMPLETIONS, &echoed).chunks();
    let texts: Vec<_> = chunks.iter().map(|c| c["choices"][0]["text"].clone()).collect();
    assert_eq!(texts, ["a", "Hello", " wor", "ld"]);
}

#[test]
fn prompts_are_scored_with_echo() {
    let s = server(hello_with_logprobs());
    let body = json!({"prompt": [1, 2, 3], "echo": true, "logprobs": 1, "max_tokens": 2});
    let answer = post(s.addr, COMPLETIONS, &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    let choice = answer.json()["choices"][0].clone();
    assert_eq!(choice["text"], "<1><2><3><7><8>");
    let expected = json!({
        "tokens": ["<1>", "<2>", "<3>", "<7>", "<8>"],
        "token_logprobs": [null, -0.5, -1.5, -0.1, -3.5],
        "top_logprobs": [
            null, {"<2>": -0.5, "<3>": -0.25}, {"<3>": -1.5}, {"<3>": -2.5, "<7>": -0.1},
            {"<8>": -3.5, "\u{FFFD}": -0.2}
        ],
        "text_offset": [0, 3, 6, 9, 12],
    });
    assert_eq!(choice["logprobs"], expected);
    let (scored, _) = s.fake.scored.lock().unwrap().pop().unwrap();
    assert_eq!((scored.tokens, scored.top_k), (vec![1, 2, 3], 1));

    // Streamed, the prompt is the first chunk; a choice more has it once more.
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let chunks = post(s.addr, COMPLETIONS, &streamed).chunks();
    assert_eq!(chunks[0]["choices"][0]["text"], "<1><2><3>");
    let lists = chunks.iter().map(|c| &c["choices"][0]["logprobs"]["text_offset"]);
    let offsets: Vec<_> = lists.filter_map(Value::as_array).flatten().collect();
    assert_eq!(offsets, [0, 3, 6, 9, 12]);

    // Nothing is generated where no token is wanted.
    let asked = s.fake.seen.lock().unwrap().len();
    let alone =
        json!({"prompt": [[1, 2], [3]], "n": 2, "echo": true, "logprobs": 0, "max_tokens": 0});
    let whole = post(s.addr, COMPLETIONS, &alone).json();
    let texts: Vec<_> = whole["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
    assert_eq!(texts, ["<1><2>", "<1><2>", "<3>", "<3>"]);
    assert_eq!(whole["choices"][1]["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(whole["choices"][3]["finish_reason"], "length");
    let counts = |key: &str| whole["usage"][key].as_u64().unwrap();
    assert_eq!((counts("prompt_tokens"), counts("completion_tokens")), (3, 0));
    let plain = json!({"prompt": "ab", "echo": true, "max_tokens": 0});
    let whole = post(s.addr, COMPLETIONS, &plain).json();
    assert_eq!(whole["choices"][0]["text"], "ab");
    assert!(whole["choices"][0]["logprobs"].is_null());
    assert_eq!(s.fake.seen.lock().unwrap().len(), asked);

    // Whoever attaches hears the same.
    let named = post_text(COMPLETIONS, &streamed.to_string(), "idempotency-key: scored\r\n");
    let first = exchange(s.addr, named.as_bytes());
    assert_eq!(first.status, 200, "{first:?}");
    let attach = |from: &str| {
        let text = format!(
            "GET /v1/requests/scored/events HTTP/1.1\r\nhost: localhost\r\n\
             authorization: Bearer {KEY}\r\n{from}\r\n"
        );
        exchange(s.addr, text.as_bytes()).chunks()
    };
    let again = &attach("")[0]["choices"][0];
    assert_eq!(again["text"], "<1><2><3><4><5>", "as the service tells it");
    let told = &again["logprobs"]["token_logprobs"];
    assert_eq!(*told, json!([null, -0.5, -1.5, -2.5, -3.5]));
    let before = s.fake.scored.lock().unwrap().len();
    let rest = attach("last-event-id: 0:1\r\n");
    assert_eq!(rest[0]["choices"][0]["logprobs"]["text_offset"], json!([18]));
    assert_eq!(s.fake.scored.lock().unwrap().len(), before, "what was heard is not scored again");
}

#[test]
fn several_choices() {
    let s = server(two_choices());
    let answer = post(s.addr, CHAT, &chat_body(json!({"n": 2, "best_of": 3})));
    assert_eq!(s.fake.last().0.choices, Choices { n: 2, best_of: 3 });
    let body = answer.json();
    let of = |index: u32, content: &str, reason: &str| {
        json!({"index": index, "logprobs": null, "finish_reason": reason,
            "message": {"role": "assistant", "content": content, "refusal": null}})
    };
    let expected = json!([of(0, "Hello world", "stop"), of(1, "Good bye", "length")]);
    assert_eq!(body["choices"], expected);
    // The prompt once, every token that was made, and of the cache what the first computed did find.
    let usage = json!({"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(body["usage"], usage);
    let text = post(s.addr, COMPLETIONS, &json!({"prompt": "x", "n": 2})).json();
    let texts: Vec<_> = text["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
    assert_eq!(texts, ["Hello world", "Good bye"]);

    let streamed =
        chat_body(json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}}));
    let extra = "idempotency-key: two\r\n";
    let answer = exchange(s.addr, post_text(CHAT, &streamed.to_string(), extra).as_bytes());
    let seen: Vec<_> = (answer.chunks().iter())
        .flat_map(|c| c["choices"].as_array().unwrap().clone())
        .map(|c| {
            let text = c["delta"]["content"].as_str().unwrap_or_default().to_owned();
            (c["index"].as_u64().unwrap(), text, c["finish_reason"].clone())
        })
        .collect();
    let piece = |index: u64, text: &str| (index, text.to_owned(), json!(null));
    let expected = [
        piece(1, ""),
        piece(1, "Good"),
        piece(0, ""),
        piece(0, "Hello"),
        piece(1, " bye"),
        (1, String::new(), json!("length")),
        piece(0, " wor"),
        (0, "ld".to_owned(), json!("stop")),
    ];
    assert_eq!(seen, expected);
    assert_eq!(answer.chunks().last().unwrap()["usage"], usage);
    assert_eq!(*answer.data().last().unwrap(), "[DONE]");
    let ids: Vec<_> = answer.body.lines().filter_map(|l| l.strip_prefix("id: ")).collect();
    assert_eq!(ids, ["0:0,1:1", "0:1,1:1", "0:2,1:2", "0:2,1:3", "0:3,1:3", "0:4,1:3"]);
    // From any of these places on comes what had not come by then.
    for (at, (id, left)) in ids.iter().zip([5, 4, 3, 2, 1, 0]).enumerate() {
        let text = format!(
            "GET /v1/requests/two/events HTTP/1.1\r\nhost: localhost\r\n\
             authorization: Bearer {KEY}\r\nlast-event-id: {id}\r\n\r\n"
        );
        let rest = exchange(s.addr, text.as_bytes());
        let later: Vec<_> = rest.body.lines().filter_map(|l| l.strip_prefix("id: ")).collect();
        assert_eq!(later, ids[at + 1..], "after {id}");
        assert_eq!(later.len(), left);
        assert_eq!(*rest.data().last().unwrap(), "[DONE]");
    }
    s.fake.set(play(vec![api_common::of(1, token(0, 7, "?", None))]));
    let wrong = post(s.addr, COMPLETIONS, &json!({"prompt": "x"}));
    assert_eq!(wrong.status, 500, "a choice that nobody announced: {wrong:?}");
}

#[test]
fn logprobs_in_both_shapes() {
    let s = server(hello_with_logprobs());
    let answer = post(s.addr, CHAT, &chat_body(json!({"logprobs": true, "top_logprobs": 2})));
    assert_eq!(s.fake.last().0.params.logprobs, Some(2));
    // The text shows that numbers keep their shortest form.
    assert!(answer.body.contains("\"logprob\":-0.1,"), "{answer:?}");
    let content = &answer.json()["choices"][0]["logprobs"]["content"];
    assert_eq!(content[0]["token"], "<7>");
    assert_eq!(content[0]["bytes"], json!(b"<7>"));
    assert_eq!(content[0]["top_logprobs"][1]["token"], "<3>");
    assert_eq!(content[1]["top_logprobs"][0]["bytes"], json!([0xe2, 0x82]), "half a character");
    assert_eq!(content.as_array().unwrap().len(), 2);

    let answer = post(s.addr, COMPLETIONS, &json!({"prompt": "x", "logprobs": 2}));
    let found = &answer.json()["choices"][0]["logprobs"];
    assert_eq!(found["tokens"], json!(["<7>", "<8>"]));
    assert_eq!(found["text_offset"], json!([0, 3]));
    assert_eq!(found["top_logprobs"][0], json!({"<7>": -0.1, "<3>": -2.5}));
    assert_eq!(found["top_logprobs"][1], json!({"\u{FFFD}": -0.2, "<8>": -3.5}));

    let streamed = chat_body(json!({"logprobs": true, "stream": true}));
    let chunks = post(s.addr, CHAT, &streamed).chunks();
    let tokens: Vec<_> =
        chunks.iter().map(|c| c["choices"][0]["logprobs"]["content"][0]["token"].clone()).collect();
    assert_eq!(tokens, [json!(null), json!("<7>"), json!("<8>"), json!(null)]);
}

#[test]
fn a_key_is_needed_even_on_loopback() {
    let s = server(hello());
    let get = |path: &str, auth: &str| {
        let text = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{auth}\r\n");
        exchange(s.addr, text.as_bytes())
    };
    for auth in ["", "authorization: Bearer wrong\r\n", "authorization: Basic mlr-secret\r\n"] {
        let answer = get("/v1/models", auth);
        expect_error(&answer, 401, "authentication_error", json!(null), "invalid_api_key");
        // However the path is spelled, it is not served without a key.
        for path in ["/%761/models", "/v1//models", "//v1/models", "/v1/models/x"] {
            let status = get(path, auth).status;
            assert!(matches!(status, 401 | 404), "{path}: {status}");
        }
    }
    assert_eq!(get("/v1/models", "authorization: bearer mlr-secret\r\n").status, 200);
    for path in ["/tokenize", "/detokenize", CHAT, COMPLETIONS] {
        let text =
            format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{{}}");
        assert_eq!(exchange(s.addr, text.as_bytes()).status, 401, "{path}");
    }
    for path in ["/health", "/ready", "/live"] {
        assert_eq!(get(path, "").status, 200, "{path}");
    }
}

#[test]
fn only_known_hosts_are_served() {
    let s = server_with(hello(), |c| c.allowed_hosts = vec!["box.example".into()]);
    let get = |target: &str, host: &str| {
        exchange(s.addr, format!("GET {target} HTTP/1.1\r\n{host}\r\n").as_bytes())
    };
    for host in ["127.0.0.1:80", "localhost", "[::1]", "Box.Example:8000"] {
        assert_eq!(get("/live", &format!("host: {host}\r\n")).status, 200, "{host}");
    }
    for host in ["evil.example", "localhost.evil.example", "169.254.1.1"] {
        let answer = get("/live", &format!("host: {host}\r\n"));
        let message =
            expect_error(&answer, 403, "permission_error", json!(null), "permission_denied");
        assert!(message.contains("--http-host"), "{message}");
    }
    assert_eq!(get("/live", "host: localhost\r\nhost: evil.example\r\n").status, 400);
    assert_eq!(get("http://evil.example/live", "host: localhost\r\n").status, 403);
    assert_eq!(get("/live", "").status, 400);
}

#[test]
fn bodies_that_are_no_requests() {
    let s = server(hello());
    let send = |body: &[u8]| {
        let length = format!("content-length: {}", body.len());
        let head = post_text(CHAT, "", "").replace("content-length: 0", &length);
        exchange(s.addr, &[head.as_bytes(), body].concat())
    };
    for (body, part) in [
        (&b"{\"model\": \n tru}"[..], "line 2 column 5"),
        (b"{\"model\": \"\xc3\x28\"}", "not valid UTF-8 at byte 11"),
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
    ] {
        let answer = send(body);
        let message =
            expect_error(&answer, 400, "invalid_request_error", json!(null), "invalid_argument");
        assert!(message.contains(part), "{message}");
    }
    let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
    assert_eq!(send(&deep).status, 400, "nesting does not overflow the stack");
}

#[test]
fn long_bodies_are_refused() {
    let s = server(hello());
    let limit = 4 << 20;
    let long = format!("{{\"prompt\": \"{}\"}}", "x".repeat(limit));
    let answer = exchange(s.addr, post_text(COMPLETIONS, &long, "").as_bytes());
    expect_error(&answer, 413, "invalid_request_error", json!(null), "request_too_large");
    let head = post_text(COMPLETIONS, "", "transfer-encoding: chunked\r\n")
        .replace("content-length: 0\r\n", "");
    let chunked = format!("{head}{:x}\r\n{long}\r\n0\r\n\r\n", long.len());
    let answer = exchange(s.addr, chunked.as_bytes());
    expect_error(&answer, 413, "invalid_request_error", json!(null), "request_too_large");
    let fits = format!("{{\"prompt\": \"{}\"}}", "x".repeat(limit - 100));
    assert_eq!(exchange(s.addr, post_text(COMPLETIONS, &fits, "").as_bytes()).status, 200);
}

#[test]
fn paths_and_methods() {
    let s = server(hello());
    for path in ["/nothing", "/v2/models", "/v1/nothing", "/v1"] {
        let answer = get(s.addr, path);
        let message = expect_error(&answer, 404, "not_found_error", json!(null), "unknown_url");
        assert!(message.contains(path), "{message}");
    }
    let answer = get(s.addr, CHAT);
    expect_error(&answer, 405, "invalid_request_error", json!(null), "method_not_allowed");
    assert_eq!(answer.headers["allow"], "POST");
    let answer = post(s.addr, "/v1/models", &json!({}));
    assert_eq!((answer.status, answer.headers["allow"].as_str()), (405, "GET"));
    // No CORS: a preflight gets no permission.
    let preflight = format!(
        "OPTIONS {CHAT} HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.example\r\n\
         access-control-request-method: POST\r\n\r\n"
    );
    let answer = exchange(s.addr, preflight.as_bytes());
    assert!(answer.status >= 400);
    assert!(!answer.headers.keys().any(|k| k.starts_with("access-control")), "{answer:?}");
}

#[test]
fn the_dashboard_loads_nothing_from_elsewhere() {
    let s = server(hello());
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/dashboard/style.css", "text/css; charset=utf-8"),
        ("/dashboard/app.js", "text/javascript; charset=utf-8"),
    ] {
        let answer = get(s.addr, path);
        assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, kind));
        let policy = &answer.headers["content-security-policy"];
        assert!(policy.starts_with("default-src 'none'; script-src 'self'"), "{policy}");
        assert!(!answer.body.contains("https://"), "{path} works in a closed network");
    }
    assert_eq!(get(s.addr, "/v1/cluster").json()["ready"], json!(true));
    let timeline = get(s.addr, "/v1/cluster/timeline?after=0").json();
    assert_eq!((&timeline["last"], &timeline["passages"]), (&json!(0), &json!([])));
    assert_eq!(get(s.addr, "/v1/cluster/timeline?after=x").status, 400);
}

#[test]
fn unsupported_is_refused_and_unknown_is_named() {
    let s = server(hello());
    for (field, value) in
        [("prediction", json!({"type": "content"})), ("modalities", json!(["text", "audio"]))]
    {
        let answer = post(s.addr, CHAT, &chat_body(json!({ field: value })));
        let message =
            expect_error(&answer, 400, "invalid_request_error", json!(field), "invalid_argument");
        assert!(message.contains(field), "{message}");
    }
    for (field, value) in [("n", json!(17)), ("best_of", json!(0))] {
        let answer = post(s.addr, CHAT, &chat_body(json!({ field: value })));
        let message =
            expect_error(&answer, 400, "invalid_request_error", json!(field), "invalid_argument");
        assert!(message.contains("between 1 and 16"), "{message}");
    }
    let schema = json!({"type": "xml"});
    let answer = post(s.addr, CHAT, &chat_body(json!({ "response_format": schema })));
    let field = json!("response_format.type");
    expect_error(&answer, 400, "invalid_request_error", field, "invalid_argument");
    for (field, body) in [
        ("max_tokens", json!({"prompt": "x", "max_tokens": 0})),
        ("stream", json!({"prompt": "x", "echo": true, "max_tokens": 0, "stream": true})),
        ("suffix", json!({"prompt": "x", "suffix": "y"})),
        ("prompt", json!({"prompt": vec!["x"; 129]})),
    ] {
        let answer = post(s.addr, COMPLETIONS, &body);
        expect_error(&answer, 400, "invalid_request_error", json!(field), "invalid_argument");
    }
    assert!(s.fake.seen.lock().unwrap().is_empty(), "nothing reached the service");
    let more = json!({"n": 1, "tools": null, "mystery": 1, "store": true, "user": "me", "stop": null,
        "stream_options": {"include_obfuscation": false}});
    let answer = post(s.addr, CHAT, &chat_body(more));
    assert_eq!(answer.status, 200, "{answer:?}");
    let ignored = &answer.headers["x-millrace-ignored"];
    assert_eq!(ignored, "stream_options.include_obfuscation, mystery, store");
}

#[test]
fn refusals_of_the_service() {
    let s = server(refuse(Status::exhausted("the queue is full", 1500)));
    let body = chat_body(json!({"stream": true}));
    let answer = post(s.addr, CHAT, &body);
    expect_error(&answer, 429, "rate_limit_error", json!(null), "rate_limit_exceeded");
    assert_eq!(answer.headers["retry-after"], "2");
    s.fake.set(refuse(Status::unavailable("no pipeline", 100)));
    let answer = post(s.addr, CHAT, &body);
    expect_error(&answer, 503, "unavailable_error", json!(null), "unavailable");
    assert_eq!(answer.headers["retry-after"], "1");
    s.fake.set(refuse(Status::invalid("temperature", "must be at least 0")));
    let answer = post(s.addr, CHAT, &body);
    expect_error(&answer, 400, "invalid_request_error", json!("temperature"), "invalid_argument");
    s.fake.set(hello());
    let answer = post(s.addr, COMPLETIONS, &json!({"model": "other", "prompt": "x"}));
    expect_error(&answer, 404, "not_found_error", json!("model"), "model_not_found");
}

#[test]
fn failures_on_the_way() {
    let lost = || Err(Status::unavailable("a node was lost", 2000));
    let s = server(play(vec![started(), token(0, 7, "Hello", None), lost()]));
    let streamed = chat_body(json!({"stream": true}));
    let answer = post(s.addr, CHAT, &streamed);
    assert_eq!(answer.status, 200);
    let chunks = answer.chunks();
    assert_eq!(chunks[1]["choices"][0]["delta"]["content"], "Hello");
    let error = json!({"message": "a node was lost", "type": "unavailable_error", "param": null,
        "code": "unavailable"});
    assert_eq!(chunks[2], json!({ "error": error }));
    assert_eq!(chunks.len(), 3);
    assert!(!answer.body.contains("[DONE]"));
    // Whole answers, and streams that fail before their first event, get the status itself.
    let answer = post(s.addr, CHAT, &chat_body(json!({})));
    assert_eq!((answer.status, answer.headers["retry-after"].as_str()), (503, "2"));
    s.fake.set(play(vec![lost()]));
    assert_eq!(post(s.addr, CHAT, &streamed).status, 503);
    // Neither an end without a reason nor a cancelled answer passes for a complete one.
    s.fake.set(play(vec![started(), token(0, 7, "Hello", None)]));
    let answer = post(s.addr, CHAT, &streamed);
    assert!(answer.chunks()[2]["error"]["message"].as_str().unwrap().contains("attach"));
    assert_eq!(post(s.addr, CHAT, &chat_body(json!({}))).status, 503);
    s.fake.set(play(vec![started(), finished(FinishReason::Cancelled, "")]));
    assert_eq!(post(s.addr, CHAT, &streamed).chunks()[0]["error"]["code"], "cancelled");
    assert_eq!(post(s.addr, CHAT, &chat_body(json!({}))).status, 499);
}

#[test]
fn hanging_up_cancels() {
    let s = server(hang());
    for stream in [true, false] {
        let body = chat_body(json!({ "stream": stream })).to_string();
        let mut connection = connect(s.addr);
        connection.write_all(post_text(CHAT, &body, "").as_bytes()).unwrap();
        if stream {
            let mut reader = BufReader::new(connection.try_clone().unwrap());
            assert_eq!(read_head(&mut reader).0, 200);
            let first = reader.lines().map(Result::unwrap).find(|l| l.contains("Hello"));
            assert!(first.is_some(), "tokens arrive while the request runs");
        } else {
            while s.fake.seen.lock().unwrap().len() < 2 {
                std::thread::yield_now();
            }
        }
        assert!(s.dropped.try_recv().is_err());
        drop(connection);
        s.dropped.recv_timeout(DEADLINE).expect("the stream is dropped");
    }
}

/// Who reads nothing loses the connection, and with it the request, once what the system keeps for
/// it is full; others are served meanwhile.
#[test]
fn who_reads_nothing_is_cut_off() {
    let text = "x".repeat(64 << 10);
    // Far more than the buffers of both ends.
    let flood = (0..400).map(|index| token(index, 7, &text, None));
    let endless = Script { hang: true, ..play([started()].into_iter().chain(flood).collect()) };
    let s = server_with(endless, |c| c.unread_timeout = Duration::from_secs(1));
    let mut slow = connect(s.addr);
    let body = chat_body(json!({"stream": true})).to_string();
    slow.write_all(post_text(CHAT, &body, "").as_bytes()).unwrap();
    while s.fake.seen.lock().unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    s.fake.set(hello());
    let begun = std::time::Instant::now();
    loop {
        assert_eq!(post(s.addr, CHAT, &chat_body(json!({}))).status, 200, "others are served");
        match s.dropped.try_recv() {
            Ok(_) => break,
            Err(e) => assert!(begun.elapsed() < DEADLINE, "{e}: it is kept for ever"),
        }
    }
    let mut answer = Vec::new();
    let _ = slow.read_to_end(&mut answer);
    assert!(answer.len() < 400 << 16, "the answer was cut off, not ended");
}

#[test]
fn silence_is_filled_with_comments() {
    let s = server_with(hang(), |c| c.keep_alive = Duration::from_millis(20));
    let body = chat_body(json!({"stream": true})).to_string();
    let mut connection = connect(s.addr);
    connection.write_all(post_text(CHAT, &body, "").as_bytes()).unwrap();
    let lines = BufReader::new(connection).lines().map(Result::unwrap);
    assert_eq!(lines.filter(|l| l == ": keep-alive").take(3).count(), 3);
}

#[test]
fn request_headers() {
    let s = server(hello());
    let body = chat_body(json!({})).to_string();
    let send = |extra: &str| exchange(s.addr, post_text(CHAT, &body, extra).as_bytes());
    let answer = send("x-request-id: abc-1\r\nx-request-timeout-ms: 1500\r\n");
    assert_eq!(answer.headers["x-request-id"], "abc-1");
    assert_eq!(s.fake.last().1.deadline, Some(Duration::from_millis(1500)));
    for (name, class) in [("high", Priority::High), ("low", Priority::Low)] {
        assert_eq!(send(&format!("x-millrace-priority: {name}\r\n")).status, 200);
        let caller = s.fake.last().1;
        assert_eq!((caller.priority, caller.client), (class, Caller::client_of(Some(KEY))));
    }
    assert_eq!(s.fake.last().1.trace, None);
    assert_eq!(send("traceparent: 00-1-2-01\r\ntracestate: a=b\r\n").status, 200);
    let trace = s.fake.last().1.trace.expect("a trace");
    assert_eq!((trace.parent.as_str(), trace.state.as_str()), ("00-1-2-01", "a=b"));
    let answer = send("x-millrace-priority: urgent\r\n");
    assert_eq!(
        (answer.status, &answer.json()["error"]["param"]),
        (400, &json!("x-millrace-priority"))
    );
    for wrong in ["0", "-1", "soon", ""] {
        let answer = send(&format!("x-request-timeout-ms: {wrong}\r\nx-request-id: abc-2\r\n"));
        assert_eq!(answer.headers["x-request-id"], "abc-2", "errors have it too");
        assert_eq!(answer.json()["error"]["param"], "x-request-timeout-ms", "{wrong}");
    }
    let long = "x".repeat(1000);
    let id = send(&format!("x-request-id: {long}\r\n")).headers["x-request-id"].clone();
    assert_eq!(id.len(), 36, "an id that is too long is replaced");
    s.fake.set(refuse(Status::new(ErrorCode::DeadlineExceeded, "too late")));
    assert_eq!(send("x-request-timeout-ms: 1\r\n").status, 504);
}

#[test]
fn requests_are_attached_to() {
    let s = server(hello());
    let streamed = chat_body(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let send =
        |extra: &str| exchange(s.addr, post_text(CHAT, &streamed.to_string(), extra).as_bytes());
    let answer = send("idempotency-key: mine\r\nx-millrace-keep-alive: 60\r\n");
    let id = answer.headers["x-millrace-request-id"].clone();
    let ids: Vec<_> = answer.body.lines().filter_map(|l| l.strip_prefix("id: ")).collect();
    assert_eq!(ids, ["0:1", "0:3", "0:4"], "each chunk with text, and the one that ends it");
    let caller = s.fake.last().1;
    assert_eq!(
        (caller.request_id.unwrap().to_string(), caller.keep),
        (id, Some(Duration::from_secs(60)))
    );
    assert_ne!(caller.tag, 0);
    let name = |key: &str| {
        send(&format!("idempotency-key: {key}\r\n"));
        s.fake.last().1.request_id.unwrap()
    };
    assert_eq!(name("mine"), caller.request_id.unwrap());
    assert_ne!(name("another"), name("mine"));
    // One that looks like an id is a name as any other: each key has its own.
    let uuid = "0190aaaa-0000-7000-8000-000000000001";
    let named = name(uuid);
    assert_ne!(named.to_string(), uuid);
    assert_eq!(name(uuid), named);
    for (header, wrong) in [
        ("idempotency-key", "x".repeat(257)),
        ("x-millrace-keep-alive", "soon".to_owned()),
        ("x-millrace-keep-alive", "90000".to_owned()),
    ] {
        let answer = send(&format!("{header}: {wrong}\r\n"));
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(header)));
    }

    let attach = |name: &str, from: &str| {
        let text = format!(
            "GET /v1/requests/{name}/events HTTP/1.1\r\nhost: localhost\r\n\
             authorization: Bearer {KEY}\r\n{from}\r\n"
        );
        exchange(s.addr, text.as_bytes())
    };
    let content = |answer: &Answer| -> String {
        let chunks = answer.chunks();
        let pieces = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str());
        pieces.collect()
    };
    // From the beginning, it is the very same stream; the form is that of the request.
    send("idempotency-key: mine\r\n");
    let again = attach("mine", "");
    assert_eq!((again.status, content(&again).as_str()), (200, "Hello world"));
    assert!(again.body.contains("\"usage\""), "{}", again.body);
    let rest = attach("mine", "last-event-id: 0:1\r\n");
    assert_eq!(content(&rest), " world");
    assert!(rest.chunks()[0]["choices"][0]["delta"]["role"].is_null(), "no second opening");
    let nothing = attach("mine", "last-event-id: 0:4\r\n");
    assert_eq!(content(&nothing), "", "the end was heard");
    assert!(nothing.body.contains("\"usage\"") && nothing.body.contains("[DONE]"));
    for id in [uuid, &named.to_string()] {
        assert_eq!(content(&attach(id, "")), "Hello world", "by its name and by its id");
    }
    assert_eq!(attach("mine", "last-event-id: 12\r\n").status, 400);
    assert_eq!(attach("nobody's", "").status, 404);
    let cancel = post(s.addr, "/v1/requests/mine/cancel", &json!({}));
    assert_eq!(cancel.status, 204);
    assert_eq!(*s.fake.cancelled.lock().unwrap(), [caller.request_id.unwrap()]);
}

#[test]
fn health_and_metrics() {
    let s = server(hello());
    assert_eq!(get(s.addr, "/health").json(), json!({"status": "ok"}));
    s.fake.ready.store(false, Ordering::Relaxed);
    for path in ["/health", "/ready"] {
        let answer = get(s.addr, path);
        let message = expect_error(&answer, 503, "unavailable_error", json!(null), "unavailable");
        assert_eq!(message, "waiting for 1 more node");
        assert!(answer.headers.contains_key("retry-after"));
    }
    assert_eq!(get(s.addr, "/live").status, 200);
    assert_eq!(get(s.addr, "/version").json()["version"], env!("CARGO_PKG_VERSION"));
    let answer = get(s.addr, "/metrics");
    assert!(answer.headers["content-type"].contains("openmetrics"));
    let used = format!("millrace_kv_blocks_used{{model_name=\"{MODEL}\"}} 4\n");
    assert!(answer.body.contains(&used), "{}", answer.body);
    s.fake.ready.store(true, Ordering::Relaxed);
    s.handle.drain();
    assert_eq!(get(s.addr, "/ready").status, 503);
    assert_eq!(get(s.addr, "/live").status, 200);
    assert_eq!(post(s.addr, CHAT, &chat_body(json!({}))).status, 503);
}

#[test]
fn models_and_tokens() {
    let s = server(hello());
    let list = get(s.addr, "/v1/models").json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["object"], "model");
    for spelling in ["org/tiny:1b", "org%2Ftiny%3A1b"] {
        let one = get(s.addr, &format!("/v1/models/{spelling}"));
        assert_eq!(one.json(), list["data"][0], "{spelling}");
    }
    let answer = get(s.addr, "/v1/models/other");
    expect_error(&answer, 404, "not_found_error", json!("model"), "model_not_found");

    let expected = json!({"tokens": [104, 105], "count": 2, "max_model_len": 2048});
    for body in [json!({"prompt": "hi"}), json!({"content": "hi", "model": MODEL})] {
        assert_eq!(post(s.addr, "/tokenize", &body).json(), expected);
    }
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "return_token_strs": true});
    let answer = post(s.addr, "/tokenize", &body);
    assert_eq!(answer.json()["tokens"], json!([2]));
    assert_eq!(answer.headers["x-millrace-ignored"], "return_token_strs");
    for (special, expected) in
        [(json!(true), json!([1, 94])), (json!(null), json!([1, 94])), (json!(false), json!([94]))]
    {
        let answer =
            post(s.addr, "/tokenize", &json!({"prompt": "^", "add_special_tokens": special}));
        assert_eq!(answer.json()["tokens"], expected, "{special}");
    }
    assert_eq!(get(s.addr, "/tokenizer_info").json()["eos_token"], "</s>");
    assert_eq!(post(s.addr, "/tokenize", &json!({"model": "other", "prompt": "x"})).status, 404);
    assert_eq!(post(s.addr, "/tokenize", &json!({})).json()["error"]["param"], "prompt");
    let answer = post(s.addr, "/detokenize", &json!({"tokens": [7, 8]}));
    assert_eq!(answer.json(), json!({"prompt": "<7><8>", "content": "<7><8>"}));
    let answer = post(s.addr, "/detokenize", &json!({"tokens": [7000]}));
    expect_error(&answer, 400, "invalid_request_error", json!("tokens"), "invalid_argument");
    s.fake.cuts.store(false, Ordering::Relaxed);
    for (path, body) in
        [("/tokenize", json!({"prompt": "x"})), ("/detokenize", json!({"tokens": [7]}))]
    {
        let answer = post(s.addr, path, &body);
        assert_eq!((answer.status, &answer.headers["retry-after"][..]), (429, "3"), "{path}");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let s = server(hello());
    let metrics = Arc::new(Metrics::new(MODEL));
    let error = start(HttpConfig::new(s.addr), s.fake.clone(), metrics).expect_err("in use");
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    let text = error.to_string();
    assert!(text.contains(&s.addr.port().to_string()) && text.contains("--port"), "{text}");
}

#[tokio::test]
async fn stopping_frees_the_port() {
    let s = server(hello());
    s.handle.stop().await;
    let metrics = Arc::new(Metrics::new(MODEL));
    let again = start(HttpConfig::new(s.addr), s.fake.clone(), metrics).expect("free again");
    assert_eq!(again.addr, s.addr);
}

/// What is refused counts, too, whoever refuses it.
#[test]
fn refusals_are_counted() {
    let (fake, _dropped) = Fake::new(refuse(Status::exhausted("the queue is full", 1500)));
    let metrics = Arc::new(Metrics::new(MODEL));
    let service = Arc::new(Counted::new(fake.clone(), Arc::clone(&metrics)));
    let config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    let handle = start(config, service, Arc::clone(&metrics)).expect("a free port");
    assert_eq!(post(handle.addr, CHAT, &chat_body(json!({}))).status, 429);
    assert_eq!(post(handle.addr, CHAT, &json!({})).status, 400);
    assert_eq!(post(handle.addr, COMPLETIONS, &json!({"prompt": {}})).status, 400);
    fake.set(hello());
    assert_eq!(post(handle.addr, COMPLETIONS, &json!({"prompt": "x"})).status, 200);
    handle.drain();
    assert_eq!(post(handle.addr, CHAT, &chat_body(json!({}))).status, 503);
    let text = metrics.render();
    let has = |start: &str, part: &str, end: &str| {
        let mut lines = text.lines().filter(|l| l.starts_with(start));
        lines.any(|l| l.contains(part) && l.ends_with(end))
    };
    // The one that was admitted is the scheduler's to count.
    assert!(has("millrace_requests_total{", "", " 4"), "{text}");
    for (code, count) in
        [("RESOURCE_EXHAUSTED", " 1"), ("INVALID_ARGUMENT", " 2"), ("UNAVAILABLE", " 1")]
    {
        assert!(has("millrace_request_failure_total{", code, count), "{code}: {text}");
    }
}
