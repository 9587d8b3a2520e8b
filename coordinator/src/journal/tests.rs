//! The journal by itself: its file, its bounds, and that nothing is sent before it is written.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::{Grammar, SamplingParams};
use millrace_shared::scheduler::Priority;
use millrace_shared::wire::codec;
use millrace_shared::wire::rpc::{FinishReason, Timings, TokenLogprobs};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::*;

fn head(n: u128) -> Head {
    Head {
        id: RequestId(Uuid::from_u128(n)),
        model: [7; 32],
        prompt: vec![1, 2, 70_000],
        params: SamplingParams {
            stop: vec!["END".into()],
            stop_token_ids: vec![5],
            logit_bias: vec![(3, -1.5)],
            seed: Some(11),
            max_tokens: Some(9),
            logprobs: Some(2),
            ..SamplingParams::default()
        },
        seed: 11,
        chat: true,
        max_new: 9,
        choices: 1,
        client: 77,
        priority: Priority::High,
        submitted_ms: 1_000 + n as u64,
        deadline_ms: Some(5_000),
        keep_ms: 30_000,
        digest: [9; 32],
        tag: 3,
        n: 1,
        calls: None,
        note: Vec::new(),
        rules: None,
        left_out: 0,
        altered: false,
    }
}

fn token(n: u128, index: u32) -> Record {
    let logprobs = TokenLogprobs { logprob: f32::NEG_INFINITY, top: vec![(4, -0.25)] };
    Record::Token {
        request: RequestId(Uuid::from_u128(n)),
        choice: 0,
        index,
        token: Token { id: 40 + index, at_ms: 10 * index, logprobs: Some(logprobs) },
    }
}

fn end(n: u128, at_ms: u64) -> Record {
    let end = End::Finished {
        reason: FinishReason::Stop,
        cached_tokens: 1,
        timings: Timings { queue_ms: 0.5, ttft_ms: 1.5, decode_ms: 2.5 },
    };
    Record::End { request: RequestId(Uuid::from_u128(n)), choice: 0, at_ms, end }
}

fn request(n: u128) -> Record {
    Record::Request(Arc::new(head(n)))
}

fn reopened(dir: &Path) -> Vec<Entry> {
    FileStore::open(dir).unwrap().1
}

#[test]
fn what_is_written_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, empty) = FileStore::open(dir.path()).unwrap();
    assert!(empty.is_empty());
    store.write(&[request(1), token(1, 0), request(2)]).unwrap();
    store.write(&[token(1, 1), end(1, 2_000), token(2, 0)]).unwrap();
    drop(store);
    let entries = reopened(dir.path());
    let ids: Vec<u32> = entries[0].tokens[0].iter().map(|t| t.id).collect();
    assert_eq!(ids, [40, 41]);
    assert_eq!((entries[0].ended_ms(), entries[1].ended_ms()), (Some(2_000), None));
    let records: Vec<Record> = entries.iter().flat_map(Entry::records).collect();
    let again = [request(1), token(1, 0), token(1, 1), end(1, 2_000), request(2), token(2, 0)];
    assert_eq!(records, again);

    let (mut store, _) = FileStore::open(dir.path()).unwrap();
    store.write(&[Record::Erase(RequestId(Uuid::from_u128(1)))]).unwrap();
    drop(store);
    let left: Vec<Record> = reopened(dir.path()).iter().flat_map(Entry::records).collect();
    assert_eq!(left, [request(2), token(2, 0)]);

    let (mut store, _) = FileStore::open(dir.path()).unwrap();
    store.replace(&[request(3)]).unwrap();
    drop(store);
    let left: Vec<Record> = reopened(dir.path()).iter().flat_map(Entry::records).collect();
    assert_eq!(left, [request(3)]);
}

#[cfg(unix)]
#[test]
fn nobody_else_may_read_it() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    drop(FileStore::open(dir.path()).unwrap());
    let mode = || fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    fs::set_permissions(dir.path().join(FILE), fs::Permissions::from_mode(0o644)).unwrap();
    drop(FileStore::open(dir.path()).unwrap());
    assert_eq!(mode(), 0o600);
}

#[test]
fn one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let _store = FileStore::open(dir.path()).unwrap();
    let error = FileStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, JournalError::InUse(_)), "{error}");
    assert!(error.to_string().contains("--dir"), "{error}");
}

