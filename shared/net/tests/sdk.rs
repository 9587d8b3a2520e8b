//! The client SDK against a server that answers by rote.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use millrace_net::client::{Client, ClientConfig};
use millrace_net::rpc_server::{ReplySender, accept_call};
use millrace_net::{
    Alpn, Connection, Endpoint, IncomingStream, MessageReceiver, MessageSender, tls,
};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::pooling::Pooling;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{
    CallHeader, ChatMessage, Choices, EmbedRequest, Embedded, FinishReason, GenerateEvent,
    GenerateRequest, Method, PositionScore, Prompt, Reply, ScoreRequest, Timings, TokenizeRequest,
    Usage,
};
use millrace_shared::wire::{MAX_CALL_HEADER_BYTES, MAX_RPC_BYTES, codec};
use tokio::sync::mpsc;

struct Server {
    endpoint: Endpoint,
    config: ClientConfig,
    ca_der: Vec<u8>,
}

fn server() -> Server {
    let cluster = cluster();
    let tls = tls::public_server(&cluster.coordinator).unwrap();
    let endpoint = Endpoint::bind(loopback(), Some(tls)).unwrap();
    let config = ClientConfig {
        quic: endpoint.local_addr().unwrap().to_string(),
        http: "http://127.0.0.1:8000".into(),
        api_key: "mlr-test".into(),
        ca_pem: cluster.ca.ca_pem(),
        server_name: None,
    };
    Server { endpoint, config, ca_der: cluster.ca.ca_der().to_vec() }
}

impl Server {
    async fn accept(&self) -> Connection {
        let connection = self.endpoint.accept().await.unwrap().handshake(DEADLINE).await.unwrap();
        assert_eq!(connection.alpn(), Alpn::Client);
        connection
    }

    /// A connected client and the server's end.
    async fn connect(&self) -> (Client, Connection) {
        let (client, connection) =
            soon(async { tokio::join!(Client::connect(&self.config), self.accept()) }).await;
        (client.unwrap(), connection)
    }
}

struct Call {
    header: CallHeader,
    method: Method,
}

async fn next_call(connection: &Connection) -> (Call, ReplySender) {
    let stream = connection.accept_incoming().await.unwrap();
    let call = Box::pin(accept_call(stream)).await.unwrap();
    assert_eq!(call.bearer(), Some("mlr-test"));
    let header = call.header().clone();
    let (method, _, replies) = Box::pin(call.method()).await.unwrap();
    (Call { header, method }, replies)
}

fn request() -> GenerateRequest {
    GenerateRequest {
        model: String::new(),
        prompt: Prompt::Text("hello".into()),
        params: SamplingParams::default(),
        choices: Choices::default(),
    }
}

fn token(index: u32) -> GenerateEvent {
    token_of(0, index)
}

fn token_of(choice: u32, index: u32) -> GenerateEvent {
    GenerateEvent::Token {
        choice,
        index,
        token_id: 100 + index,
        text: "x".into(),
        logprobs: None,
        calls: Vec::new(),
    }
}

fn finished() -> GenerateEvent {
    GenerateEvent::Finished {
        choice: 0,
        reason: FinishReason::Length,
        text: String::new(),
        calls: Vec::new(),
        usage: Usage::default(),
        timings: Timings::default(),
    }
}

#[tokio::test]
async fn a_continuation_streams() {
    let server = server();
    let (client, connection) = server.connect().await;
    let serving = async {
        let (call, mut replies) = next_call(&connection).await;
        assert_eq!(call.header.deadline_ms, None);
        assert!(matches!(call.method, Method::Generate(r) if r == request()));
        for i in 0..3 {
            replies.event(token(i)).await.unwrap();
        }
        replies.event(finished()).await.unwrap();
        replies.done().await.unwrap();
    };
    let asking = async {
        let mut answer = client.generate(request()).await.unwrap();
        let mut events = Vec::new();
        while let Some(event) = answer.next().await {
            events.push(event.unwrap());
        }
        assert!(answer.next().await.is_none());
        events
    };
    let ((), events) = soon(Box::pin(async { tokio::join!(serving, asking) })).await;
    assert_eq!(events, vec![token(0), token(1), token(2), finished()]);
}

