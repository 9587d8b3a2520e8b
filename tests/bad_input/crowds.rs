//! Those who only hold places: more connections than there may be, and such as never say what they
//! came for, or never read what they are told. The others are served meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use futures::future::join_all;
use harness::relay::{Relay, Way};
use harness::{ask, hostile, http, soon, wait_for};
use millrace_net::client::ClientConfig;
use millrace_net::{ClientTls, Connection, Endpoint, NetError, tls};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::rpc::{Method, Prompt, Reply};
use millrace_shared::wire::{COORDINATOR_NAME, MAX_REPLY_BYTES, codec};

use crate::cluster::{Cluster, under_attack};

/// Connections that either API has at once.
const PLACES: usize = 1024;

/// Where strangers connect, and how.
struct Strangers {
    to: SocketAddr,
    tls: ClientTls,
    endpoint: Endpoint,
    key: String,
}

impl Strangers {
    fn of(cluster: &Cluster) -> Self {
        let ClientConfig { quic, api_key: key, .. } = cluster.coordinator.client.clone();
        let to = quic.parse().unwrap();
        let tls = tls::api_client(cluster.ca().ca_der()).unwrap();
        Self { to, tls, endpoint: Endpoint::client(to).unwrap(), key }
    }

    async fn connect(&self) -> Result<Connection, NetError> {
        self.endpoint.connect(self.to, COORDINATOR_NAME, &self.tls, Duration::from_secs(20)).await
    }

    /// One that has shown its key, and so keeps its place.
    async fn with_key(&self) -> Result<Connection, NetError> {
        let connection = self.connect().await?;
        let call = [hostile::call_header(&self.key), codec::encode_frame(&Method::Models)].concat();
        let (_out, mut replies) = hostile::begin_call(&connection, &call).await?;
        match replies.recv_one(MAX_REPLY_BYTES).await? {
            Reply::Models(_) => Ok(connection),
            other => panic!("{other:?}"),
        }
    }
}

/// As many QUIC connections as there are places get in and keep them; nobody gets in beyond, who is
/// in is served, and a place that is given up is the next one's.
#[test]
fn a_crowd_over_quic() {
    under_attack(async |cluster| {
        let strangers = Strangers::of(cluster);
        let mut held = Vec::new();
        // The test's own client has a place, too. Some come too fast, and again.
        while held.len() < PLACES - 1 {
            let wave = (PLACES - 1 - held.len()).min(64);
            let came = join_all((0..wave).map(|_| strangers.with_key())).await;
            held.extend(came.into_iter().flatten());
        }
        let why = "too many connections, one refused";
        let refusals = |cluster: &Cluster| cluster.coordinator.process.log().matches(why).count();
        while refusals(cluster) < 8 {
            assert!(strangers.with_key().await.is_err(), "there is one place too many");
        }
        assert!(held.iter().all(|c| c.close_reason().is_none()), "all keep their places");
        cluster.is_unharmed("a crowd").await;

        held.pop().unwrap().close("room for another");
        let next = async {
            loop {
                if let Ok(connection) = strangers.with_key().await {
                    break connection;
                }
            }
        };
        held.push(soon(next).await);
        drop(held);
        strangers.endpoint.close("done");
        strangers.endpoint.drain().await;
        cluster.is_unharmed("a crowd that went").await;
    });
}

/// Asks, and leaves the connection open for more.
fn ask_and_stay(addr: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    stream
}

