//! The cluster's folder: CA, the coordinator's identity, join tokens, API keys, nodes that are kept
//! out, `client.toml`.
//!
//! Made where missing, never overwritten: the CA is what every member trusts. `state.toml` says in
//! which format the rest is. An older format is brought up to date when the folder is opened, after
//! a copy was made beside it; a newer one is refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use millrace_net::client::ClientConfig;
use millrace_net::join::TokenStore;
use millrace_net::keys::{self, ApiKeyStore};
use millrace_net::revoked::Revocations;
use millrace_net::{ClusterCa, Identity, NetError, private_file};
use millrace_shared::wire::admin::{NewKey, Scope};
use serde::{Deserialize, Serialize};

use crate::backup;

/// Prefix of the coordinator's certificate and key files.
const IDENTITY: &str = "coordinator";
/// File that clients read.
pub const CLIENT_FILE: &str = "client.toml";
/// File that says in which format the folder is.
pub(crate) const STATE_FILE: &str = "state.toml";
/// The format that this program writes. 1 had no `state.toml`, and keys without scopes.
pub const FORMAT: u32 = 2;

/// An opened folder.
#[derive(Debug)]
pub struct ClusterDir {
    /// The folder.
    pub path: PathBuf,
    /// The CA.
    pub ca: Arc<ClusterCa>,
    /// The coordinator's identity.
    pub identity: Identity,
    /// Join tokens.
    pub tokens: Arc<TokenStore>,
    /// API keys.
    pub keys: Arc<ApiKeyStore>,
    /// Nodes that are kept out.
    pub revoked: Arc<Revocations>,
    /// What the first client needs.
    pub client: ClientConfig,
    /// Whether the CA was made just now.
    pub created: bool,
}

/// What `state.toml` holds.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    format: u32,
}

/// Seconds since 1970.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl ClusterDir {
    /// Opens the folder of a cluster that `init`, `serve` or `up` has made.
    ///
    /// # Errors
    /// If it is not one, or of a newer format.
    pub fn open(path: &Path) -> Result<Self, NetError> {
        if !path.join("ca.pem").exists() {
            return Err(NetError::Identity(format!(
                "{} is not a cluster's folder: run 'millrace-coordinator init --dir {}' first, or \
                 name the right one with --dir",
                path.display(),
                path.display()
            )));
        }
        migrate(path)?;
        let ca = ClusterCa::load(path)?;
        let identity = match Identity::load(path, IDENTITY) {
            Ok(kept) if kept.is_pair() && !kept.validity()?.is_due(unix_now()) => kept,
            // Due, or torn: whoever renewed it last was ended between certificate and key.
            Ok(_) => renew_identity(path, &ca)?,
            Err(e) => return Err(e),
        };
        let client = ClientConfig::load(&path.join(CLIENT_FILE))?;
        Self::assemble(path, (ca, identity), client, false)
    }

    /// Opens the folder, or makes it: CA, identity and the first client's key. `quic` and `http`
    /// are where clients of a new one will find the coordinator.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open_or_init(path: &Path, quic: &str, http: &str) -> Result<Self, NetError> {
        if path.join("ca.pem").exists() {
            return Self::open(path);
        }
        let ca = ClusterCa::create()?;
        let identity = ca.issue_coordinator()?;
        identity.save(path, IDENTITY)?;
        write_format(path)?;
        let first = NewKey::new("first client", Scope::Admin);
        let (_, api_key) = ApiKeyStore::open(path)?.create(&first, unix_now())?;
        let client = ClientConfig {
            quic: quic.to_owned(),
            http: http.to_owned(),
            api_key,
            ca_pem: ca.ca_pem(),
            server_name: None,
        };
        client.save(&path.join(CLIENT_FILE))?;
        // Last: its certificate is what says that the folder is complete.
        ca.save(path)?;
        Self::assemble(path, (ca, identity), client, true)
    }

    fn assemble(
        path: &Path,
        (ca, identity): (ClusterCa, Identity),
        client: ClientConfig,
        created: bool,
    ) -> Result<Self, NetError> {
        Ok(Self {
            path: path.to_owned(),
            ca: Arc::new(ca),
            identity,
            tokens: Arc::new(TokenStore::open(path)?),
            keys: Arc::new(ApiKeyStore::open(path)?),
            revoked: Arc::new(Revocations::open(path)?),
            client,
            created,
        })
    }

    /// Writes the addresses in use into `client.toml`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set_addresses(&mut self, quic: &str, http: &str) -> Result<(), NetError> {
        if self.client.quic != quic || self.client.http != http {
            quic.clone_into(&mut self.client.quic);
            http.clone_into(&mut self.client.http);
            self.client.save(&self.path.join(CLIENT_FILE))?;
        }
        Ok(())
    }
}

