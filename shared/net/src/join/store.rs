//! Join-token records on disk: one file per use, named by the SHA-256 of the secret.
//!
//! `HASH-INDEX.free` is a use that is left; spending renames it to `HASH-INDEX.KEY.NODE.spent`,
//! which binds it to the public key that was presented. A rename succeeds for exactly one
//! contender, also across processes, so the command line can create tokens beside a running
//! server. The secret itself is never stored. Time is an argument.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use millrace_shared::id::NodeId;
use millrace_shared::wire::admin::TokenInfo;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::JoinToken;
use crate::{NetError, private_file};

/// Most uses of one token; each is a small file.
const MAX_USES: u32 = 1000;
/// A token is called by so many digits of its secret's hash.
const ID_DIGITS: usize = 12;

/// Why a token is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpendError {
    /// Nobody made it, or it was purged.
    #[error("unknown join token: create one with `millrace-coordinator token create`")]
    Unknown,
    /// Too late.
    #[error("the join token has expired: create another with `millrace-coordinator token create`")]
    Expired,
    /// Other keys have used it.
    #[error(
        "the join token has been used: create another with `millrace-coordinator token create`"
    )]
    Used,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] NetError),
}

/// The folder of join-token records.
#[derive(Debug)]
pub struct TokenStore {
    dir: PathBuf,
    /// Requests of one process take turns, so that one key never takes two uses.
    turn: Mutex<()>,
}

#[derive(Clone, Debug)]
enum State {
    Free,
    Spent { key: String, node: NodeId },
}

#[derive(Clone, Debug)]
struct Slot {
    hash: String,
    index: u32,
    path: PathBuf,
    state: State,
}

impl TokenStore {
    /// The store in `dir/tokens`, which is made if needed.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn open(dir: &Path) -> Result<Self, NetError> {
        let dir = dir.join("tokens");
        private_file::create_dir(&dir)?;
        Ok(Self { dir, turn: Mutex::new(()) })
    }

    /// Makes a token of `uses` uses that is refused from `expires` (Unix seconds) on.
    ///
    /// # Errors
    /// If `uses` is not between 1 and 1000, or a record cannot be written.
    pub fn create(
        &self,
        addr: &str,
        ca_sha256: [u8; 32],
        uses: u32,
        expires: u64,
    ) -> Result<JoinToken, NetError> {
        if !(1..=MAX_USES).contains(&uses) {
            return Err(NetError::Protocol(format!(
                "a join token can have 1 to {MAX_USES} uses, not {uses}"
            )));
        }
        let secret = private_file::random::<32>()?;
        let hash = hash_of(&secret);
        for index in 0..uses {
            let path = self.dir.join(format!("{hash}-{index}.free"));
            private_file::write(&path, expires.to_string().as_bytes())?;
        }
        Ok(JoinToken { addr: addr.to_owned(), ca_sha256, secret, expires })
    }

    /// What [`TokenStore::list`] calls a token.
    pub fn id(token: &JoinToken) -> String {
        id_of(&hash_of(&token.secret))
    }

    /// All tokens, the one that expires first before others.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn list(&self) -> Result<Vec<TokenInfo>, NetError> {
        let mut tokens = BTreeMap::<String, TokenInfo>::new();
        for slot in self.slots("")? {
            // A record that vanishes or changes name meanwhile is seen with the next look.
            let Ok(expires) = expiry(&slot.path) else { continue };
            let id = id_of(&slot.hash);
            let new = || TokenInfo { id, left: 0, nodes: Vec::new(), expires };
            let token = tokens.entry(slot.hash).or_insert_with(new);
            match slot.state {
                State::Free => token.left += 1,
                State::Spent { node, .. } => token.nodes.push(node),
            }
        }
        let mut tokens: Vec<TokenInfo> = tokens.into_values().collect();
        tokens.sort_by_key(|t| t.expires);
        Ok(tokens)
    }

    /// Makes a token invalid, whose id [`TokenStore::list`] tells; whether there was one. Nodes that
    /// joined with it stay.
    ///
    /// # Errors
    /// If the folder cannot be read, or a record not be deleted.
    pub fn revoke(&self, id: &str) -> Result<bool, NetError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = false;
        // One that another process spends meanwhile has another name then: look again.
        for _ in 0..=MAX_USES {
            let mut slots = self.slots("")?;
            slots.retain(|s| id_of(&s.hash) == id);
            if slots.is_empty() {
                break;
            }
            found = true;
            for slot in slots {
                match fs::remove_file(&slot.path) {
                    Err(e) if e.kind() != ErrorKind::NotFound => {
                        return Err(NetError::file(&slot.path, e));
                    }
                    _ => {}
                }
            }
        }
        self.sync()?;
        Ok(found)
    }

    /// Spends a use for the key with this SHA-256 (of its SubjectPublicKeyInfo), or finds the use
    /// that the same key has spent before. Returns the node's id, which is the same then.
    ///
    /// # Errors
    /// If the token is unknown, expired, or other keys have used it up.
    pub fn spend(&self, secret: &[u8; 32], key: [u8; 32], now: u64) -> Result<NodeId, SpendError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let hash = hash_of(secret);
        let key = private_file::hex(&key);
        // A record that is gone was spent by another process, or purged: look again. Each round
        // means that somebody else used one up, and there are no more than this.
        for _ in 0..=MAX_USES {
            let slots = self.slots(&hash)?;
            match self.spend_one(&hash, &slots, &key, now) {
                Err(SpendError::Store(e)) if is_gone(&e) => {}
                other => return other,
            }
        }
        Err(SpendError::Used)
    }

    /// Whether the token could be spent now, without spending it.
    ///
    /// # Errors
    /// If it is unknown or expired.
    pub fn check(&self, secret: &[u8; 32], now: u64) -> Result<(), SpendError> {
        let hash = hash_of(secret);
        for _ in 0..=MAX_USES {
            let slots = self.slots(&hash)?;
            match expiry(&slots.first().ok_or(SpendError::Unknown)?.path) {
                Ok(expires) if expires <= now => return Err(SpendError::Expired),
                Ok(_) => return Ok(()),
                Err(e) if is_gone(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Err(SpendError::Used)
    }

    /// Fails with what [`is_gone`] where the records have changed since they were listed.
    fn spend_one(
        &self,
        hash: &str,
        slots: &[Slot],
        key: &str,
        now: u64,
    ) -> Result<NodeId, SpendError> {
        let first = slots.first().ok_or(SpendError::Unknown)?;
        if expiry(&first.path)? <= now {
            return Err(SpendError::Expired);
        }
        if let Some(node) = bound(slots, key) {
            return Ok(node);
        }
        let free = slots.iter().find(|s| matches!(s.state, State::Free));
        let slot = free.ok_or(SpendError::Used)?;
        let node = NodeId(Uuid::now_v7());
        let spent = self.dir.join(format!("{hash}-{}.{key}.{node}.spent", slot.index));
        fs::rename(&slot.path, &spent).map_err(|e| NetError::file(&slot.path, e))?;
        self.sync()?;
        // Another process may have served the same key: the lowest use counts.
        Ok(bound(&self.slots(hash)?, key).unwrap_or(node))
    }

    /// Deletes the records of tokens that had expired by `now`; returns how many.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn purge(&self, now: u64) -> Result<usize, NetError> {
        let mut purged = 0;
        for slot in self.slots("")? {
            // A record that vanishes or changes name meanwhile is somebody else's business.
            if expiry(&slot.path).is_ok_and(|e| e <= now) && fs::remove_file(&slot.path).is_ok() {
                purged += 1;
            }
        }
        Ok(purged)
    }

    /// The records whose names begin with `prefix`, by index.
    fn slots(&self, prefix: &str) -> Result<Vec<Slot>, NetError> {
        let failed = |e| NetError::file(&self.dir, e);
        let mut slots = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(prefix)
                && let Some((hash, index, state)) = parse(&name)
            {
                slots.push(Slot { hash, index, path, state });
            }
        }
        slots.sort_by_key(|s| s.index);
        Ok(slots)
    }

    fn sync(&self) -> Result<(), NetError> {
        fs::File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| NetError::file(&self.dir, e))
    }
}

