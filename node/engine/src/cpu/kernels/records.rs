//! What a part of a sequence says of a query: unnormalised sums of values, the largest score, the sum
//! of probabilities. Records are merged in the order of parts, so that parts may be computed anywhere.

use super::elementwise::exp;
use super::quads::Quads;

/// Floats of a [`merge`] record: sums of values, then maximum, sum of probabilities, room.
pub(crate) fn record_len(dim: usize) -> usize {
    dim + 16
}

/// Adds a record to those of the parts before it.
#[inline(always)]
pub(super) unsafe fn merge<V: Quads>(total: *mut f32, next: *const f32, dim: usize) {
    // SAFETY: two records.
    unsafe {
        let (old, new) = (*total.add(dim), *next.add(dim));
        let top = if new > old { new } else { old };
        let mut shrink = [0f32; 16];
        (shrink[0], shrink[1]) = (old - top, new - top);
        exp(V::load(shrink.as_ptr())).store(shrink.as_mut_ptr());
        let (a, b) = (V::splat(shrink[0]), V::splat(shrink[1]));
        *total.add(dim) = top;
        let sum = total.add(dim + 1);
        *sum = (*sum).mul_add(shrink[0], *next.add(dim + 1) * shrink[1]);
        for d in (0..dim).step_by(16) {
            let old = V::load(total.add(d)).mul(a);
            V::load(next.add(d)).fma(b, old).store(total.add(d));
        }
    }
}

/// Normalises.
#[inline(always)]
pub(super) unsafe fn finish<V: Quads>(record: *const f32, out: *mut f32, dim: usize) {
    // SAFETY: a record and `dim` outputs.
    unsafe {
        let inverse = V::splat(1.0 / *record.add(dim + 1));
        for d in (0..dim).step_by(16) {
            V::load(record.add(d)).mul(inverse).store(out.add(d));
        }
    }
}
