//! The engine's own threads: one caller (member 0) and `threads - 1` workers that take the items of a
//! job together.
//!
//! Each member starts with its own range of items and then helps the others out, so nobody waits for
//! a member that is late, descheduled or asleep: only for items that it has begun ([`gate`]). Which
//! member computes an item changes nothing about the result. Where stages of one process compute at
//! once, they share its processors ([`cores`]).
//!
//! Threads are pinned ([`pin`](mod@pin)). Workers that find no job spin for some microseconds, then
//! park. They park at once when the step ends, where the compute threads of this host outnumber its
//! processors, and for a while after a spinning member found itself descheduled: somebody else needs
//! the processor. A panic in a job is carried to the caller after every member has left. Nothing is
//! allocated per job.

mod cores;
mod gate;
mod pin;
mod spin;

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread, ThreadId};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use cores::Cores;
use gate::{Gate, Sleeper};
use pin::{Places, pin, pin_caller, unpin_caller};
use spin::Spin;

/// A caller that has waited so long for items that others have begun parks.
const PATIENCE: Duration = Duration::from_micros(100);

/// A worker that parked while its stage was at work is woken at most so often.
const WAKE_EVERY: Duration = Duration::from_micros(200);

/// A job, its lifetime erased: member and item. It is alive while anybody is inside the gate.
type Job = *const (dyn Fn(usize, usize) + Sync);

struct State {
    job: UnsafeCell<Option<Job>>,
    items: AtomicUsize,
    gate: Gate<AtomicU64>,
    stop: AtomicBool,
    /// Between the begin and the end of a step: only then members spin.
    at_work: AtomicBool,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    caller: Mutex<Option<Thread>>,
    caller_sleeps: Sleeper<AtomicBool>,
    /// The caller first.
    members: Vec<Member>,
    spin: Spin,
    cores: Arc<Cores>,
    places: Places,
}

#[derive(Default)]
#[repr(align(128))]
struct Member {
    /// The next item of this member's range.
    next: AtomicUsize,
    sleeper: Sleeper<AtomicBool>,
    /// CPU nanoseconds spent spinning.
    spun: AtomicU64,
    /// The system's number of the thread; 0 until it runs.
    thread: AtomicI32,
}

// SAFETY: `job` is written by the caller only while the gate is closed and nobody is inside, and read
// by members only inside.
unsafe impl Sync for State {}
// SAFETY: the job pointer is only used as described above.
unsafe impl Send for State {}

/// Compute threads.
pub(crate) struct Pool {
    state: Arc<State>,
    workers: Vec<JoinHandle<()>>,
    /// Of the caller inside steps: CPU time of those that ended, and at the start of this one.
    busy: Duration,
    step_began: Duration,
    in_step: bool,
    last_wake: Instant,
    /// The thread that was pinned as the caller.
    pinned: Option<ThreadId>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

/// CPU time on a thread's clock.
fn cpu_time(clock: ClockId) -> Duration {
    clock_gettime(clock).map_or(Duration::ZERO, Duration::from)
}

/// The clock of any thread of this process: Linux makes its number of the thread's.
fn clock_of(thread: i32) -> ClockId {
    const PER_THREAD_SCHEDULED: i32 = 4 + 2;
    ClockId::from_raw((!thread << 3) | PER_THREAD_SCHEDULED)
}

impl Pool {
    /// Starts `threads - 1` workers; one that the system refuses is done without. `host_threads` are
    /// the compute threads of all pools that share this host's processors.
    pub(crate) fn new(threads: usize, host_threads: usize) -> Self {
        let cores = Cores::of_process();
        let crowded = threads.max(host_threads) > cores.count();
        Self::with(threads, if crowded { Spin::never() } else { Spin::default() }, cores)
    }

