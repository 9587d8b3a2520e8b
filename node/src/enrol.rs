//! Membership on disk: the node's certificate, key and coordinator; how to get them, and how they
//! stay valid.
//!
//! A node enrols once, with a token. From then on its present certificate is what speaks for it:
//! it renews it over the same endpoint when two thirds of its life are over, and asks there for the
//! cluster's address when `--coordinator` names another host than before. `node.toml` carries the
//! number of its format: an older one is kept beside the new, a newer one is refused.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use millrace_net::certs::LiveIdentity;
use millrace_net::join::{request_join, request_renewal, request_seat};
use millrace_net::{Identity, NodeKey, PeerName, private_file};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// Prefix of certificate and key files.
const IDENTITY: &str = "node";
/// Where the coordinator is.
const FILE: &str = "node.toml";
/// The format that this program writes. 1 had no number, and no public address.
const FORMAT: u32 = 2;
/// How often a running node looks whether its certificate is due. By the clock of the day, which
/// may jump: a renewal too early does no harm, and one too late is caught here.
const LOOK: Duration = Duration::from_secs(600);

/// What is kept beside the certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(default = "first_format")]
    format: u32,
    /// `host:port` of the coordinator's cluster endpoint.
    coordinator: String,
    /// `host:port` of its public endpoint, where certificates are renewed.
    #[serde(default)]
    public: Option<String>,
}

fn first_format() -> u32 {
    1
}

/// A member's papers.
#[derive(Debug)]
pub struct Membership {
    /// Certificate and key.
    pub identity: Identity,
    /// The name in the certificate.
    pub node_id: NodeId,
    /// `host:port` of the coordinator's cluster endpoint.
    pub coordinator: String,
    /// How the certificate is renewed; `None` where it is not.
    pub renewal: Option<Renewal>,
}

/// What renewing takes.
#[derive(Clone, Debug)]
pub struct Renewal {
    /// The node's folder.
    dir: PathBuf,
    /// `host:port` of the coordinator's public endpoint.
    public: String,
}

/// Whether the folder is that of a node that has enrolled.
pub fn is_member(dir: &Path) -> bool {
    dir.join(FILE).exists()
}

/// Loads the node's membership, or enrols with the token.
///
/// # Errors
/// If there is neither, or the coordinator refuses.
pub async fn membership(config: &Config) -> anyhow::Result<Membership> {
    let file = config.dir.join(FILE);
    if file.exists() {
        return load(config, &file).await;
    }
    let mut token = config.token.clone().ok_or_else(|| {
        anyhow!(
            "this node is not a member yet ({} is not there): run 'millrace-coordinator token \
             create' on the coordinator and start with --token TOKEN",
            file.display()
        )
    })?;
    if let Some(coordinator) = &config.coordinator {
        token.addr.clone_from(coordinator);
    }
    // The key is saved first, so that a repeated request presents the same one and is granted.
    let key = match NodeKey::load(&config.dir, IDENTITY) {
        Ok(key) => key,
        Err(_) => {
            let key = NodeKey::generate()?;
            key.save(&config.dir, IDENTITY)?;
            key
        }
    };
    let joined = request_join(&token, &key)
        .await
        .map_err(|status| anyhow!("cannot join the cluster at {}: {status}", token.addr))?;
    joined.identity.save(&config.dir, IDENTITY)?;
    let saved = Saved {
        format: FORMAT,
        coordinator: joined.cluster_addr.clone(),
        public: Some(token.addr.clone()),
    };
    save(&file, &saved)?;
    tracing::info!(node = %joined.node_id, "enrolled; the token is no longer needed");
    Ok(Membership {
        identity: joined.identity,
        node_id: joined.node_id,
        coordinator: joined.cluster_addr,
        renewal: Some(Renewal { dir: config.dir.clone(), public: token.addr }),
    })
}

/// Makes the folder of a further node of this machine that of a member, unless it is one.
///
/// # Errors
/// If the coordinator refuses, or cannot be reached.
pub async fn seat(machine: &Membership, seat: u16, dir: &Path) -> anyhow::Result<()> {
    let file = dir.join(FILE);
    if file.exists() {
        return Ok(());
    }
    let Some(renewal) = &machine.renewal else {
        return Err(anyhow!("{}: nobody to ask for a certificate", dir.display()));
    };
    let joined = request_seat(&renewal.public, &machine.identity, seat)
        .await
        .map_err(|status| anyhow!("cannot enrol {}: {status}", dir.display()))?;
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    joined.identity.save(dir, IDENTITY)?;
    let public = Some(renewal.public.clone());
    save(&file, &Saved { format: FORMAT, coordinator: joined.cluster_addr, public })?;
    tracing::info!(node = %joined.node_id, "enrolled {}", dir.display());
    Ok(())
}

async fn load(config: &Config, file: &Path) -> anyhow::Result<Membership> {
    let mut saved = read(file)?;
    let mut identity = Identity::load(&config.dir, IDENTITY)?;
    let PeerName::Node(node_id) = identity.name()? else {
        return Err(anyhow!("{} does not hold a node's certificate", config.dir.display()));
    };
    let public = config.coordinator.clone().or_else(|| saved.public.clone());
    let moved = config.coordinator.is_some() && config.coordinator != saved.public;
    let renewal = public.map(|public| Renewal { dir: config.dir.clone(), public });
    if let Some(renewal) = renewal.as_ref().filter(|_| moved || is_due(&identity)) {
        match renewal.renew(&mut identity).await {
            Ok(coordinator) => saved = renewal.remember(coordinator)?,
            Err(status) if is_final(&status) => {
                return Err(anyhow!("the coordinator refuses this node: {}", status.message));
            }
            Err(status) => {
                tracing::warn!("the certificate is not renewed: {status}");
                saved.coordinator = on_host(config, saved.coordinator);
            }
        }
    }
    Ok(Membership { identity, node_id, coordinator: saved.coordinator, renewal })
}

