//! What an operator has done to text: to prompts before the model reads them, and to answers before
//! anybody hears them.
//!
//! [`PromptRules`] normalise, redact, block and shorten prompts; a prompt is there as a whole.
//! [`AnswerRules`] redact and block answers, and take JSON out of them, while they grow: text that
//! may still become part of a match is held back, and so are the events of its tokens, whose ids and
//! log-probabilities would tell it. What is sent is a function of the rules and the tokens alone; a
//! request keeps the rules that it began with. Rules see what is written, not what is meant: a model
//! that spells a number in words passes every pattern for numbers.

mod answer;
mod args;
mod json;
mod overflow;
mod patterns;
mod prompt;
#[cfg(test)]
mod tests;

pub use answer::AnswerRules;
pub(crate) use answer::{Screen, Shown};
pub use args::RulesArgs;
pub(crate) use json::JsonFinder;
pub use overflow::Overflow;
pub(crate) use overflow::{Fitted, Overlong};
pub(crate) use prompt::Touched;
pub use prompt::{PromptRules, UnicodeForm};

use std::sync::Arc;

/// All rules of a served model.
#[derive(Clone, Debug, Default)]
pub struct TextRules {
    /// Before the model.
    pub prompt: Arc<PromptRules>,
    /// After it; `None` where answers are sent as they are.
    pub answer: Option<AnswerRules>,
}

/// Why a rule cannot be used; names the flag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}: {why}")]
pub struct RuleError {
    flag: &'static str,
    why: String,
}
