//! A model that is being written: a file or folder that has another name until it is whole.
//!
//! What was at the target stays there until [`Target::finish`]: a full disk, an error or a kill leave it
//! alone, and what was written goes away. What is written is the caller's.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use millrace_shared::model::FolderSource;
use tempfile::{NamedTempFile, TempDir};

/// Why there is nothing new at a target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// There is a file of that name.
    #[error("{0} is there already")]
    Exists(PathBuf),
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
    File(NamedTempFile),
    Folder(TempDir, File),
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
        let parent = check(source, path, overwrite, needed)?;
        if path.is_dir() {
            return Err(TargetError::Exists(path.to_owned()));
        }
        let made =
            builder(0o644).tempfile_in(parent).map_err(io_error("make a file in", parent))?;
        Ok(Self { part: Part::File(made), path: path.to_owned(), overwrite })
    }

    /// Begins a folder with everything of a source's but its weights: `config` is its description,
    /// `needed` are the bytes of the weights. A folder is replaced only if `ours` says so of it.
    ///
    /// # Errors
    /// As [`Target::file`], or if a small file cannot be copied.
    pub fn folder(
        source: &FolderSource,
        path: &Path,
        (overwrite, ours): (bool, &dyn Fn(&Path) -> bool),
        config: &[u8],
        needed: u64,
    ) -> Result<Self, TargetError> {
        let parent = check(&source.folder, path, overwrite, needed)?;
        if path.exists() && !ours(path) {
            return Err(TargetError::Exists(path.to_owned()));
        }
        let made =
            builder(0o755).tempdir_in(parent).map_err(io_error("make a folder in", parent))?;
        for path in &source.others {
            let name = path.file_name().unwrap_or_default();
            fs::copy(path, made.path().join(name)).map_err(io_error("copy", path))?;
        }
        let at = made.path().join(FolderSource::config_name());
        fs::write(&at, config).map_err(io_error("write", &at))?;
        let weights = made.path().join(FolderSource::weights_name());
        let file = File::create_new(&weights).map_err(io_error("write", &weights))?;
        Ok(Self { part: Part::Folder(made, file), path: path.to_owned(), overwrite })
    }

    /// The file of weights.
    pub fn weights(&self) -> &File {
        match &self.part {
            Part::File(file) => file.as_file(),
            Part::Folder(_, file) => file,
        }
    }

    /// Where the weights are while they are written.
    pub fn weights_path(&self) -> PathBuf {
        match &self.part {
            Part::File(file) => file.path().to_owned(),
            Part::Folder(folder, _) => folder.path().join(FolderSource::weights_name()),
        }
    }

    /// The name it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, once all of it is on the disk.
    ///
    /// # Errors
    /// If the disk is full, or something came to the target that may not be replaced.
    pub fn finish(self) -> Result<(), TargetError> {
        let path = &self.path;
        self.weights().sync_all().map_err(io_error("write", path))?;
        match self.part {
            Part::File(file) => {
                let kept = match self.overwrite {
                    true => file.persist(path),
                    false => file.persist_noclobber(path),
                };
                kept.map_err(|e| match e.error.kind() {
                    io::ErrorKind::AlreadyExists => TargetError::Exists(path.clone()),
                    _ => io_error("write", path)(e.error),
                })?;
            }
            Part::Folder(made, _) => {
                sync_folder(made.path());
                // Nothing good goes for a copy that somebody removed meanwhile.
                let weights = made.path().join(FolderSource::weights_name());
                fs::metadata(&weights).map_err(io_error("find", &weights))?;
                if path.exists() {
                    fs::remove_dir_all(path).map_err(io_error("replace", path))?;
                }
                fs::rename(made.path(), path).map_err(io_error("write", path))?;
                // It is not there any more under its first name.
                let _ = made.keep();
            }
        }
        sync_folder(parent(path));
        Ok(())
    }
}

fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.suffix(".part").permissions(fs::Permissions::from_mode(mode));
    builder
}

fn parent(path: &Path) -> &Path {
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
