//! The last steps of this node, for whoever has to find out what went wrong.
//!
//! A ring: the steps of the last 60 s, at most 16,384. Where a step passes its deadline, the ring is
//! saved in the node's folder (`rings/`, the newest 8 files), while the step may still be at work.
//! Numbers alone: nothing of a prompt or an answer is in it.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use millrace_shared::id::{Epoch, MicroBatchId};
use millrace_shared::wire::admin::{CollectedFile, MAX_COLLECTED_BYTES};

/// How far back it goes.
const SPAN: Duration = Duration::from_secs(60);
/// Steps that are kept.
const LENGTH: usize = 16_384;
/// A step may take so many times as long, for each position, as any in the ring.
const PATIENCE: u32 = 10;
/// Saved rings that are kept.
const FILES: usize = 8;
/// Those that are handed over.
const HANDED_OVER: usize = 4;

/// A step that has ended.
#[derive(Clone, Copy, Debug)]
struct Done {
    begin: Begun,
    waited: Duration,
    took: Duration,
    failed: bool,
}

/// A step that was submitted.
#[derive(Clone, Copy, Debug)]
struct Begun {
    epoch: Epoch,
    micro_batch: MicroBatchId,
    positions: u32,
    at: Instant,
}

#[derive(Debug, Default)]
struct Steps {
    done: VecDeque<Done>,
    begun: VecDeque<Begun>,
    /// When the last one ended.
    ended: Option<Instant>,
    /// The last one that was late.
    late: Option<(Epoch, MicroBatchId)>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Ring {
    steps: Mutex<Steps>,
    folder: PathBuf,
}

impl Ring {
    /// Nothing yet; saved below this folder.
    pub fn new(folder: &Path) -> Self {
        Self { steps: Mutex::default(), folder: folder.join("rings") }
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step was handed to the engine.
    pub fn begin(&self, epoch: Epoch, micro_batch: MicroBatchId, positions: u32) {
        let mut steps = self.steps();
        // Of an epoch that is over nothing comes back.
        steps.begun.retain(|b| b.epoch >= epoch);
        if steps.begun.len() < LENGTH {
            steps.begun.push_back(Begun { epoch, micro_batch, positions, at: Instant::now() });
        }
    }

    /// It came back.
    pub fn end(&self, epoch: Epoch, micro_batch: MicroBatchId, failed: bool) {
        let now = Instant::now();
        let mut steps = self.steps();
        let is_it = |b: &Begun| (b.epoch, b.micro_batch) == (epoch, micro_batch);
        let Some(at) = steps.begun.iter().position(is_it) else { return };
        let Some(begin) = steps.begun.remove(at) else { return };
        let began = steps.ended.map_or(begin.at, |ended| ended.max(begin.at));
        let (waited, took) = (began - begin.at, now - began);
        steps.ended = Some(now);
        steps.done.push_back(Done { begin, waited, took, failed });
        let old = |d: &Done| now - d.begin.at > SPAN;
        while steps.done.len() > LENGTH || steps.done.front().is_some_and(old) {
            steps.done.pop_front();
        }
    }

    /// Whether a step has been at work for longer than it may: than `lease`, and than ten times what
    /// the slowest step of the ring took for each position. Once for each.
    pub fn is_late(&self, lease: Duration) -> bool {
        let mut steps = self.steps();
        let Some(oldest) = steps.begun.front().copied() else { return false };
        let began = steps.ended.map_or(oldest.at, |ended| ended.max(oldest.at));
        let slowest = steps.done.iter().map(|d| d.took / d.begin.positions.max(1)).max();
        let patience = slowest.unwrap_or(lease) * (PATIENCE * oldest.positions.max(1));
        let name = Some((oldest.epoch, oldest.micro_batch));
        if began.elapsed() <= lease.max(patience) || steps.late == name {
            return false;
        }
        steps.late = name;
        true
    }

    /// As text: a line for each step, those at work last.
    pub fn text(&self) -> String {
        let steps = self.steps();
        let (now, clock) = (Instant::now(), SystemTime::now());
        let unix_ms = |at: Instant| {
            let at = clock.checked_sub(now - at).unwrap_or(SystemTime::UNIX_EPOCH);
            at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis()
        };
        let mut out = String::from(
            "submitted_unix_ms,epoch,micro_batch,positions,waited_us,took_us,outcome\n",
        );
        let mut line = |b: &Begun, waited: Duration, took: Duration, outcome: &str| {
            let (at, epoch, id) = (unix_ms(b.at), b.epoch, b.micro_batch);
            let (waited, took) = (waited.as_micros(), took.as_micros());
            let _ = writeln!(out, "{at},{epoch},{id},{},{waited},{took},{outcome}", b.positions);
        };
        for done in &steps.done {
            let outcome = if done.failed { "failed" } else { "done" };
            line(&done.begin, done.waited, done.took, outcome);
        }
        for (n, begun) in steps.begun.iter().enumerate() {
            let since = now - begun.at;
            match n {
                0 => line(begun, Duration::ZERO, since, "at work"),
                _ => line(begun, since, Duration::ZERO, "waits"),
            }
        }
        out
    }

    /// Saves it, and keeps the newest few. What cannot be written is logged.
    pub fn save(&self) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let path = self.folder.join(format!("{:013}.csv", since.as_millis()));
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(&self.folder)?;
            std::fs::write(&path, self.text())?;
            let mut files = self.saved()?;
            files.truncate(files.len().saturating_sub(FILES));
            files.iter().try_for_each(std::fs::remove_file)
        };
        match write() {
            Ok(()) => tracing::warn!("a step is late: the last steps are in {}", path.display()),
            Err(e) => tracing::warn!("a step is late; {}: {e}", path.display()),
        }
    }

