//! The processors that the stages of one process share.
//!
//! Every stage may have as many threads as there are processors; how many of them work is decided
//! anew all the time: alone, a stage has them all; where several compute at once, each has its share,
//! and the others of its threads stand back at their next item. Results do not depend on it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::pin::Pins;

/// Processors, and how many stages compute on them at this moment.
#[derive(Debug)]
pub(super) struct Cores {
    count: usize,
    steps: AtomicUsize,
    pub(super) pins: Pins,
}

impl Cores {
    pub(super) fn new(count: usize) -> Self {
        Self { count: count.max(1), steps: AtomicUsize::new(0), pins: Pins::of_process() }
    }

    /// Those of this process.
    pub(super) fn of_process() -> Arc<Self> {
        static CORES: OnceLock<Arc<Cores>> = OnceLock::new();
        let make = || {
            let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            Arc::new(Self::new(count))
        };
        Arc::clone(CORES.get_or_init(make))
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// A stage begins to compute, until [`Cores::end`].
    pub(super) fn begin(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.steps.fetch_sub(1, Ordering::Relaxed);
    }

    /// Threads that a computing stage may use now: all where it is alone.
    pub(super) fn share(&self) -> usize {
        match self.steps.load(Ordering::Relaxed) {
            0 | 1 => usize::MAX,
            steps => (self.count / steps).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_that_compute_at_once_share() {
        let cores = Cores::new(6);
        assert_eq!(cores.share(), usize::MAX);
        cores.begin();
        assert_eq!(cores.share(), usize::MAX);
        cores.begin();
        assert_eq!(cores.share(), 3);
        (0..6).for_each(|_| cores.begin());
        assert_eq!(cores.share(), 1);
        (0..7).for_each(|_| cores.end());
        assert_eq!(cores.share(), usize::MAX);
    }
}
