//! The engine's own threads: one caller (member 0) and `threads - 1` workers that run one job
//! together and then wait for the next.
//!
//! Waiting spins for some microseconds, then parks. It parks at once where the compute threads of
//! this host outnumber its processors, and for a while after a spinning member found itself
//! descheduled: somebody else needs the processor. A panic in a job is carried to the caller after
//! every member has finished. Nothing is allocated per job. Work is split by member number alone, so
//! results do not depend on timing.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// How long a member spins before it parks: longer than the gap between most phases of a step, and
/// about what waking a parked thread costs.
const SPIN: Duration = Duration::from_micros(50);

/// Turns between two looks at the clock: one to three microseconds.
const CHECK_TURNS: u32 = 32;

/// The most that turns between two looks at the clock count as spinning: the rest of a longer gap
/// was another thread's, or an interrupt.
const CHECK_MAX: Duration = Duration::from_micros(5);

/// A longer gap between two looks at the clock means that the thread was descheduled. Timer interrupts
/// of an idle virtual machine take up to some hundred microseconds, several hundred times a second.
const DESCHEDULED: Duration = Duration::from_millis(1);

/// How long nobody spins after that.
const QUIET: Duration = Duration::from_millis(5);

/// A job, its lifetime erased; it is alive while `pending` is not zero.
type Job = *const (dyn Fn(usize) + Sync);

struct State {
    job: UnsafeCell<Option<Job>>,
    generation: AtomicU64,
    pending: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    caller: Mutex<Option<Thread>>,
    /// The caller first.
    members: Vec<Member>,
    /// Zero where nobody may spin.
    spin: Duration,
    /// What `no_spin_until` counts from.
    start: Instant,
    /// Nanoseconds since `start` before which nobody spins.
    no_spin_until: AtomicU64,
}

#[derive(Default)]
#[repr(align(64))]
struct Member {
    parked: AtomicBool,
    /// CPU nanoseconds spent spinning; and at the start of the step, those and all.
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

impl Pool {
    /// Starts `threads - 1` workers; one that the system refuses is done without. `host_threads` are
    /// the compute threads of all pools that share this host's processors.
    pub(crate) fn new(threads: usize, host_threads: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let crowded = threads.max(host_threads) > cores;
        Self::spinning(threads, if crowded { Duration::ZERO } else { SPIN })
    }

    /// With members that spin for so long.
    fn spinning(threads: usize, spin: Duration) -> Self {
        let threads = threads.max(1);
        let state = Arc::new(State {
            job: UnsafeCell::new(None),
            generation: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            caller: Mutex::new(None),
            members: (0..threads).map(|_| Member::default()).collect(),
            spin,
            start: Instant::now(),
            no_spin_until: AtomicU64::new(0),
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
        let mut pool = Self { state, workers };
        // A thread allocates while it starts: not in the first step.
        pool.run(&|_| {});
        pool
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
        state.wait(&state.members[0], || state.pending.load(Ordering::SeqCst) == 0);
        let theirs = state.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// Calls `job(member, item)` once for each item of `0..items`; no item waits for another.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub(crate) fn each(&mut self, items: usize, job: &(dyn Fn(usize, usize) + Sync)) {
        if items <= 1 || self.workers.is_empty() {
            return (0..items).for_each(|item| job(0, item));
        }
        let threads = self.threads();
        self.run(&|member| (member..items).step_by(threads).for_each(|item| job(member, item)));
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
    /// Spins, then parks, until `ready`.
    fn wait(&self, own: &Member, ready: impl Fn() -> bool) {
        if ready() {
            return;
        }
        if !self.spin.is_zero() {
            self.spin(own, &ready);
        }
        while !ready() {
            own.parked.store(true, Ordering::SeqCst);
            if !ready() {
                std::thread::park();
            }
            own.parked.store(false, Ordering::SeqCst);
        }
    }

    /// Spins for a while at most, and counts it.
    fn spin(&self, own: &Member, ready: impl Fn() -> bool) {
        let start = Instant::now();
        if self.nanos(start) < self.no_spin_until.load(Ordering::Relaxed) {
            return;
        }
        let (mut last, mut spun, mut turns) = (start, Duration::ZERO, 0u32);
        loop {
            std::hint::spin_loop();
            turns = turns.wrapping_add(1);
            let done = ready();
            if !done && !turns.is_multiple_of(CHECK_TURNS) {
                continue;
            }
            let now = Instant::now();
            let gap = now - last;
            last = now;
            spun += gap.min(CHECK_MAX);
            if gap > DESCHEDULED {
                self.no_spin_until.store(self.nanos(now + QUIET), Ordering::Relaxed);
                break;
            }
            if done || now - start > self.spin {
                break;
            }
        }
        own.spun.fetch_add(spun.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Nanoseconds since the pool was made.
    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_nanos() as u64
    }

    /// What a worker does until the pool is dropped.
    fn work(&self, member: usize) {
        let mut seen = 0;
        let own = &self.members[member];
        loop {
            self.wait(own, || self.generation.load(Ordering::SeqCst) != seen);
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
                && self.members[0].parked.load(Ordering::SeqCst)
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
        let mut pool = Pool::spinning(3, SPIN);
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
        let mut pool = Pool::spinning(2, SPIN);
        for who in [0, 1] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|m| assert!(m != who, "member {m} fails"));
            }));
            assert!(result.is_err());
            pool.run(&|_| {});
        }
    }

