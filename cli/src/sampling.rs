//! Flags that choose tokens. Temperature and length differ in their defaults from command to
//! command, so those two are not here.

use clap::Args;
use millrace_shared::sampling::{Grammar, SamplingParams};

/// How to choose tokens.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Fix the random stream: the same seed gives the same answer [default: drawn]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Keep this many most probable tokens; 0 keeps all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: u32,
    /// Keep the smallest set of tokens that together are this probable; 1 keeps all
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Drop tokens less probable than this times the most probable; 0 keeps all
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Penalty on tokens of prompt and answer; 1 is none
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Penalty on tokens that the answer has; 0 is none
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Penalty on tokens of the answer per occurrence; 0 is none
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Text that ends the answer and is not part of it; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// JSON schema that the answer follows: JSON, or @FILE
    #[arg(long, value_name = "SCHEMA", value_parser = text_or_file, group = "language")]
    json_schema: Option<String>,
    /// Regular expression that the whole answer matches, or @FILE
    #[arg(long, value_name = "REGEX", value_parser = text_or_file, group = "language")]
    regex: Option<String>,
    /// Lark grammar that the answer follows, or @FILE; for example start: "yes" | "no"
    #[arg(long, value_name = "LARK", value_parser = text_or_file, group = "language")]
    grammar: Option<String>,
}

impl SamplingArgs {
    fn language(&self) -> Option<Grammar> {
        let schema = self.json_schema.clone().map(Grammar::JsonSchema);
        schema
            .or_else(|| self.regex.clone().map(Grammar::Regex))
            .or_else(|| self.grammar.clone().map(Grammar::Lark))
    }

    pub(crate) fn params(&self, temperature: f32, max_tokens: Option<u32>) -> SamplingParams {
        SamplingParams {
            temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            max_tokens,
            stop: self.stop.clone(),
            grammar: self.language(),
            ..SamplingParams::default()
        }
    }
}

/// A text as it stands, or behind `@` the file that has it.
fn text_or_file(text: &str) -> Result<String, String> {
    match text.strip_prefix('@') {
        None => Ok(text.to_owned()),
        Some(path) => std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}")),
    }
}

/// A temperature: any finite number from 0.
pub(crate) fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(t) if t.is_finite() && t >= 0.0 => Ok(t),
        _ => Err("must be a number from 0 (greedy) upwards, for example 0.7".to_owned()),
    }
}
