//! The thread that writes: group commit, and delivery after it.
//!
//! It takes everything that has gathered, makes the records of it durable by one commit, and only
//! then hands the events on, in the order in which they came. While a commit runs the next group
//! gathers, so that the disk sets the size of groups, not the pace of the pipeline.
//!
//! When writing fails (the disk is full, or broken) the journal is *degraded*: events go on to the
//! clients without being written, the metric `millrace_journal_degraded` is 1 and the log says so.
//! Every [`RETRY`] a write of next to nothing is tried; where it succeeds, the owner sends all that it
//! knows ([`Item::Snapshot`]), and once that is written the journal is whole again. Where only the
//! small write succeeds, that is tried less and less often, so that a disk that is almost full is not
//! kept busy by what it has no room for. With the small write goes what was to be erased meanwhile:
//! it frees room, and nobody is to find what is not kept any more. Of what there is no room for all
//! of, ended requests are written first. Otherwise the next life, where this one is killed before the
//! disk works again, would resume them: their ends are nowhere.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::GenerateEvent;

use super::record::Record;
use super::store::Store;
use crate::metrics::Metrics;
use crate::request::EventSender;

/// How long to wait before a degraded journal is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Longest wait between two tries to write everything.
const MAX_RETRY: Duration = Duration::from_secs(60);
/// Most erasures that are remembered while nothing can be written: 1 MiB of ids.
const MAX_OWED: usize = 1 << 16;
/// Most of a group: bounds how long the first of it waits.
const MAX_GROUP: usize = 8192;

/// What the writer is given.
pub(super) enum Item {
    /// To be made durable.
    Write(Record),
    /// To be handed on after everything before it.
    Deliver(EventSender, Result<GenerateEvent, Status>),
    /// Everything that is to be kept.
    Snapshot(Vec<Record>),
    /// Tell when everything before it is done.
    Barrier(tokio::sync::oneshot::Sender<()>),
}

/// What both sides see.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Items not done.
    pub(super) backlog: AtomicUsize,
    /// Nothing is written until a snapshot is.
    pub(super) degraded: AtomicBool,
    /// A snapshot is wanted now.
    pub(super) wants_snapshot: AtomicBool,
    /// Commits so far.
    pub(super) commits: AtomicU64,
}

pub(super) struct Writer<S> {
    pub(super) store: S,
    pub(super) items: Receiver<Item>,
    pub(super) shared: Arc<Shared>,
    pub(super) metrics: Arc<Metrics>,
    /// When writing failed last.
    pub(super) failed_at: Option<Instant>,
    /// How long after that everything is tried again.
    pub(super) wait: Duration,
    /// What was to be erased since.
    owed: BTreeSet<RequestId>,
}

impl<S: Store> Writer<S> {
    /// A writer that nothing has happened to.
    pub(super) fn new(
        store: S,
        items: Receiver<Item>,
        shared: Arc<Shared>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { store, items, shared, metrics, failed_at: None, wait: RETRY, owed: BTreeSet::new() }
    }

