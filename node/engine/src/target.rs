//! A model that is being written: a file that has no name until it is whole.
//!
//! What was at the target stays there until [`Target::finish`]: a full disk, an error or a kill leave it
//! alone, and what was written goes away. What is written is the caller's. Where the file system has no
//! files without names, it has another one meanwhile, which a kill leaves behind. A folder changes places
//! with what was there at once; where the file system cannot do that, what was there steps aside first,
//! and comes back if its place cannot be taken.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use millrace_shared::model::FolderSource;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, renameat2};
use nix::unistd::linkat;
use tempfile::{NamedTempFile, TempDir};

/// Whoever may read the folder reads a model.
const FILE_MODE: u32 = 0o644;
/// Where the system lists a process's open files.
const OWN_FILES: &str = "/proc/self/fd";

/// Why there is nothing new at a target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// There is a file of that name.
    #[error("{0} is there already")]
    Exists(PathBuf),
    /// The target's path ends in no name.
    #[error("'{0}' ends in no name: say what the result is to be called")]
    Unnamed(PathBuf),
    /// Source and target are one.
    #[error("{0} would be read and written at once: give the result another name")]
    SameFile(PathBuf),
    /// The disk is too small.
    #[error("{folder} has {free} bytes free, the file takes {needed}")]
    NoSpace {
        /// Where it was to go.
        folder: PathBuf,
        /// Bytes free.
        free: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// A file cannot be used.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// An [`TargetError::Io`] of something done with a path.
pub fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TargetError {
    let path = path.to_owned();
    move |source| TargetError::Io { what, path, source }
}

/// A model that is being written.
#[derive(Debug)]
pub struct Target {
    part: Part,
    path: PathBuf,
    overwrite: bool,
}

#[derive(Debug)]
enum Part {
    File(Weights),
    Folder {
        weights: Weights,
        small: Small,
        /// Something was there that may be replaced.
        replaces: bool,
    },
}

/// What is written, and what it is called meanwhile.
#[derive(Debug)]
enum Weights {
    /// Nothing: it goes with whoever writes it, however that ends.
    Unnamed(File),
    /// Where the file system has no files without names.
    Named(NamedTempFile),
}

/// What lies beside the weights in a folder: open from the beginning on, so that it is still there at
/// the end.
#[derive(Debug)]
struct Small {
    config: Vec<u8>,
    others: Vec<(OsString, File)>,
}

impl Target {
    /// Begins a file of `needed` bytes.
    ///
    /// # Errors
    /// If the target is there and may not be replaced or is `source`, or the disk is too small.
    pub fn file(
        source: &Path,
        path: &Path,
        overwrite: bool,
        needed: u64,
    ) -> Result<Self, TargetError> {
        let path = named(path)?;
        let parent = check(source, &path, overwrite, needed)?;
        if path.is_dir() {
            return Err(TargetError::Exists(path));
        }
        let part = Part::File(Weights::begin(parent)?);
        Ok(Self { part, path, overwrite })
    }

    /// Begins a folder with everything of a source's but its weights: `config` is its description,
    /// `needed` are the bytes of the weights. A folder is replaced only if `ours` says so of it.
    ///
    /// # Errors
    /// As [`Target::file`].
    pub fn folder(
        source: &FolderSource,
        path: &Path,
        (overwrite, ours): (bool, &dyn Fn(&Path) -> bool),
        config: &[u8],
        needed: u64,
    ) -> Result<Self, TargetError> {
        let path = named(path)?;
        let parent = check(&source.folder, &path, overwrite, needed)?;
        let replaces = path.exists();
        if replaces && !ours(&path) {
            return Err(TargetError::Exists(path));
        }
        let open = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_owned();
            Ok((name, File::open(path).map_err(io_error("read", path))?))
        };
        let others = source.others.iter().map(open).collect::<Result<_, _>>()?;
        let small = Small { config: config.to_owned(), others };
        let part = Part::Folder { weights: Weights::begin(parent)?, small, replaces };
        Ok(Self { part, path, overwrite })
    }

    /// The file of weights.
    pub fn weights(&self) -> &File {
        match &self.part {
            Part::File(weights) | Part::Folder { weights, .. } => weights.file(),
        }
    }

    /// The name it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, once all of it is on the disk.
    ///
    /// # Errors
    /// If the disk is full, a small file cannot be copied, or something came to the target that may not
    /// be replaced.
    pub fn finish(self) -> Result<(), TargetError> {
        let path = &self.path;
        self.weights().sync_all().map_err(io_error("write", path))?;
        match self.part {
            Part::File(weights) => {
                weights.persist(path, self.overwrite).map_err(|e| match e.kind() {
                    io::ErrorKind::AlreadyExists => TargetError::Exists(path.clone()),
                    _ => io_error("write", path)(e),
                })?;
            }
            Part::Folder { weights, small, replaces } => {
                // Of a writer that is killed from here on, this folder may stay.
                let made = small.write(parent(path))?;
                let at = made.path().join(FolderSource::weights_name());
                weights.persist(&at, false).map_err(io_error("write", &at))?;
                sync_folder(made.path());
                if replaces {
                    place(made.path(), path)?;
                } else {
                    fs::rename(made.path(), path).map_err(|e| match e.kind() {
                        io::ErrorKind::AlreadyExists
                        | io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::NotADirectory => TargetError::Exists(path.clone()),
                        _ => io_error("write", path)(e),
                    })?;
                }
                // It is not there any more under its first name.
                let _ = made.keep();
            }
        }
        sync_folder(parent(path));
        Ok(())
    }
}

