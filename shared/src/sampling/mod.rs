//! From logits to a token: a pure function of (logits, parameters, token log, seed, position).

mod params;

pub use params::{SamplingError, SamplingParams};
