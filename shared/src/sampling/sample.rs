//! One token from the logits of one position.
//!
//! In this order:
//! 1. raw log-probabilities, where asked for, from the untouched logits;
//! 2. `logit_bias` is added;
//! 3. penalties: repetition (tokens of prompt and answer), then frequency and presence (tokens of
//!    the answer);
//! 4. where there is a mask, only the tokens in it go on;
//! 5. temperature 0: the largest logit, the lowest id among equals;
//! 6. else probabilities at that temperature; then `top_k` largest logits (equal ones by lower id),
//!    `min_p` (relative to the most probable), `top_p` (of what is left, most probable first; the
//!    token that reaches the mass is kept);
//! 7. a number in `[0, 1)` from (seed, position) picks from the running sum of probabilities in
//!    ascending order of ids.
//!
//! Probabilities are f64, unnormalised, relative to the largest, and exactly 0 below e^-37; every sum
//! has one fixed order. So the result is defined to the last bit.

use super::draw::uniform;
use super::exp;
use super::mask::TokenMask;
use super::params::SamplingParams;
use super::score::log_sum_exp;
use super::top::{self, Candidate};
use crate::wire::rpc::TokenLogprobs;

/// What was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Raw log-probabilities, where `params.logprobs` asks for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why no token can be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model's output is broken.
    #[error("logit {value} of token {id} is not finite; the model's output is unusable")]
    NonFinite {
        /// The first such token.
        id: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// There is nothing to choose from.
    #[error("no logits")]
    Empty,
    /// The mask lets nothing through.
    #[error("no token of the vocabulary is allowed")]
    NothingAllowed,
    /// A token that the model does not have.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    OutsideVocabulary {
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab: usize,
    },
}

impl SampleError {
    /// Names the first logit that is not finite.
    pub(super) fn non_finite(logits: &[f32]) -> Self {
        match logits.iter().position(|x| !x.is_finite()) {
            Some(id) => Self::NonFinite { id, value: logits[id] },
            None => Self::Empty,
        }
    }
}

/// Memory that is used again from call to call; holds nothing that matters.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) candidates: Vec<Candidate>,
    raw: Vec<f32>,
    weights: Vec<f64>,
    counts: Vec<u32>,
}

/// Where in its sequence a token is chosen, and among which.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The token log up to and including the position after which a token is chosen.
    pub history: &'a [u32],
    /// How many of `history` are the prompt.
    pub prompt_len: usize,
    /// The random stream.
    pub seed: u64,
    /// Position of the last token of `history`; with `seed` it names the random number.
    pub position: u32,
    /// Tokens that may come; `None` allows all.
    pub mask: Option<&'a TokenMask>,
}

/// Chooses the token that follows a place. `logits` are the `vocab` logits of its position; they are
/// changed. `params` must have passed [`SamplingParams::validate`].
///
/// # Errors
/// If a logit is not finite, there are none, or the mask allows none.
pub fn sample(
    logits: &mut [f32],
    params: &SamplingParams,
    place: Place<'_>,
    scratch: &mut Scratch,
) -> Result<Sampled, SampleError> {
    let Place { history, prompt_len, seed, position, mask } = place;
    let changes = adjusts(params) || mask.is_some();
    let adjusts = adjusts(params);
    let mut raw = None;
    if let Some(k) = params.logprobs {
        let total = log_sum_exp(logits).ok_or_else(|| SampleError::non_finite(logits))?;
        top::largest(logits, usize::from(k), &mut scratch.candidates);
        let logprob = |logit: f32| (f64::from(logit) - total) as f32;
        let top = scratch.candidates.iter().map(|&(id, logit)| (id, logprob(logit))).collect();
        raw = Some((total, top));
        if changes {
            scratch.raw.clear();
            scratch.raw.extend_from_slice(logits);
        }
    } else if changes && top::argmax(logits).is_none() {
        return Err(SampleError::non_finite(logits));
    }
    if adjusts {
        adjust(logits, params, history, prompt_len, &mut scratch.counts);
    }
    let lowest = match mask {
        Some(mask) => Some(mask.first(logits.len()).ok_or(SampleError::NothingAllowed)?),
        None => None,
    };
    if let Some(mask) = mask {
        mask.apply(logits);
    }
    let (best, max) = top::argmax(logits).ok_or_else(|| SampleError::non_finite(logits))?;
    let token = if params.takes_best() {
        best
    } else {
        draw(logits, max, params, uniform(seed, position), scratch)
    };
    // Only where bias and penalties made every allowed logit the lowest that there is.
    let allowed = |token: &u32| mask.is_none_or(|mask| mask.allows(*token));
    let token = Some(token).filter(allowed).or(lowest).unwrap_or(token);
    let logprobs = raw.map(|(total, top)| {
        let untouched = if changes { &scratch.raw[..] } else { &*logits };
        let logprob = (f64::from(untouched[token as usize]) - total) as f32;
        TokenLogprobs { logprob, top }
    });
    Ok(Sampled { token, logprobs })
}

fn penalises(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0
        || params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
}

pub(super) fn adjusts(params: &SamplingParams) -> bool {
    !params.logit_bias.is_empty() || penalises(params)
}

/// Back to f32, finite whatever the penalty was.
fn finite(x: f64) -> f32 {
    x.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}