impl Weights {
    /// An empty file in a folder.
    fn begin(folder: &Path) -> Result<Self, TargetError> {
        let failed = io_error("make a file in", folder);
        match unnamed(folder) {
            Ok(Some(file)) => Ok(Self::Unnamed(file)),
            Ok(None) => builder(FILE_MODE).tempfile_in(folder).map(Self::Named).map_err(failed),
            Err(e) => Err(failed(e)),
        }
    }

    fn file(&self) -> &File {
        match self {
            Self::Unnamed(file) => file,
            Self::Named(file) => file.as_file(),
        }
    }

    /// Gives it a name, in the place of another file of that name if it may.
    fn persist(self, path: &Path, overwrite: bool) -> io::Result<()> {
        let named = match self {
            Self::Unnamed(file) if !overwrite => return Ok(link(&file, path)?),
            // No call gives a name that is taken: it gets one of its own first.
            Self::Unnamed(file) => {
                let at = |at: &Path| Ok(link(&file, at)?);
                builder(FILE_MODE).make_in(parent(path), at)?.into_temp_path()
            }
            Self::Named(file) => file.into_temp_path(),
        };
        match overwrite {
            true => Ok(named.persist(path)?),
            false => Ok(named.persist_noclobber(path)?),
        }
    }
}

impl Small {
    /// A folder beside the target with all of it.
    fn write(self, beside: &Path) -> Result<TempDir, TargetError> {
        let made =
            builder(0o755).tempdir_in(beside).map_err(io_error("make a folder in", beside))?;
        let write = |name: &OsString, mut from: &mut dyn io::Read| {
            let at = made.path().join(name);
            let file = File::options().write(true).create_new(true).mode(FILE_MODE).open(&at);
            let done = file.and_then(|mut file| {
                io::copy(&mut from, &mut file)?;
                file.sync_all()
            });
            done.map_err(io_error("write", &at))
        };
        for (name, mut file) in self.others {
            write(&name, &mut file)?;
        }
        write(&FolderSource::config_name().into(), &mut &*self.config)?;
        Ok(made)
    }
}

/// Gives what lies at `made` beside it the name `path`; what was there goes away afterwards.
///
/// # Errors
/// If it cannot have that name: what was there still has it then.
pub fn place(made: &Path, path: &Path) -> Result<(), TargetError> {
    place_by(made, path, exchange)
}

fn place_by(
    made: &Path,
    path: &Path,
    exchange: impl Fn(&Path, &Path) -> Result<(), Errno>,
) -> Result<(), TargetError> {
    let renamed = |from: &Path, to: &Path| fs::rename(from, to).map_err(io_error("replace", path));
    if !path.is_dir() {
        renamed(made, path)?;
        sync_folder(parent(path));
        return Ok(());
    }
    if exchange(made, path).is_ok() {
        sync_folder(parent(path));
        // What was there has the other's name now.
        let _ = if made.is_dir() { fs::remove_dir_all(made) } else { fs::remove_file(made) };
        return Ok(());
    }
    let beside = builder(0o755).tempdir_in(parent(path)).map_err(io_error("replace", path))?;
    let aside = beside.path().join("old");
    renamed(path, &aside)?;
    if let Err(failed) = renamed(made, path) {
        if fs::rename(&aside, path).is_err() {
            let _ = beside.keep();
        }
        return Err(failed);
    }
    sync_folder(parent(path));
    Ok(())
}

/// The path without dots and slashes behind its last name.
///
/// # Errors
/// If it has none.
pub fn named(path: &Path) -> Result<PathBuf, TargetError> {
    let plain: PathBuf = path.components().collect();
    match plain.file_name() {
        Some(_) => Ok(plain),
        None => Err(TargetError::Unnamed(path.to_owned())),
    }
}