    /// Saved rings, oldest first.
    fn saved(&self) -> std::io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            files.push(entry?.path());
        }
        files.retain(|path| path.extension().is_some_and(|e| e == "csv"));
        files.sort();
        Ok(files)
    }

    /// The ring and those that were saved last, as long as they fit.
    pub fn collected(&self, about: String) -> Vec<CollectedFile> {
        let file = |name: String, bytes| CollectedFile { name, bytes };
        let mut files = vec![
            file("about.txt".to_owned(), about.into_bytes()),
            file("ring.csv".to_owned(), self.text().into_bytes()),
        ];
        let saved = self.saved().unwrap_or_default();
        for path in saved.iter().rev().take(HANDED_OVER) {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let (Some(name), Ok(bytes)) = (name, std::fs::read(path)) else { continue };
            let sum: usize = files.iter().map(|f| f.bytes.len()).sum();
            if sum + bytes.len() < MAX_COLLECTED_BYTES / 2 {
                files.push(file(format!("late-{name}"), bytes));
            }
        }
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_kept_in_order_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let ring = Ring::new(dir.path());
        let (epoch, id) = (Epoch(1), MicroBatchId);
        for n in 0..LENGTH as u64 + 10 {
            ring.begin(epoch, id(n), 4);
            ring.end(epoch, id(n), n == 12);
        }
        ring.begin(epoch, id(99_999), 1);
        ring.begin(epoch, id(100_000), 1);
        let text = ring.text();
        assert_eq!(text.lines().count(), LENGTH + 3);
        assert!(text.lines().nth(1).unwrap().contains(",1,10,4,"), "the oldest have gone");
        assert_eq!(text.matches("failed").count(), 1);
        assert!(text.ends_with("waits\n") && text.contains("at work"));
        ring.begin(Epoch(2), id(1), 1);
        assert!(!ring.text().contains(",99999,"), "an epoch that is over is forgotten");
    }

    #[test]
    fn a_late_step_is_noticed_once_and_saved() {
        let dir = tempfile::tempdir().unwrap();
        let ring = Ring::new(dir.path());
        ring.begin(Epoch(1), MicroBatchId(1), 1);
        ring.end(Epoch(1), MicroBatchId(1), false);
        assert!(!ring.is_late(Duration::ZERO), "nothing is at work");
        ring.begin(Epoch(1), MicroBatchId(2), 1);
        assert!(!ring.is_late(Duration::from_secs(600)));
        std::thread::sleep(Duration::from_millis(50));
        let late = ring.is_late(Duration::ZERO);
        assert!(late || ring.steps().done[0].took > Duration::from_millis(5), "a busy machine");
        assert!(!ring.is_late(Duration::ZERO), "once for each");
        (0..FILES + 3).for_each(|n| {
            let name = format!("{n:013}.csv");
            std::fs::create_dir_all(&ring.folder).unwrap();
            std::fs::write(ring.folder.join(name), "x").unwrap();
        });
        ring.save();
        assert_eq!(ring.saved().unwrap().len(), FILES);
        let files = ring.collected("about".to_owned());
        assert_eq!(files.len(), 2 + HANDED_OVER);
        let text = String::from_utf8(files[2].bytes.clone()).unwrap();
        assert!(text.contains("at work"), "the newest comes first: {text}");
    }
}
