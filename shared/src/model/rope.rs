//! How positions turn the heads of queries and keys.

use serde::{Deserialize, Serialize};

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RopeStyle {
    /// Neighbours: `(0, 1), (2, 3), …` (GGUF's `llama`).
    Interleaved,
    /// Halves: `(0, d/2), (1, d/2 + 1), …` (Hugging Face's convention).
    Halves,
}

/// How angles are stretched for contexts longer than the model was first trained for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Positions are divided by it; 1 for none.
    Linear(f32),
    /// Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between mixed.
    Llama3 {
        /// Divisor of slow frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are slow.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are fast.
        high_freq_factor: f32,
        /// Context of the first training.
        original_context: f32,
    },
    /// `YaRN` (arXiv 2309.00071): frequencies that turn less than `beta_slow` times in the first
    /// context are divided by `factor`, those above `beta_fast` kept, those between mixed.
    Yarn {
        /// Divisor of slow frequencies.
        factor: f32,
        /// Context of the first training.
        original_context: f32,
        /// Turns from which on a frequency is fast.
        beta_fast: f32,
        /// Turns below which it is slow.
        beta_slow: f32,
        /// Whether the bounds are whole frequencies.
        truncate: bool,
        /// Of cosines and sines.
        attention_factor: f32,
    },
    /// `LongRoPE` (arXiv 2402.13753): a divisor for each frequency, out of one list for sequences
    /// within the first context and of another for longer ones. A deployment uses one of them, by
    /// the longest sequence that it admits: keys in the cache would not fit the other.
    Long {
        /// Context of the first training.
        original_context: f32,
        /// Of cosines and sines.
        attention_factor: f32,
    },
}

/// Divisors of the frequencies for [`RopeScaling::Long`], where no tensors hold them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LongFactors {
    /// For sequences within the first context.
    pub short: Vec<f32>,
    /// For longer ones.
    pub long: Vec<f32>,
}

impl RopeScaling {
    /// Whether sequences of at most so many positions take the factors for long contexts, where
    /// there are two lists.
    pub fn is_long(self, positions: u32) -> bool {
        matches!(self, Self::Long { original_context, .. } if positions as f32 > original_context)
    }

    /// What usual `YaRN` multiplies cosines and sines with.
    pub(super) fn yarn_attention_factor(factor: f32, weight: f32) -> f32 {
        let ln = libm::log(f64::from(factor));
        if factor <= 1.0 { 1.0 } else { (0.1 * f64::from(weight) * ln + 1.0) as f32 }
    }

    /// The same for `LongRoPE`; `factor` says how much longer the context has become.
    pub(super) fn long_attention_factor(factor: f32, original_context: f32) -> f32 {
        let ln = libm::log(f64::from(factor)) / libm::log(f64::from(original_context));
        if factor <= 1.0 { 1.0 } else { (1.0 + ln).sqrt() as f32 }
    }
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub base: f32,
    /// Rotated elements per head; none where positions are learned.
    pub dim: u32,
    /// Pairing.
    pub style: RopeStyle,
    /// For long contexts.
    pub scaling: RopeScaling,
}
