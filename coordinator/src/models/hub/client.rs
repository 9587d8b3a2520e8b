//! Talks to the hub: what a repository holds, files of it or their beginnings.
//!
//! Plain HTTP by the client that the rest of this crate has; the hub's own crate brings a second HTTP
//! stack. The token goes to the hub alone, never to where it redirects. What the hub refuses is
//! final; what cannot be reached may be there another time.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use super::super::Settings;
use super::name::{HubName, is_relative};

/// Time to find a host and to connect to it.
const CONNECT: Duration = Duration::from_secs(5);
/// Time until an answer begins, and of silence within one.
const SILENCE: Duration = Duration::from_secs(30);
/// Time for a list or the beginning of a file, from first to last byte.
const SMALL: Duration = Duration::from_mins(5);
/// Times that an address is tried which is busy or broken.
pub(super) const TRIES: u32 = 5;
/// The longest wait that a server may ask for.
const MOST_WAIT: Duration = Duration::from_secs(60);
/// Redirects of one request.
const MAX_REDIRECTS: usize = 5;
/// Longest list of a repository's files.
const MAX_LIST_BYTES: u64 = 64 << 20;
/// Most files of a repository.
const MAX_FILES: usize = 100_000;

/// A file of a repository, as the hub describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::models) struct HubFile {
    /// Path in the repository.
    pub(in crate::models) path: String,
    /// Length; mirrors may not say.
    pub(in crate::models) bytes: Option<u64>,
    /// SHA-256 in hexadecimal, of files that the hub keeps by content.
    pub(in crate::models) sha256: Option<String>,
}

/// A repository at a revision.
#[derive(Clone, Debug)]
pub(in crate::models) struct Listing {
    pub(in crate::models) commit: String,
    pub(in crate::models) files: Vec<HubFile>,
}

/// Why the hub gave nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::models) enum HubError {
    /// It says no, and will again.
    Refused(String),
    /// It cannot be reached, or broke off.
    Unreachable(String),
}

impl HubError {
    pub(in crate::models) fn into_text(self) -> String {
        match self {
            Self::Refused(text) | Self::Unreachable(text) => text,
        }
    }
}

#[derive(Deserialize)]
struct ApiModel {
    sha: String,
    #[serde(default)]
    siblings: Vec<ApiFile>,
}

#[derive(Deserialize)]
struct ApiFile {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<ApiLfs>,
}

#[derive(Deserialize)]
struct ApiLfs {
    #[serde(alias = "oid")]
    sha256: Option<String>,
    size: Option<u64>,
}

/// The hub.
pub(in crate::models) struct Hub<'a> {
    pub(super) settings: &'a Settings,
    agent: Agent,
}

/// The beginning of an answer.
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    /// SHA-256 that the hub named on the way, before it redirected.
    pub(super) sha256: Option<String>,
}

impl<'a> Hub<'a> {
    pub(in crate::models) fn new(settings: &'a Settings) -> Self {
        let agent = Agent::config_builder()
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("millrace/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Self { settings, agent }
    }

    /// What a repository holds.
    pub(in crate::models) fn list(&self, name: &HubName) -> Result<Listing, HubError> {
        let (repo, revision) = (&name.repo, name.revision());
        let hub = &self.settings.hub_url;
        let revision = revision.replace('/', "%2F");
        let url = format!("{hub}/api/models/{repo}/revision/{revision}?blobs=true");
        let mut answer = self.get(&url, None, Some(SMALL))?;
        let body = answer.response.body_mut().with_config().limit(MAX_LIST_BYTES);
        let broken = |e: &dyn std::fmt::Display| {
            HubError::Unreachable(format!("{url}: the answer is no list of files: {e}"))
        };
        let text = body.read_to_string().map_err(|e| broken(&e))?;
        let model: ApiModel = serde_json::from_str(&text).map_err(|e| broken(&e))?;
        let wrong = |what: &str| HubError::Refused(format!("{url}: {what}"));
        if !model.sha.chars().all(|c| c.is_ascii_alphanumeric()) || model.sha.is_empty() {
            return Err(wrong("the answer names no commit"));
        }
        if model.siblings.len() > MAX_FILES {
            return Err(wrong("it has more files than any model"));
        }
        let file = |f: ApiFile| HubFile {
            bytes: f.size.or_else(|| f.lfs.as_ref().and_then(|l| l.size)),
            sha256: f.lfs.and_then(|l| l.sha256).filter(|s| is_sha256(s)),
            path: f.rfilename,
        };
        let files = model.siblings.into_iter().map(file).filter(|f| is_relative(&f.path));
        Ok(Listing { commit: model.sha, files: files.collect() })
    }

    /// Address of a file.
    pub(in crate::models) fn url(&self, repo: &str, revision: &str, path: &str) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./~".contains(c);
        let mut escaped = String::new();
        for c in path.chars() {
            match plain(c) {
                true => escaped.push(c),
                false => {
                    let mut bytes = [0; 4];
                    let bytes = c.encode_utf8(&mut bytes).bytes();
                    escaped.extend(bytes.map(|b| format!("%{b:02X}")));
                }
            }
        }
        format!("{}/{repo}/resolve/{revision}/{escaped}", self.settings.hub_url)
    }

    /// The first bytes of a file, at most `most`; more may come where a server knows no ranges.
    pub(in crate::models) fn beginning(
        &self,
        url: &str,
        most: u64,
    ) -> Result<impl Read + use<>, HubError> {
        let answer = self.get(url, Some((0, Some(most))), Some(SMALL))?;
        Ok(answer.response.into_body().into_reader().take(most))
    }

