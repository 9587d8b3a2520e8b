//! Nodes that are never let in again: one small file for each in `DIR/revoked`.
//!
//! The cluster endpoint asks here during every handshake ([`crate::tls::cluster_server_of`]), and
//! renewal asks before it signs. Who holds a node's connection waits with [`Revocations::until`].
//! Nothing here ends a revocation: a machine that is wanted again enrols as a new node. With a
//! machine's first node go all of its seats, those too whose certificates it has already.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use millrace_shared::id::NodeId;
use millrace_shared::wire::join::MAX_SEAT;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{NetError, private_file};

/// A node that is not let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// What people called it, where that was known.
    pub name: String,
    /// Unix seconds at which it was revoked.
    pub at: u64,
}

/// The folder of revocations.
#[derive(Debug)]
pub struct Revocations {
    dir: PathBuf,
    kept_out: RwLock<KeptOut>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct KeptOut {
    nodes: BTreeMap<NodeId, Revocation>,
    /// All that these can have.
    seats: HashSet<NodeId>,
}

impl KeptOut {
    fn insert(&mut self, node: NodeId, record: Revocation) {
        if !node.is_seat() {
            self.seats.extend((1..=MAX_SEAT).map(|seat| node.seat(seat)));
        }
        self.nodes.insert(node, record);
    }
}

impl Revocations {
    /// The store in `dir/revoked`, which is made if needed.
    ///
    /// # Errors
    /// If it cannot be made or read, or a record is none: who is kept out must not depend on luck.
    pub fn open(dir: &Path) -> Result<Self, NetError> {
        let dir = dir.join("revoked");
        private_file::create_dir(&dir)?;
        let mut kept_out = KeptOut::default();
        let failed = |e| NetError::file(&dir, e);
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let node = stem.parse().map_err(|_| unusable(&path, "its name is no node's id"))?;
            let record = serde_json::from_slice(&private_file::read(&path)?)
                .map_err(|e| unusable(&path, &e.to_string()))?;
            kept_out.insert(node, record);
        }
        let changed = watch::Sender::new(());
        Ok(Self { dir, kept_out: RwLock::new(kept_out), changed })
    }

    /// Keeps a node out from now on (`now`: Unix seconds), across restarts.
    ///
    /// # Errors
    /// If the record cannot be written; the node is kept out by this process all the same.
    pub fn revoke(&self, node: NodeId, name: &str, now: u64) -> Result<(), NetError> {
        let record = Revocation { name: name.to_owned(), at: now };
        let text = serde_json::to_vec_pretty(&record)
            .map_err(|e| NetError::Protocol(format!("revocation record: {e}")))?;
        self.kept_out.write().unwrap_or_else(PoisonError::into_inner).insert(node, record);
        self.changed.send_replace(());
        private_file::write(&self.dir.join(format!("{node}.json")), &text)
    }

    /// Whether a node is kept out, by itself or with its machine.
    pub fn has(&self, node: NodeId) -> bool {
        let kept_out = self.kept_out.read().unwrap_or_else(PoisonError::into_inner);
        kept_out.nodes.contains_key(&node) || kept_out.seats.contains(&node)
    }

    /// All that were named.
    pub fn list(&self) -> Vec<(NodeId, Revocation)> {
        let kept_out = self.kept_out.read().unwrap_or_else(PoisonError::into_inner);
        kept_out.nodes.iter().map(|(node, record)| (*node, record.clone())).collect()
    }

    /// Completes when the node is kept out. Cancel-safe.
    pub async fn until(&self, node: NodeId) {
        let mut changed = self.changed.subscribe();
        while !self.has(node) {
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

fn unusable(path: &Path, what: &str) -> NetError {
    NetError::Identity(format!("{}: not a revocation record: {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[tokio::test]
    async fn a_revocation_is_kept_and_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (node, other) = (NodeId(Uuid::now_v7()), NodeId(Uuid::now_v7()));
        let store = Revocations::open(dir.path()).unwrap();
        assert!(!store.has(node));
        tokio::join!(store.until(node), async { store.revoke(node, "gpu-2", 7).unwrap() });
        assert!(store.has(node) && !store.has(other));
        let again = Revocations::open(dir.path()).unwrap();
        assert_eq!(again.list(), vec![(node, Revocation { name: "gpu-2".into(), at: 7 })]);
        fs::write(dir.path().join("revoked/x.json"), "{}").unwrap();
        let message = Revocations::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("x.json") && message.contains("no node's id"), "{message}");
    }

    /// A machine has one key: who has it must not come back under another of its names.
    #[test]
    fn seats_go_with_their_machine() {
        let dir = tempfile::tempdir().unwrap();
        let machine = NodeId(Uuid::now_v7());
        let store = Revocations::open(dir.path()).unwrap();
        store.revoke(machine.seat(2), "gpu-2-cuda1", 7).unwrap();
        assert!(store.has(machine.seat(2)) && !store.has(machine.seat(1)) && !store.has(machine));
        store.revoke(machine, "", 8).unwrap();
        for store in [store, Revocations::open(dir.path()).unwrap()] {
            assert!((1..=MAX_SEAT).all(|seat| store.has(machine.seat(seat))));
            assert!(!store.has(NodeId(Uuid::now_v7()).seat(1)));
            assert_eq!(store.list().len(), 2);
        }
    }
}
