//! How often a coordinator began to work on this folder.
//!
//! The number of its life is the number of its pipeline, which every frame and message carries beside
//! the epoch: what a stage still does for an earlier life can never be taken for something of this
//! one. Kept whether there is a journal or not; on the disk before it is used.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

/// Name of the file in the cluster's folder.
pub(crate) const FILE: &str = "life";

/// More lives than a coordinator has between a backup and its loss.
const LEAP: u32 = 1_000_000;

/// Begins the next life.
///
/// # Errors
/// If the file cannot be read or written, or holds no number.
pub fn begin(dir: &Path) -> io::Result<u32> {
    go_on(dir, 1)
}

/// For a folder that was made from an old copy: skips the lives that the original may have had since.
///
/// # Errors
/// As for [`begin`].
pub(crate) fn leap(dir: &Path) -> io::Result<()> {
    go_on(dir, LEAP).map(drop)
}

fn go_on(dir: &Path, by: u32) -> io::Result<u32> {
    let path = dir.join(FILE);
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let last = match fs::read_to_string(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        Err(e) => return Err(named(e)),
        Ok(text) => text.trim().parse::<u32>().map_err(|_| {
            let why = "it does not hold a number; write one into it that is higher than any that \
                       the pipeline had, such as 1000000";
            named(io::Error::new(io::ErrorKind::InvalidData, why))
        })?,
    };
    let next = last.checked_add(by).ok_or_else(|| {
        named(io::Error::new(io::ErrorKind::InvalidData, "no number is left above it"))
    })?;
    write(dir, &path, next).map_err(named)?;
    Ok(next)
}

fn write(dir: &Path, path: &Path, life: u32) -> io::Result<()> {
    let new = dir.join(".life.new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&new)?;
    writeln!(file, "{life}")?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_count_up() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!([1, 2, 3].map(|_| begin(dir.path()).unwrap()), [1, 2, 3]);
        fs::write(dir.path().join(FILE), "x").unwrap();
        assert!(begin(dir.path()).unwrap_err().to_string().contains("number"));
        fs::write(dir.path().join(FILE), u32::MAX.to_string()).unwrap();
        assert!(begin(dir.path()).is_err());
    }
}
