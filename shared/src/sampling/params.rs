//! Sampling parameters and their validation.

use serde::{Deserialize, Serialize};

use super::grammar::Grammar;
use crate::wire::bounded;

/// How to choose tokens and when to stop. Defaults: greedy-free plain sampling, as OpenAI has it.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep this many most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 0 keeps the most probable token.
    pub top_p: f32,
    /// Drop tokens less probable than this times the most probable.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens seen in the answer.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Fixes the random stream.
    pub seed: Option<u64>,
    /// Most tokens to generate; `None` to the end of the context.
    pub max_tokens: Option<u32>,
    /// Strings that end the answer; not part of it.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_STOP_ENTRIES>")]
    pub stop: Vec<String>,
    /// Further ids that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// Return raw log-probabilities: `Some(k)` with the `k` best rivals, at most 64.
    pub logprobs: Option<u8>,
    /// What the answer has to look like.
    pub grammar: Option<Grammar>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            max_tokens: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            grammar: None,
        }
    }
}

/// Most rivals whose log-probabilities a request may ask for.
pub const MAX_LOGPROBS: u8 = 64;
/// Most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Most stop strings that are decoded at all; between the two, the error names the field.
const MAX_STOP_ENTRIES: usize = 1024;
/// Longest stop string, in bytes of UTF-8.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most further end ids of a request.
pub const MAX_STOP_TOKENS: usize = 1024;
/// Most biased tokens of a request.
pub const MAX_LOGIT_BIASES: usize = 1024;

impl SamplingParams {
    /// Greedy, everything else at its default.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the most probable token is taken without a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether the largest logit decides, whatever the random number.
    pub(super) fn takes_best(&self) -> bool {
        self.is_greedy() || self.top_k == 1
    }

    /// Checks every field against its range for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// Names the first field that is out of range, and the range.
    pub fn validate(&self, vocab: u32) -> Result<(), SamplingError> {
        check_range("temperature", self.temperature, 0.0, 2.0)?;
        check_range("top_p", self.top_p, 0.0, 1.0)?;
        check_range("min_p", self.min_p, 0.0, 1.0)?;
        let repetition = self.repetition_penalty;
        if !repetition.is_finite() || repetition <= 0.0 {
            let message = format!("must be a finite number greater than 0, got {repetition}");
            return Err(SamplingError::new("repetition_penalty", message));
        }
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        self.validate_bias(vocab)?;
        self.validate_stops(vocab)?;
        self.grammar.as_ref().map_or(Ok(()), Grammar::validate)?;
        if self.grammar.is_some() && self.ignore_eos {
            let message = "an answer that follows a grammar ends where the grammar does";
            return Err(SamplingError::new("ignore_eos", message));
        }
        if self.max_tokens == Some(0) {
            return Err(SamplingError::new("max_tokens", "must be at least 1, got 0"));
        }
        match self.logprobs {
            Some(k) if k > MAX_LOGPROBS => Err(SamplingError::new(
                "logprobs",
                format!("at most {MAX_LOGPROBS} can be returned, got {k}"),
            )),
            _ => Ok(()),
        }
    }

    fn validate_bias(&self, vocab: u32) -> Result<(), SamplingError> {
        check_count("logit_bias", "tokens", self.logit_bias.len(), MAX_LOGIT_BIASES)?;
        for &(id, bias) in &self.logit_bias {
            check_id("logit_bias", id, vocab)?;
            check_range("logit_bias", bias, -100.0, 100.0)?;
        }
        Ok(())
    }

    fn validate_stops(&self, vocab: u32) -> Result<(), SamplingError> {
        check_count("stop", "strings", self.stop.len(), MAX_STOP_STRINGS)?;
        for stop in &self.stop {
            if stop.is_empty() {
                return Err(SamplingError::new("stop", "a stop string must not be empty"));
            }
            if stop.len() > MAX_STOP_BYTES {
                let message = format!(
                    "a stop string may have at most {MAX_STOP_BYTES} bytes, got {}",
                    stop.len()
                );
                return Err(SamplingError::new("stop", message));
            }
        }
        check_count("stop_token_ids", "ids", self.stop_token_ids.len(), MAX_STOP_TOKENS)?;
        self.stop_token_ids.iter().try_for_each(|&id| check_id("stop_token_ids", id, vocab))
    }
}

fn check_range(param: &'static str, x: f32, low: f32, high: f32) -> Result<(), SamplingError> {
    // NaN is in no range.
    if (low..=high).contains(&x) {
        return Ok(());
    }
    Err(SamplingError::new(param, format!("must be between {low} and {high}, got {x}")))
}

fn check_count(
    param: &'static str,
    what: &str,
    count: usize,
    limit: usize,
) -> Result<(), SamplingError> {
    if count <= limit {
        return Ok(());
    }
    Err(SamplingError::new(param, format!("at most {limit} {what} are allowed, got {count}")))
}

fn check_id(param: &'static str, id: u32, vocab: u32) -> Result<(), SamplingError> {
    if id < vocab {
        return Ok(());
    }
    let message = format!("token id {id} is outside the vocabulary of {vocab}");
    Err(SamplingError::new(param, message))
}

/// A parameter outside its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{param}: {message}")]
pub struct SamplingError {
    /// Name of the field.
    pub param: &'static str,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl SamplingError {
    pub(super) fn new(param: &'static str, message: impl Into<String>) -> Self {
        Self { param, message: message.into() }
    }
}