#[test]
fn a_newer_version_is_refused_and_an_older_one_migrated() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = FileStore::open(dir.path()).unwrap();
    store.write(&[request(1), token(1, 0)]).unwrap();
    drop(store);
    let nothing: store::Migration = |_| Ok(());
    let (_, entries) = FileStore::open_as(dir.path(), VERSION + 1, &[nothing; 5]).unwrap();
    assert_eq!(entries[0].records(), [request(1), token(1, 0)]);
    // The old file is kept, as the old program reads it.
    let old = tempfile::tempdir().unwrap();
    fs::copy(dir.path().join(format!("{FILE}.v{VERSION}")), old.path().join(FILE)).unwrap();
    assert_eq!(reopened(old.path())[0].records(), [request(1), token(1, 0)]);

    let error = FileStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, JournalError::Newer { found, .. } if found == VERSION + 1));
    for part in ["version 6", "up to 5", FILE] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // Without a way there, nothing is touched.
    let error = FileStore::open_as(dir.path(), VERSION + 2, &[nothing; 5]).unwrap_err();
    assert!(matches!(error, JournalError::Unreadable { .. }), "{error}");
}

/// A torn file, or something else, is an error that names it, never a panic; a torn end is undone.
#[test]
fn torn_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let (mut store, _) = FileStore::open(dir.path()).unwrap();
    let records: Vec<Record> = (0..200).map(|i| token(1, i)).collect();
    store.write(&[&[request(1)], &records[..]].concat()).unwrap();
    drop(store);
    let whole = fs::read(&path).unwrap();
    for len in [1, 100, 4096, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        if let Err(error) = FileStore::open(dir.path()) {
            assert!(error.to_string().contains(FILE), "{error}");
        }
    }
    fs::write(&path, vec![0xA5; 100_000]).unwrap();
    let error = FileStore::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains(FILE), "{error}");
}

/// Entries in the layout of [`VERSION`]: whoever changes a type in them changes the format.
#[test]
fn the_format_is_that_of_its_version() {
    let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
    let (Record::Token { token, .. }, Record::End { at_ms, end, .. }) =
        (token(1, 3), end(1, 2_000))
    else {
        panic!("they are what they are");
    };
    let failed = End::Failed(Status::new(ErrorCode::Internal, "x"));
    let hashes = [
        hash(&codec::encode(&head(1))),
        hash(&codec::encode(&token)),
        hash(&codec::encode(&(at_ms, end))),
        hash(&codec::encode(&(at_ms, failed))),
    ];
    assert_eq!(VERSION, 5, "write a migration, then the new hashes");
    assert_eq!(
        hashes,
        ["412289814847a473", "d51aa3e0f7331e83", "e5feb5eb770923b4", "97e88b65b394723e"]
    );
}

fn entry(n: u128, ended: u64) -> Entry {
    let mut entry = Entry::new(Arc::new(head(n)));
    let Record::End { end, .. } = end(n, ended) else { panic!("an end") };
    entry.ends[0] = Some((ended, end));
    entry
}

#[test]
fn ended_requests_are_kept_for_a_time() {
    let mut retained = Retained::new(1_000, 1 << 20);
    let id = |n| RequestId(Uuid::from_u128(n));
    assert!(retained.keep(entry(1, 5_000)).is_empty());
    assert!(retained.keep(entry(2, 5_500)).is_empty());
    assert!(retained.expire(5_999).is_empty());
    assert_eq!(retained.expire(6_000), [id(1)]);
    assert!(retained.get(id(1)).is_none() && retained.get(id(2)).is_some());
    assert_eq!(retained.expire(u64::MAX), [id(2)]);
    assert_eq!(retained.bytes(), 0);
    assert_eq!(Retained::new(0, 1 << 20).keep(entry(3, 1)), [id(3)]);
}

