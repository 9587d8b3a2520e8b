//! How the HTTP API is protected: whose certificate it shows, and what needs no key.
//!
//! Decides what may be started at all, makes the certificates, and keeps them up to date while the
//! coordinator runs. HTTP that others can reach is encrypted unless told otherwise.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::Args;
use millrace_net::ClusterCa;
use millrace_net::certs::{CertFiles, LiveIdentity};
use millrace_net::tls::WebCerts;
use tokio::signal::unix::{SignalKind, signal};

use crate::state::{renew_identity, unix_now};

/// How often certificate files are looked at, and the dates of certificates.
const LOOK: Duration = Duration::from_secs(10);

/// What the operator chose.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Security")]
pub struct Security {
    /// Certificate for HTTPS and for clients of the QUIC API that do not know the cluster's own CA:
    /// a PEM file, its chain included. Read again when it changes, and at SIGHUP
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// HTTPS with a certificate of the cluster's own CA; clients trust the ca_pem in client.toml
    #[arg(long, conflicts_with = "tls_cert")]
    pub https: bool,
    /// Serve HTTP without encryption also beyond loopback, as behind a proxy that does TLS
    #[arg(long, conflicts_with_all = ["tls_cert", "https"])]
    pub insecure_http: bool,
    /// Let anybody read /metrics; else that needs a key, of any scope
    #[arg(long)]
    pub public_metrics: bool,
}

impl Security {
    /// Whether HTTP may be served there.
    ///
    /// # Errors
    /// If keys and prompts could be read on the way.
    pub fn check(&self, http: Option<SocketAddr>) -> anyhow::Result<()> {
        let encrypted = self.scheme() == "https";
        match http.filter(|addr| !addr.ip().to_canonical().is_loopback()) {
            Some(addr) if !encrypted && !self.insecure_http => Err(anyhow!(
                "HTTP on {addr} would not be encrypted, so that API keys and prompts could be read \
                 on the way: give --tls-cert and --tls-key, or --https for a certificate of the \
                 cluster's own CA, or --insecure-http where a proxy in front does TLS"
            )),
            _ => Ok(()),
        }
    }

    /// What URLs of the HTTP API begin with.
    pub fn scheme(&self) -> &'static str {
        if self.https || self.tls_cert.is_some() { "https" } else { "http" }
    }

    /// The company's certificate, if there is one.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn files(&self) -> anyhow::Result<Option<CertFiles>> {
        let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        let files = CertFiles::load(cert, key).context("--tls-cert, --tls-key")?;
        if !files.is_valid_at(unix_now()) {
            tracing::warn!("the certificate in {} is not valid now", cert.display());
        }
        Ok(Some(files))
    }
}

/// Certificates in use.
#[derive(Debug)]
pub struct Certs {
    /// The coordinator's own, for members.
    pub own: LiveIdentity,
    /// The company's.
    pub files: Option<CertFiles>,
    /// The cluster's, for HTTPS.
    web: Option<(LiveIdentity, Vec<String>)>,
}

impl Certs {
    /// Loads and makes what is needed. `names`: hosts and addresses under which HTTPS is reached.
    ///
    /// # Errors
    /// If files cannot be used, or a name is none.
    pub fn new(
        security: &Security,
        ca: &ClusterCa,
        own: LiveIdentity,
        names: Vec<String>,
    ) -> anyhow::Result<Self> {
        let web = match security.https {
            false => None,
            true => Some((LiveIdentity::new(&ca.issue_web(&names).context("--https")?)?, names)),
        };
        Ok(Self { own, files: security.files()?, web })
    }

    /// What HTTPS shows; `None` for plain HTTP.
    pub fn https(&self) -> Option<WebCerts> {
        let files = self.files.clone().map(WebCerts::Files);
        files.or_else(|| self.web.as_ref().map(|(web, _)| WebCerts::Own(web.clone())))
    }

    /// Renews and reads again what is due, for as long as the program runs. `dir`: the cluster's
    /// folder.
    pub async fn keep(self, dir: PathBuf, ca: std::sync::Arc<ClusterCa>) {
        // Without files nobody asks for a reload, and the signal keeps its usual meaning.
        let hangup = self.files.as_ref().and_then(|_| signal(SignalKind::hangup()).ok());
        let mut hangup = hangup;
        let mut renewed = unix_now();
        loop {
            let told = async {
                match &mut hangup {
                    Some(hangup) => drop(hangup.recv().await),
                    None => std::future::pending().await,
                }
            };
            let force = tokio::select! {
                () = told => true,
                () = tokio::time::sleep(LOOK) => false,
            };
            if let Some(files) = &self.files {
                match files.reload(force) {
                    Ok(true) => tracing::info!("--tls-cert was read again"),
                    Ok(false) => {}
                    Err(e) => tracing::error!("the former certificate stays in use: {e}"),
                }
            }
            // A clock that jumps brings a renewal too many, and does no harm.
            let now = unix_now();
            if now.abs_diff(renewed) >= millrace_net::identity::MEMBER_LIFETIME.as_secs() / 6 {
                match self.renew(&dir, &ca) {
                    Ok(()) => renewed = now,
                    Err(e) => tracing::error!("the certificate is not renewed: {e:#}"),
                }
            }
        }
    }

    fn renew(&self, dir: &std::path::Path, ca: &ClusterCa) -> anyhow::Result<()> {
        self.own.replace(&renew_identity(dir, ca)?)?;
        if let Some((web, names)) = &self.web {
            web.replace(&ca.issue_web(names)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_beyond_loopback_is_encrypted_or_named() {
        let at = |addr: &str| Some(addr.parse::<SocketAddr>().unwrap());
        let plain = Security::default();
        assert!(plain.check(None).is_ok());
        for near in ["127.0.0.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert!(plain.check(at(near)).is_ok(), "{near}");
        }
        for far in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[2001:db8::1]:1"] {
            let message = plain.check(at(far)).unwrap_err().to_string();
            for flag in ["--insecure-http", "--tls-cert", "--https", far] {
                assert!(message.contains(flag), "{message}");
            }
            let insecure = Security { insecure_http: true, ..plain.clone() };
            let own = Security { https: true, ..plain.clone() };
            let files = Security { tls_cert: Some("c".into()), ..plain.clone() };
            assert!([insecure, own, files].iter().all(|s| s.check(at(far)).is_ok()));
        }
    }
}
