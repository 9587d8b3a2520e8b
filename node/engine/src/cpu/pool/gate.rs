//! Who may be inside a job: one word that the caller opens and closes, and members enter and leave.
//!
//! The caller opens the gate with a new generation, works itself, closes it, and waits until nobody
//! is inside; whoever comes late finds it closed and has missed nothing. So a job never waits for a
//! thread that has not begun. Entering adds one *before* looking whether the gate is open, hence
//! nobody is inside unseen; what was written before `open` is seen by whoever entered, and what
//! members wrote is seen by the caller once the gate is empty.
//!
//! Who finds nothing to do goes to sleep as a [`Sleeper`]: flag, fence, a last look; who opens or leaves
//! changes the gate, fence, looks at the flag. So no wake-up is lost.
//!
//! Generic over the atomics, so that the tests run this very code under loom's scheduler.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Members inside: the low bits.
const INSIDE: u64 = (1 << 16) - 1;
const OPEN: u64 = 1 << 16;
/// The generation: the rest.
const GENERATION: u64 = 1 << 17;

/// A 64-bit atomic.
pub(super) trait Word: Default {
    fn load(&self) -> u64;
    fn add(&self, n: u64) -> u64;
    fn sub(&self, n: u64) -> u64;
}

impl Word for AtomicU64 {
    fn load(&self) -> u64 {
        self.load(Ordering::Acquire)
    }
    fn add(&self, n: u64) -> u64 {
        self.fetch_add(n, Ordering::AcqRel)
    }
    fn sub(&self, n: u64) -> u64 {
        self.fetch_sub(n, Ordering::AcqRel)
    }
}

/// A flag, and the fence that goes with it.
pub(super) trait Flag: Default {
    fn get(&self) -> bool;
    fn set(&self, value: bool);
    fn fence();
}

impl Flag for AtomicBool {
    fn get(&self) -> bool {
        self.load(Ordering::Relaxed)
    }
    fn set(&self, value: bool) {
        self.store(value, Ordering::Relaxed);
    }
    fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// A thread that may be asleep.
#[derive(Debug, Default)]
pub(super) struct Sleeper<F> {
    parked: F,
}

impl<F: Flag> Sleeper<F> {
    /// Parks the calling thread, which is the sleeper, unless it is `ready`. Returns at any time.
    pub(super) fn sleep(&self, ready: impl FnOnce() -> bool, park: impl FnOnce()) {
        self.parked.set(true);
        F::fence();
        if !ready() {
            park();
        }
        self.parked.set(false);
    }

    /// Between the change that makes sleepers ready and looking who is asleep.
    pub(super) fn fence() {
        F::fence();
    }

    /// Whether it must be unparked.
    pub(super) fn is_asleep(&self) -> bool {
        self.parked.get()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Gate<W> {
    word: W,
}

impl<W: Word> Gate<W> {
    /// Opens a new generation. Only the caller, and only while the gate is closed and empty.
    pub(super) fn open(&self) {
        self.word.add(GENERATION + OPEN);
    }

    /// Closes it: nobody enters any more. Only the caller.
    pub(super) fn close(&self) {
        self.word.sub(OPEN);
    }

    /// Whether nobody is inside. After `close`, that stays so but for members who look in and leave.
    pub(super) fn is_empty(&self) -> bool {
        self.word.load() & INSIDE == 0
    }

    /// Whether the gate is open with another generation than `seen`.
    pub(super) fn is_new(&self, seen: u64) -> bool {
        let word = self.word.load();
        word & OPEN != 0 && word / GENERATION != seen
    }

    /// Goes in, if the gate is open with another generation than `seen`; gives the generation. Must
    /// be followed by [`Gate::leave`].
    pub(super) fn enter(&self, seen: u64) -> Option<u64> {
        if !self.is_new(seen) {
            return None;
        }
        let word = self.word.add(1);
        let generation = word / GENERATION;
        if word & OPEN != 0 && generation != seen {
            return Some(generation);
        }
        self.leave();
        None
    }

    /// Goes out.
    pub(super) fn leave(&self) {
        self.word.sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    impl Word for loom::sync::atomic::AtomicU64 {
        fn load(&self) -> u64 {
            self.load(Ordering::Acquire)
        }
        fn add(&self, n: u64) -> u64 {
            self.fetch_add(n, Ordering::AcqRel)
        }
        fn sub(&self, n: u64) -> u64 {
            self.fetch_sub(n, Ordering::AcqRel)
        }
    }

    impl Flag for loom::sync::atomic::AtomicBool {
        fn get(&self) -> bool {
            self.load(Ordering::Relaxed)
        }
        fn set(&self, value: bool) {
            self.store(value, Ordering::Relaxed);
        }
        fn fence() {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    type Checked = Gate<loom::sync::atomic::AtomicU64>;

    /// A job (which loom watches for races) of two items, and what came of it.
    struct Shared {
        gate: Checked,
        job: UnsafeCell<usize>,
        next: AtomicUsize,
        results: [UnsafeCell<usize>; 2],
    }

    impl Shared {
        fn take_items(&self) {
            // SAFETY: loom checks that no write happens at the same time.
            let job = self.job.with(|p| unsafe { *p });
            loop {
                let item = self.next.fetch_add(1, Ordering::Relaxed);
                if item >= 2 {
                    return;
                }
                // SAFETY: as above.
                self.results[item].with_mut(|p| unsafe { *p = job * 10 + item });
            }
        }
    }

    fn run(workers: usize, jobs: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let shared = Arc::new(Shared {
                gate: Checked::default(),
                job: UnsafeCell::new(0),
                next: AtomicUsize::new(0),
                results: [UnsafeCell::new(0), UnsafeCell::new(0)],
            });
            let members: Vec<_> = (0..workers)
                .map(|_| {
                    let shared = Arc::clone(&shared);
                    loom::thread::spawn(move || {
                        let mut seen = 0;
                        for _ in 0..jobs {
                            if let Some(generation) = shared.gate.enter(seen) {
                                seen = generation;
                                shared.take_items();
                                shared.gate.leave();
                            }
                        }
                    })
                })
                .collect();
            for job in 1..=jobs {
                // SAFETY: loom checks that nobody reads or writes at the same time.
                shared.job.with_mut(|p| unsafe { *p = job });
                shared.next.store(0, Ordering::Relaxed);
                shared.gate.open();
                shared.take_items();
                shared.gate.close();
                while !shared.gate.is_empty() {
                    loom::thread::yield_now();
                }
                for (item, result) in shared.results.iter().enumerate() {
                    // SAFETY: as above.
                    assert_eq!(result.with(|p| unsafe { *p }), job * 10 + item);
                }
            }
            for member in members {
                member.join().expect("a member");
            }
        });
    }

    #[test]
    fn every_item_is_done_once_and_seen_by_the_caller() {
        run(1, 2);
    }

    #[test]
    fn several_members() {
        run(2, 1);
    }

    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            let gate = Arc::new(Checked::default());
            let sleeper = Arc::new(Sleeper::<loom::sync::atomic::AtomicBool>::default());
            let member = {
                let (gate, sleeper) = (Arc::clone(&gate), Arc::clone(&sleeper));
                loom::thread::spawn(move || {
                    while !gate.is_new(0) {
                        sleeper.sleep(|| gate.is_new(0), loom::thread::park);
                    }
                })
            };
            gate.open();
            Sleeper::<loom::sync::atomic::AtomicBool>::fence();
            if sleeper.is_asleep() {
                member.thread().unpark();
            }
            member.join().expect("the member");
        });
    }
}