/// Whether the answer comes within this time.
fn is_answered(stream: &mut TcpStream, within: Duration) -> bool {
    stream.set_read_timeout(Some(within)).unwrap();
    let mut status = [0; 12];
    match stream.read_exact(&mut status) {
        Ok(()) => status == *b"HTTP/1.1 200",
        Err(e) => {
            assert!(matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{e}");
            false
        }
    }
}

/// So many HTTP connections are served, no more, until some of them go.
#[test]
fn a_crowd_over_http() {
    // The coordinator makes room for files by itself; this process needs it, too.
    let (few, most) = rlimit::Resource::NOFILE.get().unwrap();
    rlimit::Resource::NOFILE.set(few.min(512), most).unwrap();
    under_attack(async |cluster| {
        rlimit::increase_nofile_limit(4 * PLACES as u64).unwrap();
        let addr = cluster.coordinator.http();
        let mut held: Vec<TcpStream> = (0..PLACES).map(|_| ask_and_stay(addr)).collect();
        assert!(held.iter_mut().all(|stream| is_answered(stream, harness::DEADLINE)));
        let mut waiting: Vec<TcpStream> = (0..40).map(|_| ask_and_stay(addr)).collect();
        // The last one has had time, so the others had, too; one or two may have been accepted
        // before the server knew that it is full.
        assert!(!is_answered(waiting.last_mut().unwrap(), Duration::from_millis(500)));
        let late = waiting
            .iter_mut()
            .filter_map(|s| is_answered(s, Duration::from_millis(1)).then_some(()));
        let served = late.count();
        assert!(served <= 4, "{served} more than there are places");
        cluster.is_unharmed("a crowd").await;

        held.truncate(PLACES - 80);
        let last = waiting.last_mut().unwrap();
        assert!(is_answered(last, harness::DEADLINE), "whoever waited has its turn");
        drop((held, waiting));
        assert_eq!(http::get(addr, "/live").status, 200);
        cluster.is_unharmed("a crowd that went").await;
    });
}

/// Connections and calls that begin and never go on are ended by the server, whatever key they have.
#[test]
fn slowly_come_slowly_go() {
    under_attack(async |cluster| {
        let addr = cluster.coordinator.http();
        // HTTP: heads that begin, and one that goes on for ever.
        let begun = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-";
        let slow: Vec<TcpStream> = (0..200)
            .map(|_| {
                let mut stream = TcpStream::connect(addr).unwrap();
                stream.write_all(begun).unwrap();
                stream
            })
            .collect();
        let heads = tokio::task::spawn_blocking(move || slow.into_iter().for_each(is_turned_out));
        let dripping = tokio::task::spawn_blocking(move || drips_until_turned_out(addr));

        // QUIC: handshakes of which the answers never arrive.
        let strangers = Strangers::of(cluster);
        let relay = Relay::start(Way::default(), Way::cut(), 1);
        relay.set_target(strangers.to);
        let deaf = Strangers { to: relay.addr(), ..Strangers::of(cluster) };
        let unfinished = join_all((0..20).map(|_| deaf.connect()));
        // Half a header, and half a method behind a header with a valid key.
        let connection = strangers.with_key().await.unwrap();
        let header = hostile::call_header(&strangers.key);
        let prompt = Prompt::Text("a long question ".repeat(100));
        let method =
            codec::encode_frame(&Method::Tokenize(millrace_shared::wire::rpc::TokenizeRequest {
                model: String::new(),
                prompt,
            }));
        let halves = [
            header[..2].to_vec(),
            header[..header.len() / 2].to_vec(),
            header.clone(),
            [&header[..], &method[..2]].concat(),
            [&header[..], &method[..method.len() / 2]].concat(),
        ];
        let broken_off = join_all(halves.iter().map(|bytes| refused(&connection, bytes)));
        let (statuses, unfinished) = soon(futures::future::join(broken_off, unfinished)).await;
        for status in statuses {
            assert_eq!(status.code, ErrorCode::DeadlineExceeded, "{status}");
        }
        assert!(unfinished.iter().all(Result::is_err));
        let log = |cluster: &Cluster| cluster.coordinator.process.log();
        let late = |log: &str| log.matches("not complete within").count();
        while late(&log(cluster)) < unfinished.len() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(connection.close_reason().is_none(), "the connection itself did nothing wrong");
        soon(heads).await.unwrap();
        soon(dripping).await.unwrap();
        assert_eq!(http::get(addr, "/live").status, 200);
        cluster.is_unharmed("slow ones").await;
    });
}

/// How the server ends a call that began so and never goes on.
async fn refused(connection: &Connection, bytes: &[u8]) -> Status {
    let (_out, mut replies) = hostile::begin_call(connection, bytes).await.unwrap();
    match soon(replies.recv_one(MAX_REPLY_BYTES)).await.unwrap() {
        Reply::Failed(status) => status,
        other => panic!("{other:?}"),
    }
}

/// The server answers that it took too long, and closes; it is not this side that gives up.
fn is_turned_out(mut stream: TcpStream) {
    stream.set_read_timeout(Some(harness::DEADLINE)).unwrap();
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => assert!(answer.starts_with(b"HTTP/1.1 408"), "{answer:?}"),
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{e}"),
    }
}

/// A head of which a byte comes now and then: each is progress, all of them together are too late.
fn drips_until_turned_out(addr: SocketAddr) {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(250))).unwrap();
    wait_for("end of a head that never ends", || {
        let mut answer = [0; 12];
        match stream.read(&mut answer) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                // It may have been closed just now.
                let _ = stream.write_all(b"a");
                None
            }
            Ok(read) => {
                assert!(answer[..read].starts_with(b"HTTP/1.1 408") || read == 0, "{answer:?}");
                Some(())
            }
            Err(_) => Some(()),
        }
    });
}

/// Clients that ask and never read: their answers are made and take nothing of the cluster any more,
/// and others do not notice.
#[test]
fn those_who_never_read() {
    under_attack(async |cluster| {
        let addr = cluster.coordinator.http();
        let key = cluster.coordinator.client.api_key.clone();
        let body =
            br#"{"prompt": "a story", "max_tokens": 1500, "ignore_eos": true, "stream": true}"#;
        let unread_http: Vec<_> =
            (0..4).map(|_| http::begin_post(addr, "/v1/completions", &key, body)).collect();
        assert!(unread_http.iter().all(|exchange| exchange.status == 200));
        let deaf = ask::connect(&cluster.coordinator.client).await;
        let mut unread_quic = Vec::new();
        for _ in 0..4 {
            let story = Prompt::Text("A story".to_owned());
            unread_quic.push(ask::begin(&deaf, story, ask::greedy(1500)).await.unwrap());
        }
        // Waits, too, until nothing runs and no block is held.
        cluster.is_unharmed("those who never read").await;
        // What was kept for them is all there.
        for stream in unread_quic {
            assert_eq!(ask::finish(stream).await.unwrap().tokens.len(), 1500);
        }
        for exchange in unread_http {
            assert!(exchange.whole().text().ends_with("data: [DONE]\n\n"));
        }
        deaf.close().await;
        cluster.is_unharmed("those who read late").await;
    });
}
