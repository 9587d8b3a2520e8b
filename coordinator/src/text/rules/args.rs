//! Flags of commands that serve, for what is done to text.

use std::sync::Arc;

use clap::Args;

use super::answer::{AnswerRules, Source};
use super::patterns::Patterns;
use super::{Overflow, PromptRules, RuleError, TextRules, UnicodeForm};

/// What is done to prompts and answers.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Text rules")]
pub struct RulesArgs {
    /// Write the characters of prompts in one way: nfc, or nfkc (which also takes ligatures, full
    /// width and the like away)
    #[arg(long, value_name = "FORM")]
    pub prompt_unicode: Option<UnicodeForm>,
    /// Take control characters out of prompts, but for tabs and line ends
    #[arg(long)]
    pub prompt_strip_control: bool,
    /// Make white space in a row one space, or one line end where it has one
    #[arg(long)]
    pub prompt_collapse_whitespace: bool,
    /// Take white space from both ends of prompts, and of each message
    #[arg(long)]
    pub prompt_trim: bool,
    /// Replace what matches this pattern in prompts; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub prompt_redact: Vec<String>,
    /// Refuse prompts in which this pattern matches; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub prompt_block: Vec<String>,
    /// Most tokens of a prompt [default: what the context holds beside the answer, where prompts
    /// are shortened]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_limit: Option<u32>,
    /// What is done to longer prompts: refuse, keep-end, keep-beginning (of a conversation, the last
    /// message is cut) or drop-turns (a conversation's oldest go, the system's messages stay)
    #[arg(long, value_name = "WAY", default_value = "refuse")]
    pub prompt_overflow: Overflow,
    /// Replace what matches this pattern in answers, at most 1024 bytes; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub answer_redact: Vec<String>,
    /// End answers before what matches this pattern, at most 1024 bytes; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub answer_block: Vec<String>,
    /// Of answers without tools and grammar, send only the first JSON object or list, in one piece
    /// and without fences or prose; all of an answer that has none
    #[arg(long)]
    pub answer_json: bool,
    /// What stands where something was redacted
    #[arg(long, value_name = "TEXT", default_value = "[redacted]")]
    pub redact_with: String,
}

impl RulesArgs {
    /// As the coordinator wants it.
    ///
    /// # Errors
    /// Naming the flag with a pattern that cannot be used.
    pub fn rules(&self) -> Result<TextRules, RuleError> {
        let compile = |flag, block: &[String], redact: &[String], grows| {
            Patterns::new(block, redact, grows).map_err(|why| RuleError { flag, why })
        };
        // Each list by itself first, so that an error names the flag.
        compile("prompt-block", &self.prompt_block, &[], false)?;
        compile("answer-block", &self.answer_block, &[], true)?;
        for (flag, redact, grows) in [
            ("prompt-redact", &self.prompt_redact, false),
            ("answer-redact", &self.answer_redact, true),
        ] {
            let patterns = compile(flag, &[], redact, grows)?;
            if patterns.is_some_and(|p| p.find(&self.redact_with, 0).is_some()) {
                let why = format!(
                    "a pattern matches '{}', which stands where something was redacted: choose \
                     another text with --redact-with",
                    self.redact_with
                );
                return Err(RuleError { flag, why });
            }
        }
        let prompt = PromptRules {
            unicode: self.prompt_unicode,
            strip_control: self.prompt_strip_control,
            collapse_whitespace: self.prompt_collapse_whitespace,
            trim: self.prompt_trim,
            patterns: compile("prompt-redact", &self.prompt_block, &self.prompt_redact, false)?,
            instead: self.redact_with.clone(),
            limit: self.prompt_limit,
            overflow: self.prompt_overflow,
        };
        let answer = AnswerRules::new(Source {
            block: self.answer_block.clone(),
            redact: self.answer_redact.clone(),
            instead: self.redact_with.clone(),
            json: self.answer_json,
        })?;
        Ok(TextRules { prompt: Arc::new(prompt), answer })
    }
}
