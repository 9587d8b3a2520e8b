//! Traces of a cluster of processes, as a collector gets them: whose they are, what is in them and what
//! is not, and that nothing depends on them.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use harness::collector::{Collector, hex, number, text};
use harness::processes::Coordinator;
use harness::{alone, ask, block_on, http, wait_for};
use millrace_shared::wire::rpc::Prompt;
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;

/// Stands for what is nobody's business.
const PRIVATE: &str = "zanzibarquux";
/// The span of each client.
const CLIENT: &str = "00f067aa0ba902b7";
const OVER_HTTP: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const OVER_QUIC: &str = "5bf92f3577b34da6a3ce929d0e0e4736";
const UNSAMPLED: &str = "6bf92f3577b34da6a3ce929d0e0e4736";
/// So many tokens are asked for.
const TOKENS: u32 = 12;

/// A chat over HTTP within a trace; the text of the answer.
fn over_http(cluster: &Coordinator, trace: &str, flags: &str) -> String {
    let question = format!("The secret word is {PRIVATE}. Say it.");
    let body = json!({
        "model": "model", "messages": [{ "role": "user", "content": question }],
        "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true
    });
    let headers = format!("traceparent: 00-{trace}-{CLIENT}-{flags}\r\ntracestate: vendor=1\r\n");
    let (path, key) = ("/v1/chat/completions", &cluster.client.api_key);
    let body = body.to_string().into_bytes();
    let answer = http::begin_post_with(cluster.http(), path, key, &headers, &body).whole();
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// A completion over QUIC within a trace; the text of the answer.
fn over_quic(cluster: &Coordinator, trace: &str) -> String {
    block_on(async {
        let client = ask::connect(&cluster.client).await;
        let traced = client.with_trace(&format!("00-{trace}-{CLIENT}-01"), "vendor=1");
        let prompt = Prompt::Text(format!("The secret word {PRIVATE} opens the gate. Why"));
        let answer = ask::generate(&traced, prompt, ask::greedy(TOKENS)).await.unwrap();
        client.close().await;
        answer.text
    })
}

/// The spans of a trace, once all of them are there.
fn trace(collector: &Collector, id: &str) -> Vec<Span> {
    wait_for("the spans of a request", || {
        let all = collector.spans().into_iter().filter(|s| hex(&s.trace_id) == id);
        let all: Vec<Span> = all.collect();
        // A request's own comes last.
        all.iter().any(|s| hex(&s.parent_span_id) == CLIENT).then_some(all)
    })
}

/// A request's span is below its client's, and all others below that.
fn check(spans: &[Span], name: &str) {
    let (requests, parts): (Vec<&Span>, Vec<&Span>) =
        spans.iter().partition(|s| hex(&s.parent_span_id) == CLIENT);
    let [request] = requests[..] else { panic!("{requests:?}") };
    assert_eq!((request.name.as_str(), request.trace_state.as_str()), (name, "vendor=1"));
    assert_eq!(number(request, "gen_ai.request.max_tokens"), Some(TOKENS.into()));
    assert_eq!(number(request, "gen_ai.usage.output_tokens"), Some(TOKENS.into()));
    assert!(number(request, "gen_ai.usage.input_tokens") > Some(5));
    let range = |s: &Span| (s.start_time_unix_nano, s.end_time_unix_nano);
    let (begun, ended) = range(request);
    // What a micro-batch took is measured by another clock.
    let slack = Duration::from_millis(50).as_nanos() as u64;
    for part in &parts {
        assert_eq!(part.parent_span_id, request.span_id, "{part:?}");
        let (from, to) = range(part);
        assert!(from + slack >= begun && from <= to && to <= ended + slack, "{part:?}");
    }
    let named = |name: &str| -> Vec<&&Span> { parts.iter().filter(|s| s.name == name).collect() };
    let [queue, prefill, decode] = ["queue", "prefill", "decode"].map(|name| {
        let [phase] = named(name)[..] else { panic!("{name}: {parts:?}") };
        range(phase)
    });
    assert_eq!((queue.0, queue.1, prefill.1, decode.1), (begun, prefill.0, decode.0, ended));
    let steps = number(request, "millrace.micro_batches").unwrap();
    assert!(steps >= i64::from(TOKENS), "a step for each token: {steps}");
    // Which node is which stage is the planner's choice.
    let mut nodes = Vec::new();
    for stage in [0, 1] {
        let all: Vec<&&Span> = named("stage")
            .into_iter()
            .filter(|s| number(s, "millrace.stage") == Some(stage))
            .collect();
        assert_eq!(all.len() as i64, steps, "stage {stage}");
        let node = text(all[0], "millrace.node").unwrap();
        assert!(all.iter().all(|s| text(s, "millrace.node") == Some(node)), "{all:?}");
        nodes.push(node);
    }
    nodes.sort_unstable();
    assert_eq!(nodes, ["first", "second"]);
    assert_eq!(parts.len() as i64, 3 + 2 * steps, "nothing else");
}

#[test]
fn a_trace_goes_through_the_cluster_and_a_lost_collector_stops_nobody() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let endpoint = collector.address();
    // Without drafts there is a step for each token.
    let extra = ["--kv-cache-tokens", "8192", "--speculate", "off", "--otlp-endpoint", &endpoint];
    let cluster = Coordinator::start(root.path(), 2, &extra);
    let _nodes = [cluster.node("first", &[]), cluster.node("second", &[])];
    cluster.wait_ready();

    let silent = over_http(&cluster, UNSAMPLED, "00");
    let said = over_http(&cluster, OVER_HTTP, "01");
    assert_eq!(silent, said, "the same answer, traced or not");
    let said = [said, over_quic(&cluster, OVER_QUIC)];
    check(&trace(&collector, OVER_HTTP), "chat");
    check(&trace(&collector, OVER_QUIC), "text_completion");
    // What was not to be traced has ended before.
    let strangers = |s: &Span| ![OVER_HTTP, OVER_QUIC].contains(&hex(&s.trace_id).as_str());
    assert_eq!(collector.spans().into_iter().find(strangers), None);
    for secret in [PRIVATE, said[0].trim(), said[1].trim(), &cluster.client.api_key] {
        assert!(secret.len() > 5, "{secret}");
        let told = |body: &Vec<u8>| body.windows(secret.len()).any(|w| w == secret.as_bytes());
        assert!(!collector.bodies().iter().any(told), "{secret}");
    }
    assert_eq!(cluster.metric("millrace_spans_lost_total"), 0.0);

    drop(collector);
    assert_eq!(over_http(&cluster, OVER_HTTP, "01"), silent, "the same answer without a collector");
    // Its own, three phases, and two stages for each token at least.
    let least = f64::from(4 + 2 * TOKENS);
    wait_for("spans that are lost", || {
        (cluster.metric("millrace_spans_lost_total") >= least).then_some(())
    });
    assert_eq!(over_quic(&cluster, OVER_QUIC), said[1]);
}
