//! What routing rows to experts takes: exponentials of scores, and weighed sums.
//!
//! Each result is one lane, so that sixteen at a time give the same bits on every instruction set.

use super::dispatch;
use super::elementwise::exp;
use super::lanes::Lanes;
use crate::Isa;

#[inline(always)]
unsafe fn exps_generic<V: Lanes>(x: &mut [f32], top: f32) {
    for some in x.chunks_exact_mut(16) {
        let at = some.as_mut_ptr();
        // SAFETY: sixteen elements.
        unsafe { exp(V::load(at).sub(V::splat(top))).store(at) };
    }
}

dispatch! {
    fn exps_of = exps_generic(x: &mut [f32], top: f32);
}

/// `exp(x - top)` of a multiple of 16 elements.
pub(crate) fn exps(isa: Isa, x: &mut [f32], top: f32) {
    assert!(x.len().is_multiple_of(16), "invariant: whole vectors");
    // SAFETY: a slice, and this machine's instructions.
    unsafe { exps_of(isa, x, top) };
}

#[inline(always)]
unsafe fn add_weighed_generic<V: Lanes>(x: &[f32], weight: f32, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(16).zip(y.chunks_exact_mut(16)) {
        let at = y.as_mut_ptr();
        // SAFETY: sixteen elements each.
        unsafe { V::load(x.as_ptr()).fma(V::splat(weight), V::load(at)).store(at) };
    }
}

dispatch! {
    fn add_weighed_of = add_weighed_generic(x: &[f32], weight: f32, y: &mut [f32]);
}

/// `y = fma(x, weight, y)` of a multiple of 16 elements.
pub(crate) fn add_weighed(isa: Isa, x: &[f32], weight: f32, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(16), "invariant: whole vectors");
    // SAFETY: slices, and this machine's instructions.
    unsafe { add_weighed_of(isa, x, weight, y) };
}

/// `1 / (1 + exp(-x))`.
pub(crate) fn sigmoid(isa: Isa, x: f32) -> f32 {
    let mut lanes = [-x; 16];
    exps(isa, &mut lanes, 0.0);
    1.0 / (1.0 + lanes[0])
}
