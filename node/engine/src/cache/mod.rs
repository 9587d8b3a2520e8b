//! The cache folder: models and tensors that were fetched, and what was computed from them once and is
//! kept for the next start.
//!
//! [`KnownHashes`] remembers hashes; `Part` gives a file its name when it is whole; [`Cache`] knows what
//! lies there, what is in use and when each thing was last, and removes by one [`Rule`]. Everything
//! can be made or fetched again, so a cache that cannot be written costs time and never a start.

mod known_hashes;
mod stock;
#[cfg(test)]
mod tests;
mod uses;

pub use known_hashes::KnownHashes;
pub use stock::{Kind, Rule, Thing};
pub use uses::{InUse, is_at};

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use millrace_shared::names::env;
use millrace_shared::options::byte_size;

/// Bytes that the cache may hold, for this process; the largest number where nobody said.
static LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Sets how many bytes the cache folder may hold, for everything that this process does, instead of
/// `$MILLRACE_CACHE_LIMIT`.
pub fn set_limit(bytes: u64) {
    LIMIT.store(bytes, Ordering::Relaxed);
}

/// How many bytes the cache folder may hold.
pub fn limit() -> Option<u64> {
    let set = Some(LIMIT.load(Ordering::Relaxed)).filter(|&n| n < u64::MAX);
    let from_env = || byte_size(&std::env::var(env::CACHE_LIMIT).ok()?).ok();
    set.or_else(from_env)
}

/// A cache folder, which need not be there.
#[derive(Clone, Debug)]
pub struct Cache(PathBuf);

impl Cache {
    /// Of a folder.
    pub fn new(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Keeps those of `paths` that are in the cache, or will be, from being removed by any process;
    /// their last use is when this ends. To be called before what may be there is looked for.
    pub fn hold(&self, paths: &[PathBuf]) -> InUse {
        let inside = |p: &PathBuf| p.strip_prefix(&self.0).ok().map(Path::to_owned);
        let paths: Vec<PathBuf> = paths.iter().filter_map(inside).collect();
        uses::hold(&self.0, &paths)
    }

    /// What lies there.
    pub fn things(&self) -> Vec<Thing> {
        stock::things(&self.0, &uses::Uses::read(&self.0, false).unwrap_or_default())
    }

    /// Removes what the rule says and nobody uses, or only says what that would be.
    pub fn prune(&self, rule: &Rule, trial: bool) -> Vec<Thing> {
        self.remove_if(trial, |things| rule.choose(things, SystemTime::now()))
    }

    /// Removes these files' things unless a process uses them.
    pub fn remove(&self, files: &[PathBuf]) -> Vec<Thing> {
        let named = |t: &Thing| !t.in_use && t.files.iter().any(|f| files.contains(f));
        self.remove_if(false, |things| things.into_iter().filter(named).collect())
    }

    /// Keeps to the rule that always holds, after so many bytes were made or fetched.
    pub fn tidy(&self, just_made: u64) {
        let gone = self.prune(&Rule::usual(limit(), just_made), false);
        if !gone.is_empty() {
            let bytes: u64 = gone.iter().map(|t| t.bytes).sum();
            tracing::info!(things = gone.len(), bytes, "the cache was tidied up");
        }
    }

    fn remove_if(&self, trial: bool, choose: impl FnOnce(Vec<Thing>) -> Vec<Thing>) -> Vec<Thing> {
        if trial {
            return choose(self.things());
        }
        // No use begins while this looks and removes.
        let closed = uses::gate(&self.0);
        let known = closed.and_then(|gate| Ok((gate, uses::Uses::read(&self.0, true)?)));
        let (_closed, uses) = match known {
            Ok(known) => known,
            Err(error) => {
                let cache = self.0.display();
                tracing::warn!(%cache, %error, "nothing is removed: what is in use cannot be told");
                return Vec::new();
            }
        };
        let gone = choose(stock::things(&self.0, &uses));
        for file in gone.iter().flat_map(|thing| &thing.files) {
            remove(file);
            self.remove_empty_folders(file);
        }
        gone
    }

    /// The folders of a model or a copy go with its last file.
    fn remove_empty_folders(&self, file: &Path) {
        let (models, copies) = (self.0.join("models"), self.0.join("quantized"));
        if let Some(copy) = file.parent().filter(|f| f.parent() == Some(copies.as_path())) {
            let _ = std::fs::remove_dir(copy);
        }
        for folder in file.ancestors().skip(1).take_while(|f| f.starts_with(&models)) {
            if folder == models || folder == models.join("hub") {
                return;
            }
            if folder.file_name().is_some_and(|n| n == "snapshots") {
                let repo = folder.parent().unwrap_or(folder);
                if std::fs::remove_dir(folder).is_ok() {
                    // What names commits that are gone.
                    let _ = std::fs::remove_dir_all(repo.join("refs"));
                    remove(&repo.join(".lock"));
                    let _ = std::fs::remove_dir(repo);
                }
                return;
            }
            // The folder of a catalogue model keeps its lock to the end.
            if std::fs::remove_dir(folder).is_err() {
                return;
            }
        }
    }
}

/// A new file, private to the user, under a name of its own; it is removed unless it gets the one
/// it is for.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) file: File,
    part: PathBuf,
    path: PathBuf,
}

impl Part {
    /// For `path`, whose folder is made.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let part = path.with_extension(format!("{}.part", own_number()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        Ok(Self { file, part, path: path.to_owned() })
    }

    /// Gives the file its name.
    pub(crate) fn finish(self) -> io::Result<()> {
        std::fs::rename(&self.part, &self.path)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Gone already where it was renamed.
        let _ = std::fs::remove_file(&self.part);
    }
}

/// A number that no other writer has: of this process, and in it.
fn own_number() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Processes of containers may share a folder and a number: their start times differ.
    let start = File::open("/proc/self/stat").and_then(|f| f.metadata()?.modified());
    let start = start.ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    let nanos = start.unwrap_or_default().as_nanos();
    format!("{}-{nanos}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// What cannot be removed only takes space.
fn remove(path: &Path) {
    // A lock that somebody has, others wait for.
    if path.file_name().is_some_and(|n| n == ".lock")
        && !File::open(path).is_ok_and(|lock| lock.try_lock().is_ok())
    {
        return;
    }
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "cannot remove a file of the cache");
    }
}
