//! Hashes of files and of their parts, remembered between starts, so that a model is hashed once
//! and not at every start.
//!
//! A hash stands for a part of a file as long as the file's device, inode, size and times stay what
//! they were before it was read. A file that had changed within a second of writing is not
//! remembered: it could change again without a new time. Losing a store costs hashing again, so
//! only reading the file itself can fail: what is unreadable here is empty, and what cannot be
//! written is not kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::Part as Unfinished;

/// First line of a store.
const FIRST_LINE: &str = "millrace known hashes 1";
/// Most bytes of a store: about 100,000 parts.
const MAX_BYTES: u64 = 16 << 20;
/// How long a file must have been at rest, in nanoseconds.
const REST: i128 = 1_000_000_000;
/// Bytes per read.
const CHUNK: u64 = 1 << 20;

/// A file as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct FileState {
    device: u64,
    inode: u64,
    size: u64,
    modified: i128,
    changed: i128,
}

impl FileState {
    fn of(file: &File) -> io::Result<Self> {
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
type Hashes = BTreeMap<Part, [u8; 32]>;

/// What is known of the parts of a file, or of the files of a folder.
#[derive(Debug)]
pub struct KnownHashes {
    /// `None` keeps nothing.
    path: Option<PathBuf>,
    known: Hashes,
    /// What this start has used or found.
    used: Hashes,
    new: bool,
}

impl KnownHashes {
    /// Of `of`, a file or folder; kept in the folder `cache`. Without a cache nothing is known and
    /// nothing is kept.
    pub fn open(cache: Option<&Path>, of: &Path) -> Self {
        let path = cache.map(|cache| {
            let of = of.canonicalize().unwrap_or_else(|_| of.to_owned());
            let name = blake3::hash(of.as_os_str().as_encoded_bytes()).to_hex();
            cache.join("hashes").join(&name[..32])
        });
        let read = |path: &PathBuf| {
            let mut text = String::new();
            File::open(path).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
            parse(&text)
        };
        let known = path.as_ref().and_then(read).unwrap_or_default();
        Self { path, known, used: Hashes::new(), new: false }
    }

    /// BLAKE3 of the `bytes` at `offset` of a file: known, or computed and remembered. `advance`
    /// gets the number of bytes done since it was called last; together they are `bytes`.
    ///
    /// # Errors
    /// If the file cannot be read, or ends before.
    pub fn hash(
        &mut self,
        file: &File,
        offset: u64,
        bytes: u64,
        advance: &mut dyn FnMut(u64),
    ) -> io::Result<[u8; 32]> {
        let state = FileState::of(file)?;
        let part = (state, offset, bytes);
        if let Some(hash) = self.known.get(&part).or_else(|| self.used.get(&part)).copied() {
            self.used.insert(part, hash);
            advance(bytes);
            return Ok(hash);
        }
        let mut hasher = blake3::Hasher::new();
        let mut chunk = vec![0; CHUNK.min(bytes) as usize];
        let mut done = 0;
        while done < bytes {
            let n = CHUNK.min(bytes - done);
            file.read_exact_at(&mut chunk[..n as usize], offset + done)?;
            hasher.update(&chunk[..n as usize]);
            done += n;
            advance(n);
        }
        let hash = hasher.finalize().into();
        // One that changed while it was read has no hash.
        if FileState::of(file).is_ok_and(|now| now == state) {
            self.used.insert(part, hash);
            self.new = true;
        }
        Ok(hash)
    }

    /// Writes what this start has used and found, if something is new, and what else is known of
    /// the same unchanged files; the rest is forgotten.
    pub fn save(mut self) {
        let Some(path) = self.path.take().filter(|_| self.new) else { return };
        let files: BTreeSet<FileState> = self.used.keys().map(|part| part.0).collect();
        let others = self.known.into_iter().filter(|(part, _)| files.contains(&part.0));
        self.used.extend(others);
        // It is hashed again, that is all.
        let _ = write(&path, &self.used);
    }
}

fn write(path: &Path, hashes: &Hashes) -> io::Result<()> {
    let mut part = Unfinished::create(path)?;
    let now = FileState::of(&part.file)?.modified;
    let mut text = format!("{FIRST_LINE}\n");
    for ((f, offset, bytes), hash) in hashes {
        if f.changed.max(f.modified) + REST > now {
            continue;
        }
        let hash = blake3::Hash::from_bytes(*hash).to_hex();
        text += &format!(
            "{} {} {} {} {} {offset} {bytes} {hash}\n",
            f.device, f.inode, f.size, f.modified, f.changed
        );
    }
    part.file.write_all(text.as_bytes())?;
    part.finish()
}

/// `None` if anything is wrong.
fn parse(text: &str) -> Option<Hashes> {
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

    /// A folder with a file in it, and what is known of the file.
    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        std::fs::write(&path, b"content").unwrap();
        (folder, path)
    }

    /// As if the file had been at rest: its change time cannot be set, so the state is made up.
    fn rested(file: &File) -> FileState {
        let long_ago = |t: i128| t - 10 * REST;
        let state = FileState::of(file).unwrap();
        FileState { changed: long_ago(state.changed), modified: long_ago(state.modified), ..state }
    }

    #[test]
    fn the_same_file_is_not_read_again() {
        let (folder, path) = folder();
        let open = || KnownHashes::open(Some(folder.path()), &path);
        let file = File::open(&path).unwrap();
        // Known, and wrong: it shows what is not read.
        let state = FileState::of(&file).unwrap();
        let mut hashes = open();
        hashes.known.insert((state, 0, 7), [5; 32]);
        let mut done = 0;
        let mut advance = |n| done += n;
        assert_eq!(hashes.hash(&file, 0, 7, &mut advance).unwrap(), [5; 32]);
        let of = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
        assert_eq!(hashes.hash(&file, 0, 6, &mut advance).unwrap(), of(b"conten"));
        assert_eq!(hashes.hash(&file, 3, 4, &mut advance).unwrap(), of(b"tent"));
        assert_eq!(done, 17);
        assert!(hashes.hash(&file, 3, 5, &mut |_| ()).is_err(), "the file ends before");
        // Another time of modification or change is another file.
        std::fs::write(&path, b"CONTENT").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(hashes.hash(&file, 0, 7, &mut |_| ()).unwrap(), of(b"CONTENT"));
    }

    #[test]
    fn what_is_known_of_an_unchanged_file_stays() {
        let (folder, path) = folder();
        let open = || KnownHashes::open(Some(folder.path()), &path);
        let state = rested(&File::open(&path).unwrap());
        let before = FileState { size: 3, ..state };
        let mut hashes = open();
        hashes.used.extend([((state, 0, 7), [5; 32]), ((before, 0, 3), [6; 32])]);
        hashes.new = true;
        hashes.save();
        let mut hashes = open();
        assert_eq!(hashes.known.len(), 2);
        hashes.used.insert((state, 0, 4), [7; 32]);
        hashes.new = true;
        hashes.save();
        let known: Vec<_> = open().known.into_iter().collect();
        assert_eq!(known, [((state, 0, 4), [7; 32]), ((state, 0, 7), [5; 32])]);
        assert!(KnownHashes::open(Some(folder.path()), folder.path()).known.is_empty());
        assert!(KnownHashes::open(None, &path).known.is_empty());
    }

    #[test]
    fn a_file_that_just_changed_is_not_remembered() {
        let (folder, path) = folder();
        let open = || KnownHashes::open(Some(folder.path()), &path);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut hashes = open();
        hashes.hash(&file, 0, 7, &mut |_| ()).unwrap();
        assert!(hashes.new);
        hashes.save();
        assert!(open().known.is_empty());
        // Changed while it was read.
        let mut hashes = open();
        let mut change = |_| file.set_modified(SystemTime::now() - Duration::from_mins(1)).unwrap();
        hashes.hash(&file, 0, 7, &mut change).unwrap();
        assert!(!hashes.new && hashes.used.is_empty());
    }

    #[test]
    fn damage_means_nothing_is_known() {
        let (folder, path) = folder();
        let open = || KnownHashes::open(Some(folder.path()), &path);
        let store = open().path.unwrap();
        std::fs::create_dir_all(store.parent().unwrap()).unwrap();
        let hash = blake3::hash(b"x").to_hex();
        for text in [
            String::new(),
            format!("something else\n1 2 3 4 5 6 7 {hash}\n"),
            format!("{FIRST_LINE}\n1 2 3 4 5 6 7\n"),
            format!("{FIRST_LINE}\n1 2 3 4 5 6 -7 {hash}\n"),
            format!("{FIRST_LINE}\n1 2 3 4 5 6 7 {hash} 8\n"),
        ] {
            std::fs::write(&store, &text).unwrap();
            assert!(open().known.is_empty(), "{text}");
        }
        std::fs::write(&store, format!("{FIRST_LINE}\n1 2 3 4 5 6 7 {hash}\n")).unwrap();
        assert_eq!(open().known.len(), 1);
    }
}