#[tokio::test]
async fn unary_calls() {
    let server = server();
    let (client, connection) = server.connect().await;
    let embedded = Embedded { prompt_tokens: 2, vector: vec![0.6, -0.8] };
    let scores = vec![PositionScore { position: 3, ..PositionScore::default() }];
    let serving = async {
        for _ in 0..8 {
            let (call, mut replies) = next_call(&connection).await;
            let reply = match call.method {
                Method::Tokenize(_) => Reply::Tokens(vec![1, 2]),
                Method::Detokenize { ids } => Reply::Text(format!("{ids:?}")),
                Method::Models => Reply::Models(Vec::new()),
                Method::Status => Reply::Status(Box::default()),
                Method::Score(_) => {
                    replies.reply(&Reply::Scores(scores.clone())).await.unwrap();
                    Reply::Scores(scores.clone())
                }
                Method::Embed(_) => {
                    replies.reply(&Reply::Embeddings(vec![embedded.clone()])).await.unwrap();
                    Reply::Embeddings(vec![embedded.clone()])
                }
                Method::Cancel { .. } => {
                    replies.done().await.unwrap();
                    continue;
                }
                Method::Admin(AdminRequest::Nodes) => Reply::Admin(AdminReply::Nodes(Vec::new())),
                Method::Admin(_) | Method::Generate(_) | Method::Attach(_) => {
                    panic!("not asked for")
                }
            };
            replies.reply(&reply).await.unwrap();
            replies.done().await.unwrap();
        }
    };
    let asking = async {
        let text = TokenizeRequest { model: String::new(), prompt: Prompt::Text("a".into()) };
        assert_eq!(client.tokenize(text).await.unwrap(), vec![1, 2]);
        let nodes = client.admin(AdminRequest::Nodes).await.unwrap();
        assert_eq!(nodes, AdminReply::Nodes(Vec::new()));
        assert_eq!(client.detokenize(vec![5]).await.unwrap(), "[5]");
        assert!(client.models().await.unwrap().is_empty());
        assert!(!client.status().await.unwrap().ready);
        let ask = ScoreRequest { model: String::new(), tokens: vec![1, 2], top_k: 0 };
        assert_eq!(client.score(ask).await.unwrap().len(), 2);
        let (inputs, pooling) = (vec![Prompt::Text("a".into()); 2], Pooling::Mean);
        let ask = EmbedRequest { model: String::new(), inputs, pooling, dimensions: None };
        assert_eq!(client.embed(ask).await.unwrap(), [embedded.clone(), embedded.clone()]);
        client.cancel(RequestId(uuid::Uuid::now_v7())).await.unwrap();
    };
    soon(Box::pin(async { tokio::join!(serving, asking) })).await;
}

#[tokio::test]
async fn errors_come_as_the_server_says_them() {
    let server = server();
    let (client, connection) = server.connect().await;
    let status = Status::exhausted("the queue is full", 250);
    let serving = async {
        for _ in 0..2 {
            let (_, replies) = next_call(&connection).await;
            replies.fail(status.clone()).await.unwrap();
        }
        // Dropped without an end.
        let (_, replies) = next_call(&connection).await;
        drop(replies);
        // An answer to another question.
        let (_, mut replies) = next_call(&connection).await;
        replies.reply(&Reply::Text("?".into())).await.unwrap();
        replies.done().await.unwrap();
    };
    let asking = async {
        assert_eq!(client.models().await.unwrap_err(), status);
        let mut answer = client.generate(request()).await.unwrap();
        assert_eq!(answer.next().await.unwrap().unwrap_err(), status);
        assert!(answer.next().await.is_none());
        let cut = client.models().await.unwrap_err();
        assert_eq!(cut.code, ErrorCode::Unavailable);
        assert_eq!(client.models().await.unwrap_err().code, ErrorCode::Internal);
    };
    soon(Box::pin(async { tokio::join!(serving, asking) })).await;
}

