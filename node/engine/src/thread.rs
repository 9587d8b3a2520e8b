//! The engine's own thread: jobs go in through a bounded queue, results come out by callback.
//!
//! ```text
//! actor -- try_submit(Job) --> [queue] --> engine thread: StageRunner --> done(result)
//! ```
//!
//! Submitting never blocks: a full queue gives the job back. Steps are bounded by the capacity that
//! was asked for (credits and a few); other jobs have as many slots of their own (each step may come
//! with masks) and [`CONTROL_SLOTS`] more, so that a full queue of steps cannot keep a new assignment
//! out. Jobs run in the order of submission. A panic in
//! a job, or in its callback, ends neither thread nor queue.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millrace_shared::id::Epoch;
use millrace_shared::wire::MAX_VOID_ROWS;
use millrace_shared::wire::control::{ProfileSpec, StageProfile, VoidRows};
use millrace_shared::wire::data::{MaskMeta, OpenMeta, StageTime};
use millrace_shared::wire::frame::Frame;

use crate::clock;
use crate::seam::{Engine, LoadError, LoadedStage, StageSpec, TensorSource};
use crate::stage::{StageError, StagePlace, StageRunner, guarded};

/// Builds the engine; called on the engine's thread, where it then stays.
pub type EngineFactory = Box<dyn FnOnce() -> Box<dyn Engine> + Send>;
/// Gets a result, on the engine's thread: it must not block.
pub type Done<T> = Box<dyn FnOnce(T) + Send>;

/// Jobs other than steps that may wait, beyond one for each step.
pub const CONTROL_SLOTS: usize = 64;
/// How long a dropped handle waits for its thread to finish the job at hand.
const JOIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A stage to load.
pub struct LoadJob {
    /// What it is.
    pub spec: StageSpec,
    /// Where it belongs.
    pub place: StagePlace,
    /// Its tensors.
    pub tensors: Vec<TensorSource>,
    /// Gets the bytes of weights done so far.
    pub progress: Box<dyn FnMut(u64) + Send>,
    /// Gets the outcome.
    pub done: Done<Result<LoadedStage, LoadError>>,
}

/// Work for the engine's thread.
pub enum Job {
    /// Load a stage in place of any other.
    Load(Box<LoadJob>),
    /// Register sequences (last stage).
    Open {
        /// Epoch of the frame that carried them.
        epoch: Epoch,
        /// The sequences.
        opens: OpenMeta,
        /// Gets the outcome.
        done: Done<Result<(), StageError>>,
    },
    /// Note which tokens may come next (last stage).
    Mask {
        /// Epoch of the frame that carried them.
        epoch: Epoch,
        /// The masks.
        masks: MaskMeta,
        /// Gets the outcome.
        done: Done<Result<(), StageError>>,
    },
    /// Run a frame.
    Step {
        /// The frame.
        frame: Frame,
        /// Gets the next frame.
        done: Done<Result<Frame, StageError>>,
    },
    /// Measure a layer and the head.
    Profile {
        /// Of which model.
        spec: Box<ProfileSpec>,
        /// With this many threads.
        threads: usize,
        /// Gets the outcome.
        done: Done<Result<StageProfile, LoadError>>,
    },
    /// Give the stage up.
    Unload,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load(_) => "Job::Load",
            Self::Open { .. } => "Job::Open",
            Self::Mask { .. } => "Job::Mask",
            Self::Step { .. } => "Job::Step",
            Self::Profile { .. } => "Job::Profile",
            Self::Unload => "Job::Unload",
        })
    }
}

/// Why a job was not taken; the job comes back.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Too much is waiting: hold the job back or shed it.
    #[error("the engine's queue is full")]
    Full(Job),
    /// The thread has ended.
    #[error("the engine thread has stopped")]
    Closed(Job),
}

/// A job, and since when it waits.
type Queued = (Instant, Job);

#[derive(Default)]
struct Counters {
    busy_nanos: AtomicU64,
    steps: AtomicU64,
    queued_steps: AtomicUsize,
    queued_others: AtomicUsize,
    left_out: AtomicU64,
    stop: AtomicBool,
    /// Rows that nobody wants any more; not in the queue, for they overtake the steps in it.
    void: Mutex<Vec<(Epoch, VoidRows)>>,
    has_void: AtomicBool,
}

