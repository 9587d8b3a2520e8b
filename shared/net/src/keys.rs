//! API keys of clients: one small file per key in `DIR/keys`, named by the key's id.
//!
//! Only the SHA-256 of a secret is stored; the secret is shown once. A running server notices keys
//! that the command line creates or revokes by the folder's modification time. When keys were used
//! is kept in memory and written now and then to `DIR/key-uses.json`. Which key may do what, and
//! how much, is recorded here and decided by the coordinator's gate.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use millrace_shared::wire::admin::{KeyInfo, NewKey, Scope};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{NetError, private_file};

const PREFIX: &str = "mlr-";
/// A folder changed this recently may change again within the clock's resolution: read it again.
const SETTLED: Duration = Duration::from_secs(2);
/// Longest name.
const MAX_NAME_BYTES: usize = 128;
/// Most keys: each call compares with all of them.
const MAX_KEYS: usize = 4096;

/// A key as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    /// Name of the key, for `revoke`, logs and metrics.
    pub id: String,
    /// What was asked for when it was made.
    pub key: NewKey,
    /// Unix seconds at which it was made.
    pub created: u64,
    /// SHA-256 of the secret, hexadecimal.
    hash: String,
}

/// A key as state folders of format 1 stored it.
#[derive(Debug, Deserialize)]
struct ApiKeyV1 {
    id: String,
    label: String,
    created: u64,
    #[serde(default)]
    admin: bool,
    hash: String,
}

/// The folder of API keys.
#[derive(Debug)]
pub struct ApiKeyStore {
    dir: PathBuf,
    cache: Mutex<Cache>,
    uses: Mutex<Uses>,
}

#[derive(Debug, Default)]
struct Cache {
    /// Modification time of the folder when it was read, if it was settled then.
    read_at: Option<SystemTime>,
    keys: Vec<ApiKey>,
}

#[derive(Debug, Default)]
struct Uses {
    /// Unix seconds by id.
    last: BTreeMap<String, u64>,
    /// Since they were written.
    changed: bool,
}

