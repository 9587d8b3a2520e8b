//! Spans, as a collector gets them.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use millrace_shared::wire::data::StageTime;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;

use super::*;
use crate::request::tests::Spoken;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// A collector that takes everything; its address, and the spans.
fn collector() -> (String, Receiver<Span>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let (spans, taken) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
            let mut length = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                let lower = line.to_ascii_lowercase();
                if let Some(n) = lower.strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
                if line == "\r\n" {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let request = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
            let scopes = request.resource_spans.into_iter().flat_map(|r| r.scope_spans);
            scopes.flat_map(|s| s.spans).for_each(|span| spans.send(span).unwrap());
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            (&stream).write_all(answer.as_bytes()).unwrap();
        }
    });
    (address, taken)
}

fn parent(flags: &str) -> Parent {
    let parent = format!("00-{TRACE}-{CLIENT}-{flags}");
    Parent { parent, state: "vendor=1".into() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn number(span: &Span, key: &str) -> Option<i64> {
    let found = span.attributes.iter().find(|a| a.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::IntValue(n) => Some(*n),
        _ => None,
    }
}

#[test]
fn a_request_and_its_stages_join_the_trace_of_the_client() {
    let (address, taken) = collector();
    let spans = Spans::to(Some(&address), "tiny").unwrap();
    let mut spoken = Spoken::new();
    let span = spans.begin(Some(&parent("01")), spoken.generation()).expect("sampled");
    let other =
        Parent { parent: format!("00-{}-{CLIENT}-01", "1".repeat(32)), state: String::new() };
    let other = spans.begin(Some(&other), spoken.generation()).expect("sampled");
    assert!(spans.begin(Some(&parent("00")), spoken.generation()).is_none(), "not sampled");
    let ms = Duration::from_millis;
    let times = [StageTime::new(ms(1), ms(5)), StageTime::new(ms(2), ms(6))];
    spoken.say("xy");
    spans.step(7, &[&span, &other], &times, ms(20));
    spans.end(span, spoken.generation());
    assert_eq!(spans.lost(), 0);
    drop((other, spans));

    let all: Vec<Span> = taken.try_iter().collect();
    let named = |name: &str| -> Vec<&Span> {
        let ours = |s: &&Span| s.name == name && hex(&s.trace_id) == TRACE;
        all.iter().filter(ours).collect()
    };
    let [request] = named("text_completion")[..] else { panic!("{all:?}") };
    assert_eq!(
        (hex(&request.parent_span_id).as_str(), request.trace_state.as_str()),
        (CLIENT, "vendor=1")
    );
    assert_eq!(number(request, "gen_ai.usage.input_tokens"), Some(3));
    assert_eq!(number(request, "gen_ai.usage.output_tokens"), Some(2));
    let stages = named("stage");
    let of = |s: &&Span| (number(s, "millrace.stage"), number(s, "millrace.micro_batch"));
    assert_eq!(stages.iter().map(of).collect::<Vec<_>>(), [(Some(0), Some(7)), (Some(1), Some(7))]);
    for (stage, seconds) in stages.iter().zip([6, 8]) {
        assert_eq!(stage.parent_span_id, request.span_id);
        assert_eq!(hex(&stage.links[0].trace_id), "1".repeat(32), "the other request");
        let took = Duration::from_nanos(stage.end_time_unix_nano - stage.start_time_unix_nano);
        assert_eq!(took, ms(seconds));
    }
    assert!(
        stages[0].end_time_unix_nano < stages[1].start_time_unix_nano,
        "a link is between them"
    );
    for phase in ["queue", "decode"] {
        assert!(named(phase).iter().all(|s| s.parent_span_id == request.span_id), "{phase}");
    }
    assert_eq!((named("queue").len(), named("decode").len()), (1, 1));
}

#[test]
fn a_collector_that_is_not_there_costs_spans_alone() {
    let nowhere = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let spans = Spans::to(Some(&format!("http://{nowhere}")), "tiny").unwrap();
    let spoken = Spoken::new();
    for _ in 0..3 {
        let span = spans.begin(None, spoken.generation()).expect("sampled");
        spans.end(span, spoken.generation());
    }
    spans.flush();
    // Each request has its own span and that of its time in the queue.
    assert_eq!(spans.lost(), 6);
    // Without an endpoint there is nothing.
    assert!(Spans::to(None, "tiny").unwrap().begin(None, spoken.generation()).is_none());
    assert!(Spans::to(Some("not an address"), "tiny").is_err());
}

#[test]
fn what_clients_say_is_bounded() {
    let of = |value: &'static str| Parent::of(move |name| (name == "traceparent").then_some(value));
    assert_eq!(of("00-x").unwrap().parent, "00-x");
    assert_eq!(of("x".repeat(513).leak()), None);
    assert_eq!(Parent::of(|_| None), None);
}
