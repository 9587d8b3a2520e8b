//! What of the cache is in use, by any process of this machine, and when each thing was used last.
//!
//! A use is a file in `uses/` with a list of paths, named by the list. Who uses these holds a shared
//! lock on the file, which ends with the process however that ends; the file's time is that of the
//! last use. So a thing that is read, mapped or about to be found again needs no writes of its own,
//! and model files keep the times that vouch for their hashes. The gate, another lock, keeps uses
//! from beginning while things are removed. Where a lock or a list cannot be had, nothing goes.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Part;

/// Most bytes of a list: a model's tensors, a hundred times over.
const MAX_BYTES: u64 = 16 << 20;
/// Times that a use is begun whose file loses its name meanwhile.
const TRIES: u32 = 8;

/// Something of the cache is used as long as this lives.
#[derive(Debug, Default)]
#[must_use = "what it names may be removed once it is dropped"]
pub struct InUse(Option<File>);

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(file) = &self.0 {
            // The last use is now. Closing lets go of the lock.
            let _ = file.set_modified(SystemTime::now());
        }
    }
}

/// Begins a use of `paths`, relative to the cache.
pub(super) fn hold(cache: &Path, paths: &[PathBuf]) -> InUse {
    // A cache that cannot be written loses nothing either.
    InUse(begin(cache, paths).ok().flatten())
}

fn begin(cache: &Path, paths: &[PathBuf]) -> io::Result<Option<File>> {
    let mut lines: Vec<&str> = paths.iter().filter_map(|p| p.to_str()).collect();
    lines.retain(|line| !line.contains('\n'));
    lines.sort_unstable();
    lines.dedup();
    if lines.is_empty() {
        return Ok(None);
    }
    let text = lines.join("\n") + "\n";
    let name = blake3::hash(text.as_bytes()).to_hex();
    let path = cache.join("uses").join(&name[..32]);
    // Alone: two that begin the same use find one file.
    let _alone = gate(cache).ok();
    for _ in 0..TRIES {
        if !path.exists() {
            let mut part = Part::create(&path)?;
            part.file.write_all(text.as_bytes())?;
            part.finish()?;
        }
        let file = match OpenOptions::new().read(true).append(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        file.lock_shared()?;
        // A lock on a file that lost its name says nothing to anybody.
        if is_at(&file, &path) {
            file.set_modified(SystemTime::now())?;
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// Whether this is the file that the path names now.
pub fn is_at(file: &File, path: &Path) -> bool {
    let id = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    let (file, path) = (file.metadata().map(id), std::fs::metadata(path).map(id));
    file.is_ok_and(|file| path.is_ok_and(|path| file == path))
}

/// The lock between uses that begin and things that are removed: who has it is alone.
pub(super) fn gate(cache: &Path) -> io::Result<File> {
    let path = cache.join("uses").join(".gate");
    std::fs::create_dir_all(cache.join("uses"))?;
    let gate = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    gate.lock()?;
    Ok(gate)
}

/// When each path was used last; `None` is now.
#[derive(Debug, Default)]
pub(super) struct Uses(BTreeMap<PathBuf, Option<SystemTime>>);

impl Uses {
    /// Of all uses, past and present; those of which nothing is left are forgotten.
    ///
    /// # Errors
    /// If one cannot be read: then nobody can tell what is in use.
    pub(super) fn read(cache: &Path, forget: bool) -> io::Result<Self> {
        let mut uses = Self::default();
        let entries = match std::fs::read_dir(cache.join("uses")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(uses),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if path.extension().is_some() || entry.file_name() == ".gate" {
                continue;
            }
            let (time, paths) = match one(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                one => one?,
            };
            if forget && time.is_some() && !paths.iter().any(|p| cache.join(p).exists()) {
                let _ = std::fs::remove_file(&path);
            }
            for path in paths {
                uses.add(path, time);
            }
        }
        Ok(uses)
    }

    fn add(&mut self, path: PathBuf, time: Option<SystemTime>) {
        let known = self.0.entry(path).or_insert(Some(SystemTime::UNIX_EPOCH));
        *known = known.zip(time).map(|(a, b)| a.max(b));
    }

    /// The last use of a path, of what is below it, or of what it is below.
    pub(super) fn of(&self, path: &Path) -> Option<Option<SystemTime>> {
        let mut found: Option<Option<SystemTime>> = None;
        let above = path.ancestors().filter_map(|a| self.0.get(a));
        let below = self.0.range(path.to_owned()..).take_while(|(p, _)| p.starts_with(path));
        for time in above.chain(below.map(|(_, time)| time)) {
            found = Some(match found {
                None => *time,
                Some(other) => other.zip(*time).map(|(a, b)| a.max(b)),
            });
        }
        found
    }
}

/// When a use was, and of what; `None` is now.
fn one(path: &Path) -> io::Result<(Option<SystemTime>, Vec<PathBuf>)> {
    let file = File::open(path)?;
    let time = match file.try_lock() {
        Ok(()) => Some(file.metadata()?.modified()?),
        // Where there are no locks nobody can tell that it ended.
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => None,
    };
    let mut text = String::new();
    let read = (&file).take(MAX_BYTES + 1).read_to_string(&mut text);
    let sound = read.and_then(|n| match n as u64 > MAX_BYTES {
        true => Err(io::Error::from(io::ErrorKind::InvalidData)),
        false => Ok(()),
    });
    match sound {
        // Damaged, and nobody's.
        Err(e) if e.kind() == io::ErrorKind::InvalidData && time.is_some() => Ok((time, vec![])),
        sound => sound.map(|()| (time, text.lines().map(PathBuf::from).collect())),
    }
}
