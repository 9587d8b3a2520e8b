//! The QUIC API through the client SDK, against a service that plays a script.
#![allow(clippy::unwrap_used)]

mod api_common;

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use api_common::*;
use millrace_coordinator::api::quic::{Patience, serve_connection_with};
use millrace_net::client::{Client, ClientConfig};
use millrace_net::{ClusterCa, Endpoint, tls};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::COORDINATOR_NAME;
use millrace_shared::wire::rpc::{
    Choices, EmbedRequest, FinishReason, GenerateEvent, GenerateRequest, Prompt, ScoreRequest,
    TokenizeRequest,
};

struct Server {
    fake: Arc<Fake>,
    dropped: mpsc::Receiver<RequestId>,
    config: ClientConfig,
    ca_der: Vec<u8>,
}

fn server(script: Script) -> Server {
    server_with(script, Patience::default())
}

fn server_with(script: Script, patience: Patience) -> Server {
    let ca = ClusterCa::create().unwrap();
    let tls = tls::public_server(&ca.issue_coordinator().unwrap()).unwrap();
    let endpoint = Endpoint::bind(SocketAddr::from(([127, 0, 0, 1], 0)), Some(tls)).unwrap();
    let config = ClientConfig {
        quic: endpoint.local_addr().unwrap().to_string(),
        http: "http://127.0.0.1:8000".into(),
        api_key: KEY.into(),
        ca_pem: ca.ca_pem(),
        server_name: None,
    };
    let (fake, dropped) = Fake::new(script);
    let service = fake.clone();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let connection = incoming.handshake(DEADLINE).await.unwrap();
            let service = service.clone();
            tokio::spawn(serve_connection_with(connection, service, patience));
        }
    });
    Server { fake, dropped, config, ca_der: ca.ca_der().to_vec() }
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.expect("within the deadline")
}

async fn dropped(server: Server) -> RequestId {
    let told = tokio::task::spawn_blocking(move || server.dropped.recv_timeout(DEADLINE));
    told.await.unwrap().expect("the stream is dropped")
}

fn request() -> GenerateRequest {
    let prompt = Prompt::Text("hello".into());
    let (params, choices) = (SamplingParams::default(), Choices::default());
    GenerateRequest { model: String::new(), prompt, params, choices }
}

#[tokio::test]
async fn a_continuation_streams() {
    let s = server(hello());
    let client = soon(Client::connect(&s.config)).await.unwrap();
    let client = client.with_deadline(Duration::from_secs(10));
    let mut stream = soon(client.generate(request())).await.unwrap();
    let mut text = String::new();
    let mut reason = None;
    while let Some(event) = soon(stream.next()).await {
        match event.unwrap() {
            GenerateEvent::Started { .. } => {}
            GenerateEvent::Token { text: piece, .. } => text.push_str(&piece),
            GenerateEvent::Finished { reason: r, text: rest, .. } => {
                text.push_str(&rest);
                reason = Some(r);
            }
        }
    }
    assert_eq!((text.as_str(), reason), ("Hello world", Some(FinishReason::Stop)));
    let (seen, caller) = s.fake.last();
    assert_eq!(seen, request());
    assert_eq!(caller.deadline, Some(Duration::from_secs(10)));
}

#[tokio::test]
async fn choices_come_mixed() {
    let s = server(two_choices());
    let client = soon(Client::connect(&s.config)).await.unwrap();
    let choices = Choices { n: 2, best_of: 3 };
    let id = RequestId(uuid::Uuid::now_v7());
    let asked = GenerateRequest { choices, ..request() };
    let mut stream = soon(client.generate_as(id, asked.clone())).await.unwrap();
    let mut texts = [String::new(), String::new()];
    let (mut said, mut ends) = (0, Vec::new());
    while let Some(event) = soon(stream.next()).await {
        match event.unwrap() {
            GenerateEvent::Started { choices, .. } => said = choices,
            GenerateEvent::Token { choice, text, .. } => texts[choice as usize].push_str(&text),
            GenerateEvent::Finished { choice, text, usage, .. } => {
                texts[choice as usize].push_str(&text);
                ends.push((choice, usage.completion_tokens + usage.discarded_tokens));
            }
        }
    }
    assert_eq!((said, &texts[..]), (2, &["Hello world".to_owned(), "Good bye".to_owned()][..]));
    assert_eq!(ends, [(1, 6), (0, 3)]);
    assert_eq!(s.fake.last().0, asked);
    // Attached to somewhere else in each choice; the server of this test sends everything again.
    let mut rest = soon(client.attach(id, &[2, 1])).await.unwrap();
    let mut indices = Vec::new();
    while let Some(event) = soon(rest.next()).await {
        if let GenerateEvent::Token { choice, index, .. } = event.unwrap() {
            indices.push((choice, index));
        }
    }
    assert_eq!(indices, [(1, 1), (0, 2)]);
}

