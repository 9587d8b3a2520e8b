//! Sampling from the largest logits alone.
//!
//! Where nothing changes logits and no log-probability is asked for, a greedy choice and one among
//! `top_k` tokens depend on the largest `k` logits and nothing else: whoever computes logits need
//! not keep the others. [`SamplingParams::candidates`] says when, and [`sample_top`] then gives the
//! token of [`sample`](super::sample()), by the same code. Not here: `top_p` or `min_p` without
//! `top_k`, whose sums are over the whole vocabulary.

use super::draw::uniform;
use super::params::SamplingParams;
use super::sample::{SampleError, Sampled, Scratch, adjusts, draw_among};
use super::top;

/// Most logits per position that can be asked for in place of all.
pub const MAX_CANDIDATES: usize = 64;

impl SamplingParams {
    /// How many of the largest of `vocab` logits [`sample_top`] needs to give the token that
    /// [`sample`](super::sample()) would; `None` where it takes all logits.
    pub fn candidates(&self, vocab: usize) -> Option<usize> {
        if self.logprobs.is_some() || self.grammar.is_some() || adjusts(self) {
            return None;
        }
        if self.takes_best() {
            return Some(1);
        }
        let k = self.top_k as usize;
        (k > 0 && k < vocab && k <= MAX_CANDIDATES).then_some(k)
    }
}

/// [`sample`](super::sample()), given the [`SamplingParams::candidates`] largest logits as pairs of
/// (token id, logit) in the order of [`largest_logits`].
///
/// # Errors
/// If there are none.
pub fn sample_top(
    top: &[(u32, f32)],
    params: &SamplingParams,
    seed: u64,
    position: u32,
    scratch: &mut Scratch,
) -> Result<Sampled, SampleError> {
    let &(best, max) = top.first().ok_or(SampleError::Empty)?;
    let token = if params.takes_best() {
        best
    } else {
        scratch.candidates.clear();
        scratch.candidates.extend_from_slice(top);
        draw_among(max, params, uniform(seed, position), scratch)
    };
    Ok(Sampled { token, logprobs: None })
}

/// Fills `out` with the `k` largest logits as pairs of (token id, logit): larger first, equal ones by
/// lower id. Allocates nothing if `out` has room for `k + 64` and `2 k`.
///
/// # Errors
/// If a logit is not finite (the first is named), or there are none.
pub fn largest_logits(
    logits: &[f32],
    k: usize,
    out: &mut Vec<(u32, f32)>,
) -> Result<(), SampleError> {
    let best = top::argmax(logits).ok_or_else(|| SampleError::non_finite(logits))?;
    if k == 1 {
        out.clear();
        out.push(best);
    } else {
        top::largest(logits, k, out);
    }
    Ok(())
}