impl ApiKeyStore {
    /// The store in `dir/keys`, which is made if needed.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn open(dir: &Path) -> Result<Self, NetError> {
        let dir = dir.join("keys");
        private_file::create_dir(&dir)?;
        // Of no weight: what cannot be read is forgotten.
        let last = fs::read(uses_file(&dir)).ok();
        let last = last.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let uses = Mutex::new(Uses { last, changed: false });
        Ok(Self { dir, cache: Mutex::default(), uses })
    }

    /// Makes a key; returns what is known of it and the secret, which is not stored. `now`: Unix
    /// seconds.
    ///
    /// # Errors
    /// If the record cannot be written, the name is too long or has control characters, or there
    /// are too many keys.
    pub fn create(&self, key: &NewKey, now: u64) -> Result<(KeyInfo, String), NetError> {
        check(key, now)?;
        if self.read_all()?.len() >= MAX_KEYS {
            return Err(NetError::Protocol(format!(
                "there are {MAX_KEYS} keys, which is the most: revoke one first"
            )));
        }
        let secret = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(private_file::random::<32>()?));
        let key = ApiKey {
            id: private_file::hex(&private_file::random::<6>()?),
            key: key.clone(),
            created: now,
            hash: private_file::hex(&Sha256::digest(secret.as_bytes())),
        };
        write(&self.dir, &key)?;
        Ok((self.info(key), secret))
    }

    /// All keys, oldest first.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn list(&self) -> Result<Vec<KeyInfo>, NetError> {
        Ok(self.read_all()?.into_iter().map(|key| self.info(key)).collect())
    }

    fn info(&self, key: ApiKey) -> KeyInfo {
        let last_used = self.uses().last.get(&key.id).copied();
        KeyInfo { id: key.id, key: key.key, created: key.created, last_used }
    }

    fn read_all(&self) -> Result<Vec<ApiKey>, NetError> {
        let mut keys = Vec::new();
        for path in records(&self.dir)? {
            match fs::read(&path) {
                Ok(bytes) => match serde_json::from_slice::<ApiKey>(&bytes) {
                    Ok(key) => keys.push(key),
                    Err(e) => {
                        tracing::warn!(path = %path.display(), error = %e, "not a key record");
                    }
                },
                // Revoked meanwhile.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                // Made by another user, say: this key alone is not valid.
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                    tracing::warn!(path = %path.display(), error = %e, "a key record is closed");
                }
                Err(e) => return Err(NetError::file(&path, e)),
            }
        }
        keys.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(keys)
    }

    /// Deletes a key; `false` if there is none of this id.
    ///
    /// # Errors
    /// If the record cannot be deleted.
    pub fn revoke(&self, id: &str) -> Result<bool, NetError> {
        if id.is_empty() || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(false);
        }
        let path = self.path(id);
        match fs::remove_file(&path) {
            Ok(()) => {
                private_file::sync_folder(&path)?;
                self.uses().last.remove(id);
                Ok(true)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(NetError::file(&path, e)),
        }
    }

    /// The key with this secret, if there is one that is valid at `now` (Unix seconds).
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn verify(&self, secret: &str, now: u64) -> Result<Option<ApiKey>, NetError> {
        let hash = private_file::hex(&Sha256::digest(secret.as_bytes()));
        let found = {
            let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            self.refresh(&mut cache)?;
            let mut found = None;
            for key in &cache.keys {
                if same(key.hash.as_bytes(), hash.as_bytes()) {
                    found = Some(key.clone());
                }
            }
            found
        };
        let valid = |key: &ApiKey| key.key.expires.is_none_or(|end| now < end);
        let Some(key) = found.filter(valid) else { return Ok(None) };
        let mut uses = self.uses();
        match uses.last.get_mut(&key.id) {
            Some(last) => *last = now,
            None => drop(uses.last.insert(key.id.clone(), now)),
        }
        uses.changed = true;
        Ok(Some(key))
    }

    /// Writes when keys were used, if that has changed.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_uses(&self) -> Result<(), NetError> {
        let bytes = {
            let mut uses = self.uses();
            if !std::mem::take(&mut uses.changed) {
                return Ok(());
            }
            serde_json::to_vec(&uses.last)
                .map_err(|e| NetError::Protocol(format!("uses of keys: {e}")))?
        };
        private_file::write(&uses_file(&self.dir), &bytes)
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refresh(&self, cache: &mut Cache) -> Result<(), NetError> {
        let modified = fs::metadata(&self.dir)
            .and_then(|m| m.modified())
            .map_err(|e| NetError::file(&self.dir, e))?;
        if cache.read_at == Some(modified) {
            return Ok(());
        }
        cache.keys = self.read_all()?;
        let settled = SystemTime::now().duration_since(modified).is_ok_and(|age| age >= SETTLED);
        cache.read_at = settled.then_some(modified);
        Ok(())
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// Rewrites the keys that a folder of format 1 holds.
///
/// # Errors
/// If one cannot be read or written.
pub fn migrate_v1(dir: &Path) -> Result<(), NetError> {
    let dir = dir.join("keys");
    if !dir.exists() {
        return Ok(());
    }
    for path in records(&dir)? {
        let bytes = private_file::read(&path)?;
        // A migration that was interrupted has left some that are done.
        if serde_json::from_slice::<ApiKey>(&bytes).is_ok() {
            continue;
        }
        let old: ApiKeyV1 = serde_json::from_slice(&bytes)
            .map_err(|e| NetError::Identity(format!("{}: {e}", path.display())))?;
        let scope = if old.admin { Scope::Admin } else { Scope::Generate };
        let key = NewKey::new(old.label, scope);
        let key = ApiKey { id: old.id, key, created: old.created, hash: old.hash };
        write(&dir, &key)?;
    }
    Ok(())
}

fn write(dir: &Path, key: &ApiKey) -> Result<(), NetError> {
    let text = serde_json::to_vec_pretty(key)
        .map_err(|e| NetError::Protocol(format!("key record: {e}")))?;
    private_file::write(&dir.join(format!("{}.json", key.id)), &text)
}

fn records(dir: &Path) -> Result<Vec<PathBuf>, NetError> {
    let failed = |e| NetError::file(dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|e| e == "json") {
            found.push(path);
        }
    }
    Ok(found)
}

fn uses_file(keys: &Path) -> PathBuf {
    keys.with_file_name("key-uses.json")
}

