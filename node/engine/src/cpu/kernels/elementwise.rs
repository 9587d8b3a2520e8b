//! Row-wise kernels: normalisation, activation, quantisation, rotation, rounding.
//!
//! Written once over [`Lanes`]. Widths are multiples of 32 (`model::weights` checks), so no kernel
//! has a tail; only the rotation works element by element.

use millrace_shared::model::Activation;

use super::dispatch;
use super::lanes::Lanes;
use crate::Isa;

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
        rms_norm_add_generic::<V>(x, gain, y, n, eps, false);
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
unsafe fn rms_norm_add_generic<V: Lanes>(
    x: *const f32,
    gain: *const f32,
    y: *mut f32,
    n: usize,
    eps: f32,
    add: bool,
) {
    // SAFETY: `n` elements at `x`, `gain` and `y`.
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
            let one = V::load(x.add(i)).mul(scale).mul(V::load(gain.add(i)));
            let one = if add { V::load(y.add(i)).add(one) } else { one };
            one.store(y.add(i));
        }
    }
}

dispatch! {
    /// `rms_norm` without the int8 form, of a multiple of 16 elements, stored or added; `x` may be `y`.
    pub(crate) fn rms_norm_add = rms_norm_add_generic(
        x: *const f32, gain: *const f32, y: *mut f32, n: usize, eps: f32, add: bool,
    );
}

#[inline(always)]
unsafe fn layer_norm_generic<V: Lanes>(
    x: *const f32,
    (gain, bias): (*const f32, *const f32),
    y: *mut f32,
    n: usize,
    eps: f32,
    quant: QuantOut,
) {
    // SAFETY: `n` elements at `x`, `gain`, `bias` and `y`; `quant` for `n / 32` blocks.
    unsafe {
        let mut sums = V::splat(0.0);
        for i in (0..n).step_by(16) {
            sums = sums.add(V::load(x.add(i)));
        }
        let mean = V::splat(sums.sum() / n as f32);
        let mut squares = V::splat(0.0);
        for i in (0..n).step_by(16) {
            let off = V::load(x.add(i)).sub(mean);
            squares = off.fma(off, squares);
        }
        let variance = squares.sum() / n as f32 + eps;
        // As in `rms_norm`: what overflowed must not pass as 1 / inf.
        let scale = V::splat(1.0 / variance.sqrt() + variance * 0.0);
        for i in (0..n).step_by(16) {
            let off = V::load(x.add(i)).sub(mean).mul(scale);
            off.fma(V::load(gain.add(i)), V::load(bias.add(i))).store(y.add(i));
        }
        quantise_blocks::<V>(y, n, quant);
    }
}

dispatch! {
    /// `y = fma((x - mean) * (1 / sqrt(mean((x - mean)^2) + eps)), gain, bias)`, elements and squares
    /// summed in the 16-lane order; and the int8 form of `y`.
    pub(crate) fn layer_norm = layer_norm_generic(
        x: *const f32,
        factors: (*const f32, *const f32),
        y: *mut f32,
        n: usize,
        eps: f32,
        quant: QuantOut,
    );
}

#[inline(always)]
unsafe fn activated<V: Lanes>(x: V, activation: Activation) -> V {
    // SAFETY: register arithmetic; the caller has the instruction set.
    unsafe {
        let turned = match activation {
            Activation::Silu => V::splat(0.0).sub(x),
            // `tanh(u)` is `2 / (1 + exp(-2 u)) - 1`, so that half of `1 + tanh` is a sigmoid.
            Activation::GeluTanh => {
                let cube = x.mul(x).mul(x);
                let u = cube.fma(V::splat(0.044_715), x);
                u.mul(V::splat(-2.0 * 0.797_884_6))
            }
        };
        x.div(V::splat(1.0).add(exp(turned)))
    }
}

#[inline(always)]
unsafe fn gated_generic<V: Lanes>(
    gate: *const f32,
    up: *const f32,
    y: *mut f32,
    n: usize,
    activation: Activation,
    quant: QuantOut,
) {
    // SAFETY: `n` elements at `gate`, `up` and `y`; `quant` for `n / 32` blocks.
    unsafe {
        for i in (0..n).step_by(16) {
            let active = activated(V::load(gate.add(i)), activation);
            active.mul(V::load(up.add(i))).store(y.add(i));
        }
        quantise_blocks::<V>(y, n, quant);
    }
}

#[inline(always)]
unsafe fn activate_generic<V: Lanes>(
    x: *mut f32,
    bias: Option<&[f32]>,
    n: usize,
    activation: Activation,
    quant: QuantOut,
) {
    // SAFETY: `n` elements at `x`, and as many of the bias; `quant` for `n / 32` blocks.
    unsafe {
        for i in (0..n).step_by(16) {
            let mut one = V::load(x.add(i));
            if let Some(bias) = bias {
                one = one.add(V::load(bias.as_ptr().add(i)));
            }
            activated(one, activation).store(x.add(i));
        }
        quantise_blocks::<V>(x, n, quant);
    }
}

dispatch! {
    /// `x = activation(x + bias)`, as [`gated`] has it; and the int8 form of `x`.
    pub(crate) fn activate = activate_generic(
        x: *mut f32,
        bias: Option<&[f32]>,
        n: usize,
        activation: Activation,
        quant: QuantOut,
    );
}

dispatch! {
    /// `y = activation(gate) * up`, SiLU being `g / (1 + exp(-g))` and GELU
    /// `g / (1 + exp(-2 sqrt(2 / pi) (g + 0.044715 g^3)))`; and the int8 form of `y`.
    pub(crate) fn gated = gated_generic(
        gate: *const f32,
        up: *const f32,
        y: *mut f32,
        n: usize,
        activation: Activation,
        quant: QuantOut,
    );
}

/// `c * tanh(x / c)` of each lane, as `c - 2 c / (1 + exp(2 x / c))`.
#[inline(always)]
unsafe fn capped<V: Lanes>(x: V, cap: f32) -> V {
    // SAFETY: register arithmetic; the caller has the instruction set.
    unsafe {
        let one = V::splat(1.0).add(exp(x.mul(V::splat(2.0 / cap))));
        V::splat(cap).sub(V::splat(2.0 * cap).div(one))
    }
}

/// [`soft_cap`] of a multiple of 16 elements.
#[inline(always)]
unsafe fn cap_lanes<V: Lanes>(x: *mut f32, n: usize, cap: f32) {
    for i in (0..n).step_by(16) {
        // SAFETY: `n` elements.
        unsafe { capped(V::load(x.add(i)), cap).store(x.add(i)) };
    }
}

#[inline(always)]
unsafe fn soft_cap_generic<V: Lanes>(x: &mut [f32], cap: f32) {
    let whole = x.len() / 16 * 16;
    // SAFETY: as many elements; the rest by way of a full vector.
    unsafe {
        cap_lanes::<V>(x.as_mut_ptr(), whole, cap);
        let rest = &mut x[whole..];
        let mut last = [0.0; 16];
        last[..rest.len()].copy_from_slice(rest);
        cap_lanes::<V>(last.as_mut_ptr(), 16, cap);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

dispatch! {
    fn soft_cap_of = soft_cap_generic(x: &mut [f32], cap: f32);
}

/// `x = c * tanh(x / c)` of every element, the cap `c` being above 0.
pub(crate) fn soft_cap(isa: Isa, x: &mut [f32], cap: f32) {
    // SAFETY: a slice, and this machine's instructions.
    unsafe { soft_cap_of(isa, x, cap) };
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
