//! Ended requests, for whoever attaches late: kept for a time, within a number of bytes.
//!
//! Pure. Running requests are promised bytes as they grow, ahead of their tokens; the ended ones that
//! ended first make room. Invariant: what is kept and what is promised stay within the limit
//! together, where what is promised alone does; nobody new is admitted beyond it. Times are those of
//! the wall clock, for they outlive the process: a request that ended in the future, because the
//! clock was set back, ended now.

use std::collections::{BTreeSet, HashMap};

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;

use super::record::Entry;

/// See the module's documentation.
#[derive(Debug)]
pub struct Retained {
    retain_ms: u64,
    max_bytes: u64,
    /// With when each ended.
    entries: HashMap<RequestId, (u64, Entry)>,
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
        self.entries.get(&id).map(|(_, entry)| entry)
    }

    /// All ended requests.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().map(|(_, entry)| entry)
    }

    /// Whether those that run leave room for `more` bytes of a new one, if all that have ended go.
    ///
    /// # Errors
    /// `InvalidArgument` where there would be no room for it alone, `ResourceExhausted`, to be tried
    /// again after `retry_ms`, where others take it.
    pub fn check_room(&self, more: u64, retry_ms: u32) -> Result<(), Status> {
        if self.promised.saturating_add(more) <= self.max_bytes {
            return Ok(());
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let (most, ours) = (mib(self.max_bytes), mib(self.promised));
        if more > self.max_bytes {
            let message = format!(
                "the request takes {} MiB of the journal to begin with, which has {most}: send less, \
                 or ask for fewer choices (the operator gives it more with --journal-size)",
                mib(more)
            );
            return Err(Status::invalid("prompt", message));
        }
        let message = format!(
            "the journal is full of running requests: they take {ours} of its {most} MiB; try again \
             later, or send less (the operator gives it more with --journal-size)"
        );
        Err(Status::exhausted(message, retry_ms))
    }

    /// Promises bytes to a request that runs, whatever there is; returns whom that cost.
    pub fn promise(&mut self, more: u64) -> Vec<RequestId> {
        self.promised += more;
        self.shrink()
    }

    /// Forgets an ended request of which `what` is true; whether it did.
    pub fn forget_if(&mut self, id: RequestId, what: impl Fn(&Entry) -> bool) -> bool {
        let Some(&(ended, _)) = self.entries.get(&id).filter(|(_, entry)| what(entry)) else {
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
        self.entries.insert(id, (ended, entry));
        self.shrink()
    }

    /// Forgets what ended too long ago.
    pub fn expire(&mut self, now_ms: u64) -> Vec<RequestId> {
        while let Some(&(ended, id)) = self.by_end.last().filter(|(ended, _)| *ended > now_ms) {
            self.by_end.remove(&(ended, id));
            self.by_end.insert((now_ms, id));
            if let Some((known, _)) = self.entries.get_mut(&id) {
                *known = now_ms;
            }
        }
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
        if let Some((_, entry)) = self.entries.remove(&id) {
            self.bytes = self.bytes.saturating_sub(entry.bytes());
        }
    }
}
