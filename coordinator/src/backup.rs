//! A copy of a cluster's folder in one file, and a folder made from it.
//!
//! Holds what a coordinator cannot make again: CA, identity, API keys (hashed), revocations, spent
//! join tokens, `client.toml`. Not in it: models, requests, and join tokens that are not spent,
//! which after a restore could be spent twice. Taken beside a running coordinator: every file is
//! replaced whole or not at all. The file holds the CA's private key: mode 0600, and to be kept
//! like it. A restored folder knows nothing of keys and nodes that were revoked since. Its pipeline
//! is numbered above all that the old one can have had since the backup, so that no stage takes a
//! frame of the one for one of the other.

use std::fs;
use std::io::{Cursor, Read as _, Write as _};
use std::path::{Path, PathBuf};

use millrace_net::client::ClientConfig;
use millrace_net::{ClusterCa, NetError, private_file};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::journal::life;
use crate::state::{CLIENT_FILE, FORMAT, STATE_FILE, format};

/// Files beside each other in the folder; those that must be there come first.
const FILES: [&str; 8] = [
    "ca.pem",
    "ca.key",
    "coordinator.pem",
    "coordinator.key",
    CLIENT_FILE,
    STATE_FILE,
    USES,
    life::FILE,
];
const NEEDED: usize = 5;
const USES: &str = "key-uses.json";
/// Folders, and how the names in them end.
const FOLDERS: [(&str, &str); 3] = [("keys", ".json"), ("revoked", ".json"), ("tokens", ".spent")];
/// Longest file in a backup.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most files in a backup.
const MAX_FILES: usize = 100_000;

/// Writes a backup of `dir` to `file`, which is replaced whole or not at all.
///
/// # Errors
/// If something cannot be read or written.
pub fn write(dir: &Path, file: &Path) -> Result<(), NetError> {
    let mut names: Vec<String> =
        FILES.iter().filter(|name| dir.join(name).exists()).map(|n| (*n).to_owned()).collect();
    for (folder, end) in FOLDERS {
        let failed = |e| failed(&dir.join(folder), &e);
        let Ok(entries) = fs::read_dir(dir.join(folder)) else { continue };
        for entry in entries {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if name.ends_with(end) && is_plain(&name) {
                names.push(format!("{folder}/{name}"));
            }
        }
    }
    names.sort();
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .unix_permissions(0o600);
    for name in names {
        let bytes = match fs::read(dir.join(&name)) {
            Ok(bytes) => bytes,
            // A key that was revoked meanwhile.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(&dir.join(&name), &e)),
        };
        zip.start_file(name, options).map_err(|e| failed(file, &e))?;
        zip.write_all(&bytes).map_err(|e| failed(file, &e))?;
    }
    let bytes = zip.finish().map_err(|e| failed(file, &e))?.into_inner();
    private_file::write(file, &bytes)
}

/// Makes the folder `dir`, which must not be there or be empty, from a backup. One that is there
/// stays the same folder: it may be a mounted volume.
///
/// # Errors
/// If the file is no backup, is of a newer format, or the folder is not empty. Nothing is left
/// behind then.
pub fn restore(file: &Path, dir: &Path) -> Result<(), NetError> {
    let is_there = fs::symlink_metadata(dir).is_ok();
    if is_there && !is_empty(dir)? {
        return Err(NetError::Identity(format!(
            "{} is not empty: a backup is restored into a new folder only (--dir)",
            dir.display()
        )));
    }
    let entries = read(file)?;
    let part = if is_there { inside(dir)? } else { beside(dir)? };
    let made = unpack(&entries, &part).and_then(|()| {
        let found = format(&part)?;
        if found > FORMAT {
            return Err(NetError::Identity(format!(
                "{} has format {found}, and this program knows formats up to {FORMAT}: restore it \
                 with the release that wrote it, or a newer one",
                file.display()
            )));
        }
        // That it is a whole one, before it takes the place.
        ClusterCa::load(&part)?;
        ClientConfig::load(&part.join(CLIENT_FILE))?;
        life::leap(&part).map_err(|e| failed(&part, &e))?;
        if is_there {
            return move_into(&part, dir);
        }
        if let Some(parent) = dir.parent() {
            private_file::create_dir(parent)?;
        }
        fs::rename(&part, dir).map_err(|e| failed(dir, &e))
    });
    if made.is_err() {
        let _ = fs::remove_dir_all(&part);
    }
    made
}

