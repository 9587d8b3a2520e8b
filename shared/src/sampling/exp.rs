//! The exponential of many numbers at most 0: the same bits on every machine, and fast enough for a
//! whole vocabulary per token.
//!
//! `e^x = 2^n * e^r` with `|r| <= ln(2)/2` and a polynomial for `e^r`. Only additions and
//! multiplications of f64 in one written order, no branches, so that the compiler may use SIMD
//! without changing a bit. Relative error below 2e-14; `e^0` is exactly 1.

/// Below this a term vanishes in any sum that contains a 1 (it is less than half of the last place);
/// its exponential is given as 0.
const NEGLIGIBLE: f64 = -37.0;
/// Adding it rounds to an integer, which then lies in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// 1/k! from the highest.
const FACTORIALS: [f64; 12] = [
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// `e^x` for `x <= 0` (or NaN, which gives 0); 0 from -37 down.
#[inline(always)]
pub(super) fn exp(x: f64) -> f64 {
    let kept = x > NEGLIGIBLE;
    let x = if kept { x } else { 0.0 };
    let rounded = x * std::f64::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = FACTORIALS[0];
    for c in &FACTORIALS[1..] {
        p = p * r + c;
    }
    // 2^n: n in the exponent field.
    let scale = f64::from_bits((rounded.to_bits() << 52).wrapping_add(1.0f64.to_bits()));
    let e = p * scale;
    if kept { e } else { 0.0 }
}

/// `out[i] = e^((logits[i] - max) / temperature)`; `max` is the largest logit. Blocks without any
/// weight, which at low temperatures are nearly all, are passed over.
pub(super) fn weights(logits: &[f32], max: f32, temperature: f64, out: &mut Vec<f64>) {
    out.clear();
    out.resize(logits.len(), 0.0);
    for (logits, out) in logits.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
        if exponent(largest(logits), max, temperature) > NEGLIGIBLE {
            for (out, &logit) in out.iter_mut().zip(logits) {
                *out = weight(logit, max, temperature);
            }
        }
    }
}

/// The largest of a block.
fn largest(block: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for part in block.chunks(16) {
        for (max, &x) in lanes.iter_mut().zip(part) {
            *max = if x > *max { x } else { *max };
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// What a weight is the exponential of; it grows with the logit, rounding included.
#[inline(always)]
fn exponent(logit: f32, max: f32, temperature: f64) -> f64 {
    (f64::from(logit) - f64::from(max)) / temperature
}

/// One of [`weights`].
#[inline(always)]
pub(super) fn weight(logit: f32, max: f32, temperature: f64) -> f64 {
    exp(exponent(logit, max, temperature))
}

/// Sums run over blocks of this many, then over the blocks: in order both times.
pub(super) const BLOCK: usize = 64;

/// The sum of a block, in order.
pub(super) fn block_sum(block: &[f64]) -> f64 {
    block.iter().fold(0.0, |sum, w| sum + w)
}

/// The sum of all, block by block.
pub(super) fn sum(values: &[f64]) -> f64 {
    values.chunks(BLOCK).fold(0.0, |sum, block| sum + block_sum(block))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_exponential() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        for i in 0..600_000 {
            let x = -f64::from(i) * 1e-4;
            let expected = libm::exp(x);
            if x <= NEGLIGIBLE {
                continue;
            }
            assert!((exp(x) / expected - 1.0).abs() < 2e-14, "{x}: {} {expected}", exp(x));
        }
        for x in [-37.0, -61.0, -1e300, f64::NEG_INFINITY, f64::NAN] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
    }

    #[test]
    fn passing_blocks_over_changes_no_weight() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1009) as f32 / 20.0).collect();
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        for temperature in [0.05, 0.2, 0.7, 1.0, 2.0] {
            let mut out = Vec::new();
            weights(&logits, max, temperature, &mut out);
            for (i, &logit) in logits.iter().enumerate() {
                assert_eq!(out[i], weight(logit, max, temperature), "{i} {temperature}");
            }
        }
        let mut out = Vec::new();
        weights(&[vec![0.0; 640], vec![100.0], vec![0.0; 64]].concat(), 100.0, 1.0, &mut out);
        assert_eq!((out.len(), out[640], sum(&out)), (705, 1.0, 1.0));
    }
}
