//! Sampling parameters and their validation.

use serde::{Deserialize, Serialize};

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
    /// Keep the smallest set whose probability reaches this.
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
    pub stop: Vec<String>,
    /// Further ids that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// Return raw log-probabilities: `Some(k)` with the `k` best rivals, at most 64.
    pub logprobs: Option<u8>,
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
        }
    }
}

impl SamplingParams {
    /// Greedy, everything else at its default.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }
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
