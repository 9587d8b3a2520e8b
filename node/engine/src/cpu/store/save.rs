//! Writing packed weights, beside the stage's work: a thread of its own, which ends early when the
//! stage is given up. What it has not written, the next load packs again.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::{HEADER_BYTES, Header, Key, SUFFIX, Store};
use crate::cpu::buffer::Frozen;

/// Bytes that are kept in any case; above that, files go that were not used for the longest time.
const KEEP_BYTES: u64 = 32 << 30;
/// Files that were not used for so long go in any case.
const KEEP_UNUSED: Duration = Duration::from_hours(60 * 24);
/// Unfinished files of that age have no writer any more.
const ABANDONED: Duration = Duration::from_hours(1);
/// Bytes per write.
const CHUNK: usize = 4 << 20;
/// How long giving a stage up waits for its weights to be written.
const PATIENCE: Duration = Duration::from_secs(2);

/// A piece to keep.
#[derive(Debug)]
pub(crate) struct Unsaved {
    pub(crate) key: Key,
    pub(crate) data: Frozen<u8>,
    /// What packing took, in thread time.
    pub(crate) nanos: u64,
}

/// Set when the stage is given up.
type Deadline = Arc<Mutex<Option<Instant>>>;

/// The thread that writes. Dropping it lets it go on for a short time, then ends it.
#[derive(Debug)]
pub(crate) struct Saver {
    deadline: Deadline,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// Starts to write `pieces`, in order; `in_use` are the other pieces of the stage, which are not
    /// to be removed for them.
    pub(crate) fn start(store: Store, pieces: Vec<Unsaved>, in_use: Vec<Key>) -> Self {
        let deadline = Deadline::default();
        let until = Arc::clone(&deadline);
        let work = move || store.save(&pieces, in_use, &until);
        let thread = std::thread::Builder::new().name("pack-saver".to_owned()).spawn(work);
        let thread =
            thread.inspect_err(|error| tracing::warn!(%error, "packed weights are not kept")).ok();
        Self { deadline, thread }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn is_over(deadline: &Deadline) -> bool {
    let deadline = *deadline.lock().unwrap_or_else(PoisonError::into_inner);
    deadline.is_some_and(|end| Instant::now() >= end)
}

/// A file that is removed unless it got its name.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Gone already where it was renamed.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Store {
    fn save(&self, pieces: &[Unsaved], in_use: Vec<Key>, deadline: &Deadline) {
        let started = Instant::now();
        let (mut bytes, mut all) = (0, in_use);
        for piece in pieces {
            match self.write(piece, deadline) {
                Ok(true) => bytes += piece.data.len() as u64,
                Ok(false) => return,
                Err(error) => {
                    let dir = self.dir.display();
                    tracing::warn!(%dir, %error, "packed weights cannot be kept, every start packs again");
                    return;
                }
            }
            all.push(piece.key);
        }
        tracing::debug!(
            bytes,
            seconds = started.elapsed().as_secs_f64(),
            "packed weights are kept"
        );
        self.sweep(&all, KEEP_BYTES.max(3 * bytes));
    }

    /// `false` if time ran out.
    fn write(&self, piece: &Unsaved, deadline: &Deadline) -> std::io::Result<bool> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let path = self.path(&piece.key);
        let part = path.with_extension(format!("{}.part", own_number()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        let part = Unfinished(part);
        // The header comes last, so that an unfinished file has none.
        file.write_all(&[0; HEADER_BYTES])?;
        let mut crc = 0;
        for chunk in piece.data.chunks(CHUNK) {
            if is_over(deadline) {
                return Ok(false);
            }
            crc = crc32c::crc32c_append(crc, chunk);
            file.write_all(chunk)?;
        }
        let bytes = piece.data.len() as u64;
        let header = Header { key: piece.key, bytes, crc, nanos: piece.nanos };
        file.write_all_at(&header.encode(), 0)?;
        std::fs::rename(&part.0, path)?;
        Ok(true)
    }

    /// Removes what has not been used for long, and what is too much; never `in_use`.
    pub(super) fn sweep(&self, in_use: &[Key], keep_bytes: u64) {
        let in_use: Vec<PathBuf> = in_use.iter().map(|key| self.path(key)).collect();
        let now = SystemTime::now();
        let mut files: Vec<(Duration, u64, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(meta) = entry.metadata() else { continue };
            let age = meta.modified().ok().and_then(|at| now.duration_since(at).ok());
            let age = age.unwrap_or_default();
            match path.extension().and_then(|e| e.to_str()) {
                Some("part") if age > ABANDONED => remove(&path),
                Some(SUFFIX) => files.push((age, meta.len(), path)),
                _ => {}
            }
        }
        files.sort();
        let mut kept = 0;
        for (age, bytes, path) in files {
            let needed = in_use.contains(&path);
            if !needed && (age > KEEP_UNUSED || kept + bytes > keep_bytes) {
                remove(&path);
            } else {
                kept += bytes;
            }
        }
    }
}

/// What cannot be removed only takes space.
fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "cannot remove packed weights");
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