/// Dropping the stream tells the server, which can free what the request holds.
#[tokio::test]
async fn dropping_a_stream_cancels() {
    let server = server();
    let (client, connection) = server.connect().await;
    let (tell, mut told) = mpsc::channel::<()>(1);
    let serving = async {
        let (_, mut replies) = next_call(&connection).await;
        let closed = replies.closed();
        replies.event(token(0)).await.unwrap();
        closed.await;
        assert!(replies.event(token(1)).await.is_err());
        tell.send(()).await.unwrap();
    };
    let asking = async {
        let mut answer = client.generate(request()).await.unwrap();
        assert_eq!(answer.next().await.unwrap().unwrap(), token(0));
        drop(answer);
        told.recv().await.unwrap();
    };
    soon(Box::pin(async { tokio::join!(serving, asking) })).await;
}

#[tokio::test]
async fn deadlines_end_calls() {
    let server = server();
    let (client, connection) = server.connect().await;
    let hurried = client.with_deadline(Duration::from_millis(100));
    let serving = async {
        let (call, replies) = next_call(&connection).await;
        assert_eq!(call.header.deadline_ms, Some(100));
        replies.closed().await;
    };
    let asking = async { hurried.status().await.unwrap_err() };
    let ((), status) = soon(Box::pin(async { tokio::join!(serving, asking) })).await;
    assert_eq!(status.code, ErrorCode::DeadlineExceeded);
}

/// Whoever waits for an event only for a moment at a time breaks off no call by it, also while the
/// stream attaches again; of each choice comes what had not come.
#[tokio::test]
async fn waiting_in_pieces_loses_nothing() {
    let server = server();
    let (client, connection) = server.connect().await;
    let request_id = RequestId(uuid::Uuid::nil());
    let started = GenerateEvent::Started {
        request_id,
        prompt_token_ids: vec![1],
        seed: 1,
        choices: 2,
        left_out: 0,
    };
    let before = vec![started.clone(), token_of(1, 0), token_of(0, 0), token_of(1, 1)];
    let serving = async {
        let (_, mut replies) = next_call(&connection).await;
        for event in before.clone() {
            replies.event(event).await.unwrap();
        }
        // It must have arrived before the connection goes.
        tokio::time::sleep(Duration::from_millis(200)).await;
        connection.close("restarting");
        drop(replies);
        let connection = server.accept().await;
        let (call, mut replies) = next_call(&connection).await;
        assert!(matches!(call.method, Method::Attach(a) if a.next == [1, 2]));
        let gone = replies.closed();
        let left = tokio::time::timeout(Duration::from_millis(300), gone).await.is_ok();
        assert!(!left, "the call was broken off");
        // A server that says too much is heard all the same.
        for event in [started.clone(), token_of(0, 0), token_of(0, 1), token_of(1, 2), finished()] {
            replies.event(event).await.unwrap();
        }
        replies.done().await.unwrap();
        let more = connection.accept_incoming();
        let more = tokio::time::timeout(Duration::from_millis(100), more).await;
        assert!(!matches!(more, Ok(Ok(_))), "one call is enough");
    };
    let asking = async {
        let mut answer = client.generate(request()).await.unwrap();
        let mut events = Vec::new();
        loop {
            match tokio::time::timeout(Duration::from_millis(1), answer.next()).await {
                Err(_) => {}
                Ok(Some(event)) => events.push(event.unwrap()),
                Ok(None) => return events,
            }
        }
    };
    let ((), events) = soon(Box::pin(async { tokio::join!(serving, asking) })).await;
    let after = vec![token_of(0, 1), token_of(1, 2), finished()];
    assert_eq!(events, [before, after].concat());
}

