//! The cluster's folder: CA, the coordinator's identity, join tokens, API keys, `client.toml`.
//!
//! Made where missing, never overwritten: the CA is what every member trusts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use millrace_net::client::ClientConfig;
use millrace_net::join::TokenStore;
use millrace_net::keys::ApiKeyStore;
use millrace_net::{ClusterCa, Identity, NetError};

/// Prefix of the coordinator's certificate and key files.
const IDENTITY: &str = "coordinator";
/// File that clients read.
pub const CLIENT_FILE: &str = "client.toml";

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
    pub keys: ApiKeyStore,
    /// What the first client needs.
    pub client: ClientConfig,
    /// Whether the CA was made just now.
    pub created: bool,
}

/// Seconds since 1970.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl ClusterDir {
    /// Opens the folder of a cluster that `init`, `serve` or `up` has made.
    ///
    /// # Errors
    /// If it is not one.
    pub fn open(path: &Path) -> Result<Self, NetError> {
        if !path.join("ca.pem").exists() {
            return Err(NetError::Identity(format!(
                "{} is not a cluster's folder: run 'millrace-coordinator init --dir {}' first, or \
                 name the right one with --dir",
                path.display(),
                path.display()
            )));
        }
        let ca = ClusterCa::load(path)?;
        let identity = Identity::load(path, IDENTITY)?;
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
        let (_, api_key) = ApiKeyStore::open(path)?.create("first client", true, unix_now())?;
        let client = ClientConfig {
            quic: quic.to_owned(),
            http: http.to_owned(),
            api_key,
            ca_pem: ca.ca_pem(),
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
            keys: ApiKeyStore::open(path)?,
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
