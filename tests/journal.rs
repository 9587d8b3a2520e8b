//! What outlives the coordinator: requests, their tokens, and what clients may ask for afterwards.
//! Coordinator and nodes are processes; deaths are `kill -9`.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use harness::local::{Local, Shape};
use harness::processes::{Coordinator, Process, command, run};
use harness::{alone, ask, block_on, http};
use millrace_net::client::{Client, ClientConfig, GenerateStream};
use millrace_shared::error::ErrorCode;
use millrace_shared::id::RequestId;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, RequestQuery};
use millrace_shared::wire::rpc::{
    Choices, FinishReason, GenerateEvent, GenerateRequest, Prompt, TokenLogprobs,
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

/// All that a client hears: the seed, and each choice.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    seed: u64,
    choices: Vec<Said>,
}

/// A choice.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    tokens: Vec<(u32, String, Option<TokenLogprobs>)>,
    end: Option<(FinishReason, String, u32)>,
}

impl Heard {
    /// Takes an event of an answer, of each choice from the token in `from` on; each token comes
    /// once, in order.
    fn take(&mut self, event: GenerateEvent, from: &[u32]) {
        let at = |choice: u32| from.get(choice as usize).copied().unwrap_or_default() as usize;
        match event {
            GenerateEvent::Started { seed, choices, .. } => {
                assert!(self.choices.is_empty(), "a beginning in the middle");
                self.seed = seed;
                self.choices.resize_with(choices as usize, Said::default);
            }
            GenerateEvent::Token { choice, index, token_id, text, logprobs, .. } => {
                let said = &mut self.choices[choice as usize];
                assert_eq!(index as usize, at(choice) + said.tokens.len(), "each token once");
                said.tokens.push((token_id, text, logprobs));
            }
            GenerateEvent::Finished { choice, reason, text, usage, .. } => {
                let said = &mut self.choices[choice as usize];
                assert_eq!(usage.completion_tokens as usize, at(choice) + said.tokens.len());
                assert!(said.end.replace((reason, text, usage.completion_tokens)).is_none());
            }
        }
    }

    /// Tokens of the choice that has most.
    fn begun(&self) -> usize {
        self.choices.iter().map(|c| c.tokens.len()).max().unwrap_or_default()
    }

    /// What is left of it, of each choice from the token in `from` on.
    fn after(&self, from: &[u32]) -> Self {
        let mut left = self.clone();
        for (choice, &from) in left.choices.iter_mut().zip(from) {
            choice.tokens.drain(..from as usize);
        }
        left
    }
}

impl Said {
    fn text(&self) -> String {
        let end = self.end.as_ref().map_or("", |(_, text, _)| text);
        self.tokens.iter().map(|(_, text, _)| text.as_str()).chain([end]).collect()
    }
}

fn asked(prompt: &str, params: SamplingParams) -> GenerateRequest {
    let (prompt, choices) = (Prompt::Text(prompt.to_owned()), Choices::default());
    GenerateRequest { model: String::new(), prompt, params, choices }
}

/// The rest of a stream that began, in each choice, with the token in `from`.
async fn hear(mut stream: GenerateStream, from: &[u32]) -> Heard {
    let mut heard = Heard::default();
    while let Some(event) = stream.next().await {
        heard.take(event.unwrap(), from);
    }
    heard
}

fn whole(config: &ClientConfig, request: GenerateRequest) -> Heard {
    block_on(async {
        let client = ask::connect(config).await;
        let heard = hear(client.generate(request).await.unwrap(), &[]).await;
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
        let compared = request.choices.n < request.choices.best_of;
        let mut stream = client.generate(request).await.unwrap();
        let id = stream.request_id();
        let mut heard = Heard::default();
        let mut told = false;
        while let Some(event) = stream.next().await {
            heard.take(event.unwrap(), &[]);
            // Nothing is heard before the end where choices are compared.
            if !told && (compared || heard.begun() == BEGUN) {
                told = true;
                runs.send(()).unwrap();
            }
        }
        client.close().await;
        (id, heard)
    })
}

/// Greedy; three choices, sampled with penalties and log-probabilities; with a seed that the
/// coordinator draws, the best of three; with a stop string that is half matched for long; JSON that
/// follows a schema.
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
        plain.choices[0].tokens[range].iter().map(|(_, text, _)| text.as_str()).collect()
    };
    let stopped = SamplingParams { stop: vec![text(BEGUN - 8..80)], ..ask::greedy(TOKENS) };
    vec![
        asked("Story of a lighthouse:", ask::greedy(TOKENS)),
        GenerateRequest { choices: Choices::of(3), ..asked("Story of a lighthouse:", penalised) },
        GenerateRequest {
            choices: Choices { n: 1, best_of: 3 },
            ..asked("A recipe for bread:", drawn)
        },
        asked("The old mill by the river", stopped),
        asked(
            "As JSON:",
            SamplingParams { repetition_penalty: 1.1, ..ask::constrained(7, TOKENS) },
        ),
    ]
}