/// A limit that does not count what clients send would be none.
#[test]
fn all_that_a_client_sends_counts() {
    let plain = entry(1, 1);
    let with = |change: &dyn Fn(&mut SamplingParams)| {
        let mut head = Head::clone(&plain.head);
        change(&mut head.params);
        head.bytes() - plain.head.bytes()
    };
    let text = || "x".repeat(1000);
    assert!(with(&|p| p.grammar = Some(Grammar::Regex(text()))) >= 1000);
    assert!(with(&|p| p.stop = vec![text(), text()]) >= 2000);
    assert!(with(&|p| p.stop_token_ids = vec![1; 101]) >= 400);
    assert!(with(&|p| p.logit_bias = vec![(1, 1.0); 101]) >= 800);
    let mut failed = plain.clone();
    failed.ends[0] = Some((1, End::Failed(Status::internal(text()))));
    assert!(failed.bytes() >= plain.bytes() + 1000);
}

#[test]
fn a_clock_that_is_set_back_keeps_nothing_longer() {
    let id = |n| RequestId(Uuid::from_u128(n));
    let mut retained = Retained::new(1_000, 1 << 20);
    retained.keep(entry(1, 90_000_000));
    retained.keep(entry(2, 5_000));
    assert!(retained.expire(5_500).is_empty(), "what seems to have ended tomorrow ended now");
    assert_eq!(retained.expire(6_000), [id(2)]);
    assert!(retained.forget_if(id(1), |_| true), "and is found by its name");
    retained.keep(entry(3, 90_000_000));
    assert!(retained.expire(7_000).is_empty());
    assert_eq!(retained.expire(8_000), [id(3)]);
    assert_eq!(retained.bytes(), 0);
}

#[test]
fn what_is_kept_is_bounded() {
    let each = entry(1, 1).bytes();
    let mut retained = Retained::new(1_000, 3 * each);
    let id = |n| RequestId(Uuid::from_u128(n));
    let has_room = |retained: &Retained, more| retained.check_room(more, 1).is_ok();
    for n in 1..=3 {
        assert!(retained.keep(entry(n, n as u64)).is_empty());
    }
    assert_eq!(retained.keep(entry(4, 4)), [id(1)], "the oldest makes room");
    assert!(has_room(&retained, 2 * each), "ended ones do not count");
    assert_eq!(retained.bytes(), 3 * each, "and asking costs nobody anything");
    assert_eq!(retained.promise(2 * each), [id(2), id(3)], "so it does for those that run");
    assert!(!has_room(&retained, 2 * each), "running ones are never erased");
    assert!(retained.bytes() <= 3 * each);
    // One that runs may grow beyond the limit; then nobody comes in.
    assert_eq!(retained.promise(2 * each), [id(4)]);
    assert!(!has_room(&retained, 0));
    retained.release(3 * each);
    assert!(has_room(&retained, 2 * each));
    assert_eq!(retained.promise(each), []);
}

/// Whoever can come in later is told to wait; whoever never can, to send less.
#[test]
fn what_finds_no_room_is_told_why() {
    let mut retained = Retained::new(1_000, 8 << 20);
    let never = retained.check_room(9 << 20, 500).unwrap_err();
    assert_eq!((never.code, never.retry_after_ms), (ErrorCode::InvalidArgument, None));
    assert!(never.message.contains("takes 9 MiB of the journal"), "{never}");
    assert!(retained.check_room(8 << 20, 500).is_ok());
    retained.promise(6 << 20);
    let later = retained.check_room(3 << 20, 500).unwrap_err();
    assert_eq!((later.code, later.retry_after_ms), (ErrorCode::ResourceExhausted, Some(500)));
    assert!(later.message.contains("full of running requests: they take 6 of its 8"), "{later}");
}

/// Files as they were written: requests of version 1 have no number of choices to send, those of
/// version 2 no grammar, those of version 3 no tools.
#[test]
fn older_versions_are_migrated() {
    for old in [1, 2, 3] {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = FileStore::open(dir.path()).unwrap();
        store.write(&[request(1), token(1, 0), request(2)]).unwrap();
        drop(store);
        store::as_version(old, dir.path());
        let records: Vec<Record> = reopened(dir.path()).iter().flat_map(Entry::records).collect();
        assert_eq!(records, [request(1), token(1, 0), request(2)]);
        assert!(dir.path().join(format!("{FILE}.v{old}")).exists());
    }
}

/// Remembers what was written, and whether an event had arrived by then.
struct Watched {
    written: Arc<Mutex<Vec<Record>>>,
    events: mpsc::Receiver<Result<GenerateEvent, Status>>,
    /// What had arrived when a write began.
    seen: Arc<Mutex<Vec<u32>>>,
    full: Arc<AtomicBool>,
    /// Most records of one write.
    room: usize,
}

