//! What this machine could do at best, measured: bytes read and multiplications per second.
//!
//! A speed says little without its limit, and machines drift, so a limit is measured next to what it
//! is the limit of. Figures are medians of several passes, as speeds are.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::buffer::Arena;
use super::kernels::limits::{Product, multiply, read};
use crate::{Isa, LoadError};

/// Passes; the median counts.
const PASSES: usize = 9;
/// What each pass of the arithmetic takes, about.
const PASS: Duration = Duration::from_millis(10);
/// A pass through a small region reads it again until it has read this much.
const PASS_BYTES: usize = 64 << 20;
/// Taken for the last cache where the system does not say.
const LAST_CACHE_BYTES: usize = 32 << 20;

/// Multiplications with additions per second of one core.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Of 8-bit integers.
    pub int8: f64,
    /// Of f32.
    pub float: f64,
}

/// Bytes that no cache holds: four times the last cache.
pub fn uncached_bytes() -> usize {
    let path = "/sys/devices/system/cpu/cpu0/cache/index3/size";
    let said = std::fs::read_to_string(path).ok();
    let kib = said.and_then(|s| s.trim().strip_suffix('K')?.parse::<usize>().ok());
    kib.map_or(LAST_CACHE_BYTES, |k| k << 10).clamp(16 << 20, 256 << 20) * 4
}

/// Bytes per second that `threads` read together, each from a region of its own of `bytes`: see
/// [`uncached_bytes`] for memory; less than a core's cache for that. With or without fetching ahead,
/// whichever is faster here.
///
/// # Errors
/// If memory runs out.
pub fn read_bandwidth(threads: usize, bytes: usize) -> Result<f64, LoadError> {
    let threads = threads.max(1);
    let barrier = Barrier::new(threads);
    let rounds = (PASS_BYTES / bytes.max(64)).max(1);
    let all = std::thread::scope(|scope| {
        let reader = || passes(bytes, rounds, &barrier);
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(reader)).collect();
        let own = reader();
        let join = |t: std::thread::ScopedJoinHandle<'_, _>| {
            t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        others.into_iter().map(join).chain([own]).collect::<Result<Vec<_>, _>>()
    })?;
    let total = (threads * rounds * bytes) as f64;
    let rate = |pass: usize| {
        let passes = || all.iter().map(|thread| thread[pass]);
        let first = passes().map(|(start, _)| start).min();
        let last = passes().map(|(_, end)| end).max();
        let wall = first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first);
        total / wall.as_secs_f64()
    };
    Ok(median((0..PASSES).map(rate).collect())
        .max(median((PASSES..2 * PASSES).map(rate).collect())))
}

/// One thread's part: when each pass started and ended, those that fetch ahead first. All threads
/// start a pass together, also where one of them has no memory.
fn passes(
    bytes: usize,
    rounds: usize,
    barrier: &Barrier,
) -> Result<Vec<(Instant, Instant)>, LoadError> {
    let isa = Isa::best();
    let mut region = Arena::new("measuring bandwidth").take::<u64>(bytes.div_ceil(8));
    // Pages that were never written may all be one page of zeros.
    region.iter_mut().for_each(|r| r.fill(1));
    let data: &[u64] = region.as_ref().map_or(&[], |r| r);
    let pass = |i: usize| {
        barrier.wait();
        let start = Instant::now();
        for _ in 0..rounds {
            black_box(read(isa, i < PASSES, black_box(data)));
        }
        (start, Instant::now())
    };
    let passes = (0..2 * PASSES).map(pass).collect();
    region.map(|_| passes)
}

/// The most that one core multiplies with an instruction set, operands in registers; `None` where
/// there is no way known to measure it (scalar).
pub fn peak(isa: Isa) -> Option<Peak> {
    if isa > Isa::best() {
        return None;
    }
    Some(Peak {
        int8: product_rate(isa, Product::Int8)?,
        float: product_rate(isa, Product::Float)?,
    })
}

fn product_rate(isa: Isa, product: Product) -> Option<f64> {
    let time = |turns: u64| {
        let start = Instant::now();
        multiply(isa, product, turns).map(|n| (n as f64, start.elapsed()))
    };
    // Long enough to reach the clock it will run at.
    let mut turns = 1 << 12;
    while time(turns)?.1 < PASS {
        turns *= 2;
    }
    let rates = (0..PASSES).map(|_| time(turns).map(|(n, wall)| n / wall.as_secs_f64()));
    Some(median(rates.collect::<Option<Vec<_>>>()?))
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_plausible() {
        let cached = read_bandwidth(1, 256 << 10).unwrap();
        assert!(cached > 1e9 && cached < 1e13, "{cached}");
        let two = read_bandwidth(2, 1 << 20).unwrap();
        assert!(two > 1e9 && two < 1e13, "{two}");
        assert_eq!(peak(Isa::Scalar), None);
        if let Some(peak) = peak(Isa::best()) {
            assert!(peak.int8 > peak.float && peak.float > 1e9 && peak.int8 < 1e13, "{peak:?}");
        }
    }
}
