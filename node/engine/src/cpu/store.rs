//! Packed weights in files: what one start has packed, the next one reads as it is.
//!
//! One file for each piece (a layer, the embedding, the head), named by the content of its tensors
//! and by the layout, so that a cut elsewhere finds what it can and nothing stale is ever found. A
//! file is written under another name and renamed when it is whole; length, header and content are
//! checked by CRC32C when it is read. What is wrong with a file, a folder or a disk costs a warning
//! and the time to pack again, never the load. Files are private to the user (0600).

mod save;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::kernels::format::LAYOUT_REVISION;
use crate::cache::{Cache, InUse};
use crate::model::{Part, Source};

pub(crate) use save::{Saver, Unsaved};

/// How a file begins; the last byte is the revision of the header.
const MAGIC: [u8; 8] = *b"MRPACK\0\x01";
/// Bytes before the content: a page, so that a mapped content begins on one.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Bytes of the header that say something.
const USED_BYTES: usize = 72;
/// How the names end.
const SUFFIX: &str = "pack";

/// What a piece is: a hash of its tensors, of their order, and of how they are packed.
pub(crate) type Key = [u8; 32];

/// The name of a piece packed with `r` rows per group; `None` if a tensor's content is not known or
/// there is no matrix.
pub(crate) fn key(parts: &[Part<'_>], r: usize) -> Option<Key> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"millrace packed weights");
    let mut add = |number: u64| {
        hasher.update(&number.to_le_bytes());
    };
    add(u64::from(LAYOUT_REVISION));
    add(r as u64);
    let mut matrices = 0;
    for part in parts {
        let sources: &[&Source] = match part {
            Part::Vector(source, plus) => {
                hasher.update(&plus.to_le_bytes());
                std::slice::from_ref(source)
            }
            Part::Matrices(sources) => sources,
            Part::Transposed(source) => std::slice::from_ref(source),
        };
        let tag = match part {
            Part::Vector(..) => [0],
            Part::Matrices(_) => [1],
            Part::Transposed(_) => [2],
        };
        matrices += usize::from(tag != [0]);
        hasher.update(&tag).update(&(sources.len() as u64).to_le_bytes());
        for source in sources {
            for entry in source.tensors()? {
                if entry.hash == [0; 32] {
                    return None;
                }
                let name = entry.dtype.as_str().as_bytes();
                hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
                hasher.update(&(entry.dims.len() as u64).to_le_bytes());
                for dim in &entry.dims {
                    hasher.update(&dim.to_le_bytes());
                }
                hasher.update(&entry.hash);
            }
        }
    }
    (matrices > 0).then(|| hasher.finalize().into())
}

/// What a file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    key: Key,
    /// Of the content.
    bytes: u64,
    /// Of the content.
    crc: u32,
    /// What packing took, in thread time.
    nanos: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&LAYOUT_REVISION.to_le_bytes());
        out[12..16].copy_from_slice(&self.crc.to_le_bytes());
        out[16..24].copy_from_slice(&self.bytes.to_le_bytes());
        out[24..32].copy_from_slice(&self.nanos.to_le_bytes());
        out[32..64].copy_from_slice(&self.key);
        let own = crc32c::crc32c(&out[..64]);
        out[64..68].copy_from_slice(&own.to_le_bytes());
        out
    }

    /// Reads the beginning of a file.
    fn decode(b: &[u8; USED_BYTES]) -> Result<Self, &'static str> {
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | (u64::from(word(at + 4)) << 32);
        if b[..8] != MAGIC {
            return Err("it is no file of packed weights of this version");
        }
        if word(64) != crc32c::crc32c(&b[..64]) {
            return Err("its header is damaged");
        }
        if word(8) != LAYOUT_REVISION {
            return Err("it has another layout");
        }
        let mut key = [0; 32];
        key.copy_from_slice(&b[32..64]);
        Ok(Self { key, bytes: long(16), crc: word(12), nanos: long(24) })
    }
}

/// A file whose header fits; its content is to be checked against `crc` when it is read.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) file: File,
    pub(crate) crc: u32,
    pub(crate) nanos: u64,
}

/// The cache whose packed weights are in that folder.
pub(crate) fn cache_of(packed: &Path) -> Option<Cache> {
    let own = packed.file_name().is_some_and(|name| name == "packed");
    packed.parent().filter(|_| own).map(Cache::new)
}

/// A folder of packed weights.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
    /// One warning for each load is enough.
    warned: AtomicBool,
}

impl Store {
    /// Of a folder, which need not be there.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), warned: AtomicBool::new(false) }
    }

    /// The cache that the folder is part of.
    fn cache(&self) -> Option<Cache> {
        cache_of(&self.dir)
    }

    /// Keeps the files of these pieces, those that are still to be written too.
    pub(crate) fn hold(&self, keys: &[Key]) -> InUse {
        let paths: Vec<PathBuf> = keys.iter().map(|key| self.path(key)).collect();
        self.cache().map(|cache| cache.hold(&paths)).unwrap_or_default()
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{}.{SUFFIX}", blake3::Hash::from_bytes(*key).to_hex()))
    }

    /// The file of a piece of `bytes`, if there is one and it looks right.
    pub(crate) fn open(&self, key: &Key, bytes: u64) -> Option<Stored> {
        let path = self.path(key);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return None,
            Err(e) => {
                self.warn(&path, &e.to_string());
                return None;
            }
        };
        let header = || -> std::io::Result<Result<Header, &'static str>> {
            let len = file.metadata()?.len();
            if len != bytes + HEADER_BYTES as u64 {
                return Ok(Err("it has the wrong length"));
            }
            let mut start = [0; USED_BYTES];
            file.read_exact_at(&mut start, 0)?;
            Ok(Header::decode(&start).and_then(|header| match header {
                h if h.key == *key && h.bytes == bytes => Ok(h),
                _ => Err("it holds other weights"),
            }))
        };
        match header() {
            Ok(Ok(Header { crc, nanos, .. })) => Some(Stored { file, crc, nanos }),
            Ok(Err(problem)) => {
                self.warn(&path, problem);
                None
            }
            Err(e) => {
                self.warn(&path, &e.to_string());
                None
            }
        }
    }

    /// Says once that a file is not used.
    fn warn(&self, path: &Path, problem: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(path = %path.display(), "packed weights are not used: {problem}; packing again");
        }
    }

    /// The content of a file is not what its header says.
    pub(crate) fn damaged(&self, key: &Key) {
        self.warn(&self.path(key), "its content is damaged");
    }
}
