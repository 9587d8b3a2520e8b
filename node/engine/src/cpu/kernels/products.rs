//! The two products of attention over a part: scores, and sums of values.
//!
//! One lane per output, in order of the reduced index, accumulators in registers from the first
//! to the last. `N` queries share every row that is loaded, and rows a little ahead are asked for.

use super::part::{AHEAD, Part};
use super::quads::Quads;
use super::stored::Stored;

/// What integer sums become, or (without an excess) float ones.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) factor: f32,
    /// Sums are too large by so much, because what is stored is.
    pub(super) excess: i32,
}

/// Scores of `N` queries with the keys of `W` groups from `group`: `(sum * key scale) * factor`, the
/// scale for integers alone. Query elements are f32, or factors for integers.
///
/// # Safety
/// Groups exist, `dim` query elements, rows of a score for every position of the part.
#[inline(always)]
pub(super) unsafe fn scores<V: Quads, E: Stored<V>, const N: usize, const W: usize>(
    part: &Part,
    group: usize,
    dim: usize,
    queries: [*const u8; N],
    scales: [Scale; N],
    rows: [*mut f32; N],
) {
    // SAFETY: the caller's promise; steps are even, for `dim` is a multiple of 16.
    unsafe {
        let mut sums = [[E::zero(); W]; N];
        let mut step = 0;
        while step < dim / E::STEP {
            for step in [step, step + 1] {
                for w in 0..W {
                    ahead::<V, E>(part.keys[group + AHEAD + w].wrapping_add(step * E::ROW), step);
                }
                let mut row = [E::row(part.keys[group].add(step * E::ROW)); W];
                for w in 1..W {
                    row[w] = E::row(part.keys[group + w].add(step * E::ROW));
                }
                for q in 0..N {
                    let x = E::factor(queries[q].add(step * E::FACTOR));
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
                let mut score = E::float(sums[q][w], scales[q].excess);
                if E::INTEGER {
                    score = score.mul(V::load(part.key_scales[g]));
                }
                score.mul(V::splat(scales[q].factor)).store(rows[q].add(g * 16));
            }
        }
    }
}

/// Sums of `N` queries over the values of positions `from..to`, for `W * 16` dimensions from
/// `column * 16`; from zero, or on top of `out` (floats alone). Probabilities are f32, or factors for
/// integers, which sum whole quads.
///
/// # Safety
/// Positions are of the part, probabilities for each of them.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn values<V: Quads, E: Stored<V>, const N: usize, const W: usize>(
    part: &Part,
    column: usize,
    dim: usize,
    (from, to): (usize, usize),
    probabilities: [*const u8; N],
    scales: [Scale; N],
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
            let next = if E::INTEGER {
                // The rest of this part has been asked for; the next part's keys, at half the rate.
                part.values[part.groups + group / 2].wrapping_add(group % 2 * dim * 8)
            } else {
                part.values[group + AHEAD]
            };
            let first = from.saturating_sub(group * 16) / E::STEP;
            let last = (to - group * 16).min(16).div_ceil(E::STEP);
            for step in first..last {
                for w in 0..W {
                    let at = step * stride + (column + w) * E::ROW;
                    if E::INTEGER && w % 2 == 0 {
                        ahead::<V, E>(next.wrapping_add(at / 2), 0);
                    } else if !E::INTEGER {
                        ahead::<V, E>(next.wrapping_add(at), w);
                    }
                }
                let p = (group * 16 / E::STEP + step) * E::FACTOR;
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
                let mut sum = E::float(sums[q][w], scales[q].excess);
                if E::INTEGER {
                    sum = sum.mul(V::splat(scales[q].factor));
                }
                sum.store(out[q].add((column + w) * 16));
            }
        }
    }
}

/// Asks for a row to come, the `index`-th of rows that follow each other: once for each cache line.
#[inline(always)]
unsafe fn ahead<V: Quads, E: Stored<V>>(row: *const u8, index: usize) {
    if E::AHEAD && (E::ROW == 64 || index.is_multiple_of(2)) {
        // SAFETY: a hint.
        unsafe { V::prefetch(row) };
    }
}
