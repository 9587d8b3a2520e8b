//! What this process has cost so far.

use nix::time::{ClockId, clock_gettime};

/// CPU seconds of all threads of this process, those that ended included.
pub fn process_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID);
    time.map_or(0.0, |t| std::time::Duration::from(t).as_secs_f64())
}