fn read(file: &Path) -> anyhow::Result<Saved> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let newer = |found: i64| {
        anyhow!(
            "{} has format {found}, and this program ({}) knows formats up to {FORMAT}: run the \
             release that wrote it, or a newer one",
            file.display(),
            env!("CARGO_PKG_VERSION")
        )
    };
    let table: toml::Table = toml::from_str(&text).with_context(|| file.display().to_string())?;
    match table.get("format").and_then(toml::Value::as_integer) {
        Some(found) if found > i64::from(FORMAT) => Err(newer(found)),
        _ => toml::from_str(&text).with_context(|| file.display().to_string()),
    }
}

/// Whether asking again cannot help.
fn is_final(status: &Status) -> bool {
    matches!(status.code, ErrorCode::PermissionDenied)
}

fn is_due(identity: &Identity) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    identity.validity().is_ok_and(|validity| validity.is_due(now))
}

/// The coordinator's cluster address, on another host where `--coordinator` names one.
fn on_host(config: &Config, saved: String) -> String {
    let host = config.coordinator.as_deref().and_then(|c| c.rsplit_once(':'));
    match (host, saved.rsplit_once(':')) {
        (Some((host, _)), Some((_, port))) => format!("{host}:{port}"),
        _ => saved,
    }
}

impl Renewal {
    /// Gets and saves a new certificate; the answer is the cluster's address.
    async fn renew(&self, identity: &mut Identity) -> Result<String, Status> {
        let joined = request_renewal(&self.public, identity).await?;
        if let Err(e) = joined.identity.save(&self.dir, IDENTITY) {
            tracing::warn!("the renewed certificate is not saved: {e}");
        }
        *identity = joined.identity;
        tracing::info!(node = %joined.node_id, "the certificate was renewed");
        Ok(joined.cluster_addr)
    }

    fn remember(&self, coordinator: String) -> anyhow::Result<Saved> {
        let saved = Saved { format: FORMAT, coordinator, public: Some(self.public.clone()) };
        save(&self.dir.join(FILE), &saved)?;
        Ok(saved)
    }

    /// Renews what `live` shows, before its end, for as long as the node runs. A refusal is for the
    /// link to notice: here it is only logged.
    pub async fn keep(self, mut identity: Identity, live: LiveIdentity) {
        loop {
            tokio::time::sleep(LOOK).await;
            if !is_due(&identity) {
                continue;
            }
            match self.renew(&mut identity).await {
                Ok(coordinator) => {
                    let saved = self.remember(coordinator).map(|_| ());
                    let used = live.replace(&identity).map_err(anyhow::Error::from);
                    if let Err(e) = saved.and(used) {
                        tracing::warn!("the renewed certificate: {e:#}");
                    }
                }
                Err(status) => tracing::warn!("the certificate is not renewed: {status}"),
            }
        }
    }
}

fn save(path: &Path, saved: &Saved) -> anyhow::Result<()> {
    if let Ok(old) = read(path)
        && old.format < saved.format
    {
        let copy = path.with_extension(format!("toml.format-{}", old.format));
        std::fs::copy(path, &copy).with_context(|| copy.display().to_string())?;
    }
    private_file::write(path, toml::to_string(saved)?.as_bytes())?;
    Ok(())
}

/// Papers for a node inside the coordinator's own process.
#[derive(Debug)]
pub struct Issued {
    /// Certificate and key.
    pub identity: Identity,
    /// `host:port` of the coordinator's cluster endpoint.
    pub coordinator: String,
}

impl Issued {
    /// As a membership. Such a node lives as long as its process, and its papers are new.
    ///
    /// # Errors
    /// If the certificate is not a node's.
    pub fn membership(self) -> anyhow::Result<Membership> {
        let PeerName::Node(node_id) = self.identity.name()? else {
            return Err(anyhow!("not a node's certificate"));
        };
        let (identity, coordinator) = (self.identity, self.coordinator);
        Ok(Membership { identity, node_id, coordinator, renewal: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_a_format() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        std::fs::write(&file, "coordinator = \"h:8002\"\n").unwrap();
        let old = read(&file).unwrap();
        assert_eq!((old.format, old.public.as_deref()), (1, None));
        let now =
            Saved { format: FORMAT, coordinator: "h:8002".into(), public: Some("h:1".into()) };
        save(&file, &now).unwrap();
        assert_eq!(read(&file).unwrap(), now);
        let copy = std::fs::read_to_string(dir.path().join("node.toml.format-1")).unwrap();
        assert_eq!(copy, "coordinator = \"h:8002\"\n");
        std::fs::write(&file, "format = 9\nnew = 1\n").unwrap();
        let message = read(&file).unwrap_err().to_string();
        assert!(message.contains("node.toml has format 9") && message.contains("up to 2"));
    }
}
