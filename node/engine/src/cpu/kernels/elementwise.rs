//! Row-wise kernels: normalisation, activation, quantisation, rotation, rounding.
//!
//! Written once over [`Lanes`]. Widths are multiples of 32 (`model::weights` checks), so no kernel
//! has a tail; only the rotation works element by element.

use super::dispatch;
use super::lanes::Lanes;

/// Where the int8 form of one row goes; one entry per block of 32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantOut {
    pub(crate) q: *mut i8,
    pub(crate) scale: *mut f32,
    pub(crate) scaled_sum: *mut f32,
    pub(crate) sums: *mut [i32; 2],
}

/// `exp` of each lane: `2^n * p(r)` with `n` the nearest integer to `x / ln 2`, and `p` of degree 6.
/// Arguments are clamped to the range of normal results; NaN stays NaN. Relative error under 3e-7.
#[inline(always)]
pub(crate) unsafe fn exp<V: Lanes>(x: V) -> V {
    // SAFETY: register arithmetic; the caller has the instruction set.
    unsafe {
        let s = |x: f32| V::splat(x);
        let x = s(-87.0).max(x);
        let x = s(88.0).min(x);
        let n = x.mul(s(std::f32::consts::LOG2_E)).round();
        // ln 2 in two parts; the first has few bits, so that the product is exact.
        let r = n.fma(s(-0.693_359_4), x);
        let r = n.fma(s(2.121_944_4e-4), r);
        let p = s(1.0 / 720.0);
        let p = p.fma(r, s(1.0 / 120.0));
        let p = p.fma(r, s(1.0 / 24.0));
        let p = p.fma(r, s(1.0 / 6.0));
        let p = p.fma(r, s(0.5));
        let p = p.fma(r, s(1.0));
        let p = p.fma(r, s(1.0));
        p.mul(n.pow2())
    }
}

/// Quantises a row: per block of 32 `scale = absmax / 127`, `q = round(x * (127 / absmax))`, ties to
/// even.
#[inline(always)]
unsafe fn quantise_blocks<V: Lanes>(x: *const f32, n: usize, out: QuantOut) {
    // SAFETY: `n` readable elements, outputs for `n / 32` blocks.
    unsafe {
        for b in 0..n / 32 {
            let (lo, hi) = (V::load(x.add(b * 32)), V::load(x.add(b * 32 + 16)));
            let got = V::quantise(lo, hi, out.q.add(b * 32));
            *out.scale.add(b) = got.scale;
            *out.scaled_sum.add(b) = got.scale * (got.sums[0] + got.sums[1]) as f32;
            *out.sums.add(b) = got.sums;
        }
    }
}

dispatch! {
    /// Quantises a row of `n`.
    pub(crate) fn quantise = quantise_blocks(x: *const f32, n: usize, out: QuantOut);
}

#[inline(always)]
unsafe fn rms_norm_generic<V: Lanes>(
    x: *const f32,
    gain: *const f32,
    y: *mut f32,
    n: usize,
    eps: f32,
    quant: QuantOut,
) {
    // SAFETY: `n` elements at `x`, `gain` and `y`; `quant` for `n / 32` blocks.
    unsafe {
        let mut squares = V::splat(0.0);
        for i in (0..n).step_by(16) {
            let x = V::load(x.add(i));
            squares = x.fma(x, squares);
        }
        let mean = squares.sum() / n as f32 + eps;
        // The product is zero, but NaN where the squares overflowed: that must not pass as 1 / inf.
        let scale = V::splat(1.0 / mean.sqrt() + mean * 0.0);
        for i in (0..n).step_by(16) {
            V::load(x.add(i)).mul(scale).mul(V::load(gain.add(i))).store(y.add(i));
        }
        quantise_blocks::<V>(y, n, quant);
    }
}

dispatch! {
    /// `y = (x * (1 / sqrt(mean(x^2) + eps))) * gain`, squares summed in the 16-lane order; and the
    /// int8 form of `y`.
    pub(crate) fn rms_norm = rms_norm_generic(
        x: *const f32, gain: *const f32, y: *mut f32, n: usize, eps: f32, quant: QuantOut,
    );
}

#[inline(always)]
unsafe fn silu_mul_generic<V: Lanes>(
    gate: *const f32,
    up: *const f32,
    y: *mut f32,
    n: usize,
    quant: QuantOut,
) {
    // SAFETY: `n` elements at `gate`, `up` and `y`; `quant` for `n / 32` blocks.
    unsafe {
        let (zero, one) = (V::splat(0.0), V::splat(1.0));
        for i in (0..n).step_by(16) {
            let g = V::load(gate.add(i));
            let silu = g.div(one.add(exp(zero.sub(g))));
            silu.mul(V::load(up.add(i))).store(y.add(i));
        }
        quantise_blocks::<V>(y, n, quant);
    }
}

dispatch! {
    /// `y = (gate / (1 + exp(-gate))) * up`; and the int8 form of `y`.
    pub(crate) fn silu_mul = silu_mul_generic(
        gate: *const f32, up: *const f32, y: *mut f32, n: usize, quant: QuantOut,
    );
}

#[inline(always)]
unsafe fn finite_generic<V: Lanes>(x: *const f32, n: usize) -> bool {
    // SAFETY: `n` readable elements.
    unsafe { (0..n).step_by(16).all(|i| V::load(x.add(i)).finite()) }
}

dispatch! {
    /// Whether every element is finite.
    pub(crate) fn finite = finite_generic(x: *const f32, n: usize) -> bool;
}

/// Cosines and sines of one position, `dim / 2` each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rotation<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) interleaved: bool,
}

#[inline(always)]
unsafe fn rotate_generic<V: Lanes>(heads: &mut [f32], head_dim: usize, rotation: Rotation<'_>) {
    let half = rotation.cos.len();
    for head in heads.chunks_exact_mut(head_dim) {
        let turn = |a: f32, b: f32, i: usize| {
            let (c, s) = (rotation.cos[i], rotation.sin[i]);
            (a.mul_add(c, -(b * s)), a.mul_add(s, b * c))
        };
        if rotation.interleaved {
            for (i, pair) in head[..2 * half].chunks_exact_mut(2).enumerate() {
                (pair[0], pair[1]) = turn(pair[0], pair[1], i);
            }
        } else {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for (i, (a, b)) in low.iter_mut().zip(high).enumerate() {
                (*a, *b) = turn(*a, *b, i);
            }
        }
    }
}

dispatch! {
    /// Rotates whole heads: `(a, b) -> (fma(a, cos, -(b sin)), fma(a, sin, b cos))`.
    pub(crate) fn rotate = rotate_generic(
        heads: &mut [f32], head_dim: usize, rotation: Rotation<'_>,
    );
}
