//! What outlives the coordinator: requests, their tokens, and what clients may ask for afterwards.
//! Coordinator and nodes are processes; deaths are `kill -9`.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use harness::local::{Local, Shape};
use harness::processes::{Coordinator, Process, command, run};
use harness::{alone, ask, block_on, http};
use millrace_net::client::{Client, ClientConfig, GenerateStream};
use millrace_shared::error::ErrorCode;
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{
    FinishReason, GenerateEvent, GenerateRequest, Prompt, TokenLogprobs,
};
use serde_json::{Value, json};
use uuid::Uuid;

/// Enough that every answer is still under way when the first tokens of all have come.
const TOKENS: u32 = 160;
/// Tokens that have come when the coordinator dies.
const BEGUN: usize = 24;
const STAGES: u32 = 2;
/// Patience for a slow and busy machine.
const OPTIONS: [&str; 4] = ["--kv-cache-tokens", "8192", "--recovery-timeout", "100"];

/// All that a client hears.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    seed: u64,
    tokens: Vec<(u32, String, Option<TokenLogprobs>)>,
    end: Option<(FinishReason, String, u32)>,
}

impl Heard {
    /// Takes an event of an answer from token `from` on; each comes once, in order.
    fn take(&mut self, event: GenerateEvent, from: u32) {
        match event {
            GenerateEvent::Started { seed, .. } => {
                assert!(self.tokens.is_empty(), "a beginning in the middle");
                self.seed = seed;
            }
            GenerateEvent::Token { index, token_id, text, logprobs } => {
                assert_eq!(index as usize, from as usize + self.tokens.len(), "each token once");
                self.tokens.push((token_id, text, logprobs));
            }
            GenerateEvent::Finished { reason, text, usage, .. } => {
                assert_eq!(usage.completion_tokens as usize, from as usize + self.tokens.len());
                assert!(self.end.replace((reason, text, usage.completion_tokens)).is_none());
            }
        }
    }

    fn text(&self) -> String {
        let end = self.end.as_ref().map_or("", |(_, text, _)| text);
        self.tokens.iter().map(|(_, text, _)| text.as_str()).chain([end]).collect()
    }

    /// What is left of it from token `from` on.
    fn after(&self, from: u32) -> Self {
        Self { tokens: self.tokens[from as usize..].to_vec(), ..self.clone() }
    }
}

fn asked(prompt: &str, params: SamplingParams) -> GenerateRequest {
    GenerateRequest { model: String::new(), prompt: Prompt::Text(prompt.to_owned()), params }
}

/// The rest of a stream that began with token `from`.
async fn hear(mut stream: GenerateStream, from: u32) -> Heard {
    let mut heard = Heard::default();
    while let Some(event) = stream.next().await {
        heard.take(event.unwrap(), from);
    }
    heard
}

fn whole(config: &ClientConfig, request: GenerateRequest) -> Heard {
    block_on(async {
        let client = ask::connect(config).await;
        let heard = hear(client.generate(request).await.unwrap(), 0).await;
        client.close().await;
        heard
    })
}

/// Hears a whole answer, and says so when it is well under way.
fn hear_slowly(
    config: &ClientConfig,
    request: GenerateRequest,
    runs: &Sender<()>,
) -> (RequestId, Heard) {
    block_on(async {
        let client = ask::connect(config).await;
        let mut stream = client.generate(request).await.unwrap();
        let id = stream.request_id();
        let mut heard = Heard::default();
        while let Some(event) = stream.next().await {
            heard.take(event.unwrap(), 0);
            if heard.tokens.len() == BEGUN {
                runs.send(()).unwrap();
            }
        }
        client.close().await;
        (id, heard)
    })
}

/// Greedy; sampled with penalties and log-probabilities; with a seed that the coordinator draws; with
/// a stop string that is half matched for long.
fn requests(truth: &ClientConfig) -> Vec<GenerateRequest> {
    let penalised = SamplingParams {
        repetition_penalty: 1.1,
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        logprobs: Some(3),
        ..ask::sampled(7, TOKENS)
    };
    let drawn = SamplingParams { seed: None, ..ask::sampled(0, TOKENS) };
    let plain = whole(truth, asked("The old mill by the river", ask::greedy(TOKENS)));
    let text = |range: std::ops::Range<usize>| -> String {
        plain.tokens[range].iter().map(|(_, text, _)| text.as_str()).collect()
    };
    let stopped = SamplingParams { stop: vec![text(BEGUN - 8..80)], ..ask::greedy(TOKENS) };
    vec![
        asked("Story of a lighthouse:", ask::greedy(TOKENS)),
        asked("Story of a lighthouse:", penalised),
        asked("A recipe for bread:", drawn),
        asked("The old mill by the river", stopped),
    ]
}

