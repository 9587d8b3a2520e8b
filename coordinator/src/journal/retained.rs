//! Ended requests, for whoever attaches late: kept for a time, within a number of bytes.
//!
//! Pure. Running requests are promised bytes as they grow, ahead of their tokens; the ended ones that
//! ended first make room. Invariant: what is kept and what is promised stay within the limit
//! together, where what is promised alone does; nobody new is admitted beyond it.

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
    /// What running requests may take.
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

    /// Bytes of ended requests, and those promised to running ones.
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

    /// Whether those that run leave room for `more` bytes, if all that have ended go.
    pub fn has_room(&self, more: u64) -> bool {
        self.promised.saturating_add(more) <= self.max_bytes
    }

    /// Promises bytes to a request that runs, whatever there is; returns whom that cost.
    pub fn promise(&mut self, more: u64) -> Vec<RequestId> {
        self.promised += more;
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

    /// A request that was promised so many bytes takes none of them any more.
    pub fn release(&mut self, promised: u64) {
        self.promised = self.promised.saturating_sub(promised);
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
