//! The two products of attention over a part: scores, and sums of values.
//!
//! One lane per output, in order of the reduced index, accumulators in registers from the first
//! to the last. `N` queries share every row that is loaded, and rows a little ahead are asked for.

use super::pairs::Pairs;
use super::part::{AHEAD, Part};
use super::stored::Stored;

/// Scores of `N` queries with the keys of `W` groups from `group`: `(sum * key scale) * factor`, the
/// scale for integers alone. Query elements are f32, or i16 for integers.
///
/// # Safety
/// Groups exist, `dim` query elements, rows of a score for every position of the part.
#[inline(always)]
pub(super) unsafe fn scores<V: Pairs, E: Stored<V>, const N: usize, const W: usize>(
    part: &Part,
    group: usize,
    dim: usize,
    queries: [*const u8; N],
    factors: [f32; N],
    rows: [*mut f32; N],
) {
    // SAFETY: the caller's promise; steps are even, for `dim` is a multiple of 16.
    unsafe {
        let mut sums = [[E::zero(); W]; N];
        let mut step = 0;
        while step < dim / E::STEP {
            for w in 0..W {
                ahead::<V, E>(part.keys[group + AHEAD + w], step);
            }
            for step in [step, step + 1] {
                let mut row = [E::row(part.keys[group].add(step * E::ROW)); W];
                for w in 1..W {
                    row[w] = E::row(part.keys[group + w].add(step * E::ROW));
                }
                for q in 0..N {
                    let x = E::factor(queries[q].add(step * 4));
                    for w in 0..W {
                        sums[q][w] = E::dot(sums[q][w], row[w], x);
                    }
                }
            }
            step += 2;
        }
        for w in 0..W {
            let g = group + w;
            if E::INTEGER {
                V::prefetch(part.value_scales[g].cast());
                if g + AHEAD < part.groups {
                    V::prefetch(part.key_scales[g + AHEAD].cast());
                }
            }
            for q in 0..N {
                let mut score = E::float(sums[q][w]);
                if E::INTEGER {
                    score = score.mul(V::load(part.key_scales[g]));
                }
                score.mul(V::splat(factors[q])).store(rows[q].add(g * 16));
            }
        }
    }
}

/// Sums of `N` queries over the values of positions `from..to`, for `W * 16` dimensions from
/// `column * 16`; from zero, or on top of `out` (floats alone). Probabilities are f32, or i16 for
/// integers, which sum whole pairs.
///
/// # Safety
/// Positions are of the part, probabilities for each of them.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn values<V: Pairs, E: Stored<V>, const N: usize, const W: usize>(
    part: &Part,
    column: usize,
    dim: usize,
    (from, to): (usize, usize),
    probabilities: [*const u8; N],
    factors: [f32; N],
    out: [*mut f32; N],
    on_top: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[E::zero(); W]; N];
        if on_top {
            for q in 0..N {
                for w in 0..W {
                    sums[q][w] = E::resume(V::load(out[q].add((column + w) * 16)));
                }
            }
        }
        let stride = dim / 16 * E::ROW;
        for group in from / 16..to.div_ceil(16) {
            let base = part.values[group].add(column * E::ROW);
            let next = part.values[group + AHEAD].wrapping_add(column * E::ROW);
            let first = from.saturating_sub(group * 16) / E::STEP;
            let last = (to - group * 16).min(16).div_ceil(E::STEP);
            for step in first..last {
                for w in (0..W).step_by(if E::ROW == 32 { 2 } else { 1 }) {
                    ahead::<V, E>(next.wrapping_add(step * stride), w);
                }
                let p = (group * 16 / E::STEP + step) * 4;
                let mut row = [E::row(base.add(step * stride)); W];
                for w in 1..W {
                    row[w] = E::row(base.add(step * stride + w * E::ROW));
                }
                for q in 0..N {
                    let x = E::factor(probabilities[q].add(p));
                    for w in 0..W {
                        sums[q][w] = E::dot(sums[q][w], row[w], x);
                    }
                }
            }
        }
        for q in 0..N {
            for w in 0..W {
                let mut sum = E::float(sums[q][w]);
                if E::INTEGER {
                    sum = sum.mul(V::splat(factors[q]));
                }
                sum.store(out[q].add((column + w) * 16));
            }
        }
    }
}

/// Asks for row `step` of a group to come. Floats of four bytes are in the first cache already.
#[inline(always)]
unsafe fn ahead<V: Pairs, E: Stored<V>>(group: *const u8, step: usize) {
    if E::ROW == 32 {
        // SAFETY: a hint.
        unsafe { V::prefetch(group.wrapping_add(step * E::ROW)) };
    }
}