#[tokio::test]
async fn a_lost_connection_is_made_again() {
    let server = server();
    let (client, connection) = server.connect().await;
    let serving = async {
        let (_, replies) = next_call(&connection).await;
        connection.close("restarting");
        drop(replies);
        let connection = server.accept().await;
        let (_, mut replies) = next_call(&connection).await;
        replies.reply(&Reply::Tokens(vec![9])).await.unwrap();
        replies.done().await.unwrap();
        connection
    };
    let asking = async {
        let lost = client.models().await.unwrap_err();
        assert_eq!(lost.code, ErrorCode::Unavailable);
        assert!(lost.message.contains("restarting"), "{lost}");
        assert!(lost.message.contains(&server.config.quic), "{lost}");
        let text = TokenizeRequest { model: String::new(), prompt: Prompt::Text("a".into()) };
        assert_eq!(client.tokenize(text).await.unwrap(), vec![9]);
    };
    soon(Box::pin(async { tokio::join!(serving, asking) })).await;
}

#[tokio::test]
async fn nobody_there() {
    let server = server();
    server.endpoint.close("");
    soon(server.endpoint.drain()).await;
    let config = server.config.clone();
    drop(server);
    let status = soon(Client::connect(&config)).await.unwrap_err();
    assert_eq!(status.code, ErrorCode::Unavailable);
    assert!(status.message.contains(&config.quic), "{status}");
}

/// A bare connection and the server's end.
async fn bare(server: &Server) -> (Connection, Connection) {
    let addr = server.endpoint.local_addr().unwrap();
    let client = Endpoint::client(addr).unwrap();
    let tls = tls::api_client(&server.ca_der).unwrap();
    let name = millrace_shared::wire::COORDINATOR_NAME;
    let (ours, theirs) =
        soon(async { tokio::join!(client.connect(addr, name, &tls, DEADLINE), server.accept()) })
            .await;
    (ours.unwrap(), theirs)
}

/// Opens a stream that begins with these bytes; also the server's end of it.
async fn say(
    ours: &Connection,
    theirs: &Connection,
    bytes: &[u8],
) -> (MessageReceiver, IncomingStream, MessageSender) {
    let (send, recv) = ours.open_bare().await.unwrap();
    let mut out = MessageSender::new(send);
    out.send_bytes(bytes::Bytes::copy_from_slice(bytes)).await.unwrap();
    (MessageReceiver::new(recv), soon(theirs.accept_incoming()).await.unwrap(), out)
}

async fn failure(replies: &mut MessageReceiver) -> Status {
    match soon(replies.recv_one(1 << 20)).await.unwrap() {
        Reply::Failed(status) => status,
        other => panic!("{other:?}"),
    }
}

fn header(pairs: usize) -> Vec<u8> {
    let metadata = vec![("a".to_owned(), "b".to_owned()); pairs];
    codec::encode_frame(&CallHeader { metadata, deadline_ms: None })
}

/// Headers and methods over their limits, and such that are none, get an answer, and the
/// connection lives on.
#[tokio::test]
async fn bad_calls_harm_nobody() {
    let server = server();
    let (ours, theirs) = bare(&server).await;
    let long = ((MAX_CALL_HEADER_BYTES + 1) as u32).to_le_bytes();
    for bytes in [&b"\xff\xff\xff\xff"[..], &long, b"\x04\0\0\0abcd", &header(33)] {
        let (mut replies, stream, _out) = say(&ours, &theirs, bytes).await;
        assert!(soon(accept_call(stream)).await.is_err());
        assert_eq!(failure(&mut replies).await.code, ErrorCode::InvalidArgument);
    }
    let long = ((MAX_RPC_BYTES + 1) as u32).to_le_bytes();
    let turn = ChatMessage::default();
    let prompt = Prompt::Chat(vec![turn; 100_000].into());
    let inflating = Method::Tokenize(TokenizeRequest { model: String::new(), prompt });
    for bytes in [&long[..], b"\x01\0\0\0\xff", &codec::encode_frame(&inflating)] {
        let (mut replies, stream, mut out) = say(&ours, &theirs, &header(32)).await;
        let call = soon(accept_call(stream)).await.unwrap();
        assert_eq!(call.bearer(), None);
        theirs.widen();
        let bytes = bytes::Bytes::copy_from_slice(bytes);
        let (method, _) = soon(async { tokio::join!(call.method(), out.send_bytes(bytes)) }).await;
        assert!(method.is_err());
        assert_eq!(failure(&mut replies).await.code, ErrorCode::InvalidArgument);
    }
    assert!(ours.close_reason().is_none());
}

