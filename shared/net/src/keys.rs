//! API keys of clients: one small file per key in `DIR/keys`, named by the key's id.
//!
//! Only the SHA-256 of a secret is stored; the secret is shown once. A running server notices keys
//! that the command line creates or revokes by the folder's modification time. Which key may do
//! what is not decided here.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{NetError, private_file};

const PREFIX: &str = "mlr-";
/// A folder changed this recently may change again within the clock's resolution: read it again.
const SETTLED: Duration = Duration::from_secs(2);
/// Longest label.
const MAX_LABEL_BYTES: usize = 128;

/// What is known of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    /// Name of the key, for `revoke`, logs and metrics.
    pub id: String,
    /// What people call it.
    pub label: String,
    /// Unix seconds at which it was made.
    pub created: u64,
    /// Whether its holder may change the cluster.
    #[serde(default)]
    pub admin: bool,
    /// SHA-256 of the secret, hexadecimal.
    hash: String,
}

/// The folder of API keys.
#[derive(Debug)]
pub struct ApiKeyStore {
    dir: PathBuf,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    /// Modification time of the folder when it was read, if it was settled then.
    read_at: Option<SystemTime>,
    keys: Vec<ApiKey>,
}

impl ApiKeyStore {
    /// The store in `dir/keys`, which is made if needed.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn open(dir: &Path) -> Result<Self, NetError> {
        let dir = dir.join("keys");
        private_file::create_dir(&dir)?;
        Ok(Self { dir, cache: Mutex::default() })
    }

    /// Makes a key; returns its record and the secret, which is not stored. `admin`: its holder may
    /// change the cluster. `now`: Unix seconds.
    ///
    /// # Errors
    /// If the record cannot be written or the label is too long.
    pub fn create(&self, label: &str, admin: bool, now: u64) -> Result<(ApiKey, String), NetError> {
        if label.len() > MAX_LABEL_BYTES {
            return Err(NetError::Protocol(format!(
                "a key's label may have at most {MAX_LABEL_BYTES} bytes"
            )));
        }
        let secret = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(private_file::random::<32>()?));
        let key = ApiKey {
            id: private_file::hex(&private_file::random::<6>()?),
            label: label.to_owned(),
            created: now,
            admin,
            hash: private_file::hex(&Sha256::digest(secret.as_bytes())),
        };
        let text = serde_json::to_vec_pretty(&key)
            .map_err(|e| NetError::Protocol(format!("key record: {e}")))?;
        private_file::write(&self.path(&key.id), &text)?;
        Ok((key, secret))
    }

    /// All keys, oldest first.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn list(&self) -> Result<Vec<ApiKey>, NetError> {
        let failed = |e| NetError::file(&self.dir, e);
        let mut keys = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match fs::read(&path) {
                Ok(bytes) => match serde_json::from_slice::<ApiKey>(&bytes) {
                    Ok(key) => keys.push(key),
                    Err(e) => {
                        tracing::warn!(path = %path.display(), error = %e, "not a key record");
                    }
                },
                // Revoked meanwhile.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
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
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(NetError::file(&path, e)),
        }
    }

    /// The key with this secret, if there is one. A store that cannot be read knows no keys.
    pub fn verify(&self, secret: &str) -> Option<ApiKey> {
        let hash = private_file::hex(&Sha256::digest(secret.as_bytes()));
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = self.refresh(&mut cache) {
            tracing::error!(error = %e, "cannot read the API keys");
            return None;
        }
        let mut found = None;
        for key in &cache.keys {
            if same(key.hash.as_bytes(), hash.as_bytes()) {
                found = Some(key.clone());
            }
        }
        found
    }

    fn refresh(&self, cache: &mut Cache) -> Result<(), NetError> {
        let modified = fs::metadata(&self.dir)
            .and_then(|m| m.modified())
            .map_err(|e| NetError::file(&self.dir, e))?;
        if cache.read_at == Some(modified) {
            return Ok(());
        }
        cache.keys = self.list()?;
        let settled = SystemTime::now().duration_since(modified).is_ok_and(|age| age >= SETTLED);
        cache.read_at = settled.then_some(modified);
        Ok(())
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// Compares without telling, by its duration, where a difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0u8, |d, (x, y)| std::hint::black_box(d | (x ^ y)));
    a.len() == b.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn life_of_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let server = ApiKeyStore::open(dir.path()).unwrap();
        let cli = ApiKeyStore::open(dir.path()).unwrap();
        assert_eq!(server.verify("mlr-nothing"), None);
        let (key, secret) = cli.create("laptop", true, 7).unwrap();
        assert!(secret.starts_with("mlr-") && secret.len() > 40);
        assert_eq!(server.verify(&secret), Some(key.clone()), "made beside a running server");
        assert_eq!(server.verify(&secret[..secret.len() - 1]), None);
        assert_eq!(cli.list().unwrap(), vec![key.clone()]);
        assert!(cli.revoke(&key.id).unwrap());
        assert!(!cli.revoke(&key.id).unwrap());
        assert!(!cli.revoke("../keys").unwrap());
        assert_eq!(server.verify(&secret), None, "revoked beside a running server");
    }

    #[test]
    fn files_are_private_and_hold_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let store = ApiKeyStore::open(dir.path()).unwrap();
        let (key, secret) = store.create("x", false, 7).unwrap();
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
