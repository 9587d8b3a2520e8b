//! A collector of traces: takes what OTLP over HTTP brings, and keeps it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;

/// One that listens until it is dropped.
#[derive(Debug)]
pub struct Collector {
    at: SocketAddr,
    bodies: Arc<Mutex<Vec<Vec<u8>>>>,
    stops: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

impl Collector {
    /// Starts one on a free port.
    ///
    /// # Panics
    /// If there is none.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let at = listener.local_addr().expect("its address");
        let (bodies, stops) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<AtomicBool>::default());
        let (kept, stop) = (Arc::clone(&bodies), Arc::clone(&stops));
        let serving = thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let taken = stream.and_then(|stream| take(&stream, &kept));
                taken.expect("a request for spans");
            }
        });
        Self { at, bodies, stops, serving: Some(serving) }
    }

    /// The endpoint, as `--otlp-endpoint` wants it.
    pub fn address(&self) -> String {
        format!("http://{}/", self.at)
    }

    /// Everything that came, as it came.
    pub fn bodies(&self) -> Vec<Vec<u8>> {
        lock(&self.bodies).clone()
    }

    /// All spans that came, in order.
    ///
    /// # Panics
    /// If something that came was none.
    pub fn spans(&self) -> Vec<Span> {
        let read = |body: Vec<u8>| ExportTraceServiceRequest::decode(body.as_slice());
        let requests = self.bodies().into_iter().map(|body| read(body).expect("spans"));
        let scopes = requests.flat_map(|r| r.resource_spans).flat_map(|r| r.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Release);
        // So that it looks.
        drop(TcpStream::connect(self.at));
        if let Some(serving) = self.serving.take() {
            let ended = serving.join();
            assert!(ended.is_ok() || thread::panicking(), "the collector failed");
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a request, keeps its body, and says that all is well.
fn take(mut stream: &TcpStream, kept: &Mutex<Vec<Vec<u8>>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
    let mut length = 0;
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line)?;
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().map_err(std::io::Error::other)?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    lock(kept).push(body);
    stream.write_all(answer.as_bytes())
}

/// As ids are written.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn value<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    let found = span.attributes.iter().find(|a| a.key == key)?;
    found.value.as_ref()?.value.as_ref()
}

/// An attribute that is a whole number.
pub fn number(span: &Span, key: &str) -> Option<i64> {
    match value(span, key)? {
        Value::IntValue(n) => Some(*n),
        _ => None,
    }
}

/// An attribute that is text.
pub fn text<'a>(span: &'a Span, key: &str) -> Option<&'a str> {
    match value(span, key)? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}
