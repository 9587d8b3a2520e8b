//! One client of the HTTP API: a connection that asks for completions as streams, one after the
//! other. Plain HTTP/1.1, read by hand, so that what is measured is the server and not a library.
//!
//! Invariant: a connection is used again only where the last answer on it was read to its end.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::caller::{Ask, Failure, Heard, refused};
use crate::error::usage;

/// Longest line of a head, and longest chunk, that a server may send.
const MOST_BYTES: u64 = 4 << 20;
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Where the HTTP API is, and as whom to ask.
#[derive(Clone, Debug)]
pub(super) struct Place {
    authority: String,
    key: String,
    model: String,
}

impl Place {
    /// # Errors
    /// If it is not plain HTTP.
    pub(super) fn new(url: &str, key: &str, model: &str) -> anyhow::Result<Self> {
        let Some(authority) = url.strip_prefix("http://") else {
            return Err(usage(format!(
                "--http speaks plain HTTP, and the cluster's client.toml names {url:?}: measure on \
                 the coordinator's machine, where loopback serves it"
            )));
        };
        let authority = authority.trim_end_matches('/').to_owned();
        Ok(Self { authority, key: key.to_owned(), model: model.to_owned() })
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: BufReader<TcpStream>,
    place: Place,
}

/// What a chunk of a completion says.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<serde::de::IgnoredAny>,
    usage: Option<Usage>,
    error: Option<Problem>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: u64,
}

#[derive(Deserialize)]
struct Problem {
    message: String,
    code: Option<serde_json::Value>,
}

/// The head of an answer.
#[derive(Debug, Default, PartialEq)]
struct Head {
    status: u16,
    chunked: bool,
    length: Option<u64>,
    close: bool,
}

impl Connection {
    /// # Errors
    /// If nobody listens there.
    pub(super) async fn open(place: &Place) -> anyhow::Result<Self> {
        let stream = tokio::time::timeout(CONNECT, TcpStream::connect(&place.authority));
        let stream = stream.await.context("no connection within 10 s")??;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::with_capacity(16 << 10, stream), place: place.clone() })
    }

    /// Asks, and hears the answer to its end.
    ///
    /// # Errors
    /// What the server refused, or what went wrong; then the connection is of no use.
    pub(super) async fn ask(&mut self, ask: &Ask, heard: &mut Heard<'_>) -> Result<(), Failure> {
        self.send(ask).await?;
        let head = self.head().await?;
        if head.status != 200 {
            let body = self.whole(&head).await?;
            if head.close {
                return Err(Failure::Failed(format!("status {}, and closed", head.status)));
            }
            let why = serde_json::from_slice::<Chunk>(&body).ok().and_then(|c| c.error);
            let why = why.map_or_else(|| format!("status {}", head.status), |e| e.message);
            return Err(if head.status == 429 { refused(why) } else { Failure::Failed(why) });
        }
        let mut lines = Lines::default();
        while let Some(bytes) = self.chunk(&head).await? {
            lines.push(&bytes);
            while let Some(line) = lines.next() {
                if let Some(data) = line.strip_prefix(b"data: ") {
                    take(data, heard)?;
                }
            }
        }
        Ok(())
    }

    async fn send(&mut self, ask: &Ask) -> anyhow::Result<()> {
        let Place { authority, key, model } = &self.place;
        let body = json!({
            "model": model, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        })
        .to_string();
        let text = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {authority}\r\nAuthorization: Bearer {key}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        Ok(self.stream.get_mut().write_all(text.as_bytes()).await?)
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if (&mut self.stream).take(MOST_BYTES).read_line(&mut line).await? == 0 {
            bail!("the server closed the connection");
        }
        Ok(line.trim_end().to_owned())
    }

    async fn head(&mut self) -> anyhow::Result<Head> {
        let line = self.line().await?;
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.with_context(|| format!("no HTTP answer: {line}"))?;
        let mut head = Head { status, ..Head::default() };
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(head);
            }
            head.take(&line);
        }
    }

    /// The next piece of a body; `None` at its end.
    async fn chunk(&mut self, head: &Head) -> anyhow::Result<Option<Vec<u8>>> {
        if !head.chunked {
            bail!("a streamed answer must come in chunks");
        }
        let line = self.line().await?;
        let length = u64::from_str_radix(&line, 16).ok().filter(|n| *n <= MOST_BYTES);
        let length = length.with_context(|| format!("no length of a chunk: {line:?}"))?;
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).await?;
        self.line().await?;
        Ok((length > 0).then_some(bytes))
    }

    async fn whole(&mut self, head: &Head) -> anyhow::Result<Vec<u8>> {
        let mut body = Vec::new();
        if head.chunked {
            while let Some(bytes) = self.chunk(head).await? {
                body.extend(bytes);
            }
            return Ok(body);
        }
        let length = head.length.filter(|n| *n <= MOST_BYTES).context("a body of no length")?;
        body.resize(length as usize, 0);
        self.stream.read_exact(&mut body).await?;
        Ok(body)
    }
}

impl Head {
    fn take(&mut self, line: &str) {
        let Some((name, value)) = line.split_once(':') else { return };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "transfer-encoding" => self.chunked = value.eq_ignore_ascii_case("chunked"),
            "content-length" => self.length = value.parse().ok(),
            "connection" => self.close = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
}

/// An event's data.
fn take(data: &[u8], heard: &mut Heard<'_>) -> Result<(), Failure> {
    if data == b"[DONE]" {
        return heard.end();
    }
    let chunk: Chunk = serde_json::from_slice(data)
        .map_err(|e| anyhow!("{e}: {}", String::from_utf8_lossy(data)))?;
    if let Some(problem) = chunk.error {
        let exhausted = problem.code.is_some_and(|c| c == 429 || c == "rate_limit_exceeded");
        return Err(if exhausted {
            refused(problem.message)
        } else {
            Failure::Failed(problem.message)
        });
    }
    if !chunk.choices.is_empty() {
        heard.text();
    }
    if let Some(usage) = chunk.usage {
        heard.count(usage.completion_tokens);
    }
    Ok(())
}

/// Puts lines together that came in pieces.
#[derive(Debug, Default)]
struct Lines {
    bytes: VecDeque<u8>,
    /// Bytes at the front that are known to hold no line break.
    looked: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let end = self.bytes.iter().skip(self.looked).position(|b| *b == b'\n');
        let Some(end) = end else {
            self.looked = self.bytes.len();
            return None;
        };
        let end = self.looked + end;
        self.looked = 0;
        let line = self.bytes.drain(..=end).take(end).collect();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads() {
        let mut head = Head { status: 200, ..Head::default() };
        for line in ["Transfer-Encoding: chunked", "content-length: 12", "Connection: close", "odd"]
        {
            head.take(line);
        }
        assert_eq!(head, Head { status: 200, chunked: true, length: Some(12), close: true });
    }

    #[test]
    fn lines_come_in_pieces() {
        let mut lines = Lines::default();
        lines.push(b"data: a");
        assert_eq!(lines.next(), None);
        lines.push(b"b\n\nid");
        assert_eq!(lines.next(), Some(b"data: ab".to_vec()));
        assert_eq!(lines.next(), Some(Vec::new()));
        assert_eq!(lines.next(), None);
        lines.push(b"\n");
        assert_eq!(lines.next(), Some(b"id".to_vec()));
    }

    #[test]
    fn only_plain_http() {
        assert!(Place::new("http://127.0.0.1:8000", "k", "m").is_ok());
        let error = Place::new("https://a:1", "k", "m").unwrap_err().to_string();
        assert!(error.contains("plain HTTP"), "{error}");
    }
}
