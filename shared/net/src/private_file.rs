//! Files that nobody else may read: mode 0600 in folders of mode 0700, written whole or not at all.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use rustls::crypto::SecureRandom;

use crate::NetError;

/// Makes a folder (and its parents) that only its owner may enter.
///
/// # Errors
/// If it cannot be made.
pub fn create_dir(path: &Path) -> Result<(), NetError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(|e| NetError::file(path, e))
}

/// Writes a file of mode 0600 by way of a temporary one, so that readers see old or new, whole.
///
/// # Errors
/// If it cannot be written; nothing is left behind then.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), NetError> {
    let temporary = temporary_beside(path)?;
    let written = write_new(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path).map_err(|e| NetError::file(path, e)));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.and_then(|()| sync_folder(path))
}

/// Makes what happened to the name `path` last: made, replaced or removed, it stays so whatever
/// happens to the machine.
///
/// # Errors
/// If the folder cannot be written to the disk.
pub fn sync_folder(path: &Path) -> Result<(), NetError> {
    let folder =
        path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|e| NetError::file(folder, e))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), NetError> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(|e| NetError::file(path, e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| NetError::file(path, e))
}

fn temporary_beside(path: &Path) -> Result<PathBuf, NetError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(path.with_file_name(format!(".{name}.{}.tmp", hex(&random::<8>()?))))
}

/// Reads a file that must exist.
///
/// # Errors
/// If it cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>, NetError> {
    fs::read(path).map_err(|e| NetError::file(path, e))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Cryptographically secure random bytes, from the program's one crypto provider.
///
/// # Errors
/// If the system has none to give.
pub fn random<const N: usize>() -> Result<[u8; N], NetError> {
    let mut bytes = [0; N];
    let source: &dyn SecureRandom = rustls::crypto::ring::default_provider().secure_random;
    source
        .fill(&mut bytes)
        .map_err(|_| NetError::Identity("the system has no random numbers to give".into()))?;
    Ok(bytes)
}