fn is_gone(e: &NetError) -> bool {
    matches!(e, NetError::File { source, .. } if source.kind() == ErrorKind::NotFound)
}

fn hash_of(secret: &[u8; 32]) -> String {
    private_file::hex(&Sha256::digest(secret))
}

fn id_of(hash: &str) -> String {
    hash.chars().take(ID_DIGITS).collect()
}

fn parse(name: &str) -> Option<(String, u32, State)> {
    let (hash, rest) = name.split_once('-')?;
    let hash = hash.to_owned();
    let (index, rest) = rest.split_once('.')?;
    let index = index.parse().ok()?;
    if rest == "free" {
        return Some((hash, index, State::Free));
    }
    let (key, node) = rest.strip_suffix(".spent")?.split_once('.')?;
    Some((hash, index, State::Spent { key: key.to_owned(), node: node.parse().ok()? }))
}

fn bound(slots: &[Slot], key: &str) -> Option<NodeId> {
    slots.iter().find_map(|s| match &s.state {
        State::Spent { key: k, node } if k == key => Some(*node),
        _ => None,
    })
}

fn expiry(path: &Path) -> Result<u64, NetError> {
    let bytes = private_file::read(path)?;
    std::str::from_utf8(&bytes).ok().and_then(|s| s.trim().parse().ok()).ok_or_else(|| {
        NetError::Identity(format!("{}: not a join-token record; delete it", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000;

    fn store() -> (tempfile::TempDir, TokenStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = TokenStore::open(dir.path()).unwrap();
        (dir, store)
    }

    #[test]
    fn one_use_is_bound_to_one_key() {
        let (dir, store) = store();
        let token = store.create("h:1", [0; 32], 1, NOW + 10).unwrap();
        let node = store.spend(&token.secret, [1; 32], NOW).unwrap();
        assert_eq!(store.spend(&token.secret, [1; 32], NOW + 9).unwrap(), node, "may be repeated");
        assert!(matches!(store.spend(&token.secret, [2; 32], NOW), Err(SpendError::Used)));
        assert!(matches!(store.spend(&token.secret, [1; 32], NOW + 10), Err(SpendError::Expired)));
        // Another process sees the same.
        let other = TokenStore::open(dir.path()).unwrap();
        assert_eq!(other.spend(&token.secret, [1; 32], NOW).unwrap(), node);
    }

    #[test]
    fn several_uses() {
        let (_dir, store) = store();
        let token = store.create("h:1", [0; 32], 2, NOW + 10).unwrap();
        let a = store.spend(&token.secret, [1; 32], NOW).unwrap();
        let b = store.spend(&token.secret, [2; 32], NOW).unwrap();
        assert_ne!(a, b);
        assert!(matches!(store.spend(&token.secret, [3; 32], NOW), Err(SpendError::Used)));
        assert_eq!(store.spend(&token.secret, [2; 32], NOW).unwrap(), b);
    }

    #[test]
    fn unknown_expired_and_purged() {
        let (dir, store) = store();
        assert!(matches!(store.spend(&[9; 32], [1; 32], NOW), Err(SpendError::Unknown)));
        let token = store.create("h:1", [0; 32], 3, NOW).unwrap();
        assert!(matches!(store.spend(&token.secret, [1; 32], NOW), Err(SpendError::Expired)));
        assert_eq!(store.purge(NOW).unwrap(), 3);
        assert_eq!(fs::read_dir(dir.path().join("tokens")).unwrap().count(), 0);
        assert!(store.create("h:1", [0; 32], 0, NOW).is_err());
    }

    #[test]
    fn listed_and_revoked() {
        let (dir, store) = store();
        let later = store.create("h:1", [0; 32], 3, NOW + 20).unwrap();
        let sooner = store.create("h:1", [0; 32], 1, NOW + 10).unwrap();
        let node = store.spend(&later.secret, [1; 32], NOW).unwrap();
        let all = store.list().unwrap();
        let told: Vec<_> = all.iter().map(|t| (t.left, t.nodes.clone(), t.expires)).collect();
        assert_eq!(told, [(1, vec![], NOW + 10), (2, vec![node], NOW + 20)]);
        let secrets = [&later, &sooner].map(|t| private_file::hex(&t.secret));
        assert!(all.iter().all(|t| secrets.iter().all(|s| !s.contains(&t.id))), "{all:?}");

        assert!(!store.revoke("").unwrap() && !store.revoke(&all[1].id[1..]).unwrap());
        // By another process than the one that serves.
        assert!(TokenStore::open(dir.path()).unwrap().revoke(&all[1].id).unwrap());
        assert_eq!(store.list().unwrap(), all[..1]);
        for key in [[1; 32], [2; 32]] {
            assert!(matches!(store.spend(&later.secret, key, NOW), Err(SpendError::Unknown)));
        }
        store.spend(&sooner.secret, [1; 32], NOW).unwrap();
        assert!(!store.revoke(&all[1].id).unwrap(), "it is gone already");
    }

    #[test]
    fn secrets_are_not_stored() {
        let (dir, store) = store();
        let token = store.create("h:1", [0; 32], 1, NOW + 10).unwrap();
        let text = private_file::hex(&token.secret);
        for entry in fs::read_dir(dir.path().join("tokens")).unwrap() {
            let path = entry.unwrap().path();
            assert!(!path.display().to_string().contains(&text));
            assert!(!fs::read_to_string(&path).unwrap().contains(&token.secret_text()));
        }
    }

    #[test]
    fn checking_spends_nothing() {
        let (_dir, store) = store();
        let token = store.create("h:1", [0; 32], 1, NOW + 10).unwrap();
        store.check(&token.secret, NOW).unwrap();
        assert!(matches!(store.check(&[9; 32], NOW), Err(SpendError::Unknown)));
        assert!(matches!(store.check(&token.secret, NOW + 10), Err(SpendError::Expired)));
        store.spend(&token.secret, [1; 32], NOW).unwrap();
        // The same key may come again; which one it is, only spending looks at.
        store.check(&token.secret, NOW).unwrap();
    }

    /// Many contenders, two stores on one folder: each use goes to exactly one key.
    #[test]
    fn contention_never_spends_a_use_twice() {
        let (dir, store) = store();
        let other = TokenStore::open(dir.path()).unwrap();
        let token = store.create("h:1", [0; 32], 3, NOW + 10).unwrap();
        let won = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8u8)
                .map(|i| {
                    let store = if i % 2 == 0 { &store } else { &other };
                    let secret = token.secret;
                    scope.spawn(move || match store.spend(&secret, [i; 32], NOW) {
                        Ok(_) => true,
                        Err(SpendError::Used) => false,
                        Err(e) => panic!("{e}"),
                    })
                })
                .collect();
            threads.into_iter().filter(|_| true).map(|t| t.join().unwrap()).filter(|w| *w).count()
        });
        assert_eq!(won, 3);
    }
}
