//! Tables of rotary position embedding, in f64 by way of `libm`'s own code, so that every machine
//! has the same bits.

use millrace_shared::model::{RopeConfig, RopeStyle};

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
    /// Angles `position / scale * base^(-2 i / dim) / factor_i`.
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
        for pair in 0..pairs {
            let exponent = -2.0 * pair as f64 / f64::from(config.dim);
            let factor = factors.map_or(1.0, |f| f64::from(f[pair]));
            let turn = libm::pow(f64::from(config.base), exponent)
                / (factor * f64::from(config.linear_scale));
            for position in 0..positions {
                let (s, c) = libm::sincos(position as f64 * turn);
                cos[position * pairs + pair] = c as f32;
                sin[position * pairs + pair] = s as f32;
            }
        }
        let interleaved = config.style == RopeStyle::Interleaved;
        Ok(Self { cos, sin, pairs, head_dim, interleaved })
    }

    /// Cosines and sines of a position.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.pairs..(position + 1) * self.pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }
}