/// Gives the coordinator a new certificate.
///
/// # Errors
/// If it cannot be written.
pub fn renew_identity(path: &Path, ca: &ClusterCa) -> Result<Identity, NetError> {
    let identity = ca.issue_coordinator()?;
    identity.save(path, IDENTITY)?;
    tracing::info!("the coordinator's certificate was renewed");
    Ok(identity)
}

/// The folder's format; 1 where nothing says it.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn format(path: &Path) -> Result<u32, NetError> {
    let file = path.join(STATE_FILE);
    if !file.exists() {
        return Ok(1);
    }
    let text = String::from_utf8_lossy(&private_file::read(&file)?).into_owned();
    let state: State = toml::from_str(&text)
        .map_err(|e| NetError::Identity(format!("{}: {}", file.display(), e.message())))?;
    Ok(state.format)
}

fn write_format(path: &Path) -> Result<(), NetError> {
    private_file::create_dir(path)?;
    private_file::write(&path.join(STATE_FILE), format!("format = {FORMAT}\n").as_bytes())
}

/// Brings an older folder up to date; the copy is a backup like any other.
fn migrate(path: &Path) -> Result<(), NetError> {
    let found = format(path)?;
    if found > FORMAT {
        return Err(NetError::Identity(format!(
            "{} has format {found}, and this program ({}) knows formats up to {FORMAT}: run the \
             release that wrote it, or a newer one",
            path.join(STATE_FILE).display(),
            env!("CARGO_PKG_VERSION"),
        )));
    }
    if found == FORMAT {
        return Ok(());
    }
    let copy = path.join(format!("before-format-{FORMAT}.backup"));
    if !copy.exists() {
        backup::write(path, &copy)?;
    }
    keys::migrate_v1(path)?;
    write_format(path)?;
    tracing::info!(
        "{} was brought from format {found} to {FORMAT}; a copy of before is in {}",
        path.display(),
        copy.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_format_is_brought_up_to_date_and_a_newer_one_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("c");
        let made = ClusterDir::open_or_init(&dir, "h:1", "http://h:2").unwrap();
        let key = made.client.api_key.clone();
        // As the first release left it.
        std::fs::remove_file(dir.join(STATE_FILE)).unwrap();
        let record = made.keys.list().unwrap().remove(0);
        let file = dir.join(format!("keys/{}.json", record.id));
        let text = std::fs::read_to_string(&file).unwrap();
        let now: serde_json::Value = serde_json::from_str(&text).unwrap();
        let old = serde_json::json!({
            "id": now["id"], "label": "first client", "created": 3, "admin": true,
            "hash": now["hash"],
        });
        std::fs::write(&file, old.to_string()).unwrap();

        let opened = ClusterDir::open(&dir).unwrap();
        assert_eq!(opened.keys.verify(&key, 5).unwrap().unwrap().key.scope, Scope::Admin);
        assert_eq!(format(&dir).unwrap(), FORMAT);
        let copy = dir.join("before-format-2.backup");
        assert!(copy.exists(), "a copy is kept");
        // The copy is whole: restored, it is migrated again.
        let again = root.path().join("again");
        backup::restore(&copy, &again).unwrap();
        let again = ClusterDir::open(&again).unwrap();
        assert!(again.keys.verify(&key, 5).unwrap().is_some());

        std::fs::write(dir.join(STATE_FILE), "format = 3\n").unwrap();
        let message = ClusterDir::open(&dir).unwrap_err().to_string();
        assert!(message.contains("state.toml has format 3") && message.contains("up to 2"));
    }
}
