//! What results may say: whoever sends them is a member, and may be sick or lie all the same.

use super::data::{Failure, ResultMeta, RowOutcome};
use super::rpc::TokenLogprobs;

/// Most logits or log-probabilities of one token that a result may carry.
const MAX_TOP: usize = u8::MAX as usize;
/// Most that a number of a vector with a length of 1 can be, rounding included.
const MAX_ELEMENT: f32 = 1.000_001;

impl ResultMeta {
    /// Checks what no computing comes to: ids outside of the `vocabulary`, embeddings not as wide as
    /// the model (`hidden`), numbers that are none, and lists longer than anybody may ask for.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self, vocabulary: u32, hidden: u32) -> Result<(), String> {
        let known = |id: u32| match id < vocabulary {
            true => Ok(()),
            false => Err(format!("token {id} is outside of the vocabulary of {vocabulary}")),
        };
        let top = |top: &[(u32, f32)]| {
            if top.len() > MAX_TOP {
                return Err(format!("{} alternatives to one token", top.len()));
            }
            top.iter().try_for_each(|&(id, value)| match value.is_nan() {
                true => Err("a logit that is no number".to_owned()),
                false => known(id),
            })
        };
        let chosen = |token: u32, logprobs: &Option<TokenLogprobs>| {
            known(token)?;
            let Some(logprobs) = logprobs else { return Ok(()) };
            if logprobs.logprob.is_nan() {
                return Err("a log-probability that is no number".to_owned());
            }
            top(&logprobs.top)
        };
        self.rows.iter().try_for_each(|row| match &row.outcome {
            RowOutcome::Token { token, logprobs } => chosen(*token, logprobs),
            RowOutcome::Tokens(all) => all.iter().try_for_each(|c| chosen(c.token, &c.logprobs)),
            RowOutcome::Scores(scores) if scores.len() != row.count as usize => {
                Err(format!("{} scores of {} positions", scores.len(), row.count))
            }
            RowOutcome::Scores(scores) => scores.iter().try_for_each(|s| top(&s.top_logits)),
            RowOutcome::Embedding(vector) if vector.len() != hidden as usize => {
                Err(format!("an embedding of {} numbers, not {hidden}", vector.len()))
            }
            RowOutcome::Embedding(vector) => match vector.iter().all(|x| x.abs() <= MAX_ELEMENT) {
                true => Ok(()),
                false => Err("an embedding that is longer than 1, or has no numbers".to_owned()),
            },
            RowOutcome::Done | RowOutcome::Failed(_) => Ok(()),
        })
    }

    /// The same rows, of none of which there is a result.
    pub fn fail_all(&mut self, failure: &Failure) {
        self.rows.iter_mut().for_each(|row| row.outcome = RowOutcome::Failed(failure.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SequenceId;
    use crate::wire::data::{ChosenToken, RowResult};
    use crate::wire::rpc::PositionScore;

    fn meta(outcome: RowOutcome) -> ResultMeta {
        let row = RowResult {
            sequence: SequenceId(1),
            sequence_epoch: 0,
            position: 4,
            count: 2,
            outcome,
        };
        ResultMeta { rows: vec![row], times: Vec::new() }
    }

    fn token(token: u32, logprobs: Option<TokenLogprobs>) -> RowOutcome {
        RowOutcome::Token { token, logprobs }
    }

    fn scores(of: &[(u32, f32)], count: usize) -> RowOutcome {
        let score = PositionScore { top_logits: of.to_vec(), ..PositionScore::default() };
        RowOutcome::Scores(vec![score; count])
    }

    #[test]
    fn nonsense_is_found_and_nothing_of_it_is_left() {
        let logprobs =
            |logprob, top: &[(u32, f32)]| Some(TokenLogprobs { logprob, top: top.to_vec() });
        let sound = [
            RowOutcome::Done,
            RowOutcome::Failed("it failed".into()),
            token(9, None),
            token(0, logprobs(f32::NEG_INFINITY, &[(9, -1.0); 20])),
            RowOutcome::Tokens(vec![ChosenToken { token: 9, logprobs: None }]),
            scores(&[(9, 3.0); 255], 2),
            RowOutcome::Embedding(vec![0.0, -1.0, 0.0]),
        ];
        for outcome in sound {
            assert_eq!(meta(outcome.clone()).validate(10, 3), Ok(()), "{outcome:?}");
        }
        let nan = f32::NAN;
        let unsound = [
            token(10, None),
            token(u32::MAX, None),
            token(1, logprobs(nan, &[])),
            token(1, logprobs(-1.0, &[(10, -1.0)])),
            token(1, logprobs(-1.0, &[(1, nan)])),
            token(1, logprobs(-1.0, &[(1, -1.0); 256])),
            RowOutcome::Tokens(vec![
                ChosenToken { token: 9, logprobs: None },
                ChosenToken { token: 10, logprobs: None },
            ]),
            scores(&[(10, 1.0)], 2),
            scores(&[], 1),
            scores(&[], 3),
            RowOutcome::Embedding(vec![0.0, -1.0]),
            RowOutcome::Embedding(vec![0.0, nan, 0.0]),
            RowOutcome::Embedding(vec![f32::INFINITY, 0.0, 0.0]),
            RowOutcome::Embedding(vec![0.0, 0.0, 1.5]),
        ];
        for outcome in unsound {
            let mut meta = meta(outcome.clone());
            assert!(meta.validate(10, 3).is_err(), "{outcome:?}");
            let failure = Failure::of_stage(3, "nonsense".into());
            meta.fail_all(&failure);
            assert_eq!(meta.rows[0].outcome, RowOutcome::Failed(failure));
        }
    }
}