/// A file without a name; `None` where the system or the file system has none.
fn unnamed(folder: &Path) -> io::Result<Option<File>> {
    if !Path::new(OWN_FILES).is_dir() {
        return Ok(None);
    }
    let mut options = File::options();
    options.read(true).write(true).mode(FILE_MODE).custom_flags(OFlag::O_TMPFILE.bits());
    match options.open(folder) {
        Ok(file) => Ok(Some(file)),
        Err(e) => match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => Ok(None),
            _ => Err(e),
        },
    }
}

/// Gives a file without a name one that is not taken.
fn link(file: &File, path: &Path) -> Result<(), Errno> {
    let own = format!("{OWN_FILES}/{}", file.as_raw_fd());
    linkat(AT_FDCWD, &*own, AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
}

/// Two folders get each other's names at once.
fn exchange(a: &Path, b: &Path) -> Result<(), Errno> {
    renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE)
}

fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.suffix(".part").permissions(fs::Permissions::from_mode(mode));
    builder
}

/// The folder that a path lies in: `.` for a name alone.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or_else(|| Path::new("."))
}

/// What is in it stays there, whatever happens; a folder that cannot be synced is not worth failing
/// for.
fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|f| f.sync_all());
}

/// The folder that it goes to.
fn check<'a>(
    source: &Path,
    path: &'a Path,
    overwrite: bool,
    needed: u64,
) -> Result<&'a Path, TargetError> {
    if let Ok(there) = fs::metadata(path) {
        let own = fs::metadata(source).map_err(io_error("read", source))?;
        if (own.dev(), own.ino()) == (there.dev(), there.ino()) {
            return Err(TargetError::SameFile(path.to_owned()));
        }
        if !overwrite {
            return Err(TargetError::Exists(path.to_owned()));
        }
    }
    let folder = parent(path);
    // Where the file system does not say, writing will.
    let Ok(stat) = nix::sys::statvfs::statvfs(folder) else { return Ok(folder) };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    if free >= needed {
        return Ok(folder);
    }
    Err(TargetError::NoSpace { folder: folder.to_owned(), free, needed })
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    /// Both kinds of files, with and without something in their place.
    #[test]
    fn files_get_their_names_with_and_without_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let begin = |named: bool| match named {
            true => Weights::Named(builder(FILE_MODE).tempfile_in(dir.path()).unwrap()),
            false => {
                Weights::Unnamed(unnamed(dir.path()).unwrap().expect("a file system with them"))
            }
        };
        let path = dir.path().join("model");
        for (i, named) in [true, false].into_iter().enumerate() {
            for (there, overwrite) in [(false, false), (true, false), (true, true)] {
                let before = fs::read(&path).ok();
                let weights = begin(named);
                weights.file().write_all(&[i as u8, u8::from(overwrite)]).unwrap();
                let done = weights.persist(&path, overwrite);
                assert_eq!(before.is_some(), there);
                if there && !overwrite {
                    assert_eq!(done.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
                    assert_eq!(fs::read(&path).ok(), before);
                } else {
                    done.unwrap();
                    let mut found = Vec::new();
                    File::open(&path).unwrap().read_to_end(&mut found).unwrap();
                    assert_eq!(found, [i as u8, u8::from(overwrite)]);
                }
                assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing beside it");
            }
            fs::remove_file(&path).unwrap();
        }
    }

    /// With and without a system call that exchanges names; where a name cannot be had, what has it
    /// keeps it.
    #[test]
    fn folders_take_places_and_nothing_is_lost_where_they_cannot() {
        let home = tempfile::tempdir().unwrap();
        let (made, path) = (home.path().join("made"), home.path().join("path"));
        let never = |_: &Path, _: &Path| Err(Errno::EINVAL);
        let fill = |at: &Path, what: &str| {
            fs::create_dir(at).unwrap();
            fs::write(at.join("what"), what).unwrap();
        };
        for exchange in [&exchange as &dyn Fn(&Path, &Path) -> Result<(), Errno>, &never] {
            fill(&path, "old");
            fill(&made, "new");
            place_by(&made, &path, exchange).unwrap();
            assert_eq!(fs::read_to_string(path.join("what")).unwrap(), "new");
            assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "nothing beside it");
            place_by(&made, &path, exchange).unwrap_err();
            assert_eq!(fs::read_to_string(path.join("what")).unwrap(), "new");
            assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "nothing beside it");
            fs::remove_dir_all(&path).unwrap();
        }
        for nameless in [".", "..", "/", "a/.."] {
            let refused = named(Path::new(nameless)).unwrap_err().to_string();
            assert!(refused.contains("no name"), "{refused}");
        }
        assert_eq!(named(Path::new("a/b/./")).unwrap(), Path::new("a/b"));
    }
}