impl Watched {
    fn keep(&mut self, records: &[Record]) -> Result<(), JournalError> {
        if self.full.load(Ordering::Relaxed) || records.len() > self.room {
            return Err(JournalError::Failed { path: FILE.into(), why: "disk full".into() });
        }
        self.written.lock().unwrap().extend_from_slice(records);
        Ok(())
    }

    fn look(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            if let Ok(GenerateEvent::Token { index, .. }) = event {
                self.seen.lock().unwrap().push(index);
            }
        }
    }
}

impl Store for Watched {
    fn write(&mut self, records: &[Record]) -> Result<(), JournalError> {
        self.look();
        for record in records {
            if let Record::Token { index, .. } = record {
                let seen = self.seen.lock().unwrap();
                assert!(!seen.contains(index), "token {index} was sent before it was written");
            }
        }
        self.keep(records)
    }

    fn replace(&mut self, records: &[Record]) -> Result<(), JournalError> {
        self.look();
        let before = std::mem::take(&mut *self.written.lock().unwrap());
        self.keep(records).inspect_err(|_| *self.written.lock().unwrap() = before)
    }

    fn probe(&mut self) -> Result<(), JournalError> {
        self.keep(&[])
    }
}

fn event(index: u32) -> Result<GenerateEvent, Status> {
    Ok(GenerateEvent::Token {
        choice: 0,
        index,
        token_id: 1,
        text: String::new(),
        logprobs: None,
        calls: Vec::new(),
    })
}

struct Rig {
    journal: Journal,
    sender: EventSender,
    written: Arc<Mutex<Vec<Record>>>,
    seen: Arc<Mutex<Vec<u32>>>,
    full: Arc<AtomicBool>,
}

fn rig() -> Rig {
    let (sender, events) = mpsc::channel(1 << 10);
    let (written, seen) = (Arc::new(Mutex::default()), Arc::new(Mutex::default()));
    let full = Arc::new(AtomicBool::new(false));
    let store = Watched {
        written: Arc::clone(&written),
        events,
        seen: Arc::clone(&seen),
        full: Arc::clone(&full),
        room: usize::MAX,
    };
    let config = JournalConfig { mode: JournalMode::Disk, ..JournalConfig::default() };
    let metrics = Arc::new(Metrics::new("test"));
    let journal = Journal::with_store(config, store, &metrics).unwrap();
    Rig { journal, sender, written, seen, full }
}

/// Fails where the writer hands events on before it writes.
#[tokio::test]
async fn a_token_is_written_before_it_is_sent() {
    let rig = rig();
    rig.journal.write(|| request(1));
    for index in 0..500 {
        rig.journal.write(|| token(1, index));
        rig.journal.deliver(&rig.sender, event(index));
        if index % 7 == 0 {
            tokio::task::yield_now().await;
        }
    }
    rig.journal.settled().await.unwrap();
    // One more write, to look at what came.
    rig.journal.write(|| token(1, 500));
    rig.journal.settled().await.unwrap();
    assert_eq!(*rig.seen.lock().unwrap(), (0..500).collect::<Vec<_>>(), "each once, in order");
    assert_eq!(rig.written.lock().unwrap().len(), 502);
}

#[tokio::test]
async fn a_full_disk_degrades_and_heals() {
    let rig = rig();
    rig.journal.write(|| request(1));
    rig.journal.settled().await.unwrap();
    rig.full.store(true, Ordering::Relaxed);
    rig.journal.write(|| token(1, 0));
    rig.journal.deliver(&rig.sender, event(0));
    rig.journal.settled().await.unwrap();
    assert!(rig.journal.is_degraded(), "and the event went on, or this would hang");
    rig.journal.write(|| token(1, 1));
    rig.journal.deliver(&rig.sender, event(1));
    // Still full: it stays as it is.
    rig.journal.snapshot(vec![request(1), token(1, 0), token(1, 1)]);
    rig.journal.settled().await.unwrap();
    assert!(rig.journal.is_degraded());
    rig.full.store(false, Ordering::Relaxed);
    rig.journal.snapshot(vec![request(1), token(1, 0), token(1, 1)]);
    rig.journal.write(|| token(1, 2));
    rig.journal.settled().await.unwrap();
    assert!(!rig.journal.is_degraded());
    let whole = [request(1), token(1, 0), token(1, 1), token(1, 2)];
    assert_eq!(*rig.written.lock().unwrap(), whole);
    assert_eq!(*rig.seen.lock().unwrap(), [0, 1]);
}

