//! From logits to a token: a pure function of (logits, parameters, token log, seed, position, mask).
//!
//! Nothing here keeps state between calls (a [`Scratch`] is only memory), draws randomness of its
//! own or calls the platform's maths library: the same inputs give the same token on every machine,
//! whatever else is in the batch. [`sample`] chooses, [`score`] reports log-probabilities of given
//! tokens, [`StopMatcher`] finds stop strings in text as it grows.
//!
//! "Raw" log-probabilities are those of the untouched logits: before bias, penalties and
//! temperature, everywhere.

mod draw;
mod exp;
mod few;
mod grammar;
mod mask;
mod params;
mod sample;
mod score;
mod stop;
mod top;

pub use draw::{choice_seed, uniform};
pub use few::{MAX_CANDIDATES, largest_logits, sample_top};
pub use grammar::{Grammar, MAX_GRAMMAR_BYTES};
pub use mask::TokenMask;
pub use params::{
    MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKENS,
    SamplingError, SamplingParams,
};
pub use sample::{Place, SampleError, Sampled, Scratch, sample};
pub use score::{log_sum_exp, score};
pub use stop::{StopMatcher, StopOutcome};
