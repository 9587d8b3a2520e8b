//! A small HTTP/1.1 client: one request per connection, bodies of every framing, server-sent
//! events as they come.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use crate::DEADLINE;

/// The answer to a request, its body not yet read.
#[derive(Debug)]
pub struct Exchange {
    /// Status code.
    pub status: u16,
    /// Names are in lower case.
    headers: Vec<(String, String)>,
    body: BufReader<Body>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Names are in lower case.
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Response {
    /// The value of a header, if it is there.
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The body.
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("a UTF-8 body")
    }

    /// The body, which must be JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }
}

/// `GET`.
pub fn get(addr: SocketAddr, path: &str) -> Response {
    send(addr, "GET", path, "", "", b"").whole()
}

/// `GET` with an API key.
pub fn get_with(addr: SocketAddr, path: &str, key: &str) -> Response {
    send(addr, "GET", path, key, "", b"").whole()
}

/// `POST` with an API key and a JSON body.
pub fn post(addr: SocketAddr, path: &str, key: &str, body: &[u8]) -> Response {
    begin_post(addr, path, key, body).whole()
}

/// As [`post`], for answers that stream.
pub fn begin_post(addr: SocketAddr, path: &str, key: &str, body: &[u8]) -> Exchange {
    send(addr, "POST", path, key, "", body)
}

/// As [`begin_post`], with further header lines, each with its line break.
pub fn begin_post_with(
    addr: SocketAddr,
    path: &str,
    key: &str,
    headers: &str,
    body: &[u8],
) -> Exchange {
    send(addr, "POST", path, key, headers, body)
}

/// `GET` with an API key and further header lines, each with its line break.
pub fn begin_get(addr: SocketAddr, path: &str, key: &str, headers: &str) -> Exchange {
    send(addr, "GET", path, key, headers, b"")
}

fn send(
    addr: SocketAddr,
    method: &str,
    path: &str,
    key: &str,
    headers: &str,
    body: &[u8],
) -> Exchange {
    let mut stream = TcpStream::connect(addr).expect("the HTTP API is there");
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\
         Authorization: Bearer {key}\r\nContent-Type: application/json\r\n\
         {headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat()).expect("the request is sent");
    let mut stream = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        stream.read_line(&mut line).expect("the head of an answer");
        line.trim_end().to_owned()
    };
    let status = line().split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status line");
    let mut headers = Vec::new();
    while let Some((name, value)) = line().split_once(':') {
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let chunked = find(&headers, "transfer-encoding") == Some("chunked");
    let length = find(&headers, "content-length").and_then(|n| n.parse().ok());
    let left = if chunked { 0 } else { length.unwrap_or(u64::MAX) };
    Exchange { status, headers, body: BufReader::new(Body { stream, chunked, left }) }
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

impl Exchange {
    /// Reads the rest.
    pub fn whole(mut self) -> Response {
        let mut body = Vec::new();
        self.body.read_to_end(&mut body).expect("a whole body");
        Response { status: self.status, headers: self.headers, body }
    }

    /// The value of a header, if it is there.
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The id, where it has one, and the data of the next server-sent event; `None` where the stream
    /// ends, in order or not.
    pub fn event_with_id(&mut self) -> Option<(Option<String>, String)> {
        let mut id = None;
        loop {
            let mut line = String::new();
            if self.body.read_line(&mut line).unwrap_or_default() == 0 {
                return None;
            }
            if let Some(found) = line.trim_end().strip_prefix("id: ") {
                id = Some(found.to_owned());
            } else if let Some(data) = line.trim_end().strip_prefix("data: ") {
                return Some((id, data.to_owned()));
            }
        }
    }

    /// The data of the next server-sent event; `None` at the end. Dropping the exchange closes the
    /// connection.
    pub fn event(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.body.read_line(&mut line).expect("a line of the stream") == 0 {
                return None;
            }
            if let Some(data) = line.trim_end().strip_prefix("data: ") {
                return Some(data.to_owned());
            }
        }
    }
}

/// A body without its framing.
#[derive(Debug)]
struct Body {
    stream: BufReader<TcpStream>,
    chunked: bool,
    /// Of the chunk, or of the whole body.
    left: u64,
}

impl Read for Body {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.chunked && self.left == 0 {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            self.left = u64::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                // Nothing follows the last chunk; the next read sees the end.
                (self.chunked, self.left) = (false, 0);
            }
        }
        let n = Read::by_ref(&mut self.stream).take(self.left).read(buf)?;
        self.left -= n as u64;
        if self.chunked && self.left == 0 && n > 0 {
            self.stream.read_line(&mut String::new())?;
        }
        Ok(n)
    }
}