fn completion(stream: bool) -> Vec<u8> {
    let body = json!({
        "model": "model", "prompt": "Story of a lighthouse:", "max_tokens": TOKENS, "n": 2,
        "temperature": 0.8, "seed": 7, "ignore_eos": true, "stream": stream
    });
    body.to_string().into_bytes()
}

/// Adds the text of a chunk to that of its choice.
fn push(texts: &mut [String; 2], chunk: &Value) {
    let Some(choice) = chunk["choices"].get(0) else { return };
    texts[choice["index"].as_u64().unwrap() as usize].push_str(choice["text"].as_str().unwrap());
}

/// The texts of a stream of server-sent events that is taken up again wherever it breaks off.
fn sse(addr: SocketAddr, key: &str, runs: &Sender<()>, back: &Receiver<()>) -> [String; 2] {
    let headers = "Idempotency-Key: the lighthouse\r\n";
    let mut stream =
        http::begin_post_with(addr, "/v1/completions", key, headers, &completion(true));
    let id = stream.header("x-millrace-request-id").unwrap().to_owned();
    let (mut texts, mut last, mut pieces) = (<[String; 2]>::default(), String::new(), 0);
    loop {
        while let Some((at, event)) = stream.event_with_id() {
            if event == "[DONE]" {
                return texts;
            }
            let chunk: Value = serde_json::from_str(&event).unwrap();
            assert!(chunk["error"].is_null(), "{event}");
            last = at.unwrap();
            push(&mut texts, &chunk);
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
) -> (Vec<(RequestId, Heard)>, [String; 2]) {
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

    let (heard, texts) = interrupt(&mut coordinator, &requests, |c| c.process.kill());
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
    // The first choice is what one alone is.
    let alone = GenerateRequest { choices: Choices::default(), ..requests[1].clone() };
    assert_eq!(whole(single.client(), alone).choices[0], truth[1].choices[0]);
    let sampled = asked("Story of a lighthouse:", ask::sampled(7, TOKENS));
    let sampled = GenerateRequest { choices: Choices::of(2), ..sampled };
    let sampled = whole(single.client(), sampled);
    drop(single);
    for (i, ((_, heard), truth)) in heard.iter().zip(&truth).enumerate() {
        assert_eq!(heard, truth, "request {i}");
    }
    assert_eq!(truth[1].choices.len(), 3);
    assert_ne!(truth[1].choices[0].text(), truth[1].choices[1].text());
    let stopped = truth[3].choices[0].end.as_ref().unwrap().0;
    assert_eq!(stopped, FinishReason::Stop, "the stop string was met");
    assert_eq!(texts, [sampled.choices[0].text(), sampled.choices[1].text()]);
    assert_eq!(coordinator.metric("millrace_journal_degraded"), 0.0);

    whoever_comes_late(&config, &heard[1], &requests[1]);
    others_hear_nothing(&coordinator, heard[0].0);
    once_more_over_http(&coordinator, &sampled);
    coordinator.wait_nothing_left();
}

/// An ended request is played again, from any tokens; the same id with other content is refused.
fn whoever_comes_late(
    config: &ClientConfig,
    (id, truth): &(RequestId, Heard),
    request: &GenerateRequest,
) {
    let id = *id;
    block_on(async {
        let client = ask::connect(config).await;
        for from in [[0, 0, 0], [7, 0, TOKENS], [TOKENS, 5, 9]] {
            let late = hear(client.attach(id, &from).await.unwrap(), &from).await;
            assert_eq!(late, truth.after(&from), "from {from:?}");
        }
        let again = client.generate_as(id, request.clone()).await.unwrap();
        assert_eq!(hear(again, &[]).await, *truth);
        let other = GenerateRequest { params: ask::greedy(3), ..request.clone() };
        let refused = refusal(client.generate_as(id, other).await.unwrap()).await;
        assert_eq!(refused, ErrorCode::InvalidArgument);
        let unknown = RequestId(Uuid::now_v7());
        assert_eq!(refusal(client.attach(unknown, &[]).await.unwrap()).await, ErrorCode::NotFound);
        client.close().await;
    });
}

async fn refusal(mut stream: GenerateStream) -> ErrorCode {
    stream.next().await.unwrap().unwrap_err().code
}

/// What a client with a new key needs.
fn with_key(coordinator: &Coordinator, flags: &[&str]) -> ClientConfig {
    let mut create = command("millrace-coordinator", &coordinator.root);
    create.args(["key", "create", "--name", "other", "--dir"]).arg(coordinator.dir());
    create.args(flags);
    let output = run(create);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let api_key = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ClientConfig { api_key, ..coordinator.client.clone() }
}

/// A key that did not submit the request cannot hear it; an administrator's can.
fn others_hear_nothing(coordinator: &Coordinator, id: RequestId) {
    let with_key = |scope: &str| with_key(coordinator, &["--scope", scope]);
    block_on(async {
        let other = Client::connect(&with_key("generate")).await.unwrap();
        assert_eq!(refusal(other.attach(id, &[]).await.unwrap()).await, ErrorCode::NotFound);
        other.close().await;
        let admin = Client::connect(&with_key("admin")).await.unwrap();
        assert!(hear(admin.attach(id, &[]).await.unwrap(), &[]).await.choices[0].end.is_some());
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
    assert!(again.whole().text().contains("id: 0:161,1:161\n"));
    let other =
        json!({ "model": "model", "prompt": "Something else", "max_tokens": 1 }).to_string();
    let refused =
        http::begin_post_with(coordinator.http(), path, key, headers, other.as_bytes()).whole();
    assert_eq!(refused.status, 400, "{}", refused.text());
    // From a place in the middle of each.
    let events = format!("/v1/requests/{id}/events");
    let last = "Last-Event-ID: 0:150,1:30\r\n";
    let rest = http::begin_get(coordinator.http(), &events, key, last).whole();
    let mut texts = <[String; 2]>::default();
    for line in rest.text().lines() {
        let data = line.strip_prefix("data: ").and_then(|data| serde_json::from_str(data).ok());
        data.iter().for_each(|chunk| push(&mut texts, chunk));
    }
    let truth = truth.after(&[150, 30]);
    assert_eq!(texts, [truth.choices[0].text(), truth.choices[1].text()]);
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

/// What the cluster says of a request, once it says something.
async fn shown(client: &Client, id: RequestId) -> Option<String> {
    let query = RequestQuery::Show { id: id.to_string() };
    match client.admin(AdminRequest::Requests(query)).await {
        Ok(AdminReply::Requests(reports)) => Some(reports.first()?.state.clone()),
        _ => None,
    }
}

/// Whoever comes as the next life begins waits for its nodes, over both APIs: no answer is lost for
/// it. A request that waits is to be seen, and can be stopped; the wait has an end.
#[test]
fn requests_that_come_before_the_nodes_wait_for_them() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, mut nodes) = start(root.path());
    let config = coordinator.client.clone();
    let request = || asked("Story of a lighthouse:", ask::greedy(24));
    let truth = whole(&config, request());
    let body = json!({"prompt": "Story of a lighthouse:", "max_tokens": 24, "temperature": 0,
        "ignore_eos": true});
    coordinator.process.kill();
    coordinator.start_again(STAGES, &OPTIONS);
    let over_http = http::begin_post(
        coordinator.http(),
        "/v1/completions",
        &config.api_key,
        body.to_string().as_bytes(),
    );
    assert_eq!(whole(&config, request()).choices, truth.choices);
    let answer = over_http.whole().json();
    assert_eq!(answer["choices"][0]["text"], truth.choices[0].text(), "{answer}");

    coordinator.process.kill();
    nodes.iter_mut().for_each(Process::kill);
    coordinator.start_again(STAGES, &["--recovery-timeout", "20"]);
    block_on(async {
        let client = ask::connect(&config).await;
        let (stopped, id) = (RequestId(Uuid::now_v7()), RequestId(Uuid::now_v7()));
        let hear = async |id: RequestId| match client.generate_as(id, request()).await {
            Ok(stream) => ask::finish(stream).await,
            Err(status) => Err(status),
        };
        let stop = tokio::time::timeout(harness::DEADLINE, async {
            loop {
                let state = shown(&client, stopped).await.unwrap_or_default();
                if state.contains("waiting for nodes: 0 of 2") {
                    assert!(state.starts_with("waiting for a node: "), "{state}");
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            client.cancel(stopped).await.unwrap();
        });
        let (heard, late, stop) = tokio::join!(hear(stopped), hear(id), stop);
        stop.unwrap();
        assert_eq!(heard.unwrap_err().code, ErrorCode::Cancelled);
        let late = late.unwrap_err();
        assert_eq!(late.code, ErrorCode::Unavailable, "{late}");
        assert!(late.message.contains("waiting for nodes: 0 of 2 are there"), "{late}");
        client.close().await;
    });
}

/// A key that may have one request at once has no second one because the coordinator was started
/// again, and has its place back when the first has ended.
#[test]
fn a_request_of_an_earlier_life_keeps_its_place() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, mut nodes) = start(root.path());
    let limited = with_key(&coordinator, &["--scope", "generate", "--concurrent", "1"]);
    let long = asked("Story of a lighthouse:", ask::greedy(TOKENS));
    let short = || asked("A recipe for bread:", ask::greedy(4));
    thread::scope(|scope| {
        let (config, (runs, running)) = (&limited, channel());
        let first = scope.spawn(move || hear_slowly(config, long, &runs).1);
        running.recv_timeout(harness::DEADLINE).unwrap();
        coordinator.process.kill();
        // So that it cannot end.
        nodes.iter_mut().for_each(Process::kill);
        coordinator.start_again(STAGES, &OPTIONS);
        block_on(async {
            let client = ask::connect(config).await;
            let second = refusal(client.generate(short()).await.unwrap()).await;
            assert_eq!(second, ErrorCode::ResourceExhausted);
            client.close().await;
        });
        nodes = ["first", "last"].map(|name| coordinator.node(name, &[])).into();
        let first = first.join().unwrap();
        assert_eq!(first.choices[0].tokens.len(), TOKENS as usize);
    });
    coordinator.wait_nothing_left();
    assert_eq!(whole(&limited, short()).choices[0].tokens.len(), 4);
}
