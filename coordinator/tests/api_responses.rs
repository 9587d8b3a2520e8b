//! `/v1/responses` as a client sees it, against a service that plays a script.
#![allow(clippy::unwrap_used)]

mod api_common;

use std::net::SocketAddr;
use std::sync::Arc;

use api_common::*;
use millrace_coordinator::api::http::{HttpConfig, HttpServerHandle, start};
use millrace_coordinator::metrics::Metrics;
use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{CallPiece, FinishReason, GenerateEvent, Prompt, ToolChoice};
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";

fn server(script: Script) -> (Arc<Fake>, HttpServerHandle, SocketAddr) {
    let (fake, _dropped) = Fake::new(script);
    let config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    let handle = start(config, fake.clone(), Arc::new(Metrics::new(MODEL))).expect("a free port");
    let addr = handle.addr;
    (fake, handle, addr)
}

fn delete(addr: SocketAddr, path: &str) -> Answer {
    let text =
        format!("DELETE {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n");
    exchange(addr, text.as_bytes())
}

/// The conversation of the last request: roles and texts.
fn conversation(fake: &Fake) -> Vec<(String, String)> {
    let Prompt::Chat(conversation) = fake.last().0.prompt else { panic!("a conversation") };
    conversation.messages.into_iter().map(|m| (m.role, m.content)).collect()
}

fn turn(role: &str, content: &str) -> (String, String) {
    (role.to_owned(), content.to_owned())
}

