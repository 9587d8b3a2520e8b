//! `client.toml`: what a client needs to reach a cluster.

use std::fmt;
use std::path::Path;

use millrace_shared::wire::COORDINATOR_NAME;
use serde::{Deserialize, Serialize};

use crate::identity::parse_certificates;
use crate::{ClientTls, NetError, private_file, tls};

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
    /// The cluster's CA certificate, PEM; empty to trust whom this system trusts.
    pub ca_pem: String,
    /// Name in the coordinator's certificate, where that is not of the cluster's own CA but the
    /// company's [default: the host of `quic` where `ca_pem` is empty, else the cluster's own].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
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

    /// How to connect: whom to trust, and the name that the certificate must carry.
    ///
    /// # Errors
    /// What of the configuration is unusable.
    pub(super) fn tls(&self) -> Result<(ClientTls, String), String> {
        let host = || self.quic.rsplit_once(':').map_or(self.quic.as_str(), |(host, _)| host);
        let bare = || host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if self.ca_pem.is_empty() {
            let tls = tls::api_client_of_system().map_err(|e| e.to_string())?;
            return Ok((tls, self.server_name.clone().unwrap_or_else(bare)));
        }
        let cas = parse_certificates(self.ca_pem.as_bytes()).map_err(|e| format!("ca_pem: {e}"))?;
        if cas.is_empty() {
            return Err("ca_pem holds no certificate".to_owned());
        }
        let tls = tls::api_client_of(&cas).map_err(|e| e.to_string())?;
        Ok((tls, self.server_name.clone().unwrap_or_else(|| COORDINATOR_NAME.to_owned())))
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
