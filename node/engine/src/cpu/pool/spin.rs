//! Spinning: for about as long as a wake-up costs, never where threads outnumber processors, and not
//! for a while after somebody else took the processor away from a spinning thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a thread spins before it parks: longer than the gap between most jobs of a step, and
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

/// How the threads of one pool spin.
#[derive(Debug)]
pub(super) struct Spin {
    /// Zero where nobody may.
    limit: Duration,
    /// What `quiet_until` counts from.
    start: Instant,
    /// Nanoseconds since `start` before which nobody spins.
    quiet_until: AtomicU64,
}

impl Default for Spin {
    fn default() -> Self {
        Self::up_to(SPIN)
    }
}

impl Spin {
    pub(super) fn up_to(limit: Duration) -> Self {
        Self { limit, start: Instant::now(), quiet_until: AtomicU64::new(0) }
    }

    pub(super) fn never() -> Self {
        Self::up_to(Duration::ZERO)
    }

    /// Whether anybody ever spins.
    pub(super) fn is_allowed(&self) -> bool {
        !self.limit.is_zero()
    }

    /// Spins until `ready`, for the least of `most` and the limit; whether it became so. Adds the
    /// nanoseconds to `spun`.
    pub(super) fn until(&self, most: Duration, spun: &AtomicU64, ready: impl Fn() -> bool) -> bool {
        if ready() {
            return true;
        }
        if self.limit.is_zero() {
            return false;
        }
        let start = Instant::now();
        if self.nanos(start) < self.quiet_until.load(Ordering::Relaxed) {
            return false;
        }
        let limit = most.min(self.limit);
        let (mut last, mut sum, mut turns) = (start, Duration::ZERO, 0u32);
        let done = loop {
            std::hint::spin_loop();
            turns = turns.wrapping_add(1);
            let done = ready();
            if !done && !turns.is_multiple_of(CHECK_TURNS) {
                continue;
            }
            let now = Instant::now();
            let gap = now - last;
            last = now;
            sum += gap.min(CHECK_MAX);
            if gap > DESCHEDULED {
                self.quiet_until.store(self.nanos(now + QUIET), Ordering::Relaxed);
                break done;
            }
            if done || now - start > limit {
                break done;
            }
        };
        spun.fetch_add(sum.as_nanos() as u64, Ordering::Relaxed);
        done
    }

    /// Nanoseconds since the pool was made.
    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_gap_nobody_spins_for_a_while() {
        let (spin, spun) = (Spin::default(), AtomicU64::new(0));
        let slow = || {
            std::thread::sleep(DESCHEDULED * 2);
            false
        };
        assert!(!spin.until(Duration::MAX, &spun, slow));
        assert!(spin.quiet_until.load(Ordering::Relaxed) >= QUIET.as_nanos() as u64);
        let before = spun.load(Ordering::Relaxed);
        assert!(Duration::from_nanos(before) <= CHECK_MAX);
        spin.quiet_until.store(u64::MAX, Ordering::Relaxed);
        let looks = std::cell::Cell::new(0);
        let count = || {
            looks.set(looks.get() + 1);
            false
        };
        assert!(!spin.until(Duration::MAX, &spun, count));
        assert_eq!((looks.get(), spun.load(Ordering::Relaxed)), (1, before));
    }

    #[test]
    fn some_never_spin() {
        let (spin, spun) = (Spin::never(), AtomicU64::new(0));
        assert!(!spin.until(Duration::MAX, &spun, || false));
        assert!(spin.until(Duration::MAX, &spun, || true));
        assert_eq!(spun.into_inner(), 0);
    }
}
