//! The engine's own threads: one caller (member 0) and `threads - 1` workers that run one job
//! together and then wait for the next.
//!
//! Waiting spins for a few tens of microseconds, then parks; it parks at once where threads
//! outnumber processors. A panic in a job is carried to the caller after every member has
//! finished. Nothing is allocated per job. Work is split by member number alone, so results do not
//! depend on timing.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// How long a member spins before it parks: longer than the gap between two phases of a step.
const SPIN: Duration = Duration::from_micros(40);

/// A job, its lifetime erased; it is alive while `pending` is not zero.
type Job = *const (dyn Fn(usize) + Sync);

struct State {
    job: UnsafeCell<Option<Job>>,
    generation: AtomicU64,
    pending: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    caller: Mutex<Option<Thread>>,
    caller_parked: AtomicBool,
    members: Vec<Member>,
    spin: Duration,
}

#[derive(Default)]
struct Member {
    parked: AtomicBool,
    /// Nanoseconds spent spinning, and CPU nanoseconds at the start of the step.
    spun: AtomicU64,
    spun_before: AtomicU64,
    cpu_before: AtomicU64,
    busy: AtomicU64,
}

// SAFETY: `job` is written by the caller only while no member runs, and read by members only after
// they saw the generation that follows the write.
unsafe impl Sync for State {}
// SAFETY: the job pointer is only used as described above.
unsafe impl Send for State {}

/// Compute threads.
pub(crate) struct Pool {
    state: Arc<State>,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

/// CPU time of the calling thread in nanoseconds.
fn cpu_now() -> u64 {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Spins, then parks, until `ready`; adds what it spun to `spun`.
fn wait(ready: impl Fn() -> bool, parked: &AtomicBool, spin: Duration, spun: &AtomicU64) {
    if ready() {
        return;
    }
    let start = Instant::now();
    let mut turns = 0u32;
    while !spin.is_zero() {
        std::hint::spin_loop();
        if ready() {
            break;
        }
        turns += 1;
        if turns.is_multiple_of(32) && start.elapsed() > spin {
            break;
        }
    }
    spun.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    while !ready() {
        parked.store(true, Ordering::SeqCst);
        if !ready() {
            std::thread::park();
        }
        parked.store(false, Ordering::SeqCst);
    }
}

impl Pool {
    /// Starts `threads - 1` workers; one that the system refuses is done without.
    pub(crate) fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let state = Arc::new(State {
            job: UnsafeCell::new(None),
            generation: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            caller: Mutex::new(None),
            caller_parked: AtomicBool::new(false),
            members: (0..threads).map(|_| Member::default()).collect(),
            spin: if threads > cores { Duration::ZERO } else { SPIN },
        });
        let mut workers = Vec::with_capacity(threads - 1);
        for member in 1..threads {
            let state = Arc::clone(&state);
            let name = format!("engine-{member}");
            match std::thread::Builder::new().name(name).spawn(move || state.work(member)) {
                Ok(handle) => workers.push(handle),
                Err(error) => {
                    tracing::warn!(%error, member, "fewer compute threads than asked for");
                    break;
                }
            }
        }
        Self { state, workers }
    }

    /// Members, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(member)` on every member and returns when all have finished.
    ///
    /// # Panics
    /// With the payload of a member that panicked.
    pub(crate) fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return job(0);
        }
        let state = &*self.state;
        self.remember_caller();
        // SAFETY: only the lifetime changes. The pointer is used by members that count in `pending`,
        // and this function does not return or unwind before that is zero. No member runs now.
        unsafe {
            let job: Job = std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job);
            *state.job.get() = Some(job);
        }
        state.pending.store(self.workers.len(), Ordering::Relaxed);
        state.generation.fetch_add(1, Ordering::SeqCst);
        for (member, worker) in state.members[1..].iter().zip(&self.workers) {
            if member.parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        let done = || state.pending.load(Ordering::SeqCst) == 0;
        wait(done, &state.caller_parked, state.spin, &state.members[0].spun);
        let theirs = state.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// Starts counting busy time on every member.
    pub(crate) fn begin_step(&mut self) {
        let state = Arc::clone(&self.state);
        self.run(&|member| {
            let m = &state.members[member];
            m.spun_before.store(m.spun.load(Ordering::Relaxed), Ordering::Relaxed);
            m.cpu_before.store(cpu_now(), Ordering::Relaxed);
        });
    }

    /// Stops counting busy time.
    pub(crate) fn end_step(&mut self) {
        let state = Arc::clone(&self.state);
        self.run(&|member| {
            let m = &state.members[member];
            let spun = m.spun.load(Ordering::Relaxed) - m.spun_before.load(Ordering::Relaxed);
            let cpu = cpu_now().saturating_sub(m.cpu_before.load(Ordering::Relaxed));
            m.busy.fetch_add(cpu.saturating_sub(spun), Ordering::Relaxed);
        });
    }

    /// CPU time between `begin_step` and `end_step`, all members, spinning excluded.
    pub(crate) fn busy(&self) -> Duration {
        let nanos = self.state.members.iter().map(|m| m.busy.load(Ordering::Relaxed)).sum();
        Duration::from_nanos(nanos)
    }

    fn remember_caller(&self) {
        let mut caller = self.state.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let me = std::thread::current();
        if caller.as_ref().is_none_or(|c| c.id() != me.id()) {
            *caller = Some(me);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.state.generation.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join();
        }
    }
}

impl State {
    /// What a worker does until the pool is dropped.
    fn work(&self, member: usize) {
        let mut seen = 0;
        let own = &self.members[member];
        loop {
            let next = || self.generation.load(Ordering::SeqCst) != seen;
            wait(next, &own.parked, self.spin, &own.spun);
            seen += 1;
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: the generation moved on, so the caller has written the job, and it keeps it
            // alive until this member has counted itself out.
            let job = unsafe { (*self.job.get()).map(|job| &*job) };
            if let Some(job) = job
                && let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(member)))
            {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
            if self.pending.fetch_sub(1, Ordering::SeqCst) == 1
                && self.caller_parked.load(Ordering::SeqCst)
                && let Some(caller) = &*self.caller.lock().unwrap_or_else(PoisonError::into_inner)
            {
                caller.unpark();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_member_runs_every_job() {
        let mut pool = Pool::new(3);
        let counts: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        for round in 0..2000 {
            if round % 500 == 0 {
                std::thread::sleep(Duration::from_millis(2)); // let them park
            }
            pool.run(&|m| {
                counts[m].fetch_add(1, Ordering::Relaxed);
            });
        }
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 2000));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2);
        for who in [0, 1] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|m| assert!(m != who, "member {m} fails"));
            }));
            assert!(result.is_err());
            pool.run(&|_| {});
        }
    }

    #[test]
    fn busy_counts_work_and_not_waiting() {
        let mut pool = Pool::new(2);
        pool.begin_step();
        pool.run(&|m| {
            let start = cpu_now();
            while m == 0 && cpu_now() - start < 20_000_000 {}
        });
        pool.end_step();
        let busy = pool.busy();
        assert!(busy >= Duration::from_millis(19), "{busy:?}");
        assert!(busy < Duration::from_millis(30), "{busy:?}");
    }
}
