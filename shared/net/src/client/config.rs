//! `client.toml`: what a client needs to reach a cluster.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{NetError, private_file};

/// Addresses, CA and key of a cluster. Written by `init`, `serve` and `up`; mode 0600.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// `host:port` of the QUIC API.
    pub quic: String,
    /// `http://host:port` of the HTTP API.
    pub http: String,
    /// The API key.
    pub api_key: String,
    /// The cluster's CA certificate, PEM.
    pub ca_pem: String,
}

impl fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientConfig")
            .field("quic", &self.quic)
            .field("http", &self.http)
            .finish_non_exhaustive()
    }
}

impl ClientConfig {
    /// Reads `client.toml`.
    ///
    /// # Errors
    /// If the file is missing, or a field is missing, unknown or of the wrong type.
    pub fn load(path: &Path) -> Result<Self, NetError> {
        let bytes = private_file::read(path)?;
        let text = String::from_utf8_lossy(&bytes);
        toml::from_str(&text)
            .map_err(|e| NetError::Identity(format!("{}: {}", path.display(), e.message())))
    }

    /// Writes `client.toml` with mode 0600.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), NetError> {
        let text = toml::to_string(self)
            .map_err(|e| NetError::Identity(format!("{}: {e}", path.display())))?;
        private_file::write(path, text.as_bytes())
    }
}
