//! Spans, as a collector gets them.

#[path = "../../../tests/harness/collector.rs"]
#[allow(unreachable_pub)]
mod collector;

use std::net::TcpListener;
use std::time::Duration;

use collector::{Collector, hex, number, text};

use millrace_shared::wire::data::StageTime;
use opentelemetry_proto::tonic::trace::v1::Span;

use super::*;
use crate::request::tests::Spoken;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

fn parent(flags: &str) -> Parent {
    let parent = format!("00-{TRACE}-{CLIENT}-{flags}");
    Parent { parent, state: "vendor=1".into() }
}

#[test]
fn a_request_and_its_stages_join_the_trace_of_the_client() {
    let collector = Collector::start();
    let spans = Spans::to(Some(&collector.address()), "tiny").unwrap();
    let mut spoken = Spoken::new();
    let span = spans.begin(Some(&parent("01")), spoken.generation()).expect("sampled");
    let other =
        Parent { parent: format!("00-{}-{CLIENT}-01", "1".repeat(32)), state: String::new() };
    let other = spans.begin(Some(&other), spoken.generation()).expect("sampled");
    assert!(spans.begin(Some(&parent("00")), spoken.generation()).is_none(), "not sampled");
    let ms = Duration::from_millis;
    let times = [StageTime::new(ms(1), ms(5)), StageTime::new(ms(2), ms(6))];
    spoken.say("xy");
    let nodes = ["gpu-a".to_owned(), "gpu-b".to_owned()];
    spans.step((7, ms(20)), &[&span, &other], &times, &nodes);
    spans.end(span, spoken.generation());
    assert_eq!(spans.lost(), 0);
    drop((other, spans));

    let all = collector.spans();
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
    assert_eq!(
        stages.iter().map(|s| text(s, "millrace.node")).collect::<Vec<_>>(),
        [Some("gpu-a"), Some("gpu-b")]
    );
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