    fn with(threads: usize, spin: Spin, cores: Arc<Cores>) -> Self {
        let threads = threads.max(1);
        let state = Arc::new(State {
            job: UnsafeCell::new(None),
            items: AtomicUsize::new(0),
            gate: Gate::default(),
            stop: AtomicBool::new(false),
            at_work: AtomicBool::new(false),
            panic: Mutex::new(None),
            caller: Mutex::new(None),
            caller_sleeps: Sleeper::default(),
            members: (0..threads).map(|_| Member::default()).collect(),
            spin,
            places: cores.pins.take(threads),
            cores,
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
        // A thread allocates while it starts: not in the first step.
        for member in &state.members[1..=workers.len()] {
            while member.thread.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
        }
        let last_wake = Instant::now();
        let (busy, step_began) = (Duration::ZERO, Duration::ZERO);
        Self { state, workers, busy, step_began, in_step: false, last_wake, pinned: None }
    }

    /// Pins the caller, not before its first step: threads that it starts to load weights run anywhere.
    fn pin_caller(&mut self) {
        let Some(&cpu) = self.state.places.cpus.first() else { return };
        let me = std::thread::current().id();
        let before = self.pinned.replace(me);
        pin_caller(cpu, before != Some(me));
    }

    /// Members, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(member, item)` once for each item of `0..items` and returns when all are done.
    /// Items that are neighbours mostly go to the same member, in order.
    ///
    /// # Panics
    /// With the payload of an item that panicked.
    pub(crate) fn each(&mut self, items: usize, job: &(dyn Fn(usize, usize) + Sync)) {
        if items <= 1 || self.workers.is_empty() {
            return (0..items).for_each(|item| job(0, item));
        }
        let state = &*self.state;
        // SAFETY: only the lifetime changes. The pointer is used by members inside the gate, and this
        // function does not return or unwind before the gate is closed and empty. It is now.
        unsafe {
            let job: Job = std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), Job>(job);
            *state.job.get() = Some(job);
        }
        state.items.store(items, Ordering::Relaxed);
        for (member, m) in state.members.iter().enumerate() {
            m.next.store(state.first(member, items), Ordering::Relaxed);
        }
        state.gate.open();
        self.wake();
        let state = &*self.state;
        let own = catch_unwind(AssertUnwindSafe(|| state.take_items(0, job)));
        state.gate.close();
        self.wait_for_others();
        let theirs = self.state.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// The stage begins to compute; ends a step that a panic has left open.
    pub(crate) fn begin_step(&mut self) {
        self.end_step();
        self.pin_caller();
        self.state.cores.begin();
        self.in_step = true;
        self.state.at_work.store(true, Ordering::SeqCst);
        self.step_began = cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID);
        // So that the step's first job finds them awake, or at least on their way.
        self.last_wake = Instant::now().checked_sub(WAKE_EVERY).unwrap_or(self.last_wake);
        if self.state.spin.is_allowed() && !self.workers.is_empty() {
            self.wake();
        }
    }

    /// The stage has computed.
    pub(crate) fn end_step(&mut self) {
        if !std::mem::take(&mut self.in_step) {
            return;
        }
        self.state.cores.end();
        self.state.at_work.store(false, Ordering::SeqCst);
        let now = cpu_time(ClockId::CLOCK_THREAD_CPUTIME_ID);
        self.busy += now.saturating_sub(self.step_began);
    }

    /// CPU time inside steps so far, all members, spinning excluded.
    pub(crate) fn busy(&self) -> Duration {
        let spun = |m: &Member| Duration::from_nanos(m.spun.load(Ordering::Relaxed));
        let members = &self.state.members;
        let workers = members[1..=self.workers.len()]
            .iter()
            .map(|m| cpu_time(clock_of(m.thread.load(Ordering::Relaxed))).saturating_sub(spun(m)));
        workers.sum::<Duration>() + self.busy.saturating_sub(spun(&members[0]))
    }

    /// Wakes parked workers that may work now, but not again and again: a system call costs more
    /// than a small job.
    fn wake(&mut self) {
        let state = &*self.state;
        let share = state.cores.share();
        let may = self.workers.len().min(share.saturating_sub(1));
        let asleep = |m: &Member| m.sleeper.is_asleep();
        Sleeper::<AtomicBool>::fence();
        if !state.members[1..=may].iter().any(asleep) || self.last_wake.elapsed() < WAKE_EVERY {
            return;
        }
        self.last_wake = Instant::now();
        for (member, worker) in state.members[1..].iter().zip(&self.workers).take(may) {
            if asleep(member) {
                worker.thread().unpark();
            }
        }
    }

    /// Until nobody is inside the closed gate.
    fn wait_for_others(&self) {
        let state = &*self.state;
        if state.gate.is_empty() {
            return;
        }
        let own = &state.members[0];
        if state.spin.until(PATIENCE, &own.spun, || state.gate.is_empty()) {
            return;
        }
        let me = std::thread::current();
        let mut caller = state.caller.lock().unwrap_or_else(PoisonError::into_inner);
        if caller.as_ref().is_none_or(|c| c.id() != me.id()) {
            *caller = Some(me);
        }
        drop(caller);
        while !state.gate.is_empty() {
            state.caller_sleeps.sleep(|| state.gate.is_empty(), std::thread::park);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.end_step();
        self.state.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join();
        }
        if self.pinned == Some(std::thread::current().id()) {
            unpin_caller();
        }
        self.state.cores.pins.give_back(&self.state.places);
    }
}

impl State {
    /// First item of a member's range.
    fn first(&self, member: usize, items: usize) -> usize {
        items * member / self.members.len()
    }