    /// Works until nobody can send any more.
    pub(super) fn run(mut self) {
        loop {
            let first = match self.failed_at {
                None => self.items.recv().ok(),
                Some(_) => match self.items.recv_timeout(RETRY) {
                    Ok(item) => Some(item),
                    Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                        self.ask_again();
                        continue;
                    }
                    Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
                },
            };
            let Some(first) = first else { return };
            let mut group = vec![first];
            while group.len() < MAX_GROUP
                && let Ok(item) = self.items.try_recv()
            {
                group.push(item);
            }
            let items = group.len();
            self.handle(group);
            self.shared.backlog.fetch_sub(items, Ordering::Relaxed);
            self.ask_again();
        }
    }

    /// One group: written, then handed on.
    pub(super) fn handle(&mut self, group: Vec<Item>) {
        let mut records = Vec::new();
        let mut snapshot = false;
        let mut rest = Vec::with_capacity(group.len());
        for item in group {
            match item {
                Item::Write(record) => records.push(record),
                Item::Snapshot(all) => {
                    // It holds what was sent before it, but for what was to be erased.
                    self.owe(&records);
                    records = all;
                    snapshot = true;
                }
                other => rest.push(other),
            }
        }
        self.write(&records, snapshot);
        for item in rest {
            match item {
                // A receiver that is gone needs nothing.
                Item::Deliver(to, event) => drop(to.try_send(event)),
                Item::Barrier(done) => drop(done.send(())),
                Item::Write(_) | Item::Snapshot(_) => {}
            }
        }
    }

    fn write(&mut self, records: &[Record], snapshot: bool) {
        if !snapshot && self.failed_at.is_some() {
            self.owe(records);
            return;
        }
        if !snapshot && records.is_empty() {
            return;
        }
        let store = &mut self.store;
        // A file that is broken in a way nobody thought of must not take the streams along.
        let result = catch_unwind(AssertUnwindSafe(|| match snapshot {
            true => store.replace(records),
            false => store.write(records),
        }));
        let result = match result {
            Ok(written) => written.map_err(|e| e.to_string()),
            Err(_) => Err("the database panicked".to_owned()),
        };
        match result {
            Ok(()) => {
                let tokens = records.iter().filter(|r| matches!(r, Record::Token { .. })).count();
                self.shared.commits.fetch_add(1, Ordering::Relaxed);
                self.metrics.on_journal_commit(tokens as u64);
                self.wait = RETRY;
                self.owed.clear();
                if self.failed_at.take().is_some() {
                    tracing::info!("the journal is written again and whole");
                    self.degraded(false);
                }
            }
            Err(error) => {
                if self.failed_at.is_none() {
                    tracing::error!(
                        %error,
                        "the journal cannot be written: requests go on, but would not survive a \
                         restart of this coordinator; make room on its disk"
                    );
                }
                self.failed_at = Some(Instant::now());
                self.degraded(true);
                self.owe(records);
                if snapshot {
                    self.write_ended(records);
                }
            }
        }
    }

    fn degraded(&self, degraded: bool) {
        self.shared.degraded.store(degraded, Ordering::Relaxed);
        self.metrics.set_journal_degraded(degraded);
    }

    /// Of everything, for which there is no room, writes what has ended, as far as there is: a
    /// next life then keeps it for whoever asks, rather than computing it again for nobody.
    fn write_ended(&mut self, all: &[Record]) {
        for request in all.chunk_by(|a, b| a.request() == b.request()) {
            let ends = request.iter().filter(|r| matches!(r, Record::End { .. })).count();
            let Some(Record::Request(head)) = request.first() else { continue };
            if ends < head.choices as usize {
                continue;
            }
            // Nothing of an earlier request of this name must stay.
            let anew: Vec<Record> =
                [Record::Erase(head.id)].into_iter().chain(request.iter().cloned()).collect();
            let store = &mut self.store;
            let written = catch_unwind(AssertUnwindSafe(|| store.write(&anew)));
            if !matches!(written, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// Remembers what is to be erased as soon as the disk takes it.
    fn owe(&mut self, records: &[Record]) {
        for record in records {
            if let Record::Erase(id) = record
                && self.owed.len() < MAX_OWED
            {
                self.owed.insert(*id);
            }
        }
    }

    /// Asks for everything, if it is time and the disk takes anything at all.
    pub(super) fn ask_again(&mut self) {
        if self.failed_at.is_none_or(|at| at.elapsed() < self.wait) {
            return;
        }
        self.failed_at = Some(Instant::now());
        let (store, owed) = (&mut self.store, &self.owed);
        let small_write = || {
            store.probe()?;
            let erased: Vec<Record> = owed.iter().copied().map(Record::Erase).collect();
            if erased.is_empty() { Ok(()) } else { store.write(&erased) }
        };
        if matches!(catch_unwind(AssertUnwindSafe(small_write)), Ok(Ok(()))) {
            self.owed.clear();
            self.wait = (self.wait * 2).min(MAX_RETRY);
            self.shared.wants_snapshot.store(true, Ordering::Relaxed);
        }
    }
}
