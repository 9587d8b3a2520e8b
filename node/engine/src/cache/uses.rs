//! What of the cache is in use, by any process of this machine, and when each thing was used last.
//!
//! A use is a file in `uses/` with a list of paths, named by the list. Who uses these holds a shared
//! lock on the file, which ends with the process however that ends; the file's time is that of the
//! last use. So a thing that is read, mapped or about to be found again needs no writes of its own,
//! and model files keep the times that vouch for their hashes. The gate, another lock, keeps uses
//! from beginning while things are removed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Part;

/// Most bytes of a list: a model's tensors, a hundred times over.
const MAX_BYTES: u64 = 16 << 20;

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
    let _open = gate(cache).inspect(|gate| drop(gate.lock_shared()));
    if !path.exists() {
        let mut part = Part::create(&path)?;
        part.file.write_all(text.as_bytes())?;
        part.finish()?;
    }
    let file = OpenOptions::new().read(true).append(true).open(&path)?;
    file.lock_shared()?;
    file.set_modified(SystemTime::now())?;
    Ok(Some(file))
}

/// The lock between uses that begin and things that are removed.
pub(super) fn gate(cache: &Path) -> Option<File> {
    let path = cache.join("uses").join(".gate");
    std::fs::create_dir_all(cache.join("uses")).ok()?;
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).ok()
}

/// When each path was used last; `None` is now.
#[derive(Debug, Default)]
pub(super) struct Uses(BTreeMap<PathBuf, Option<SystemTime>>);

impl Uses {
    /// Of all uses, past and present; those of which nothing is left are forgotten.
    pub(super) fn read(cache: &Path, forget: bool) -> Self {
        let mut uses = Self::default();
        for entry in std::fs::read_dir(cache.join("uses")).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some() || entry.file_name() == ".gate" {
                continue;
            }
            let Ok((time, paths)) = one(&path) else { continue };
            if forget && time.is_some() && !paths.iter().any(|p| cache.join(p).exists()) {
                let _ = std::fs::remove_file(&path);
            }
            for path in paths {
                uses.add(path, time);
            }
        }
        uses
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

/// When a use was, and of what.
fn one(path: &Path) -> io::Result<(Option<SystemTime>, Vec<PathBuf>)> {
    let file = File::open(path)?;
    let time = match file.try_lock() {
        Err(TryLockError::WouldBlock) => None,
        // Where there are no locks, nobody can tell who uses it: its time alone speaks.
        _ => Some(file.metadata()?.modified()?),
    };
    let mut text = String::new();
    (&file).take(MAX_BYTES).read_to_string(&mut text)?;
    Ok((time, text.lines().map(PathBuf::from).collect()))
}
