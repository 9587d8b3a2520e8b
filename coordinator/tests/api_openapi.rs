//! `/openapi.json` describes the API as it is: examples are taken, fields are known, answers have the
//! fields that are promised.
#![allow(clippy::unwrap_used)]

mod api_common;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use api_common::*;
use millrace_coordinator::api::http::{HttpConfig, HttpServerHandle, start};
use millrace_coordinator::metrics::Metrics;
use serde_json::{Map, Value, json};

struct Server {
    handle: HttpServerHandle,
    page: Value,
}

fn server() -> Server {
    let (fake, _) = Fake::new(hello());
    let config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    let handle = start(config, fake, Arc::new(Metrics::new(MODEL))).expect("a free port");
    let answer = get(handle.addr, "/openapi.json");
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, "application/json"));
    Server { page: answer.json(), handle }
}

impl Server {
    /// A schema, by its reference where it is one.
    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(to) => self.page.pointer(to.strip_prefix('#').unwrap()).unwrap(),
            None => schema,
        }
    }

    /// Paths of what takes a body, the body's schema, and an example.
    fn bodies(&self) -> Vec<(String, &Value, Value)> {
        let paths = self.page["paths"].as_object().unwrap();
        let of = |(path, item): (&String, &'_ Value)| {
            let content = item["post"]["requestBody"]["content"]["application/json"].clone();
            (!content.is_null()).then(|| (path.clone(), content))
        };
        let found = paths.iter().filter_map(of);
        let schema = |path: &str| {
            let content = &self.page["paths"][path]["post"]["requestBody"]["content"];
            self.resolved(&content["application/json"]["schema"])
        };
        found
            .map(|(path, content)| {
                let example = content["examples"]["simple"]["value"].clone();
                (path.clone(), schema(&path), example)
            })
            .collect()
    }
}

fn ignored(answer: &Answer) -> BTreeSet<&str> {
    let header = answer.headers.get("x-millrace-ignored").map_or("", String::as_str);
    header.split(", ").filter(|name| !name.is_empty()).collect()
}

#[test]
fn examples_are_taken_and_every_described_field_is_read() {
    let s = server();
    let bodies = s.bodies();
    assert_eq!(bodies.len(), 6);
    for (path, schema, example) in bodies {
        let answer = post(s.handle.addr, &path, &example);
        assert_eq!((answer.status, ignored(&answer).len()), (200, 0), "{path}: {answer:?}");
        let fields = schema["properties"].as_object().unwrap();
        let required: Vec<&str> = schema["required"]
            .as_array()
            .iter()
            .flat_map(|r| r.iter())
            .flat_map(Value::as_str)
            .collect();
        assert!(fields.len() > 1 && required.iter().all(|name| !example[name].is_null()), "{path}");
        for name in fields.keys() {
            // Beside what the example says, or instead of it.
            let nonsense = (name.clone(), json!({"nonsense": [1, "x"]}));
            let read = [example.as_object().cloned(), None].into_iter().any(|with| {
                let body = with.into_iter().flatten().chain([nonsense.clone()]).collect();
                let answer = post(s.handle.addr, &path, &Value::Object(body));
                !ignored(&answer).contains(name.as_str())
            });
            assert!(read, "{path} does not read {name}");
        }
        let mut body = example.as_object().cloned().unwrap_or_else(Map::new);
        body.insert("no_such_field".into(), json!(1));
        let answer = post(s.handle.addr, &path, &Value::Object(body));
        assert!(ignored(&answer).contains("no_such_field"), "{path}: {answer:?}");
    }
}

/// The fields of answers are those of their schemas, and all that are required are there.
#[test]
fn answers_have_the_fields_of_their_schemas() {
    let s = server();
    for (path, schema, example) in s.bodies() {
        let _ = schema;
        let answer = post(s.handle.addr, &path, &example).json();
        let told = &s.page["paths"][&path]["post"]["responses"]["200"]["content"];
        check(s.resolved(&told["application/json"]["schema"]), &answer, &path);
    }
    let plain = [
        "/health",
        "/ready",
        "/live",
        "/version",
        "/tokenizer_info",
        "/v1/models",
        "/v1/cluster",
        "/v1/cluster/timeline",
        "/v1/cluster/events",
    ];
    for path in plain {
        let answer = get(s.handle.addr, path).json();
        let told = &s.page["paths"][path]["get"]["responses"]["200"]["content"];
        check(s.resolved(&told["application/json"]["schema"]), &answer, path);
    }
    let error = get(s.handle.addr, "/v1/models/none").json();
    let told = &s.page["components"]["responses"]["Error"]["content"]["application/json"];
    check(s.resolved(&told["schema"]), &error, "an error");
}

fn check(schema: &Value, answer: &Value, what: &str) {
    let known = schema["properties"].as_object().unwrap_or_else(|| panic!("{what}: {schema}"));
    let required = schema["required"].as_array().unwrap_or_else(|| panic!("{what}: {schema}"));
    for name in answer.as_object().unwrap().keys() {
        assert!(known.contains_key(name), "{what} has {name}, which is not described");
    }
    for name in required.iter().flat_map(Value::as_str) {
        assert!(answer.get(name).is_some(), "{what} has no {name}: {answer}");
    }
}
