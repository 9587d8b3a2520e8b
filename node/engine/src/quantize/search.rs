//! Better scales for four bits: a few ways to round a block, each with the scale that least squares
//! gives for them (the idea of `make_qx_quants` and `make_qkx2_quants` in `ggml-quants.c`, without
//! weights), rounded to f16; the best one, its quants chosen anew for exactly that scale. The
//! reference block is kept where nothing has a smaller squared error, so a block that four bits hold
//! exactly stays exact.

use half::f16;

use super::blocks::BLOCK;

/// Ways to round on each side of the usual one.
const STEPS: i32 = 9;
/// How much farther each of them spreads the block, in quants.
const STEP: f32 = 0.1;

/// A block with a minimum: `scale * q + min`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Affine {
    pub(super) scale: f16,
    pub(super) min: f16,
    pub(super) q: [u8; BLOCK],
}

/// To the nearest integer, halves to even, for magnitudes below 2^22: the sum has no bits left for
/// fractions.
fn round_even(x: f32) -> f32 {
    const BIG: f32 = 12_582_912.0;
    (x + BIG) - BIG
}

/// Sum in eight lanes, so that it compiles to vector code; one fixed order.
fn sum(value: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; 8];
    for i in 0..BLOCK / 8 {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += value(i * 8 + j);
        }
    }
    lanes.iter().sum()
}

/// A better Q4_0 block than `found`, whose extreme value is `extreme`, if there is one.
pub(super) fn q4_0(
    x: &[f32; BLOCK],
    extreme: f32,
    found: (f16, [u8; BLOCK]),
) -> (f16, [u8; BLOCK]) {
    let error = |scale: f16, q: &[u8; BLOCK]| {
        let d = scale.to_f32();
        sum(|i| {
            let e = x[i] - d * (f32::from(q[i]) - 8.0);
            e * e
        })
    };
    let before = error(found.0, &found.1);
    if before == 0.0 {
        return found;
    }
    let mut best = (f32::NEG_INFINITY, found.0);
    for step in -STEPS..=STEPS {
        let inv = -(8.0 + STEP * step as f32) / extreme;
        let q: [f32; BLOCK] = std::array::from_fn(|i| round_even((x[i] * inv).clamp(-8.0, 7.0)));
        let (xq, qq) = (sum(|i| x[i] * q[i]), sum(|i| q[i] * q[i]));
        let scale = f16::from_f32(xq / qq);
        let d = scale.to_f32();
        // The squared error, negated, less the squares of x, which are the same for all.
        let gain = d * (2.0 * xq - d * qq);
        if gain > best.0 && scale.is_finite() {
            best = (gain, scale);
        }
    }
    let inv = 1.0 / best.1.to_f32();
    let q = std::array::from_fn(|i| (round_even((x[i] * inv).clamp(-8.0, 7.0)) + 8.0) as u8);
    // An infinite inverse makes an error that is no number, which is not smaller.
    if error(best.1, &q) < before { (best.1, q) } else { found }
}

/// A better Q4_1 block than `found`, whose values lie between `least` and `greatest`, if there is
/// one.
pub(super) fn q4_1(x: &[f32; BLOCK], (least, greatest): (f32, f32), found: Affine) -> Affine {
    let error = |b: &Affine| {
        let (d, m) = (b.scale.to_f32(), b.min.to_f32());
        sum(|i| {
            let e = x[i] - (d * f32::from(b.q[i]) + m);
            e * e
        })
    };
    let before = error(&found);
    if before == 0.0 {
        return found;
    }
    // From the least value on, so that little is lost where the minimum is large.
    let y: [f32; BLOCK] = std::array::from_fn(|i| x[i] - least);
    let n = BLOCK as f32;
    let y_sum = sum(|i| y[i]);
    let mut best = (f32::NEG_INFINITY, found.scale, found.min);
    for step in -STEPS..=STEPS {
        let inv = (15.0 + STEP * step as f32) / (greatest - least);
        let q: [f32; BLOCK] = std::array::from_fn(|i| round_even((y[i] * inv).clamp(0.0, 15.0)));
        let (q_sum, qq, yq) = (sum(|i| q[i]), sum(|i| q[i] * q[i]), sum(|i| y[i] * q[i]));
        let determinant = n * qq - q_sum * q_sum;
        let d = (n * yq - y_sum * q_sum) / determinant;
        let m = (qq * y_sum - q_sum * yq) / determinant;
        let (scale, min) = (f16::from_f32(d), f16::from_f32(least + m));
        let (d, m) = (scale.to_f32(), min.to_f32() - least);
        // The squared error, negated, less the squares of y.
        let gain = 2.0 * (d * yq + m * y_sum) - d * d * qq - 2.0 * d * m * q_sum - n * m * m;
        if gain > best.0 && scale.is_finite() && min.is_finite() {
            best = (gain, scale, min);
        }
    }
    let (d, m) = (best.1.to_f32(), best.2.to_f32());
    let inv = 1.0 / d;
    let q = std::array::from_fn(|i| round_even(((x[i] - m) * inv).clamp(0.0, 15.0)) as u8);
    let better = Affine { scale: best.1, min: best.2, q };
    if error(&better) < before { better } else { found }
}
