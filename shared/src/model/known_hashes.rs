//! Hashes of parts of files, remembered between starts, so that a model is hashed once and not at
//! every start.
//!
//! A hash stands for a part of a file as long as the file's device, inode, size and times stay what
//! they were before it was read. A file that had changed within a second of writing is not
//! remembered: it could change again without a new time. Losing a store costs hashing again, so
//! nothing here fails: what is unreadable is empty, and what cannot be written is not kept.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// First line of a store.
const FIRST_LINE: &str = "millrace known hashes 1";
/// Most bytes of a store: about 100,000 parts.
const MAX_BYTES: u64 = 16 << 20;
/// How long a file must have been at rest, in nanoseconds.
const REST: i128 = 1_000_000_000;

/// A file as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileState {
    device: u64,
    inode: u64,
    size: u64,
    modified: i128,
    changed: i128,
}

impl FileState {
    /// Of an open file; to be taken before its content is read.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn of(file: &File) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        let nanos = |s: i64, n: i64| i128::from(s) * REST + i128::from(n);
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: nanos(meta.mtime(), meta.mtime_nsec()),
            changed: nanos(meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// A file, a place in it, a length.
type Part = (FileState, u64, u64);

/// What is known of the parts of a file, or of the files of a folder.
#[derive(Debug)]
pub struct KnownHashes {
    path: PathBuf,
    known: BTreeMap<Part, [u8; 32]>,
    /// What this start has used or found.
    used: BTreeMap<Part, [u8; 32]>,
    new: bool,
}

impl KnownHashes {
    /// Of `of`, a file or folder; kept in the folder `cache`.
    pub fn open(cache: &Path, of: &Path) -> Self {
        let of = of.canonicalize().unwrap_or_else(|_| of.to_owned());
        let name = blake3::hash(of.as_os_str().as_encoded_bytes()).to_hex();
        let path = cache.join("hashes").join(&name[..32]);
        let mut text = String::new();
        let read = File::open(&path).and_then(|f| f.take(MAX_BYTES).read_to_string(&mut text));
        let known = read.ok().and_then(|_| parse(&text)).unwrap_or_default();
        Self { path, known, used: BTreeMap::new(), new: false }
    }

    /// The hash of a part.
    pub fn get(&mut self, state: &FileState, offset: u64, bytes: u64) -> Option<[u8; 32]> {
        let part = (*state, offset, bytes);
        let hash = *self.known.get(&part)?;
        self.used.insert(part, hash);
        Some(hash)
    }

    /// Remembers the hash of a part of `file`, whose state was `state` before it was read.
    pub fn insert(&mut self, file: &File, state: &FileState, part: (u64, u64), hash: [u8; 32]) {
        if FileState::of(file).is_ok_and(|now| now == *state) {
            self.used.insert((*state, part.0, part.1), hash);
            self.new = true;
        }
    }

    /// Writes what this start has used and found, if something is new; the rest is forgotten.
    pub fn save(self) {
        if self.new {
            // It is hashed again, that is all.
            let _ = self.write();
        }
    }

    fn write(&self) -> std::io::Result<()> {
        if let Some(folder) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let part = self.path.with_extension(format!("{}.part", uuid::Uuid::now_v7().simple()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        let mut write = || -> std::io::Result<()> {
            let now = FileState::of(&file)?.modified;
            let mut text = format!("{FIRST_LINE}\n");
            for ((f, offset, bytes), hash) in &self.used {
                if f.changed.max(f.modified) + REST > now {
                    continue;
                }
                let hash = blake3::Hash::from_bytes(*hash).to_hex();
                text += &format!(
                    "{} {} {} {} {} {offset} {bytes} {hash}\n",
                    f.device, f.inode, f.size, f.modified, f.changed
                );
            }
            file.write_all(text.as_bytes())?;
            std::fs::rename(&part, &self.path)
        };
        let written = write();
        if written.is_err() {
            let _ = std::fs::remove_file(&part);
        }
        written
    }
}

/// `None` if anything is wrong.
fn parse(text: &str) -> Option<BTreeMap<Part, [u8; 32]>> {
    let mut lines = text.lines();
    (lines.next()? == FIRST_LINE).then_some(())?;
    lines.map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<(Part, [u8; 32])> {
    let words: Vec<&str> = line.split(' ').collect();
    let &[device, inode, size, modified, changed, offset, bytes, hash] = words.as_slice() else {
        return None;
    };
    let natural = |word: &str| word.parse::<u64>().ok();
    let state = FileState {
        device: natural(device)?,
        inode: natural(inode)?,
        size: natural(size)?,
        modified: modified.parse().ok()?,
        changed: changed.parse().ok()?,
    };
    let hash = blake3::Hash::from_hex(hash).ok()?;
    Some(((state, natural(offset)?, natural(bytes)?), hash.into()))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    /// A folder that goes with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("{name}-{}", uuid::Uuid::now_v7()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// As if the file had been at rest: its change time cannot be set, so the state is made up.
    fn rested(file: &File) -> FileState {
        let long_ago = |t: i128| t - 10 * REST;
        let state = FileState::of(file).unwrap();
        FileState { changed: long_ago(state.changed), modified: long_ago(state.modified), ..state }
    }

    #[test]
    fn hashes_come_back_for_the_same_file_only() {
        let folder = Folder::new("known");
        let path = folder.0.join("model");
        std::fs::write(&path, b"content").unwrap();
        let file = File::open(&path).unwrap();
        let state = rested(&file);
        let mut hashes = KnownHashes::open(&folder.0, &path);
        assert_eq!(hashes.get(&state, 0, 7), None);
        hashes.used.insert((state, 0, 7), [5; 32]);
        hashes.new = true;
        hashes.save();
        let mut hashes = KnownHashes::open(&folder.0, &path);
        assert_eq!(hashes.get(&state, 0, 7), Some([5; 32]));
        assert_eq!(hashes.get(&state, 0, 6), None);
        for other in [
            FileState { size: 8, ..state },
            FileState { inode: state.inode + 1, ..state },
            FileState { modified: state.modified + 1, ..state },
            FileState { changed: state.changed + 1, ..state },
        ] {
            assert_eq!(hashes.get(&other, 0, 7), None);
        }
        let mut others = KnownHashes::open(&folder.0, &folder.0);
        assert_eq!(others.get(&state, 0, 7), None);
    }

    #[test]
    fn a_file_that_just_changed_is_not_remembered() {
        let folder = Folder::new("fresh");
        let path = folder.0.join("model");
        std::fs::write(&path, b"content").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let state = FileState::of(&file).unwrap();
        let mut hashes = KnownHashes::open(&folder.0, &path);
        hashes.insert(&file, &state, (0, 7), [5; 32]);
        assert!(hashes.new);
        hashes.save();
        assert_eq!(KnownHashes::open(&folder.0, &path).get(&state, 0, 7), None);
        // Changed while it was read.
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        let mut hashes = KnownHashes::open(&folder.0, &path);
        hashes.insert(&file, &state, (0, 7), [5; 32]);
        assert!(!hashes.new);
    }

    #[test]
    fn damage_means_nothing_is_known() {
        let folder = Folder::new("damage");
        let hashes = KnownHashes::open(&folder.0, &folder.0);
        std::fs::create_dir_all(hashes.path.parent().unwrap()).unwrap();
        let hash = blake3::hash(b"x").to_hex();
        for text in [
            String::new(),
            format!("something else\n1 2 3 4 5 6 7 {hash}\n"),
            format!("{FIRST_LINE}\n1 2 3 4 5 6 7\n"),
            format!("{FIRST_LINE}\n1 2 3 4 5 6 -7 {hash}\n"),
            format!("{FIRST_LINE}\n1 2 3 4 5 6 7 {hash} 8\n"),
        ] {
            std::fs::write(&hashes.path, &text).unwrap();
            assert!(KnownHashes::open(&folder.0, &folder.0).known.is_empty(), "{text}");
        }
        std::fs::write(&hashes.path, format!("{FIRST_LINE}\n1 2 3 4 5 6 7 {hash}\n")).unwrap();
        assert_eq!(KnownHashes::open(&folder.0, &folder.0).known.len(), 1);
    }
}