/// Adds the bias and applies the penalties; each logit is computed in f64 and rounded once.
fn adjust(
    logits: &mut [f32],
    params: &SamplingParams,
    history: &[u32],
    prompt_len: usize,
    counts: &mut Vec<u32>,
) {
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = finite(f64::from(*logit) + f64::from(bias));
        }
    }
    if !penalises(params) {
        return;
    }
    // Occurrences in the answer; `SEEN` marks a token that is still to be penalised.
    const SEEN: u32 = 1 << 31;
    counts.clear();
    counts.resize(logits.len(), 0);
    for (index, &id) in history.iter().enumerate() {
        if let Some(count) = counts.get_mut(id as usize) {
            *count = (*count | SEEN) + u32::from(index >= prompt_len);
        }
    }
    let repetition = f64::from(params.repetition_penalty);
    for &id in history {
        let Some(count) = counts.get_mut(id as usize).filter(|c| **c & SEEN != 0) else { continue };
        *count &= !SEEN;
        let logit = &mut logits[id as usize];
        let mut x = f64::from(*logit);
        x = if x > 0.0 { x / repetition } else { x * repetition };
        if *count > 0 {
            x -= f64::from(params.frequency_penalty) * f64::from(*count);
            x -= f64::from(params.presence_penalty);
        }
        *logit = finite(x);
    }
}

/// Draws from the filtered distribution; `max` is the largest logit, `u` the random number.
fn draw(logits: &[f32], max: f32, params: &SamplingParams, u: f64, scratch: &mut Scratch) -> u32 {
    let k = params.top_k as usize;
    if k > 0 && k < logits.len() {
        top::largest(logits, k, &mut scratch.candidates);
        return draw_among(max, params, u, scratch);
    }
    let Scratch { candidates, weights, .. } = scratch;
    let temperature = f64::from(params.temperature);
    let (min_p, top_p) = (f64::from(params.min_p), f64::from(params.top_p));
    exp::weights(logits, max, temperature, weights);
    if min_p > 0.0 {
        weights.iter_mut().filter(|w| **w < min_p).for_each(|w| *w = 0.0);
    }
    if top_p >= 1.0 {
        return pick(weights, u) as u32;
    }
    nucleus(logits, weights, top_p, candidates);
    pick_candidate(max, temperature, u, candidates, weights)
}

/// Draws from the scratch's candidates, which are the `top_k` largest logits, best first.
pub(super) fn draw_among(max: f32, params: &SamplingParams, u: f64, scratch: &mut Scratch) -> u32 {
    let Scratch { candidates, weights, .. } = scratch;
    let temperature = f64::from(params.temperature);
    let (min_p, top_p) = (f64::from(params.min_p), f64::from(params.top_p));
    weights.clear();
    weights.extend(candidates.iter().map(|c| exp::weight(c.1, max, temperature)));
    // Best first: what min_p drops is at the end.
    weights.truncate(weights.iter().take_while(|&&w| w >= min_p).count());
    let mass = if top_p < 1.0 { top_p * exp::sum(weights) } else { f64::INFINITY };
    let (kept, _) = prefix(weights.iter().copied(), mass);
    candidates.truncate(kept);
    pick_candidate(max, temperature, u, candidates, weights)
}

/// The candidate at `u` of the running sum of probabilities, in ascending order of ids.
fn pick_candidate(
    max: f32,
    temperature: f64,
    u: f64,
    candidates: &mut [Candidate],
    weights: &mut Vec<f64>,
) -> u32 {
    candidates.sort_unstable_by_key(|c| c.0);
    weights.clear();
    weights.extend(candidates.iter().map(|c| exp::weight(c.1, max, temperature)));
    candidates[pick(weights, u)].0
}

/// How many of the first weights together reach `mass` (all, if none do), and whether they do. Stops
/// at a weight of 0.
fn prefix(weights: impl Iterator<Item = f64>, mass: f64) -> (usize, bool) {
    let mut sum = 0.0;
    let mut count = 0;
    for w in weights {
        if w == 0.0 {
            return (count, true);
        }
        sum += w;
        count += 1;
        if sum >= mass {
            return (count, true);
        }
    }
    (count, false)
}

/// Fills `candidates` with the most probable tokens that together reach `top_p` of all `weights`.
fn nucleus(logits: &[f32], weights: &[f64], top_p: f64, candidates: &mut Vec<Candidate>) {
    let mass = top_p * exp::sum(weights);
    // Nearly always a few tokens reach the mass: order only as many as it takes.
    let mut k = 64;
    loop {
        top::largest(logits, k, candidates);
        let ordered = candidates.iter().map(|c| weights[c.0 as usize]);
        let (kept, reached) = prefix(ordered, mass);
        if reached || k >= logits.len() {
            candidates.truncate(kept);
            return;
        }
        k *= 16;
    }
}

/// Index of the first weight at which the running sum exceeds `u < 1` times the sum of all; never that
/// of a weight of 0. The largest weight is 1, so there is one.
fn pick(weights: &[f64], u: f64) -> usize {
    let target = u * exp::sum(weights);
    let mut before = 0.0;
    for (block, values) in weights.chunks(exp::BLOCK).enumerate() {
        let after = before + exp::block_sum(values);
        if after > target {
            let mut sum = 0.0;
            let found = values.iter().position(|&w| {
                sum += w;
                w > 0.0 && before + sum > target
            });
            if let Some(index) = found {
                return block * exp::BLOCK + index;
            }
        }
        before = after;
    }
    // Only if `u` were 1.
    weights.iter().rposition(|&w| w > 0.0).unwrap_or(0)
}