    /// Asks for an address, or its bytes from `range`; goes where it is sent, and tries again where
    /// it is told to wait. An answer may take `time` to its end.
    pub(super) fn get(
        &self,
        url: &str,
        range: Option<(u64, Option<u64>)>,
        time: Option<Duration>,
    ) -> Result<Answer, HubError> {
        let mut tries = 0;
        loop {
            let answer = self.follow(url, range, time)?;
            let status = answer.response.status().as_u16();
            if matches!(status, 200 | 206 | 416) {
                return Ok(answer);
            }
            tries += 1;
            let busy = matches!(status, 408 | 429 | 500 | 502 | 503 | 504);
            if !busy {
                return Err(HubError::Refused(self.refusal(
                    url,
                    status,
                    answer.response.headers(),
                )));
            }
            if tries == TRIES {
                let text = format!("{url}: the hub is busy, it answered {status} {TRIES} times");
                return Err(HubError::Unreachable(text));
            }
            std::thread::sleep(self.wait(tries, answer.response.headers()));
        }
    }

    /// How long to wait before the next try.
    fn wait(&self, tries: u32, headers: &HeaderMap) -> Duration {
        let asked = text(headers, "retry-after").and_then(|s| s.parse().ok());
        let own = self.pause(tries);
        asked.map_or(own, Duration::from_secs).min(MOST_WAIT)
    }

    pub(super) fn pause(&self, tries: u32) -> Duration {
        (self.settings.retry_wait * 2u32.saturating_pow(tries.saturating_sub(1))).min(MOST_WAIT)
    }

    fn follow(
        &self,
        url: &str,
        range: Option<(u64, Option<u64>)>,
        time: Option<Duration>,
    ) -> Result<Answer, HubError> {
        let (mut at, mut sha256) = (url.to_owned(), None);
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&at).config().timeout_global(time).build();
            if let Some((from, most)) = range {
                let last = most.map_or(String::new(), |n| (from + n - 1).to_string());
                request = request.header("range", format!("bytes={from}-{last}"));
            }
            if let Some(token) = &self.settings.token
                && origin(&at) == origin(&self.settings.hub_url)
            {
                request = request.header("authorization", format!("Bearer {}", token.0));
            }
            let failed = |e: ureq::Error| HubError::Unreachable(format!("{url}: {e}"));
            let response = request.call().map_err(failed)?;
            let headers = response.headers();
            let linked = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
            let linked = linked.map(|s| s.trim_start_matches("W/").trim_matches('"').to_owned());
            sha256 = sha256.or_else(|| linked.filter(|s| is_sha256(s)));
            match text(headers, "location").filter(|_| response.status().is_redirection()) {
                Some(location) => at = join(&at, &location),
                None => return Ok(Answer { response, sha256 }),
            }
        }
        Err(HubError::Refused(format!("{url}: redirected more than {MAX_REDIRECTS} times")))
    }

    /// What a refusal means and what to do about it.
    fn refusal(&self, url: &str, status: u16, headers: &HeaderMap) -> String {
        let code = text(headers, "x-error-code").unwrap_or_default();
        let page = page_of(url, &self.settings.hub_url);
        let token = match &self.settings.token {
            None => "then set HF_TOKEN to a token of your account",
            Some(_) => "then check that the account of your token may read it",
        };
        match (status, code.as_str()) {
            (_, "RevisionNotFound") => format!("{page} has no such revision ({url})"),
            (_, "EntryNotFound") => format!("{page} has no such file ({url})"),
            (404, _) => format!("{url}: there is nothing (404); check the name"),
            (401 | 403, "GatedRepo") => format!(
                "{page} is gated ({status}): accept its licence there, {token} (https://huggingface.co/settings/tokens)"
            ),
            (401 | 403, _) => format!(
                "{page} does not exist, is private or is gated ({status}): check the name; if it exists, accept its licence there, {token} (https://huggingface.co/settings/tokens)"
            ),
            _ => {
                let message = text(headers, "x-error-message").unwrap_or_default();
                format!("{url}: the hub answered {status} {message}").trim_end().to_owned()
            }
        }
    }
}

pub(super) fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    Some(value.chars().filter(|c| !c.is_control()).collect())
}

pub(super) fn is_sha256(s: &str) -> bool {
    s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Scheme and host.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// The address that a redirect names, from the one that named it.
fn join(from: &str, location: &str) -> String {
    if location.contains("://") {
        location.to_owned()
    } else if location.starts_with('/') {
        format!("{}{location}", origin(from))
    } else {
        let path = from.split(['?', '#']).next().unwrap_or(from);
        let folder = path.rfind('/').map_or(path, |at| &path[..=at]);
        format!("{folder}{location}")
    }
}

/// The page for people of the repository that an address is about.
fn page_of(url: &str, hub: &str) -> String {
    let path = url.strip_prefix(hub).unwrap_or(url);
    let path = path.trim_start_matches('/').trim_start_matches("api/models/");
    let repo: Vec<&str> = path.split('/').take(2).collect();
    format!("{hub}/{}", repo.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(origin("https://a.b/c?d"), "https://a.b");
        assert_eq!(origin("http://a:1"), "http://a:1");
        assert_eq!(join("http://a/b/c", "/d"), "http://a/d");
        assert_eq!(join("http://a/b/c?x", "d"), "http://a/b/d");
        assert_eq!(join("http://a/b", "https://c/d"), "https://c/d");
        let hub = "https://huggingface.co";
        for path in ["api/models/o/n/revision/main?blobs=true", "o/n/resolve/main/f.gguf"] {
            assert_eq!(page_of(&format!("{hub}/{path}"), hub), "https://huggingface.co/o/n");
        }
    }
}
