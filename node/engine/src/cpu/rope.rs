//! Tables of rotary position embedding, in f64 by way of `libm`'s own code, so that every machine
//! has the same bits.

use millrace_shared::model::{RopeConfig, RopeScaling, RopeStyle};

use super::buffer::{Arena, Buf};
use crate::LoadError;

/// Cosines and sines for every position.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `positions x pairs`.
    cos: Buf<f32>,
    sin: Buf<f32>,
    pairs: usize,
    pub(crate) head_dim: usize,
    pub(crate) interleaved: bool,
}

impl Rope {
    /// Angles `position * base^(-2 i / dim) / factor_i`, stretched as the model's scaling says; their
    /// cosines and sines, times what it says.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn new(
        arena: &mut Arena,
        config: &RopeConfig,
        head_dim: usize,
        positions: usize,
        factors: Option<&[f32]>,
    ) -> Result<Self, LoadError> {
        let pairs = config.dim as usize / 2;
        let mut cos = arena.take(positions * pairs)?;
        let mut sin = arena.take(positions * pairs)?;
        fill(config, factors, &mut cos, &mut sin);
        let interleaved = config.style == RopeStyle::Interleaved;
        Ok(Self { cos, sin, pairs, head_dim, interleaved })
    }

    /// Cosines and sines of a position.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.pairs..(position + 1) * self.pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Fills tables of `positions x pairs`.
fn fill(config: &RopeConfig, factors: Option<&[f32]>, cos: &mut [f32], sin: &mut [f32]) {
    let pairs = config.dim as usize / 2;
    let size = match config.scaling {
        RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Long { attention_factor, .. } => {
            f64::from(attention_factor)
        }
        RopeScaling::Linear(_) | RopeScaling::Llama3 { .. } => 1.0,
    };
    for pair in 0..pairs {
        let turn = turn(config, pair, factors.map_or(1.0, |f| f[pair]));
        let lines = cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs));
        for (position, (cos, sin)) in lines.enumerate() {
            let (s, c) = libm::sincos(position as f64 * turn);
            (cos[pair], sin[pair]) = ((c * size) as f32, (s * size) as f32);
        }
    }
}

/// Cosines and sines for so many positions, each `positions x dim / 2`, as the CPU engine has them.
pub fn rope_tables(
    config: &RopeConfig,
    positions: usize,
    factors: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let elements = positions * config.dim as usize / 2;
    let (mut cos, mut sin) = (vec![0.0; elements], vec![0.0; elements]);
    fill(config, factors, &mut cos, &mut sin);
    (cos, sin)
}

/// The angle from one position to the next.
fn turn(config: &RopeConfig, pair: usize, factor: f32) -> f64 {
    let exponent = -2.0 * pair as f64 / f64::from(config.dim);
    let plain = libm::pow(f64::from(config.base), exponent);
    let scale = match config.scaling {
        RopeScaling::Linear(scale) => f64::from(scale),
        RopeScaling::Long { .. } => 1.0,
        RopeScaling::Yarn { .. } => 1.0 / kept(config, pair),
        // As `transformers` computes it (`_compute_llama3_parameters`).
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let [factor, low, high, context] =
                [factor, low_freq_factor, high_freq_factor, original_context].map(f64::from);
            let wavelength = std::f64::consts::TAU / plain;
            if wavelength > context / low {
                factor
            } else if wavelength < context / high {
                1.0
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        }
    };
    plain / (f64::from(factor) * scale)
}

/// What `YaRN` leaves of a frequency, as `transformers` computes it (`_compute_yarn_parameters`); 1
/// for other kinds.
fn kept(config: &RopeConfig, pair: usize) -> f64 {
    let RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } =
        config.scaling
    else {
        return 1.0;
    };
    let (dim, base) = (f64::from(config.dim), f64::from(config.base));
    // The pair that turns so many times in the first context.
    let pair_of = |turns: f32| {
        let wavelength = f64::from(original_context) / (f64::from(turns) * std::f64::consts::TAU);
        dim * libm::log(wavelength) / (2.0 * libm::log(base))
    };
    let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let slow = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
    slow / f64::from(factor) + (1.0 - slow)
}

/// A hash (FNV-1a) of table values before they are rounded, for usual bases and far positions:
/// another implementation of `pow` or `sincos` has another.
pub(crate) fn fingerprint() -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |x: f64| {
        for byte in x.to_bits().to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for base in [10_000.0, 100_000.0, 500_000.0, 1_000_000.0] {
        let style = RopeStyle::Interleaved;
        let config = RopeConfig { base, dim: 128, style, scaling: RopeScaling::Linear(1.0) };
        for pair in 0..64 {
            let turn = turn(&config, pair, 1.0);
            add(turn);
            for position in [1, 2, 3, 17, 100, 1023, 8191, 131_071] {
                let (s, c) = libm::sincos(f64::from(position) * turn);
                add(s);
                add(c);
            }
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every machine must find this value; with another, all recorded answers may change.
    #[test]
    fn the_fingerprint_is_known() {
        assert_eq!(format!("{:016x}", fingerprint()), "02aba2957cd67750");
    }
}