#[tokio::test]
async fn every_other_method_answers() {
    let s = server(hello());
    let client = soon(Client::connect(&s.config)).await.unwrap();
    let prompt = Prompt::Text("hi".into());
    let tokenize = TokenizeRequest { model: String::new(), prompt };
    assert_eq!(soon(client.tokenize(tokenize)).await.unwrap(), [104, 105]);
    assert_eq!(soon(client.detokenize(vec![7, 8])).await.unwrap(), "<7><8>");
    assert_eq!(soon(client.models()).await.unwrap()[0].id, MODEL);
    assert_eq!(soon(client.status()).await.unwrap().epoch, 3);
    // More positions than fit into one reply.
    let score = ScoreRequest { model: String::new(), tokens: vec![0; 1500], top_k: 1 };
    let scores = soon(client.score(score)).await.unwrap();
    assert!(scores.iter().map(|s| s.position).eq(0..1500));
    let id = RequestId(uuid::Uuid::now_v7());
    soon(client.cancel(id)).await.unwrap();
    assert_eq!(*s.fake.cancelled.lock().unwrap(), [id]);
}

#[tokio::test]
async fn failures_keep_their_code_and_hint() {
    let full = Status::exhausted("the queue is full", 700);
    let s = server(refuse(full.clone()));
    let client = soon(Client::connect(&s.config)).await.unwrap();
    assert_eq!(first_error(&client).await, full);
    let lost = Status::unavailable("a node was lost", 2000);
    s.fake.set(play(vec![started(), token(0, 7, "Hello", None), Err(lost.clone())]));
    assert_eq!(first_error(&client).await, lost);
    // An answer that breaks off is asked for again, but not for ever.
    s.fake.set(play(vec![started()]));
    assert_eq!(first_error(&client).await.code, ErrorCode::Unavailable);
    let unknown = soon(client.detokenize(vec![7000])).await.unwrap_err();
    assert_eq!(unknown.code, ErrorCode::InvalidArgument);

    let config = ClientConfig { api_key: "wrong".into(), ..s.config.clone() };
    let client = soon(Client::connect(&config)).await.unwrap();
    assert_eq!(first_error(&client).await.code, ErrorCode::Unauthenticated);
    assert_eq!(soon(client.models()).await.unwrap_err().code, ErrorCode::Unauthenticated);
}

async fn first_error(client: &Client) -> Status {
    let mut stream = match soon(client.generate(request())).await {
        Ok(stream) => stream,
        Err(status) => return status,
    };
    loop {
        match soon(stream.next()).await {
            Some(Ok(_)) => {}
            Some(Err(status)) => return status,
            None => panic!("no error"),
        }
    }
}

#[tokio::test]
async fn giving_up_a_stream_cancels() {
    let s = server(hang());
    let client = soon(Client::connect(&s.config)).await.unwrap();
    let mut stream = soon(client.generate(request())).await.unwrap();
    soon(stream.next()).await.unwrap().unwrap();
    drop(stream);
    dropped(s).await;
    assert_eq!(soon(client.models()).await.unwrap().len(), 1, "the connection goes on");
}

#[tokio::test]
async fn losing_the_connection_cancels() {
    let s = server(hang());
    let client = soon(Client::connect(&s.config)).await.unwrap();
    let mut stream = soon(client.generate(request())).await.unwrap();
    soon(stream.next()).await.unwrap().unwrap();
    soon(client.close()).await;
    dropped(s).await;
}

/// A client that starts more calls than run at once gets all of them answered.
#[tokio::test]
async fn calls_beyond_the_bound_wait() {
    let s = server(hello());
    let client = soon(Client::connect(&s.config)).await.unwrap();
    let calls = (0..200).map(|_| client.models());
    let answers = soon(futures::future::join_all(calls)).await;
    assert!(answers.iter().all(Result::is_ok));
}