fn completion(stream: bool) -> Vec<u8> {
    let body = json!({
        "model": "model", "prompt": "Story of a lighthouse:", "max_tokens": TOKENS,
        "temperature": 0, "ignore_eos": true, "stream": stream
    });
    body.to_string().into_bytes()
}

/// The text of a stream of server-sent events that is taken up again wherever it breaks off.
fn sse(addr: SocketAddr, key: &str, runs: &Sender<()>, back: &Receiver<()>) -> String {
    let headers = "Idempotency-Key: the lighthouse\r\n";
    let mut stream =
        http::begin_post_with(addr, "/v1/completions", key, headers, &completion(true));
    let id = stream.header("x-millrace-request-id").unwrap().to_owned();
    let (mut text, mut last, mut pieces) = (String::new(), String::new(), 0);
    loop {
        while let Some((at, event)) = stream.event_with_id() {
            if event == "[DONE]" {
                return text;
            }
            let chunk: Value = serde_json::from_str(&event).unwrap();
            assert!(chunk["error"].is_null(), "{event}");
            last = at.unwrap();
            text.push_str(chunk["choices"][0]["text"].as_str().unwrap());
            pieces += 1;
            if pieces == BEGUN {
                runs.send(()).unwrap();
            }
        }
        back.recv_timeout(harness::DEADLINE).unwrap();
        let path = format!("/v1/requests/{id}/events");
        let headers = format!("Last-Event-ID: {last}\r\n");
        stream = http::begin_get(addr, &path, key, &headers);
        assert_eq!(stream.status, 200);
    }
}

fn start(root: &std::path::Path) -> (Coordinator, Vec<Process>) {
    let coordinator = Coordinator::start(root, STAGES, &OPTIONS);
    let nodes = ["first", "last"].map(|name| coordinator.node(name, &[])).into();
    coordinator.wait_ready();
    (coordinator, nodes)
}

/// Four streams over QUIC and one over HTTP, in the middle of which the coordinator ends as `end`
/// says and is started again. Returns the ids and what was heard.
fn interrupt(
    coordinator: &mut Coordinator,
    requests: &[GenerateRequest],
    end: impl FnOnce(&mut Coordinator),
) -> (Vec<(RequestId, Heard)>, String) {
    let (config, addr) = (coordinator.client.clone(), coordinator.http());
    thread::scope(|scope| {
        let (config, (runs, running)) = (&config, channel());
        let streams: Vec<_> = (requests.iter().cloned())
            .map(|request| {
                let runs = runs.clone();
                scope.spawn(move || hear_slowly(config, request, &runs))
            })
            .collect();
        let (is_back, back) = channel();
        let web = scope.spawn(move || sse(addr, &config.api_key, &runs, &back));
        (0..=requests.len()).for_each(|_| running.recv_timeout(harness::DEADLINE).unwrap());
        end(coordinator);
        coordinator.start_again(STAGES, &OPTIONS);
        // Nobody waits for it where that answer was complete already.
        let _ = is_back.send(());
        (streams.into_iter().map(|s| s.join().unwrap()).collect(), web.join().unwrap())
    })
}

#[test]
fn a_killed_coordinator_loses_nothing() {
    let _turn = alone();
    let single = Local::start(Shape::default());
    let requests = requests(single.client());
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, _nodes) = start(root.path());
    let config = coordinator.client.clone();

    let (heard, text) = interrupt(&mut coordinator, &requests, |c| c.process.kill());
    // A seed that was drawn is known only now.
    let truth: Vec<Heard> = (requests.iter().zip(&heard))
        .map(|(request, (_, heard))| {
            let seed = request.params.seed.or(Some(heard.seed));
            let params = SamplingParams { seed, ..request.params.clone() };
            let mut truth = whole(single.client(), GenerateRequest { params, ..request.clone() });
            truth.seed = heard.seed;
            truth
        })
        .collect();
    drop(single);
    for (i, ((_, heard), truth)) in heard.iter().zip(&truth).enumerate() {
        assert_eq!(heard, truth, "request {i}");
    }
    assert_eq!(truth[3].end.as_ref().unwrap().0, FinishReason::Stop, "the stop string was met");
    assert_eq!(text, truth[0].text());
    assert_eq!(coordinator.metric("millrace_journal_degraded"), 0.0);

    let first = heard[0].0;
    whoever_comes_late(&config, first, &requests[0], &truth[0]);
    others_hear_nothing(&coordinator, first);
    once_more_over_http(&coordinator, &truth[0]);
    coordinator.wait_nothing_left();
}