/// Who has no key cannot make the server take in a long method, and still gets the answer.
#[tokio::test]
async fn refused_calls_are_not_read() {
    let server = server();
    let (ours, theirs) = bare(&server).await;
    let (mut replies, stream, mut out) = say(&ours, &theirs, &header(1)).await;
    let flood = bytes::Bytes::from(vec![0; MAX_RPC_BYTES]);
    let sending = tokio::time::timeout(Duration::from_millis(300), out.send_bytes(flood)).await;
    assert!(sending.is_err(), "the window is smaller than the method");
    let call = soon(accept_call(stream)).await.unwrap();
    let refusal = Status::new(ErrorCode::Unauthenticated, "no key");
    call.refuse(refusal.clone()).await.unwrap();
    assert_eq!(failure(&mut replies).await, refusal);
}

/// A method of nearly the longest length arrives whole; one over it is refused at once.
#[tokio::test]
async fn long_methods() {
    let server = server();
    let (client, connection) = server.connect().await;
    let ask = |bytes| {
        let prompt = Prompt::Text("x".repeat(bytes));
        client.tokenize(TokenizeRequest { model: String::new(), prompt })
    };
    let longest = MAX_RPC_BYTES - 64;
    let serving = async {
        let (call, mut replies) = next_call(&connection).await;
        let Method::Tokenize(request) = call.method else { panic!("{:?}", call.header) };
        assert!(matches!(request.prompt, Prompt::Text(t) if t.len() == longest));
        replies.reply(&Reply::Tokens(vec![1])).await.unwrap();
        replies.done().await.unwrap();
    };
    let ((), ids) = soon(async { tokio::join!(serving, ask(longest)) }).await;
    assert_eq!(ids.unwrap(), [1]);
    let refused = soon(ask(2 * MAX_RPC_BYTES)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::InvalidArgument);
}

/// From some number of connections on, newcomers are asked to show their address; they do.
#[tokio::test]
async fn newcomers_to_a_full_endpoint_show_their_address() {
    let server = server();
    let addr = server.endpoint.local_addr().unwrap();
    let client = Endpoint::client(addr).unwrap();
    let tls = tls::api_client(&server.ca_der).unwrap();
    let name = millrace_shared::wire::COORDINATOR_NAME;
    let mut held = Vec::new();
    for index in 0..70 {
        let connecting = client.connect(addr, name, &tls, DEADLINE);
        let accepting = async {
            let incoming = server.endpoint.accept().await.unwrap();
            assert_eq!(incoming.is_address_validated(), index >= 64, "connection {index}");
            incoming.handshake(DEADLINE).await.unwrap()
        };
        let (ours, theirs) = soon(async { tokio::join!(connecting, accepting) }).await;
        held.push((ours.unwrap(), theirs));
    }
}

#[test]
fn configurations_survive_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("client.toml");
    let config = ClientConfig {
        quic: "127.0.0.1:4700".into(),
        http: "http://127.0.0.1:8000".into(),
        api_key: "mlr-x".into(),
        ca_pem: "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n".into(),
        server_name: None,
    };
    config.save(&path).unwrap();
    assert_eq!(ClientConfig::load(&path).unwrap(), config);
    assert!(!format!("{config:?}").contains("mlr-x"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
    std::fs::write(&path, "quic = 5\n").unwrap();
    let error = ClientConfig::load(&path).unwrap_err().to_string();
    assert!(error.contains("client.toml"), "{error}");
}