    /// Whether this member may work now.
    fn may_work(&self, member: usize) -> bool {
        member == 0 || member < self.cores.share()
    }

    /// Takes items until none is left: the member's own first, then those of the others.
    fn take_items(&self, member: usize, job: &(dyn Fn(usize, usize) + Sync)) {
        let (items, members) = (self.items.load(Ordering::Relaxed), self.members.len());
        for turn in 0..members {
            let owner = (member + turn) % members;
            let (next, end) = (&self.members[owner].next, self.first(owner + 1, items));
            while next.load(Ordering::Relaxed) < end && self.may_work(member) {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= end {
                    break;
                }
                job(member, item);
            }
        }
    }

    /// What a worker does until the pool is dropped.
    fn work(&self, member: usize) {
        let own = &self.members[member];
        if let Some(&cpu) = self.places.cpus.get(member) {
            let _ = pin(cpu);
        }
        own.thread.store(nix::unistd::gettid().as_raw(), Ordering::Release);
        let mut seen = 0;
        loop {
            let ready = || {
                (self.gate.is_new(seen) && self.may_work(member))
                    || self.stop.load(Ordering::SeqCst)
            };
            // The processor is free for others as soon as the step has ended.
            let enough = || ready() || !self.at_work.load(Ordering::Relaxed);
            self.spin.until(Duration::MAX, &own.spun, enough);
            if !ready() {
                own.sleeper.sleep(ready, std::thread::park);
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if let Some(generation) = self.gate.enter(seen) {
                seen = generation;
                self.help(member);
                self.gate.leave();
                self.unpark_caller();
            }
        }
    }

    /// Takes items of the open job; only inside the gate.
    fn help(&self, member: usize) {
        // SAFETY: inside the gate: the caller has written the job and keeps it alive.
        let Some(job) = (unsafe { (*self.job.get()).map(|job| &*job) }) else { return };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.take_items(member, job))) {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
    }

    /// If the caller sleeps until the gate is empty.
    fn unpark_caller(&self) {
        Sleeper::<AtomicBool>::fence();
        if self.caller_sleeps.is_asleep()
            && self.gate.is_empty()
            && let Some(caller) = &*self.caller.lock().unwrap_or_else(PoisonError::into_inner)
        {
            caller.unpark();
        }
    }
}

#[cfg(test)]
mod tests;
