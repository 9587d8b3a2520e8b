//! The largest few of many logits, found while they are computed.
//!
//! Each thread keeps one [`Best`] per row of activations and shows it the logits of each tile; at
//! the end the lists of all threads are merged. Which thread saw which logits does not matter: a
//! list's order is total (larger logit first, equal ones by lower id). A logit that is not finite is
//! remembered, the one with the lowest id. Nothing here allocates.

use bytemuck::{Pod, Zeroable};
use millrace_shared::sampling::{MAX_CANDIDATES, SampleError};

use super::dispatch;
use super::lanes::Lanes;
use crate::TopLogits;

#[cfg(test)]
mod tests;

/// No logit.
const NONE: u32 = u32::MAX;

/// The largest `k` of what it was shown, in order; lists of different threads share no cache line.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Best {
    k: u32,
    count: u32,
    /// Lowest id of a logit that is not finite, and that logit.
    broken: u32,
    value: f32,
    ids: [u32; MAX_CANDIDATES],
    logits: [f32; MAX_CANDIDATES],
    padding: [u32; 12],
}

impl Best {
    /// Forgets everything; keeps the largest `k` from now on, 1 to `MAX_CANDIDATES`.
    pub(crate) fn reset(&mut self, k: usize) {
        self.k = k.clamp(1, MAX_CANDIDATES) as u32;
        self.count = 0;
        self.broken = NONE;
    }

    /// What a logit has to reach to be of interest.
    fn threshold(&self) -> f32 {
        if self.count < self.k { f32::NEG_INFINITY } else { self.logits[self.k as usize - 1] }
    }

    /// Takes a finite logit in, if it is one of the largest.
    fn offer(&mut self, id: u32, logit: f32) {
        let precedes = |i: usize, best: &Self| {
            logit > best.logits[i] || (logit == best.logits[i] && id < best.ids[i])
        };
        let mut at = self.count as usize;
        if self.count < self.k {
            self.count += 1;
        } else {
            at -= 1;
            if !precedes(at, self) {
                return;
            }
        }
        while at > 0 && precedes(at - 1, self) {
            (self.ids[at], self.logits[at]) = (self.ids[at - 1], self.logits[at - 1]);
            at -= 1;
        }
        (self.ids[at], self.logits[at]) = (id, logit);
    }

    fn break_at(&mut self, id: u32, value: f32) {
        if id < self.broken {
            (self.broken, self.value) = (id, value);
        }
    }

    /// Takes in what another list has.
    fn merge(&mut self, other: &Self) {
        if other.broken != NONE {
            self.break_at(other.broken, other.value);
        }
        let count = other.count as usize;
        for (&id, &logit) in other.ids[..count].iter().zip(&other.logits[..count]) {
            self.offer(id, logit);
        }
    }
}

/// Calls `take(row, largest)` with what the lists of all threads together say of each row; `lists` are
/// those of each thread's `rows` rows, one thread after the other.
pub(crate) fn merged(lists: &mut [Best], rows: usize, take: &mut dyn FnMut(usize, TopLogits<'_>)) {
    let (own, others) = lists.split_at_mut(rows);
    for (row, best) in own.iter_mut().enumerate() {
        others.iter().skip(row).step_by(rows).for_each(|other| best.merge(other));
        if best.broken != NONE {
            let error = SampleError::NonFinite { id: best.broken as usize, value: best.value };
            take(row, Err(error));
            continue;
        }
        let mut pairs = [(0, 0.0); MAX_CANDIDATES];
        for (i, pair) in pairs.iter_mut().enumerate() {
            *pair = (best.ids[i], best.logits[i]);
        }
        take(row, Ok(&pairs[..best.count as usize]));
    }
}

dispatch! {
    /// Shows `best` the `n` logits at `x`, whose ids count from `first`.
    pub(crate) fn scan = scan_generic(x: *const f32, n: usize, first: u32, best: &mut Best);
}

#[inline(always)]
unsafe fn scan_generic<V: Lanes>(x: *const f32, n: usize, first: u32, best: &mut Best) {
    // SAFETY: `n` readable elements; whole lanes among them.
    let (lanes, sound) = unsafe {
        let (mut most, mut zeros) = (V::splat(f32::NEG_INFINITY), V::splat(0.0));
        for i in (0..n / 16 * 16).step_by(16) {
            let v = V::load(x.add(i));
            most = most.max(v);
            // Infinity times zero is NaN, and NaN stays.
            zeros = v.fma(V::splat(0.0), zeros);
        }
        let mut lanes = [0f32; 16];
        most.store(lanes.as_mut_ptr());
        (lanes, zeros.finite())
    };
    // SAFETY: `n` readable elements.
    let x = unsafe { std::slice::from_raw_parts(x, n) };
    let tail = &x[n / 16 * 16..];
    if !sound || !tail.iter().all(|x| x.is_finite()) {
        if let Some(i) = x.iter().position(|x| !x.is_finite()) {
            best.break_at(first + i as u32, x[i]);
        }
        return;
    }
    let most = lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    let mut threshold = best.threshold();
    if most < threshold {
        return;
    }
    for (i, &logit) in x.iter().enumerate() {
        if logit >= threshold {
            best.offer(first + i as u32, logit);
            threshold = best.threshold();
        }
    }
}