/// Owns the engine's thread. Share it by `Arc`; the last owner ends the thread.
pub struct EngineHandle {
    jobs: Option<SyncSender<Queued>>,
    thread: Option<JoinHandle<()>>,
    ended: Mutex<Receiver<()>>,
    counters: Arc<Counters>,
    capacity: usize,
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle")
            .field("capacity", &self.capacity)
            .field("queued_steps", &self.queued_steps())
            .field("steps", &self.steps())
            .finish_non_exhaustive()
    }
}

impl EngineHandle {
    /// Starts the thread. At most `capacity` steps wait (at least 1). A factory that panics makes
    /// every job fail with what it said.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn spawn(name: &str, capacity: usize, factory: EngineFactory) -> io::Result<Self> {
        let capacity = capacity.max(1);
        let (jobs, queue) = sync_channel(2 * capacity + CONTROL_SLOTS);
        let (end, ended) = sync_channel::<()>(1);
        let counters = Arc::new(Counters::default());
        let shared = Arc::clone(&counters);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Dropped last, when the thread is as good as gone.
            let _end = end;
            work(factory, &queue, &shared);
        })?;
        let ended = Mutex::new(ended);
        Ok(Self { jobs: Some(jobs), thread: Some(thread), ended, counters, capacity })
    }

    /// Hands a job to the thread; never blocks.
    ///
    /// # Errors
    /// If the queue is full or the thread has ended; the job comes back.
    pub fn try_submit(&self, job: Job) -> Result<(), SubmitError> {
        let Some(jobs) = &self.jobs else { return Err(SubmitError::Closed(job)) };
        let (queued, limit) = self.counters.slot(&job, self.capacity);
        let free = |n: usize| (n < limit).then_some(n + 1);
        if queued.fetch_update(Ordering::AcqRel, Ordering::Acquire, free).is_err() {
            return Err(SubmitError::Full(job));
        }
        jobs.try_send((Instant::now(), job)).map_err(|refused| {
            queued.fetch_sub(1, Ordering::AcqRel);
            match refused {
                TrySendError::Full((_, job)) => SubmitError::Full(job),
                TrySendError::Disconnected((_, job)) => SubmitError::Closed(job),
            }
        })
    }

    /// Rows of an epoch that nobody wants any more: steps that have not begun leave them out. What
    /// is too much to remember is computed in vain.
    pub fn void(&self, epoch: Epoch, rows: &[VoidRows]) {
        let mut void = self.counters.void.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MAX_VOID_ROWS.saturating_sub(void.len());
        void.extend(rows.iter().take(room).map(|&rows| (epoch, rows)));
        self.counters.has_void.store(true, Ordering::Release);
    }

    /// Rows that steps left out; cumulative over the life of a stage.
    pub fn rows_left_out(&self) -> u64 {
        self.counters.left_out.load(Ordering::Relaxed)
    }

    /// CPU time of the engine's threads inside steps; cumulative.
    pub fn busy(&self) -> Duration {
        Duration::from_nanos(self.counters.busy_nanos.load(Ordering::Relaxed))
    }

    /// Frames run; cumulative.
    pub fn steps(&self) -> u64 {
        self.counters.steps.load(Ordering::Relaxed)
    }

    /// Steps that wait.
    pub fn queued_steps(&self) -> usize {
        self.counters.queued_steps.load(Ordering::Relaxed)
    }
}

impl Drop for EngineHandle {
    /// Waiting jobs end with [`StageError::Closed`]; a job that runs for longer than two more
    /// seconds is left to itself.
    fn drop(&mut self) {
        self.counters.stop.store(true, Ordering::Release);
        self.jobs = None;
        let Some(thread) = self.thread.take() else { return };
        if thread.thread().id() == std::thread::current().id() {
            return; // Dropped by a callback.
        }
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        match ended.recv_timeout(JOIN_TIMEOUT) {
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                tracing::warn!("the engine thread is still at work; not waiting for it");
            }
            _ => drop(thread.join()),
        }
    }
}

