//! The cache folder: what is computed from model files once and kept for the next start.
//!
//! [`KnownHashes`] remembers hashes; `Part` gives a file its name when it is whole; [`prune`] is
//! the one rule by which files go: packed weights and quantised copies both follow it. Everything
//! here can be made again, so a cache that cannot be written costs time and never a start. Fetched
//! models and tensors are not pruned: making them again takes a network.

mod known_hashes;

pub use known_hashes::KnownHashes;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Bytes that are kept in any case; above that, files go that were not used for the longest time.
const KEEP_BYTES: u64 = 32 << 30;
/// What has just been made fits so many times at least.
const KEEP_TIMES: u64 = 3;
/// Files that were not used for so long go in any case.
const KEEP_UNUSED: Duration = Duration::from_hours(60 * 24);
/// Unfinished files of that age have no writer any more.
const ABANDONED: Duration = Duration::from_hours(1);

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
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Processes of containers may share a folder and a number: their start times differ.
    let start = File::open("/proc/self/stat").and_then(|f| f.metadata()?.modified());
    let start = start.ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    let nanos = start.unwrap_or_default().as_nanos();
    format!("{}-{nanos}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Marks a kept file as used now, for [`prune`], without a change of the file itself: one whose
/// times change is hashed again.
pub fn mark_used(path: &Path) {
    let mark = OpenOptions::new().create(true).append(true).mode(0o600).open(mark_of(path));
    // A cache that cannot be written works as well.
    let _ = mark.and_then(|file| file.set_modified(SystemTime::now()));
}

fn mark_of(path: &Path) -> PathBuf {
    path.with_extension("used")
}

/// Removes those files of a folder with the extension `suffix` that have not been used for 60 days,
/// and the longest unused ones beyond the larger of 32 GiB and three times `own_bytes`, the size of
/// what was just made; never `in_use`. A file was used when it was changed or marked last.
pub fn prune(folder: &Path, suffix: &str, in_use: &[PathBuf], own_bytes: u64) {
    prune_to(folder, suffix, in_use, KEEP_BYTES.max(KEEP_TIMES.saturating_mul(own_bytes)));
}

fn prune_to(folder: &Path, suffix: &str, in_use: &[PathBuf], keep_bytes: u64) {
    let now = SystemTime::now();
    let age = |meta: &std::fs::Metadata| {
        meta.modified().ok().and_then(|at| now.duration_since(at).ok()).unwrap_or_default()
    };
    let mut files: Vec<(Duration, u64, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = entry.metadata() else { continue };
        match path.extension().and_then(|e| e.to_str()) {
            Some("part") if age(&meta) > ABANDONED => remove(&path),
            Some(e) if e == suffix => {
                let marked = std::fs::metadata(mark_of(&path)).map_or(Duration::MAX, |m| age(&m));
                files.push((age(&meta).min(marked), meta.len(), path));
            }
            _ => {}
        }
    }
    files.sort();
    let mut kept = 0;
    for (age, bytes, path) in files {
        if !in_use.contains(&path) && (age > KEEP_UNUSED || kept + bytes > keep_bytes) {
            remove(&path);
            let _ = std::fs::remove_file(mark_of(&path));
        } else {
            kept += bytes;
        }
    }
}

/// What cannot be removed only takes space.
fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "cannot remove a file of the cache");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_old_or_too_much_goes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let hours = |n: u64| SystemTime::now() - Duration::from_hours(n);
        let file = |name: &str, age: u64| {
            std::fs::write(at(name), [0; 1000]).unwrap();
            File::options().write(true).open(at(name)).unwrap().set_modified(hours(age)).unwrap();
        };
        let days = |n: u64| n * 24;
        file("new.pack", 0);
        file("recent.pack", days(1));
        file("third.pack", days(2));
        file("old.pack", days(61));
        file("old-in-use.pack", days(90));
        file("marked.pack", days(90));
        mark_used(&at("marked.pack"));
        file("forgotten.pack", days(90));
        file("forgotten.used", days(61));
        file("other.gguf", days(90));
        file("a.1.part", 2);
        file("b.1.part", 0);
        prune_to(dir.path(), "pack", &[at("old-in-use.pack")], 3500);
        let mut left: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let kept = ["b.1.part", "marked.pack", "marked.used", "new.pack", "old-in-use.pack"];
        assert_eq!(left, [&kept[..], &["other.gguf", "recent.pack"]].concat());
    }

    #[test]
    fn a_part_gets_its_name_or_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new").join("file");
        drop(Part::create(&path).unwrap());
        assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 0);
        Part::create(&path).unwrap().finish().unwrap();
        assert!(path.exists());
        assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 1);
    }
}