/// A writer over a disk that is full, or takes so many records at once.
fn writer_to(room: usize, full: &Arc<AtomicBool>) -> (Writer<Watched>, Arc<Shared>) {
    let (_, events) = mpsc::channel(1);
    let (written, seen) = (Arc::default(), Arc::default());
    let store = Watched { written, events, seen, full: Arc::clone(full), room };
    let shared = Arc::new(Shared::default());
    let metrics = Arc::new(Metrics::new("test"));
    (Writer::new(store, channel().1, Arc::clone(&shared), metrics), shared)
}

/// What ended while nothing could be written is neither kept longer nor resumed by the next life: as
/// soon as the disk takes a little, erasures are written, and of all that is known what has ended.
#[test]
fn ends_and_erasures_are_written_first() {
    use std::time::Instant;
    let full = Arc::new(AtomicBool::new(false));
    let (mut writer, shared) = writer_to(4, &full);
    let id = |n| RequestId(Uuid::from_u128(n));
    let ended = [request(1), token(1, 0), end(1, 2_000)];
    writer.handle(vec![Item::Write(request(1)), Item::Write(request(2)), Item::Write(request(3))]);
    full.store(true, Ordering::Relaxed);
    writer.handle(vec![Item::Write(token(1, 0)), Item::Write(Record::Erase(id(2)))]);
    writer.handle(vec![Item::Write(end(1, 2_000)), Item::Write(Record::Erase(id(4)))]);
    let running = [request(3), token(3, 0)];
    let all = || running.iter().chain(&ended).cloned().collect();
    writer.handle(vec![Item::Write(Record::Erase(id(5))), Item::Snapshot(all())]);
    let before = [request(1), request(2), request(3)];
    let written = |writer: &Writer<Watched>| writer.store.written.lock().unwrap().clone();
    assert_eq!(written(&writer), before, "it is full");

    full.store(false, Ordering::Relaxed);
    writer.failed_at = Instant::now().checked_sub(writer.wait);
    writer.ask_again();
    assert!(shared.wants_snapshot.load(Ordering::Relaxed));
    let erased = [2, 4, 5].map(|n| Record::Erase(id(n)));
    let so_far = [&before[..], &erased].concat();
    assert_eq!(written(&writer), so_far);
    writer.handle(vec![Item::Snapshot(all())]);
    assert!(shared.degraded.load(Ordering::Relaxed), "there is no room for all");
    let at_last = [&so_far[..], &[Record::Erase(id(1))], &ended].concat();
    assert_eq!(written(&writer), at_last);
    // Nothing is owed any more.
    writer.failed_at = Instant::now().checked_sub(writer.wait);
    writer.ask_again();
    assert_eq!(written(&writer), at_last);
}

/// Nothing is asked for while the disk takes nothing; where it takes only little, less and less often.
#[test]
fn a_full_disk_is_left_in_peace() {
    use std::time::Instant;
    let full = Arc::new(AtomicBool::new(true));
    let (mut writer, shared) = writer_to(usize::MAX, &full);
    writer.handle(vec![Item::Write(request(1))]);
    let first = writer.wait;
    // As if that had been so long ago.
    let after = |writer: &mut Writer<Watched>, time: Duration| {
        writer.failed_at = Instant::now().checked_sub(time);
        writer.ask_again();
        shared.wants_snapshot.swap(false, Ordering::Relaxed)
    };
    assert!(!after(&mut writer, first / 2), "not yet");
    assert!(!after(&mut writer, first), "it takes nothing");
    full.store(false, Ordering::Relaxed);
    assert!(after(&mut writer, first));
    full.store(true, Ordering::Relaxed);
    writer.handle(vec![Item::Snapshot(vec![request(1)])]);
    full.store(false, Ordering::Relaxed);
    assert!(!after(&mut writer, first), "everything failed: that is tried later");
    assert!(after(&mut writer, 2 * first));
    writer.handle(vec![Item::Snapshot(vec![request(1)])]);
    assert!(writer.failed_at.is_none() && writer.wait == first);
}
