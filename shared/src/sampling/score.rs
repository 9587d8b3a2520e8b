//! Raw log-probabilities of given tokens.

use super::sample::{SampleError, Scratch};
use super::{exp, top};
use crate::wire::rpc::PositionScore;

/// Natural logarithm of the sum of the exponentials, in f64 and in one fixed order. `None` if a logit
/// is not finite or there are none.
pub fn log_sum_exp(logits: &[f32]) -> Option<f64> {
    let (_, max) = top::argmax(logits)?;
    let mut sum = 0.0f64;
    let mut weights = [0.0f64; exp::BLOCK];
    for block in logits.chunks(exp::BLOCK) {
        for (weight, &logit) in weights.iter_mut().zip(block) {
            *weight = exp::weight(logit, max, 1.0);
        }
        sum += exp::block_sum(&weights[..block.len()]);
    }
    Some(f64::from(max) + libm::log(sum))
}

/// Scores one position: log-probability of the token that follows (`next`), the `top_k` largest
/// logits, and the log-sum-exp, all of the untouched `vocab` logits.
///
/// # Errors
/// If a logit is not finite or `next` lies outside the vocabulary.
pub fn score(
    logits: &[f32],
    position: u32,
    next: Option<u32>,
    top_k: u8,
    scratch: &mut Scratch,
) -> Result<PositionScore, SampleError> {
    let total = log_sum_exp(logits).ok_or_else(|| SampleError::non_finite(logits))?;
    let next_logprob = match next {
        None => None,
        Some(id) => {
            let logit = logits
                .get(id as usize)
                .ok_or(SampleError::OutsideVocabulary { id, vocab: logits.len() })?;
            Some((f64::from(*logit) - total) as f32)
        }
    };
    top::largest(logits, usize::from(top_k), &mut scratch.candidates);
    Ok(PositionScore {
        position,
        next_logprob,
        top_logits: scratch.candidates.clone(),
        log_sum_exp: total as f32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_logits_have_the_entropy_of_the_vocabulary() {
        let logits = vec![7.0f32; 1000];
        let got = score(&logits, 3, Some(9), 2, &mut Scratch::default()).expect("finite");
        assert_eq!(got.position, 3);
        let expected = -(1000f64.ln()) as f32;
        assert!((got.next_logprob.expect("asked") - expected).abs() < 1e-6);
        assert_eq!(got.top_logits, vec![(0, 7.0), (1, 7.0)]);
        assert!((got.log_sum_exp - (7.0 - expected)).abs() < 1e-5);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let got = log_sum_exp(&[3.0e38, -3.0e38]).expect("finite");
        assert_eq!(got as f32, 3.0e38);
    }

    #[test]
    fn what_cannot_be_scored_is_an_error() {
        let mut scratch = Scratch::default();
        assert!(score(&[1.0, f32::NAN], 0, None, 0, &mut scratch).is_err());
        assert!(score(&[], 0, None, 0, &mut scratch).is_err());
        assert!(score(&[1.0, 2.0], 0, Some(2), 0, &mut scratch).is_err());
    }
}