fn check(key: &NewKey, now: u64) -> Result<(), NetError> {
    let wrong = |what: String| Err(NetError::Protocol(what));
    if key.name.len() > MAX_NAME_BYTES || key.name.chars().any(char::is_control) {
        return wrong(format!(
            "a key's name may have at most {MAX_NAME_BYTES} bytes, and no control characters"
        ));
    }
    if key.expires.is_some_and(|end| end <= now) {
        return wrong("the key would have expired already: choose a later end".to_owned());
    }
    let limits = &key.limits;
    let limits = [limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent];
    if limits.contains(&Some(0)) {
        return wrong("a limit of 0 would make the key useless: revoke it instead".to_owned());
    }
    Ok(())
}

/// Compares without telling, by its duration, where a difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0u8, |d, (x, y)| std::hint::black_box(d | (x ^ y)));
    a.len() == b.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admin(name: &str) -> NewKey {
        NewKey::new(name, Scope::Admin)
    }

    #[test]
    fn life_of_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let server = ApiKeyStore::open(dir.path()).unwrap();
        let cli = ApiKeyStore::open(dir.path()).unwrap();
        assert_eq!(server.verify("mlr-nothing", 7).unwrap(), None);
        let (key, secret) = cli.create(&admin("laptop"), 7).unwrap();
        assert!(secret.starts_with("mlr-") && secret.len() > 40);
        let found = server.verify(&secret, 9).unwrap().expect("made beside a running server");
        assert_eq!((&found.id, &found.key), (&key.id, &admin("laptop")));
        assert_eq!(server.verify(&secret[..secret.len() - 1], 9).unwrap(), None);
        assert_eq!(cli.list().unwrap(), vec![key.clone()]);
        assert_eq!(server.list().unwrap()[0].last_used, Some(9));
        server.save_uses().unwrap();
        assert_eq!(ApiKeyStore::open(dir.path()).unwrap().list().unwrap()[0].last_used, Some(9));
        assert!(cli.revoke(&key.id).unwrap());
        assert!(!cli.revoke(&key.id).unwrap());
        assert!(!cli.revoke("../keys").unwrap());
        assert_eq!(server.verify(&secret, 9).unwrap(), None, "revoked beside a running server");
    }

    #[test]
    fn keys_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = ApiKeyStore::open(dir.path()).unwrap();
        let (_, secret) = store.create(&NewKey { expires: Some(10), ..admin("guest") }, 7).unwrap();
        assert!(store.verify(&secret, 9).unwrap().is_some());
        assert_eq!(store.verify(&secret, 10).unwrap(), None);
    }

    #[test]
    fn useless_keys_are_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let store = ApiKeyStore::open(dir.path()).unwrap();
        let mut none = admin("x");
        none.limits.concurrent = Some(0);
        let over = NewKey { expires: Some(7), ..admin("x") };
        for (key, message) in [
            (admin(&"x".repeat(129)), "128 bytes"),
            (admin("a\nb"), "control characters"),
            (none, "a limit of 0"),
            (over, "expired already"),
        ] {
            let error = store.create(&key, 7).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn keys_of_format_1_stay_valid() {
        let dir = tempfile::tempdir().unwrap();
        let store = ApiKeyStore::open(dir.path()).unwrap();
        let secret = "mlr-old";
        let hash = private_file::hex(&Sha256::digest(secret.as_bytes()));
        for (id, more) in [("aa", ", \"admin\": true"), ("bb", "")] {
            let text = format!(
                "{{\"id\": \"{id}\", \"label\": \"l\", \"created\": 3, \"hash\": \"{hash}\"{more}}}"
            );
            fs::write(dir.path().join(format!("keys/{id}.json")), text).unwrap();
        }
        migrate_v1(dir.path()).unwrap();
        migrate_v1(dir.path()).unwrap();
        let scopes: Vec<_> = store.list().unwrap().iter().map(|k| k.key.scope).collect();
        assert_eq!(scopes, [Scope::Admin, Scope::Generate]);
        assert!(store.verify(secret, 4).unwrap().is_some());
    }

    #[test]
    fn files_are_private_and_hold_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let store = ApiKeyStore::open(dir.path()).unwrap();
        let (key, secret) = store.create(&NewKey::new("x", Scope::Read), 7).unwrap();
        let path = dir.path().join("keys").join(format!("{}.json", key.id));
        assert!(!fs::read_to_string(&path).unwrap().contains(&secret));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let folder = fs::metadata(dir.path().join("keys")).unwrap();
            assert_eq!(folder.permissions().mode() & 0o777, 0o700);
        }
    }
}
