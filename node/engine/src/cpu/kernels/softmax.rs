//! From scores to probabilities, and from floats to the integers that an int8 cache is multiplied by.
//!
//! The largest score and the sum of probabilities have the one order of sixteen lanes. Nothing here
//! knows of blocks; what is added to memory's work is a hint.

use super::elementwise::exp;
use super::part::{AHEAD, Part};
use super::products::Scale;
use super::quads::{FACTOR_BYTES, MAX_FACTOR, OFFSET, Quads};
use super::stored::Stored;

/// Scale and its inverse of factors in place of floats. NaN and infinity survive in the scale.
#[inline(always)]
pub(super) fn int_scales(absmax: f32) -> (f32, f32) {
    if absmax < 1e-30 { (0.0, 0.0) } else { (absmax / MAX_FACTOR, MAX_FACTOR / absmax) }
}

/// Stores `n` floats (a multiple of 16, at most one part of attention) as factors, and returns what sums of their
/// products with stored integers are too large by.
#[inline(always)]
pub(super) unsafe fn factors<V: Quads>(x: *const f32, n: usize, inverse: f32, to: *mut u8) -> i32 {
    // SAFETY: as many elements and factors.
    unsafe {
        // Exact: at most 512 integers of 15 bits.
        let mut sum = V::splat(0.0);
        for i in (0..n).step_by(16) {
            let n = V::load(x.add(i)).mul(V::splat(inverse)).round();
            sum = sum.add(n);
            n.store_factors(to.add(i / 4 * FACTOR_BYTES));
        }
        i32::from(OFFSET) * sum.sum() as i32
    }
}

/// Turns `n` scores into unnormalised probabilities, followed by zeros up to a multiple of 16; returns
/// the largest score and the sum. For integers, probabilities are stored as `scaled`.
#[inline(always)]
pub(super) unsafe fn softmax<V: Quads, E: Stored<V>>(
    scores: *mut f32,
    n: usize,
    dim: usize,
    scaled: &mut Scaled<'_, V>,
) -> (f32, f32) {
    let end = n.next_multiple_of(16);
    // SAFETY: scores up to a multiple of 16.
    unsafe {
        for j in n..end {
            *scores.add(j) = f32::NEG_INFINITY;
        }
        let mut most = V::load(scores);
        for j in (16..end).step_by(16) {
            most = V::load(scores.add(j)).max(most);
        }
        let top = most.top();
        let mut sums = V::splat(0.0);
        for j in (0..end).step_by(16) {
            let at = scores.add(j);
            let mut p = exp(V::load(at).sub(V::splat(top)));
            if n - j < 16 {
                let mut some = [0f32; 16];
                p.store(some.as_mut_ptr());
                some[n - j..].fill(0.0);
                p = V::load(some.as_ptr());
            }
            sums = sums.add(p);
            if E::INTEGER {
                scaled.ahead(dim, j);
                p = scaled.add(j, p);
            }
            p.store(at);
        }
        (top, sums.sum())
    }
}

/// Probabilities of a query with the scales of values in them.
pub(super) struct Scaled<'a, V> {
    part: &'a Part,
    n: usize,
    /// Which query of how many.
    query: (usize, usize),
    most: V,
    /// Not zero, but NaN, where one is not finite.
    poison: V,
}

impl<'a, V: Quads> Scaled<'a, V> {
    #[inline(always)]
    pub(super) unsafe fn new(part: &'a Part, n: usize, query: (usize, usize)) -> Self {
        // SAFETY: the caller has the instruction set.
        let zero = unsafe { V::splat(0.0) };
        Self { part, n, query, most: zero, poison: zero }
    }

    /// Asks for values of the part's second half, which scores have not asked for: half a group for
    /// sixteen probabilities, and each query a share of it. Memory has nothing else to do meanwhile.
    #[inline(always)]
    unsafe fn ahead(&self, dim: usize, j: usize) {
        let group = self.part.values[AHEAD + j / 32];
        let mut line = self.query.0;
        while line < dim / 8 {
            let at = (j / 16 % 2 * dim / 8 + line) * 64;
            // SAFETY: a hint.
            unsafe { V::prefetch(group.wrapping_add(at)) };
            line += self.query.1;
        }
    }

    /// Those of the positions from `j`.
    #[inline(always)]
    unsafe fn add(&mut self, j: usize, p: V) -> V {
        // SAFETY: the part has so many positions.
        unsafe {
            let mut scales = self.part.value_scales[j / 16];
            let mut some = [0f32; 16];
            if self.n - j < 16 {
                scales.copy_to_nonoverlapping(some.as_mut_ptr(), self.n - j);
                scales = some.as_ptr();
            }
            let x = p.mul(V::load(scales));
            self.most = x.max(self.most);
            self.poison = x.fma(V::splat(0.0), self.poison);
            x
        }
    }
}

/// Turns scaled probabilities into factors, followed by zeros up to position `end` and its group;
/// returns what becomes of their sums.
#[inline(always)]
pub(super) unsafe fn integers<V: Quads>(
    scaled: &Scaled<'_, V>,
    p: *mut f32,
    end: usize,
    to: *mut u8,
) -> Scale {
    // SAFETY: probabilities up to a multiple of 16, factors likewise.
    unsafe {
        let (factor, inverse) = int_scales(scaled.most.top() + scaled.poison.sum());
        let stored = scaled.n.next_multiple_of(16);
        let excess = factors::<V>(p, stored, inverse, to);
        for j in (stored..end).step_by(16) {
            V::splat(0.0).store_factors(to.add(j / 4 * FACTOR_BYTES));
        }
        Scale { factor, excess }
    }
}
