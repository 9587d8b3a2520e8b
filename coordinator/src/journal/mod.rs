//! The journal: what a coordinator must know to go on after it was killed, and what clients may
//! still ask for after their request ended.
//!
//! `--journal disk` writes requests, tokens and ends into [`store::FILE`] before any client sees
//! them (see `writer` for how, and for what happens when the disk is full); `memory` keeps ended
//! requests for `--retain`, but nothing outlives the process; `off` keeps nothing beyond the end of
//! a request. The owner is the batcher, which holds the truth of everything that runs; the file is a
//! copy of it. It holds prompts and answers: mode 0600, bounded, ended requests erased in time.
//!
//! Invariant: an event that was sent after a record is delivered only once that record is durable
//! (except while degraded, which shows).

mod args;
pub(crate) mod life;
mod log;
mod record;
mod retained;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::GenerateEvent;

use crate::metrics::Metrics;
use crate::request::EventSender;
pub use args::JournalArgs;
pub use life::begin as begin_life;
pub use log::Log;
pub use record::{End, Entry, Head, Record, Token};
pub use retained::Retained;
pub use store::{FILE, JournalError, VERSION};
use store::{FileStore, Store};
use writer::{Item, Shared, Writer};

/// How long ended requests can be attached to, where nothing else is said.
pub const DEFAULT_RETAIN: Duration = Duration::from_secs(600);
/// Bytes of all requests in the journal, where nothing else is said.
pub const DEFAULT_MAX_BYTES: u64 = 256 << 20;
/// Items that may wait for the disk before the pipeline does too.
const MAX_BACKLOG: usize = 1 << 16;

/// Where requests are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JournalMode {
    /// Nowhere.
    #[default]
    Off,
    /// In this process.
    Memory,
    /// In the cluster's folder.
    Disk,
}

impl FromStr for JournalMode {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "off" => Ok(Self::Off),
            "memory" => Ok(Self::Memory),
            "disk" => Ok(Self::Disk),
            _ => Err(format!("unknown journal '{s}': use disk, memory or off")),
        }
    }
}

/// How to keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalConfig {
    /// Where.
    pub mode: JournalMode,
    /// For how long after the end of a request.
    pub retain: Duration,
    /// How much.
    pub max_bytes: u64,
}

impl Default for JournalConfig {
    fn default() -> Self {
        Self { mode: JournalMode::Off, retain: DEFAULT_RETAIN, max_bytes: DEFAULT_MAX_BYTES }
    }
}

/// The owner's end.
#[derive(Debug)]
pub struct Journal {
    config: JournalConfig,
    /// With a disk only.
    items: Option<Sender<Item>>,
    shared: Arc<Shared>,
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl Journal {
    /// A journal that keeps nothing on a disk.
    pub fn without_disk(config: JournalConfig) -> Self {
        Self { config, items: None, shared: Arc::default() }
    }

    /// Opens the journal in `dir`; also returns the requests that it holds, oldest first.
    ///
    /// # Errors
    /// If another program has it, a newer one wrote it, or it cannot be read or written.
    pub fn open(
        config: JournalConfig,
        dir: &Path,
        metrics: &Arc<Metrics>,
    ) -> Result<(Self, Vec<Entry>), JournalError> {
        if config.mode != JournalMode::Disk {
            return Ok((Self::without_disk(config), Vec::new()));
        }
        let (store, entries) = FileStore::open(dir)?;
        let failed = |e: std::io::Error| JournalError::Failed {
            path: dir.join(FILE),
            why: format!("no thread to write it: {e}"),
        };
        Ok((Self::with_store(config, store, metrics).map_err(failed)?, entries))
    }

    fn with_store(
        config: JournalConfig,
        store: impl Store + 'static,
        metrics: &Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let (items, received) = channel();
        let shared = Arc::new(Shared::default());
        let writer = Writer::new(store, received, Arc::clone(&shared), Arc::clone(metrics));
        thread::Builder::new().name("millrace-journal".into()).spawn(move || writer.run())?;
        Ok(Self { config, items: Some(items), shared })
    }

    /// How it was asked for.
    pub fn config(&self) -> JournalConfig {
        self.config
    }

    /// An empty table of ended requests, as the configuration bounds it.
    pub fn retained(&self) -> Retained {
        let retain = match self.config.mode {
            JournalMode::Off => 0,
            JournalMode::Memory | JournalMode::Disk => self.config.retain.as_millis(),
        };
        Retained::new(u64::try_from(retain).unwrap_or(u64::MAX), self.config.max_bytes)
    }

    fn send(&self, item: Item) {
        if let Some(items) = &self.items {
            self.shared.backlog.fetch_add(1, Ordering::Relaxed);
            // The thread ends with this sender, not before.
            let _ = items.send(item);
        }
    }

    /// Writes a record, before everything that is delivered from now on.
    pub fn write(&self, record: impl FnOnce() -> Record) {
        if self.items.is_some() {
            self.send(Item::Write(record()));
        }
    }

    /// Hands an event to a client once everything that was written before is durable.
    pub fn deliver(&self, to: &EventSender, event: Result<GenerateEvent, Status>) {
        match &self.items {
            Some(_) => self.send(Item::Deliver(to.clone(), event)),
            // A receiver that is gone needs nothing.
            None => drop(to.try_send(event)),
        }
    }

    /// Whether so much waits for the disk that the pipeline should too.
    pub fn is_behind(&self) -> bool {
        self.shared.backlog.load(Ordering::Relaxed) > MAX_BACKLOG
    }

    /// Whether the journal could not be written and wants everything anew; once per try.
    pub fn wants_snapshot(&self) -> bool {
        self.shared.wants_snapshot.swap(false, Ordering::Relaxed)
    }

    /// Whether it cannot be written at the moment.
    pub fn is_degraded(&self) -> bool {
        self.shared.degraded.load(Ordering::Relaxed)
    }

    /// Replaces everything that is kept.
    pub fn snapshot(&self, records: Vec<Record>) {
        self.send(Item::Snapshot(records));
    }

    /// Completes once everything that was sent so far is durable and handed on.
    pub fn settled(&self) -> tokio::sync::oneshot::Receiver<()> {
        let (done, settled) = tokio::sync::oneshot::channel();
        match &self.items {
            Some(_) => self.send(Item::Barrier(done)),
            None => drop(done.send(())),
        }
        settled
    }
}
