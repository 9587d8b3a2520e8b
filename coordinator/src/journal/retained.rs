//! Ended requests, for whoever attaches late: kept for a time, within a number of bytes.
//!
//! Pure. Invariant: what is kept and what running requests may come to stay within the limit
//! together; the requests that ended first make room.

use std::collections::{BTreeSet, HashMap};

use millrace_shared::id::RequestId;

use super::record::Entry;

/// See the module's documentation.
#[derive(Debug)]
pub struct Retained {
    retain_ms: u64,
    max_bytes: u64,
    entries: HashMap<RequestId, Entry>,
    by_end: BTreeSet<(u64, RequestId)>,
    /// Of ended requests.
    bytes: u64,
    /// What running requests may come to.
    promised: u64,
}

impl Retained {
    /// Nothing yet. `retain_ms` of 0 keeps nothing.
    pub fn new(retain_ms: u64, max_bytes: u64) -> Self {
        Self {
            retain_ms,
            max_bytes,
            entries: HashMap::new(),
            by_end: BTreeSet::new(),
            bytes: 0,
            promised: 0,
        }
    }

    /// Bytes of ended requests, and what running ones may come to.
    pub fn bytes(&self) -> u64 {
        self.bytes + self.promised
    }

    /// An ended request.
    pub fn get(&self, id: RequestId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// All ended requests.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// Makes room for a request that may come to `most` bytes; returns whom that cost, or `None`
    /// where running requests leave no room.
    pub fn admit(&mut self, most: u64) -> Option<Vec<RequestId>> {
        if self.promised.saturating_add(most) > self.max_bytes {
            return None;
        }
        Some(self.promise(most))
    }

    /// Promises room to a request that runs already, whatever there is; returns whom that cost.
    pub fn promise(&mut self, most: u64) -> Vec<RequestId> {
        self.promised += most;
        self.shrink()
    }

    /// Forgets an ended request of which `what` is true; whether it did.
    pub fn forget_if(&mut self, id: RequestId, what: impl Fn(&Entry) -> bool) -> bool {
        let Some(ended) = self.entries.get(&id).filter(|e| what(e)).and_then(Entry::ended_ms)
        else {
            return false;
        };
        self.drop_entry(ended, id);
        true
    }

    /// A request that was admitted with `most` bytes takes none any more.
    pub fn release(&mut self, most: u64) {
        self.promised = self.promised.saturating_sub(most);
    }

    /// Keeps an ended request; returns whom that cost, perhaps itself.
    pub fn keep(&mut self, entry: Entry) -> Vec<RequestId> {
        let (id, Some(ended)) = (entry.head.id, entry.ended_ms()) else { return Vec::new() };
        if self.retain_ms == 0 {
            return vec![id];
        }
        self.bytes += entry.bytes();
        self.by_end.insert((ended, id));
        self.entries.insert(id, entry);
        self.shrink()
    }

    /// Forgets what ended too long ago.
    pub fn expire(&mut self, now_ms: u64) -> Vec<RequestId> {
        let old = now_ms.saturating_sub(self.retain_ms);
        let mut gone = Vec::new();
        while let Some(&(ended, id)) = self.by_end.first().filter(|(ended, _)| *ended <= old) {
            self.drop_entry(ended, id);
            gone.push(id);
        }
        gone
    }

    fn shrink(&mut self) -> Vec<RequestId> {
        let mut gone = Vec::new();
        while self.bytes() > self.max_bytes
            && let Some(&(ended, id)) = self.by_end.first()
        {
            self.drop_entry(ended, id);
            gone.push(id);
        }
        gone
    }

    fn drop_entry(&mut self, ended: u64, id: RequestId) {
        self.by_end.remove(&(ended, id));
        if let Some(entry) = self.entries.remove(&id) {
            self.bytes = self.bytes.saturating_sub(entry.bytes());
        }
    }
}