/// An ended request is played again, from any token; the same id with other content is refused.
fn whoever_comes_late(
    config: &ClientConfig,
    id: RequestId,
    request: &GenerateRequest,
    truth: &Heard,
) {
    block_on(async {
        let client = ask::connect(config).await;
        for from in [0, 7, TOKENS] {
            let late = hear(client.attach(id, from).await.unwrap(), from).await;
            assert_eq!(late, truth.after(from), "from {from}");
        }
        let again = client.generate_as(id, request.clone()).await.unwrap();
        assert_eq!(hear(again, 0).await, *truth);
        let other = GenerateRequest { params: ask::greedy(3), ..request.clone() };
        let refused = refusal(client.generate_as(id, other).await.unwrap()).await;
        assert_eq!(refused, ErrorCode::InvalidArgument);
        let unknown = RequestId(Uuid::now_v7());
        assert_eq!(refusal(client.attach(unknown, 0).await.unwrap()).await, ErrorCode::NotFound);
        client.close().await;
    });
}

async fn refusal(mut stream: GenerateStream) -> ErrorCode {
    stream.next().await.unwrap().unwrap_err().code
}

/// A key that did not submit the request cannot hear it; an administrator's can.
fn others_hear_nothing(coordinator: &Coordinator, id: RequestId) {
    let with_key = |scope: &str| {
        let mut create = command("millrace-coordinator", &coordinator.root);
        create.args(["key", "create", "--name", "other", "--scope", scope, "--dir"]);
        let output = {
            create.arg(coordinator.dir());
            run(create)
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let api_key = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ClientConfig { api_key, ..coordinator.client.clone() }
    };
    block_on(async {
        let other = Client::connect(&with_key("generate")).await.unwrap();
        assert_eq!(refusal(other.attach(id, 0).await.unwrap()).await, ErrorCode::NotFound);
        other.close().await;
        let admin = Client::connect(&with_key("admin")).await.unwrap();
        assert!(hear(admin.attach(id, 0).await.unwrap(), 0).await.end.is_some());
        admin.close().await;
    });
}

/// The same request sent again over HTTP, with its key, is the same answer.
fn once_more_over_http(coordinator: &Coordinator, truth: &Heard) {
    let key = &coordinator.client.api_key;
    let headers = "Idempotency-Key: the lighthouse\r\n";
    let path = "/v1/completions";
    let again = http::begin_post_with(coordinator.http(), path, key, headers, &completion(true));
    let id = again.header("x-millrace-request-id").unwrap().to_owned();
    assert!(again.whole().text().contains("id: 0:161\n"));
    let other =
        json!({ "model": "model", "prompt": "Something else", "max_tokens": 1 }).to_string();
    let refused =
        http::begin_post_with(coordinator.http(), path, key, headers, other.as_bytes()).whole();
    assert_eq!(refused.status, 400, "{}", refused.text());
    // From a place in the middle.
    let events = format!("/v1/requests/{id}/events");
    let rest =
        http::begin_get(coordinator.http(), &events, key, "Last-Event-ID: 0:150\r\n").whole();
    let text: String = (rest.text().lines())
        .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(text, truth.after(150).text());
}

#[test]
fn a_coordinator_that_is_told_to_stop_goes_on_where_it_was() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, _nodes) = start(root.path());
    let config = coordinator.client.clone();
    let requests: Vec<_> =
        (1..=2).map(|seed| asked("Story of a lighthouse:", ask::sampled(seed, 400))).collect();
    let heard: Vec<Heard> = thread::scope(|scope| {
        let (config, (runs, running)) = (&config, channel());
        let streams: Vec<_> = (requests.iter().cloned())
            .map(|request| {
                let runs = runs.clone();
                scope.spawn(move || hear_slowly(config, request, &runs).1)
            })
            .collect();
        (0..2).for_each(|_| running.recv_timeout(harness::DEADLINE).unwrap());
        assert_eq!(coordinator.process.terminate().code(), Some(0));
        coordinator.start_again(STAGES, &OPTIONS);
        streams.into_iter().map(|s| s.join().unwrap()).collect()
    });
    let truth: Vec<Heard> = requests.into_iter().map(|r| whole(&config, r)).collect();
    assert_eq!(heard, truth);
}
