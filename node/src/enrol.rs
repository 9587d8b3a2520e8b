//! Membership on disk: the node's certificate, key and coordinator, or how to get them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use millrace_net::join::request_join;
use millrace_net::{Identity, NodeKey, PeerName};
use millrace_shared::id::NodeId;
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// Prefix of certificate and key files.
const IDENTITY: &str = "node";
/// Where the coordinator is.
const FILE: &str = "node.toml";

/// What is kept beside the certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    /// `host:port` of the coordinator's cluster endpoint.
    coordinator: String,
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
}

/// Loads the node's membership, or enrols with the token.
///
/// # Errors
/// If there is neither, or the coordinator refuses.
pub async fn membership(config: &Config) -> anyhow::Result<Membership> {
    let file = config.dir.join(FILE);
    if file.exists() {
        return load(config, &file);
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
    save(&file, &Saved { coordinator: joined.cluster_addr.clone() })?;
    tracing::info!(node = %joined.node_id, "enrolled; the token is no longer needed");
    Ok(Membership {
        identity: joined.identity,
        node_id: joined.node_id,
        coordinator: joined.cluster_addr,
    })
}

fn load(config: &Config, file: &Path) -> anyhow::Result<Membership> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let saved: Saved = toml::from_str(&text).with_context(|| file.display().to_string())?;
    let identity = Identity::load(&config.dir, IDENTITY)?;
    let PeerName::Node(node_id) = identity.name()? else {
        return Err(anyhow!("{} does not hold a node's certificate", config.dir.display()));
    };
    Ok(Membership { identity, node_id, coordinator: moved(config, saved.coordinator) })
}

/// The coordinator's cluster address, on another host where `--coordinator` names one.
fn moved(config: &Config, saved: String) -> String {
    let host = config.coordinator.as_deref().and_then(|c| c.rsplit_once(':'));
    match (host, saved.rsplit_once(':')) {
        (Some((host, _)), Some((_, port))) => format!("{host}:{port}"),
        _ => saved,
    }
}

fn save(path: &PathBuf, saved: &Saved) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, toml::to_string(saved)?).with_context(|| part.display().to_string())?;
    std::fs::rename(&part, path).with_context(|| path.display().to_string())
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
    /// As a membership.
    ///
    /// # Errors
    /// If the certificate is not a node's.
    pub fn membership(self) -> anyhow::Result<Membership> {
        let PeerName::Node(node_id) = self.identity.name()? else {
            return Err(anyhow!("not a node's certificate"));
        };
        Ok(Membership { identity: self.identity, node_id, coordinator: self.coordinator })
    }
}
