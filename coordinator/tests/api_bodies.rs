//! Long bodies share room, so that clients cannot fill the memory; in a process of its own, since the
//! room is the process's.
#![allow(clippy::unwrap_used)]

mod api_common;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use api_common::*;
use millrace_coordinator::api::http::{HttpConfig, start};
use millrace_coordinator::metrics::Metrics;
use serde_json::json;

const MB: usize = 1 << 20;

#[test]
fn long_bodies_share_room_and_short_ones_need_none() {
    let (fake, _dropped) = Fake::new(hello());
    let config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    let server = start(config, fake, Arc::new(Metrics::new(MODEL))).unwrap();
    let head = |length: &str| {
        format!(
            "POST /tokenize HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n{length}\r\n\r\n"
        )
    };
    let mut waiting: Vec<_> =
        [format!("content-length: {}", 4 * MB), "transfer-encoding: chunked".into()]
            .iter()
            .cycle()
            .take(16)
            .map(|length| {
                let mut stream = connect(server.addr);
                stream.write_all(head(length).as_bytes()).unwrap();
                stream
            })
            .collect();
    let long = json!({"prompt": "x".repeat(MB)});
    // The sixteen may come to the server after the first.
    let refused = std::iter::repeat_with(|| post(server.addr, "/tokenize", &long))
        .take(20)
        .find(|answer| answer.status != 200)
        .unwrap();
    assert_eq!((refused.status, &refused.headers["retry-after"][..]), (429, "1"), "{refused:?}");
    assert!(refused.body.contains("too many large requests"), "{}", refused.body);
    let short = json!({"prompt": "hi"});
    assert_eq!(post(server.addr, "/tokenize", &short).json()["count"], 2);
    // Room comes back when clients go.
    waiting.pop();
    let answer = std::iter::repeat_with(|| post(server.addr, "/tokenize", &long))
        .take(20)
        .find(|answer| answer.status != 429)
        .unwrap();
    assert_eq!(answer.json()["count"], MB);
}