    /// Measured with the threads' own clocks, so that a loaded machine changes nothing.
    #[test]
    fn busy_counts_work_and_not_waiting() {
        let mut pool = Pool::spinning(2, Duration::from_secs(1));
        let cpu = [const { AtomicU64::new(0) }; 2];
        let work = AtomicU64::new(0);
        pool.run(&|m| cpu[m].store(cpu_now(), Ordering::Relaxed));
        pool.begin_step();
        pool.run(&|m| {
            let start = cpu_now();
            while m == 0 && cpu_now() - start < 20_000_000 {}
            work.fetch_add(cpu_now() - start, Ordering::Relaxed);
        });
        pool.end_step();
        pool.run(&|m| cpu[m].store(cpu_now() - cpu[m].load(Ordering::Relaxed), Ordering::Relaxed));
        let busy = pool.busy().as_nanos() as u64;
        let [all, work] = [cpu.iter().map(|c| c.load(Ordering::Relaxed)).sum(), work.into_inner()];
        assert!(busy >= work - work / 10, "{busy} of {work}");
        // Member 1 spun for most of what is not work, unless it was descheduled and parked.
        assert!(busy <= work + (all - work) / 2 + 2_000_000, "{busy} of {work}, {all} in all");
    }

    #[test]
    fn a_crowded_host_does_not_spin() {
        let cores = std::thread::available_parallelism().unwrap().get();
        assert_eq!(Pool::new(1, cores).state.spin, SPIN);
        assert_eq!(Pool::new(1, cores + 1).state.spin, Duration::ZERO);
        assert_eq!(Pool::new(cores + 1, 1).state.spin, Duration::ZERO);
    }

    #[test]
    fn after_a_gap_nobody_spins_for_a_while() {
        let pool = Pool::spinning(1, SPIN);
        let (state, own) = (&*pool.state, &pool.state.members[0]);
        state.spin(own, || {
            std::thread::sleep(DESCHEDULED * 2);
            false
        });
        let until = state.no_spin_until.load(Ordering::Relaxed);
        assert!(until >= QUIET.as_nanos() as u64);
        let before = own.spun.load(Ordering::Relaxed);
        assert!(Duration::from_nanos(before) <= CHECK_MAX);
        state.no_spin_until.store(u64::MAX, Ordering::Relaxed);
        state.spin(own, || unreachable!("no turn is made"));
        assert_eq!(own.spun.load(Ordering::Relaxed), before);
    }
}
