//! Writing packed weights, beside the stage's work: a thread of its own, which ends early when the
//! stage is given up. What it has not written, the next load packs again.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{HEADER_BYTES, Header, Key, Store};
use crate::cache::Part;
use crate::cpu::buffer::Frozen;

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
    /// Starts to write `pieces`, in order.
    pub(crate) fn start(store: Store, pieces: Vec<Unsaved>) -> Self {
        let deadline = Deadline::default();
        let until = Arc::clone(&deadline);
        let work = move || store.save(&pieces, &until);
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

impl Store {
    fn save(&self, pieces: &[Unsaved], deadline: &Deadline) {
        let started = Instant::now();
        let mut bytes = 0;
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
        }
        tracing::debug!(
            bytes,
            seconds = started.elapsed().as_secs_f64(),
            "packed weights are kept"
        );
        if let Some(cache) = self.cache() {
            cache.tidy(bytes);
        }
    }

    /// `false` if time ran out.
    fn write(&self, piece: &Unsaved, deadline: &Deadline) -> std::io::Result<bool> {
        let mut part = Part::create(&self.path(&piece.key))?;
        // The header comes last, so that an unfinished file has none.
        part.file.write_all(&[0; HEADER_BYTES])?;
        let mut crc = 0;
        for chunk in piece.data.chunks(CHUNK) {
            if is_over(deadline) {
                return Ok(false);
            }
            crc = crc32c::crc32c_append(crc, chunk);
            part.file.write_all(chunk)?;
        }
        let bytes = piece.data.len() as u64;
        let header = Header { key: piece.key, bytes, crc, nanos: piece.nanos };
        part.file.write_all_at(&header.encode(), 0)?;
        part.finish()?;
        Ok(true)
    }
}
