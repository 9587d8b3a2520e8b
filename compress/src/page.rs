//! Small files that go with models: pages, reports, what a table has done. Each is whole or as it was, and
//! takes the place of its like alone.

use std::fs::{self, File, Permissions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use millrace_engine::target::{io_error, parent};

use crate::CompressError;

/// How these files begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A page.
    Html,
    /// A JSON object.
    Json,
}

impl Kind {
    fn begin(self) -> &'static [u8] {
        match self {
            Self::Html => b"<!doctype html>",
            Self::Json => b"{",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Html => "page",
            Self::Json => "JSON object",
        }
    }
}

/// Whether such a file can be written there; asked before any work.
///
/// # Errors
/// If there is no such folder, or the file is there and is something else.
pub fn check(path: &Path, kind: Kind) -> Result<(), CompressError> {
    let named = path.display();
    let folder = parent(path);
    if !folder.is_dir() {
        let folder = folder.display();
        return Err(CompressError::Settings(format!("cannot write {named}: there is no {folder}")));
    }
    if path.is_dir() {
        return Err(CompressError::Settings(format!("cannot write {named}: it is a folder")));
    }
    if !path.is_file() {
        return Ok(());
    }
    let mut begin = Vec::new();
    let file = File::open(path).map_err(io_error("read", path))?;
    let wanted = kind.begin();
    file.take(wanted.len() as u64).read_to_end(&mut begin).map_err(io_error("read", path))?;
    match begin.is_empty() || begin == wanted {
        true => Ok(()),
        false => Err(CompressError::Settings(format!(
            "{named} is there and is no {}: name another file, or remove it",
            kind.name()
        ))),
    }
}

/// Writes one: under its name once all of it is on the disk.
///
/// # Errors
/// As those of [`check`], or if the disk is full.
pub fn write(path: &Path, kind: Kind, bytes: &[u8]) -> Result<(), CompressError> {
    check(path, kind)?;
    // Pipes, and what else has no place to be put in.
    if path.exists() && !path.is_file() {
        return Ok(fs::write(path, bytes).map_err(io_error("write", path))?);
    }
    let put = || {
        let mut file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(parent(path))?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error).map(|_| ())
    };
    Ok(put().map_err(io_error("write", path))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_their_like_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write(&at("a.html"), Kind::Html, b"<!doctype html>1").unwrap();
        write(&at("a.html"), Kind::Html, b"<!doctype html>2").unwrap();
        assert_eq!(fs::read(at("a.html")).unwrap(), b"<!doctype html>2");
        fs::write(at("m.gguf"), b"GGUF...").unwrap();
        for kind in [Kind::Html, Kind::Json] {
            let said = write(&at("m.gguf"), kind, b"{}").unwrap_err().to_string();
            assert!(said.contains("m.gguf is there and is no"), "{said}");
        }
        assert_eq!(fs::read(at("m.gguf")).unwrap(), b"GGUF...");
        let said = write(&at("no/a.html"), Kind::Html, b"").unwrap_err().to_string();
        assert!(said.contains("there is no"), "{said}");
        assert!(write(dir.path(), Kind::Json, b"{}").unwrap_err().to_string().contains("a folder"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