/// Of what a fresh file system has of its own.
const LOST_AND_FOUND: &str = "lost+found";

fn is_empty(dir: &Path) -> Result<bool, NetError> {
    let entries = fs::read_dir(dir).map_err(|e| failed(dir, &e))?;
    for entry in entries {
        if entry.map_err(|e| failed(dir, &e))?.file_name() != LOST_AND_FOUND {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Moves all that is in `part` up into `dir`. The CA's certificate goes last: without it the folder
/// is no cluster's yet, and a second attempt says that it is not empty.
fn move_into(part: &Path, dir: &Path) -> Result<(), NetError> {
    let entries = fs::read_dir(part).map_err(|e| failed(part, &e))?;
    let mut names: Vec<_> = entries.filter_map(|e| Some(e.ok()?.file_name())).collect();
    names.sort_by_key(|name| name == FILES[0]);
    let mut moved: Vec<PathBuf> = Vec::new();
    for name in names {
        let to = dir.join(&name);
        if let Err(e) = fs::rename(part.join(&name), &to) {
            for path in &moved {
                let _ =
                    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            }
            return Err(failed(&to, &e));
        }
        moved.push(to);
    }
    fs::remove_dir(part).map_err(|e| failed(part, &e))
}

fn inside(dir: &Path) -> Result<PathBuf, NetError> {
    let tag = private_file::hex(&private_file::random::<6>()?);
    Ok(dir.join(format!(".{tag}.restore")))
}

/// A new folder on the same file system.
fn beside(dir: &Path) -> Result<PathBuf, NetError> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let tag = private_file::hex(&private_file::random::<6>()?);
    Ok(dir.with_file_name(format!(".{name}.{tag}.restore")))
}

fn unpack(entries: &[(String, Vec<u8>)], dir: &Path) -> Result<(), NetError> {
    private_file::create_dir(dir)?;
    for (folder, _) in FOLDERS {
        private_file::create_dir(&dir.join(folder))?;
    }
    entries.iter().try_for_each(|(name, bytes)| private_file::write(&dir.join(name), bytes))
}

/// All files of a backup. What it may hold is known, so whatever else is in it makes it none.
fn read(file: &Path) -> Result<Vec<(String, Vec<u8>)>, NetError> {
    let opened = fs::File::open(file).map_err(|e| failed(file, &e))?;
    let mut zip = ZipArchive::new(opened).map_err(|e| no_backup(file, &e.to_string()))?;
    if zip.len() > MAX_FILES {
        return Err(no_backup(file, "it holds too many files"));
    }
    let mut found = Vec::with_capacity(zip.len());
    for index in 0..zip.len() {
        let entry = zip.by_index(index).map_err(|e| no_backup(file, &e.to_string()))?;
        let name = entry.name().map_err(|e| no_backup(file, &e.to_string()))?.into_owned();
        if !is_ours(&name) {
            return Err(no_backup(file, &format!("{name:?} does not belong into one")));
        }
        let mut bytes = Vec::new();
        let mut bounded = entry.take(MAX_FILE_BYTES + 1);
        bounded.read_to_end(&mut bytes).map_err(|e| no_backup(file, &e.to_string()))?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(no_backup(file, &format!("{name} is too long")));
        }
        found.push((name, bytes));
    }
    let missing = FILES[..NEEDED].iter().find(|needed| found.iter().all(|(n, _)| n != *needed));
    match missing {
        None => Ok(found),
        Some(name) => Err(no_backup(file, &format!("{name} is missing"))),
    }
}

fn is_ours(name: &str) -> bool {
    FILES.contains(&name)
        || FOLDERS.iter().any(|(folder, end)| {
            let rest = name.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/'));
            rest.is_some_and(|rest| rest.ends_with(end) && is_plain(rest))
        })
}

/// A name that cannot lead out of its folder.
fn is_plain(name: &str) -> bool {
    !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'))
}

fn failed(path: &Path, e: &dyn std::fmt::Display) -> NetError {
    NetError::Identity(format!("{}: {e}", path.display()))
}

fn no_backup(file: &Path, what: &str) -> NetError {
    NetError::Identity(format!("{} is not a backup of a cluster: {what}", file.display()))
}

#[cfg(test)]
mod tests {
    use millrace_shared::id::NodeId;
    use millrace_shared::wire::admin::{NewKey, Scope};
    use uuid::Uuid;

    use super::*;
    use crate::state::ClusterDir;

    #[test]
    fn a_cluster_comes_back_whole() {
        let root = tempfile::tempdir().unwrap();
        let (dir, file) = (root.path().join("a"), root.path().join("a.backup"));
        let made = ClusterDir::open_or_init(&dir, "h:1", "http://h:2").unwrap();
        let (_, secret) = made.keys.create(&NewKey::new("x", Scope::Read), 5).unwrap();
        let node = NodeId(Uuid::now_v7());
        made.revoked.revoke(node, "gone", 5).unwrap();
        let unspent = made.tokens.create("h:1", made.ca.fingerprint(), 1, 99).unwrap();
        write(&dir, &file).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let bytes = fs::read(&file).unwrap();
        assert!(!bytes.windows(secret.len()).any(|w| w == secret.as_bytes()));

        let to = root.path().join("deep/b");
        restore(&file, &to).unwrap();
        let back = ClusterDir::open(&to).unwrap();
        assert_eq!(back.ca.fingerprint(), made.ca.fingerprint());
        assert_eq!(back.identity, made.identity);
        assert!(back.keys.verify(&secret, 6).unwrap().is_some() && back.revoked.has(node));
        assert_eq!(back.client, made.client);
        let spent = back.tokens.check(&unspent.secret, 6).unwrap_err();
        assert!(spent.to_string().contains("unknown join token"), "{spent}");
        let again = restore(&file, &to).unwrap_err().to_string();
        assert!(again.contains("is not empty"), "{again}");
        // Whatever the old one did since, the pipeline's number is a higher one.
        assert!(life::begin(&to).unwrap() > life::begin(&dir).unwrap() + 100_000);
    }

    #[test]
    fn a_folder_that_is_there_stays_the_same_one() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let (dir, file) = (root.path().join("a"), root.path().join("a.backup"));
        let made = ClusterDir::open_or_init(&dir, "h:1", "http://h:2").unwrap();
        write(&dir, &file).unwrap();
        let volume = root.path().join("volume");
        fs::create_dir_all(volume.join(LOST_AND_FOUND)).unwrap();
        let before = fs::metadata(&volume).unwrap().ino();
        restore(&file, &volume).unwrap();
        assert_eq!(fs::metadata(&volume).unwrap().ino(), before);
        let back = ClusterDir::open(&volume).unwrap();
        assert_eq!(back.identity, made.identity);
        let left = fs::read_dir(&volume)
            .unwrap()
            .filter_map(|e| e.unwrap().file_name().into_string().ok());
        assert!(left.into_iter().all(|name| !name.ends_with(".restore")));
        // What cannot be restored leaves it as it was.
        let other = root.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(&file, b"not a zip").unwrap();
        restore(&file, &other).unwrap_err();
        assert!(is_empty(&other).unwrap());
    }

    #[test]
    fn what_is_no_backup_leaves_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let zip = |names: &[&str]| {
            let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
            for name in names {
                zip.start_file(*name, SimpleFileOptions::default()).unwrap();
                zip.write_all(b"x").unwrap();
            }
            zip.finish().unwrap().into_inner()
        };
        let cases = [
            (b"not a zip".to_vec(), ""),
            (zip(&["../evil"]), "does not belong"),
            (zip(&["keys/../../evil.json"]), "does not belong"),
            (zip(&["/etc/passwd"]), "does not belong"),
            (zip(&["keys/.json"]), "does not belong"),
            (zip(&["ca.pem"]), "ca.key is missing"),
            (zip(&FILES[..NEEDED]), "ca.pem"),
        ];
        for (bytes, message) in cases {
            let file = root.path().join("x.backup");
            fs::write(&file, bytes).unwrap();
            let error = restore(&file, &root.path().join("to")).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            let left: Vec<_> = fs::read_dir(root.path()).unwrap().collect();
            assert_eq!(left.len(), 1, "{left:?}");
        }
    }

    #[test]
    fn a_newer_backup_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let (dir, file) = (root.path().join("a"), root.path().join("a.backup"));
        ClusterDir::open_or_init(&dir, "h:1", "http://h:2").unwrap();
        fs::write(dir.join(STATE_FILE), "format = 9\n").unwrap();
        write(&dir, &file).unwrap();
        let error = restore(&file, &root.path().join("b")).unwrap_err().to_string();
        assert!(error.contains("format 9"), "{error}");
    }
}