/// A connection without a valid key does not keep its place; one with a key does.
#[tokio::test]
async fn who_shows_no_key_is_turned_out() {
    let first_call = Duration::from_millis(1500);
    let s = server_with(hello(), Patience { first_call, ..Patience::default() });
    let addr: SocketAddr = s.config.quic.parse().unwrap();
    let endpoint = Endpoint::client(addr).unwrap();
    let tls = tls::api_client(&s.ca_der).unwrap();
    let silent = endpoint.connect(addr, COORDINATOR_NAME, &tls, DEADLINE).await.unwrap();
    let wrong = ClientConfig { api_key: "wrong".into(), ..s.config.clone() };
    let wrong = soon(Client::connect(&wrong)).await.unwrap();
    assert_eq!(soon(wrong.models()).await.unwrap_err().code, ErrorCode::Unauthenticated);
    let good = soon(Client::connect(&s.config)).await.unwrap();
    s.fake.set(hang());
    let mut stream = soon(good.generate(request())).await.unwrap();
    soon(stream.next()).await.unwrap().unwrap();

    let reason = soon(silent.closed()).await.to_string();
    assert!(reason.contains("no call with a valid key"), "{reason}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    soon(stream.next()).await.unwrap().unwrap();
    assert!(s.dropped.try_recv().is_err(), "the good client's request runs on");
}

/// A client that reads nothing of its answer loses it once what is kept for it is full, and holds up
/// nobody, not even another call of its own connection.
#[tokio::test]
async fn who_reads_nothing_loses_the_answer() {
    let reply = Duration::from_millis(500);
    let s = server_with(hello(), Patience { reply, ..Patience::default() });
    // Far more than the windows of both sides together.
    let text = "x".repeat(64 << 10);
    let flood = (0..200).map(|index| token(index, 7, &text, None));
    let endless = Script { hang: true, ..play([started()].into_iter().chain(flood).collect()) };
    s.fake.set(endless);
    let slow = soon(Client::connect(&s.config)).await.unwrap();
    let unread = soon(slow.generate(request())).await.unwrap();
    while s.fake.seen.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let begun = std::time::Instant::now();
    s.fake.set(hello());
    let other = soon(Client::connect(&s.config)).await.unwrap();
    let mut whole = 0;
    let told = loop {
        for client in [&other, &slow] {
            let mut stream = soon(client.generate(request())).await.unwrap();
            while let Some(event) = soon(stream.next()).await {
                event.unwrap();
            }
            whole += 1;
        }
        match s.dropped.try_recv() {
            Ok(id) => break id,
            Err(e) => assert!(begun.elapsed() < DEADLINE, "{e}: it is kept for ever"),
        }
    };
    assert_eq!(told, unread.request_id());
    assert!(whole >= 2);
}

#[tokio::test]
async fn embeddings_come_in_order() {
    let s = server(hello());
    let client = soon(Client::connect(&s.config)).await.unwrap();
    let request = |inputs: Vec<Prompt>| {
        let model = String::new();
        client.embed(EmbedRequest { model, inputs, pooling: Pooling::Last, dimensions: Some(2) })
    };
    let inputs: Vec<Prompt> = (1..300).map(|n| Prompt::Tokens(vec![1; n])).collect();
    let embedded = soon(request(inputs)).await.unwrap();
    let counts: Vec<u32> = embedded.iter().map(|e| e.prompt_tokens).collect();
    assert!(counts.into_iter().eq(1..300));
    assert!(embedded.iter().all(|e| e.vector[0] == e.prompt_tokens as f32));
    let (asked, _) = s.fake.embedded.lock().unwrap().pop().unwrap();
    assert_eq!((asked.pooling, asked.dimensions), (Pooling::Last, Some(2)));
    let many = soon(request(vec![Prompt::Tokens(vec![1]); 2049])).await.unwrap_err();
    assert_eq!((many.code, many.param.as_deref()), (ErrorCode::InvalidArgument, Some("input")));
    s.fake.set(refuse(Status::exhausted("full", 100)));
    let full = soon(request(vec![Prompt::Tokens(vec![1])])).await.unwrap_err();
    assert_eq!((full.code, full.retry_after_ms), (ErrorCode::ResourceExhausted, Some(100)));
}
