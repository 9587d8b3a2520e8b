//! What protects each endpoint, and what the HTTP server does about those who mean it harm.
#![allow(clippy::unwrap_used)]

mod api_common;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api_common::*;
use millrace_coordinator::api::http::{
    ENDPOINTS, HttpConfig, HttpServerHandle, Protection, Route, Verb, start,
};
use millrace_coordinator::metrics::Metrics;

fn server(change: impl FnOnce(&mut HttpConfig)) -> HttpServerHandle {
    let (fake, _dropped) = Fake::new(hello());
    let mut config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    change(&mut config);
    start(config, fake, Arc::new(Metrics::new(MODEL))).expect("a free port")
}

/// Asks an endpoint with these header lines.
fn ask(addr: SocketAddr, route: &Route, headers: &str) -> Answer {
    let path = route.path.replace("{id:.+}", "x").replace("{id}", "x");
    assert!(!path.contains('{'), "a parameter that this test does not know: {path}");
    let text = match route.verb {
        Verb::Get => format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n"),
        Verb::Delete => format!("DELETE {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n"),
        Verb::Post => format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: 2\r\n\r\n{{}}"
        ),
    };
    exchange(addr, text.as_bytes())
}

#[test]
fn every_endpoint_is_protected_as_the_table_says() {
    let (closed, public) = (server(|_| {}), server(|c| c.public_metrics = true));
    for route in ENDPOINTS {
        for (s, open) in [
            (&closed, route.protection == Protection::Open),
            (&public, matches!(route.protection, Protection::Open | Protection::Metrics)),
        ] {
            let path = route.path;
            for headers in ["", "authorization: Bearer \r\n", "authorization: Bearer wrong\r\n"] {
                let status = ask(s.addr, route, headers).status;
                if open {
                    assert_eq!(status, 200, "{path}");
                } else {
                    assert_eq!(status, 401, "{path} with {headers:?}");
                }
            }
            let key = format!("authorization: Bearer {KEY}\r\n");
            let status = ask(s.addr, route, &key).status;
            let enough = route.protection != Protection::Admin;
            assert!(status != 401 && (status == 403) != enough, "{path}: {status}");
        }
    }
    // Nothing else is open than what those who watch processes need, and the page that asks for a
    // key: it holds nothing else.
    let page = |path: &str| path == "/" || path.starts_with("/dashboard/");
    let open = ENDPOINTS.iter().filter(|r| r.protection == Protection::Open && !page(r.path));
    let open: Vec<&str> = open.map(|r| r.path).collect();
    assert_eq!(open, ["/health", "/ready", "/live"]);
}

/// What was said to whom is remembered of so many requests: strangers must not push others out.
#[test]
fn strangers_are_not_remembered() {
    let (fake, _dropped) = Fake::new(hello());
    let metrics = Arc::new(Metrics::new(MODEL));
    let config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    let s = start(config, fake, Arc::clone(&metrics)).expect("a free port");
    let refused = |name: &str, path: &str, host: &str, key: &str| {
        let text = format!(
            "POST {path} HTTP/1.1\r\nhost: {host}\r\nx-request-id: {name}\r\n\
             authorization: Bearer {key}\r\ncontent-length: 1\r\n\r\n{{"
        );
        let status = exchange(s.addr, text.as_bytes()).status;
        (status, metrics.names().find(name).refused.is_some())
    };
    let path = "/v1/completions";
    assert_eq!(refused("a", path, "localhost", "wrong"), (401, false));
    assert_eq!(refused("b", path, "evil.example", KEY), (403, false));
    assert_eq!(refused("c", "/nothing", "localhost", "wrong"), (404, false));
    assert_eq!(refused("d", path, "localhost", KEY), (400, true));
}

#[test]
fn paths_that_try_to_slip_by() {
    let s = server(|_| {});
    for path in [
        "/v1/../v1/models",
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "/%76%31/models",
        "/V1/models",
        "/v1/models/",
        "/v1/models;x=1",
        "/v1/models%00",
        "/v1\\models",
        "//v1/models",
        "/./v1/models",
        "/metrics/",
        "/version/.",
        "/health%2f..%2fmetrics",
        "/v1/models?authorization=Bearer%20mlr-secret&api_key=mlr-secret",
    ] {
        let text = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        let answer = exchange(s.addr, text.as_bytes());
        assert!(matches!(answer.status, 400 | 401 | 404), "{path}: {}", answer.status);
        assert!(!answer.body.contains(MODEL), "{path}: {}", answer.body);
    }
}

#[test]
fn header_injection_and_smuggling() {
    let s = server(|_| {});
    // A client's own id comes back as it was where it is fit to be a header, else another one does.
    let long = "a".repeat(129);
    for (id, fit) in [("mine-7", true), ("a\tb", true), ("caf\u{e9}", false), (&long, false)] {
        let text = format!("GET /live HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\n\r\n");
        let answer = exchange(s.addr, text.as_bytes());
        assert_eq!(answer.status, 200);
        let echoed = answer.headers["x-request-id"].as_str();
        assert_eq!(echoed == id, fit, "{id:?} came back as {echoed:?}");
        assert!(fit || uuid::Uuid::parse_str(echoed).is_ok(), "{echoed:?}");
    }
    for text in [
        "GET /live HTTP/1.1\r\nhost: localhost\r\nx-request-id: a\rset-cookie: x=1\r\n\r\n",
        "GET /live HTTP/1.1\r\nhost: localhost\r\nx y: 1\r\n\r\n",
        "GET /live HTTP/1.1\r\nhost: localhost\r\n: 1\r\n\r\n",
        "GET /live\r\nx: HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\
         content-length: 9\r\n\r\n{}",
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\
         transfer-encoding: chunked\r\n\r\n{}",
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: +2\r\n\r\n{}",
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked, x\r\n\r\n",
    ] {
        let answer = exchange(s.addr, text.as_bytes());
        assert!((400..500).contains(&answer.status), "{text:?}: {}", answer.status);
        assert!(!answer.headers.contains_key("set-cookie"), "{text:?}");
    }
}

#[test]
fn heads_have_a_longest_length() {
    let s = server(|_| {});
    let many: String = (0..1000).map(|i| format!("x-{i}: 1\r\n")).collect();
    let long = format!("x: {}\r\n", "a".repeat(1 << 20));
    let target = "a".repeat(1 << 20);
    for text in [
        format!("GET /live HTTP/1.1\r\nhost: localhost\r\n{many}\r\n"),
        format!("GET /live HTTP/1.1\r\nhost: localhost\r\n{long}\r\n"),
        format!("GET /{target} HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    ] {
        let mut stream = connect(s.addr);
        let _ = stream.write_all(text.as_bytes());
        let mut answer = Vec::new();
        // It may close while we still send, which loses the answer.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert_eq!(get(s.addr, "/live").status, 200);
}

/// Slowloris with bodies: who announces one and never sends it loses the place.
#[test]
fn a_body_that_never_comes() {
    let s = server(|c| c.body_timeout = Duration::from_millis(200));
    let head = post_text("/v1/completions", "", "").replace("length: 0", "length: 100");
    let mut slow: Vec<_> = (0..8).map(|_| connect(s.addr)).collect();
    for stream in &mut slow {
        stream.write_all(format!("{head}{{\"pro").as_bytes()).unwrap();
    }
    for stream in &mut slow {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer, and the end");
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert_eq!(get(s.addr, "/live").status, 200);
}