impl Counters {
    fn take_void(&self) -> Vec<(Epoch, VoidRows)> {
        if !self.has_void.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut self.void.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn slot(&self, job: &Job, capacity: usize) -> (&AtomicUsize, usize) {
        match job {
            Job::Step { .. } => (&self.queued_steps, capacity),
            _ => (&self.queued_others, capacity + CONTROL_SLOTS),
        }
    }
}

/// The thread: until every sender is gone.
fn work(factory: EngineFactory, queue: &Receiver<Queued>, counters: &Counters) {
    let mut runner = guarded(|| StageRunner::new(factory()))
        .map_err(|panic| format!("the engine could not be created: {panic}"));
    if let Err(cause) = &runner {
        tracing::error!(cause);
    }
    while let Some((idle, (since, job))) = next(queue) {
        counters.slot(&job, 0).0.fetch_sub(1, Ordering::AcqRel);
        if counters.stop.load(Ordering::Acquire) {
            refuse(job, &StageError::Closed);
            continue;
        }
        match &mut runner {
            Ok(runner) => {
                let arrival = Arrival { idle, waited: since.elapsed() };
                run(runner, job, arrival, counters);
            }
            Err(cause) => refuse(job, &StageError::Panic(cause.clone())),
        }
    }
    // An engine may panic while it is dropped, too.
    if let Err(panic) = guarded(move || drop(runner)) {
        tracing::error!(panic, "the engine panicked while it was dropped");
    }
}

/// The next job, and whether the thread had to wait for it; `None` when every sender is gone.
fn next(queue: &Receiver<Queued>) -> Option<(bool, Queued)> {
    match queue.try_recv() {
        Ok(job) => Some((false, job)),
        Err(_) => queue.recv().ok().map(|job| (true, job)),
    }
}

/// How a job came.
#[derive(Clone, Copy)]
struct Arrival {
    /// The thread had nothing else to do.
    idle: bool,
    /// Since it was submitted.
    waited: Duration,
}

impl Arrival {
    /// What a frame spent before its step. Its hop ends in the queue of a busy engine, and where an
    /// idle one begins.
    fn time(self, frame: &Frame) -> StageTime {
        let hop = clock::now().since(frame.header().ready);
        let queued = if self.idle { Duration::ZERO } else { self.waited };
        let hop = hop.map(|h| h.saturating_sub(queued));
        StageTime::new(self.waited, Duration::ZERO).with_hop(hop)
    }
}

fn run(runner: &mut StageRunner, job: Job, arrival: Arrival, counters: &Counters) {
    match job {
        Job::Load(job) => {
            let LoadJob { spec, place, tensors, mut progress, done } = *job;
            let result = guarded(|| runner.load(&spec, place, &tensors, &mut progress));
            answer(done, result.unwrap_or_else(|panic| Err(load_panic(&panic))));
        }
        Job::Open { epoch, opens, done } => {
            let result = guarded(|| runner.open(epoch, opens));
            answer(done, result.unwrap_or_else(|panic| Err(StageError::Panic(panic))));
        }
        Job::Mask { epoch, masks, done } => {
            let result = guarded(|| runner.mask(epoch, masks));
            answer(done, result.unwrap_or_else(|panic| Err(StageError::Panic(panic))));
        }
        Job::Step { frame, done } => {
            for (epoch, rows) in counters.take_void() {
                runner.void(epoch, &[rows]);
            }
            let before = arrival.time(&frame);
            let result = guarded(|| runner.run_after(&frame, before));
            drop(frame);
            let busy = u64::try_from(runner.busy().as_nanos()).unwrap_or(u64::MAX);
            counters.busy_nanos.store(busy, Ordering::Relaxed);
            counters.steps.store(runner.steps(), Ordering::Relaxed);
            counters.left_out.store(runner.rows_left_out(), Ordering::Relaxed);
            answer(done, result.unwrap_or_else(|panic| Err(StageError::Panic(panic))));
        }
        Job::Profile { spec, threads, done } => {
            let result = guarded(|| runner.profile(&spec, threads));
            answer(done, result.unwrap_or_else(|panic| Err(load_panic(&panic))));
        }
        Job::Unload => runner.unload(),
    }
}

/// Ends a job that cannot run.
fn refuse(job: Job, cause: &StageError) {
    let stage_error = || match cause {
        StageError::Panic(message) => StageError::Panic(message.clone()),
        _ => StageError::Closed,
    };
    let load_error = || LoadError::Settings(cause.to_string());
    match job {
        Job::Load(job) => answer(job.done, Err(load_error())),
        Job::Open { done, .. } | Job::Mask { done, .. } => answer(done, Err(stage_error())),
        Job::Step { done, .. } => answer(done, Err(stage_error())),
        Job::Profile { done, .. } => answer(done, Err(load_error())),
        Job::Unload => {}
    }
}

fn load_panic(panic: &str) -> LoadError {
    LoadError::Settings(format!("the engine panicked: {panic}"))
}

/// Calls back; a callback that panics harms nobody else.
fn answer<T>(done: Done<T>, result: T) {
    if let Err(panic) = guarded(move || done(result)) {
        tracing::error!(panic, "a callback of the engine thread panicked");
    }
}