#[test]
fn a_response_whole() {
    let (fake, _handle, addr) = server(hello());
    let body = json!({"model": MODEL, "input": "hi", "instructions": "Be brief.",
        "max_output_tokens": 9, "metadata": {"a": "b"}});
    let answer = post(addr, PATH, &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    let response = answer.json();
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    for (field, value) in [
        ("object", json!("response")),
        ("status", json!("completed")),
        ("error", json!(null)),
        ("model", json!(MODEL)),
        ("instructions", json!("Be brief.")),
        ("metadata", json!({"a": "b"})),
        ("max_output_tokens", json!(9)),
        ("parallel_tool_calls", json!(true)),
    ] {
        assert_eq!(response[field], value, "{field}");
    }
    let item = &response["output"][0];
    assert_eq!((&item["type"], &item["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(item["content"][0]["text"], "Hello world");
    assert_eq!(response["usage"]["input_tokens"], 5);
    assert_eq!(response["usage"]["input_tokens_details"]["cached_tokens"], 2);
    assert_eq!(response["usage"]["total_tokens"], 8);
    assert_eq!(conversation(&fake), [turn("system", "Be brief."), turn("user", "hi")]);
    assert_eq!(fake.last().0.params.max_tokens, Some(9));
}

#[test]
fn responses_follow_one_another_and_can_be_forgotten() {
    let (fake, _handle, addr) = server(hello());
    let first = post(addr, PATH, &json!({"input": "hi", "instructions": "Be brief."})).json();
    let id = first["id"].as_str().unwrap();
    let again = get(addr, &format!("{PATH}/{id}"));
    assert_eq!((again.status, &again.json()["output"]), (200, &first["output"]));
    // Instructions are for one response alone.
    let second = post(addr, PATH, &json!({"input": "more", "previous_response_id": id}));
    assert_eq!(second.status, 200, "{second:?}");
    let turns = [turn("user", "hi"), turn("assistant", "Hello world"), turn("user", "more")];
    assert_eq!(conversation(&fake), turns);
    let third = json!({"input": "and", "previous_response_id": second.json()["id"]});
    assert_eq!(post(addr, PATH, &third).status, 200);
    assert_eq!(conversation(&fake).len(), 5);

    let cancelled = post(addr, &format!("{PATH}/{id}/cancel"), &json!({}));
    assert_eq!((cancelled.status, &cancelled.json()["status"]), (200, &json!("completed")));
    let gone = delete(addr, &format!("{PATH}/{id}"));
    assert_eq!((gone.status, &gone.json()["deleted"]), (200, &json!(true)));
    let missing = get(addr, &format!("{PATH}/{id}"));
    assert_eq!(missing.status, 404, "{missing:?}");
    let asked = json!({"input": "more", "previous_response_id": id});
    let answer = post(addr, PATH, &asked);
    assert_eq!(answer.status, 404, "{answer:?}");
    assert_eq!(answer.json()["error"]["param"], "previous_response_id");
    // What is not to be kept is found by nobody; nor is another kind of request.
    let unkept = post(addr, PATH, &json!({"input": "hi", "store": false})).json();
    let unkept = unkept["id"].as_str().unwrap();
    for name in [unkept, "resp_x", "0", "resp_00000000000000000000000000000000"] {
        assert_eq!(get(addr, &format!("{PATH}/{name}")).status, 404, "{name}");
    }
    assert_eq!(post(addr, &format!("{PATH}/{id}"), &json!({})).status, 405);
}

/// The events of a stream, whose names are their types.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let events = answer.chunks();
    let names = answer.body.lines().filter_map(|l| l.strip_prefix("event: "));
    assert!(names.eq(events.iter().map(|e| e["type"].as_str().unwrap())), "{answer:?}");
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let kind = |event| Value::as_str(event).unwrap().strip_prefix("response.").unwrap();
    events.iter().map(|event| kind(&event["type"])).collect()
}

#[test]
fn a_response_streamed_and_resumed() {
    let (_fake, _handle, addr) = server(hello());
    let all = events(&post(addr, PATH, &json!({"input": "hi", "stream": true})));
    assert_eq!(
        kinds(&all),
        [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
    );
    let numbers: Vec<u64> = all.iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..11).collect::<Vec<_>>());
    let text: String = all.iter().filter_map(|e| e["delta"].as_str()).collect();
    assert_eq!((text.as_str(), &all[7]["text"]), ("Hello world", &json!("Hello world")));
    assert_eq!(all[0]["response"]["status"], "in_progress");
    assert_eq!(all[10]["response"]["output"][0], all[9]["item"]);
    let id = all[0]["response"]["id"].as_str().unwrap();
    // The very same events, from any number on.
    for after in [0, 4, 9, 10] {
        let path = format!("{PATH}/{id}?stream=true&starting_after={after}");
        let mut rest = events(&get(addr, &path));
        let mut wanted = all[after + 1..].to_vec();
        // When it was made is not known to the script.
        for event in rest.iter_mut().chain(&mut wanted) {
            if let Some(response) = event.get_mut("response") {
                response["created_at"] = json!(0);
            }
        }
        assert_eq!(rest, wanted, "after {after}");
    }
    let wrong = get(addr, &format!("{PATH}/{id}?stream=true&starting_after=x"));
    assert_eq!(wrong.status, 400, "{wrong:?}");
}

/// Nothing, and then a call.
fn calling() -> Script {
    let pieces = |id: &str, name: &str, arguments: &str| {
        let (id, name, arguments) = (id.into(), name.into(), arguments.into());
        vec![CallPiece { call: 0, id, name, arguments }]
    };
    let with = |event: Result<GenerateEvent, Status>, found| {
        event.map(|mut event| {
            if let GenerateEvent::Token { calls, .. } = &mut event {
                *calls = found;
            }
            event
        })
    };
    play(vec![
        started(),
        with(token(0, 8, "", None), pieces("call_1", "add", "{\"a\":")),
        with(token(1, 9, "", None), pieces("", "", " 1}")),
        finished(FinishReason::ToolCalls, ""),
    ])
}

#[test]
fn tools_and_their_results() {
    let (fake, _handle, addr) = server(calling());
    let tools = json!([{"type": "function", "name": "add", "parameters": {"type": "object"}}]);
    let choice = json!({"type": "function", "name": "add"});
    let body = json!({"input": "hi", "tools": tools, "tool_choice": choice, "stream": true});
    let all = events(&post(addr, PATH, &body));
    assert_eq!(
        kinds(&all),
        [
            "created",
            "in_progress",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ]
    );
    assert_eq!(all[5]["arguments"], "{\"a\": 1}");
    let item = &all[7]["response"]["output"][0];
    assert_eq!((&item["call_id"], &item["name"]), (&json!("call_1"), &json!("add")));
    let Prompt::Chat(asked) = fake.last().0.prompt else { panic!("a conversation") };
    assert_eq!(asked.tool_choice, ToolChoice::Named("add".into()));

    let output = json!({"type": "function_call_output", "call_id": "call_1", "output": "1"});
    let id = &all[0]["response"]["id"];
    let next = post(addr, PATH, &json!({"input": [output], "previous_response_id": id}));
    assert_eq!(next.status, 200, "{next:?}");
    let Prompt::Chat(asked) = fake.last().0.prompt else { panic!("a conversation") };
    assert_eq!(asked.messages[1].tool_calls[0].arguments, "{\"a\": 1}");
    assert_eq!(asked.messages[2].tool_call_id.as_deref(), Some("call_1"));
}

#[test]
fn in_the_background() {
    let (fake, _handle, addr) = server(hang());
    let queued = post(addr, PATH, &json!({"input": "hi", "background": true}));
    assert_eq!((queued.status, &queued.json()["status"]), (200, &json!("queued")));
    let (_, by) = fake.last();
    assert!(by.keep.is_some_and(|keep| keep.as_secs() >= 3600), "nobody has to listen");
    let id = queued.json()["id"].as_str().unwrap().to_owned();
    // It is told of while it goes on, without waiting.
    let now = get(addr, &format!("{PATH}/{id}")).json();
    assert_eq!((&now["status"], &now["id"]), (&json!("in_progress"), &json!(id)));
    // And nothing goes on from it before it has ended.
    let next = post(addr, PATH, &json!({"input": "more", "previous_response_id": id}));
    assert_eq!(next.status, 400, "{next:?}");
    assert_eq!(post(addr, &format!("{PATH}/{id}/cancel"), &json!({})).status, 200);
    assert_eq!(fake.cancelled.lock().unwrap().len(), 1);
}

#[test]
fn failures() {
    let (_fake, _handle, addr) = server(refuse(Status::exhausted("full", 1500)));
    let answer = post(addr, PATH, &json!({"input": "hi", "stream": true}));
    assert_eq!((answer.status, answer.headers["retry-after"].as_str()), (429, "2"));
    let broken = play(vec![started(), token(0, 7, "Hello", None), Err(Status::internal("oops"))]);
    let (_fake, _handle, addr) = server(broken);
    let all = events(&post(addr, PATH, &json!({"input": "hi", "stream": true})));
    let last = all.last().unwrap();
    assert_eq!(last["type"], "response.failed");
    assert_eq!(last["response"]["error"]["message"], "oops");
    assert_eq!(post(addr, PATH, &json!({"input": "hi"})).status, 500);
}
