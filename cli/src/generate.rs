//! `millrace generate`: continue a prompt exactly as given. The contract for scripts.

use std::path::PathBuf;

use clap::Args;
use millrace_shared::sampling::{MAX_LOGPROBS, SamplingParams};
use millrace_shared::wire::rpc::{
    Choices, FinishReason, GenerateEvent, GenerateRequest, MAX_CHOICES, Prompt, Timings,
    TokenLogprobs, Usage,
};
use serde::Serialize;

use crate::error::usage;
use crate::input;
use crate::output::{self, TextOrJson};
use crate::sampling::{self, SamplingArgs};
use crate::target::{Needs, Session, TargetArgs};

/// Flags of `generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Different continuations, each with a random stream of its own; several are printed one after
    /// the other
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_CHOICES as i64))]
    choices: u32,
    /// Make this many and keep the --choices most probable ones, best first [default: --choices]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_CHOICES as i64))]
    best_of: Option<u32>,
    /// Randomness: 0 takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true, value_parser = sampling::temperature)]
    temperature: f32,
    /// Go on after the model's end-of-text tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Return each token's log-probability and those of its K best rivals (0 to 64)
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u8).range(0..=MAX_LOGPROBS as i64))]
    logprobs: Option<u8>,
    /// text streams the continuation; json prints one object at the end
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: TextOrJson,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    target: TargetArgs,
}

/// What to continue.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// Text to continue; special tokens are parsed, none are added
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    /// UTF-8 file to continue; - reads stdin
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// JSON list of token ids to continue; - reads stdin
    #[arg(long, value_name = "FILE.json")]
    token_ids: Option<PathBuf>,
}

impl PromptArgs {
    fn read(&self) -> anyhow::Result<Prompt> {
        match (&self.prompt, &self.prompt_file, &self.token_ids) {
            (Some(text), ..) => Ok(Prompt::Text(text.clone())),
            (_, Some(file), _) => Ok(Prompt::Text(input::text(file)?)),
            (_, _, Some(file)) => Ok(Prompt::Tokens(input::token_ids(file)?)),
            (None, None, None) => Err(usage("give --prompt, --prompt-file or --token-ids")),
        }
    }
}

/// What `--output json` prints: of several choices the first, and all of them in `choices`.
#[derive(Debug, Default, Serialize)]
struct Answer {
    prompt_token_ids: Vec<u32>,
    #[serde(flatten)]
    first: Choice,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    choices: Vec<Choice>,
}

/// One continuation.
#[derive(Clone, Debug, Default, Serialize)]
struct Choice {
    token_ids: Vec<u32>,
    text: String,
    finish_reason: Option<&'static str>,
    logprobs: Option<Vec<Logprob>>,
    timings: Rates,
}

#[derive(Clone, Debug, Serialize)]
struct Logprob {
    token_id: u32,
    logprob: f32,
    top: Vec<(u32, f32)>,
}

/// Speeds of one request; absent where nothing was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Rates {
    /// Milliseconds from submission to the first token.
    pub(crate) ttft_ms: Option<f64>,
    /// Prompt tokens computed per second, waiting excluded.
    pub(crate) prefill_tokens_per_s: Option<f64>,
    /// Tokens per second after the first.
    pub(crate) decode_tokens_per_s: Option<f64>,
}

impl Rates {
    pub(crate) fn new(usage: Usage, timings: Timings) -> Self {
        let rate =
            |tokens: u32, ms: f64| (tokens > 0 && ms > 0.0).then(|| f64::from(tokens) * 1e3 / ms);
        let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        Self {
            ttft_ms: (usage.completion_tokens > 0).then_some(timings.ttft_ms),
            prefill_tokens_per_s: rate(computed, timings.ttft_ms - timings.queue_ms),
            decode_tokens_per_s: rate(usage.completion_tokens.saturating_sub(1), timings.decode_ms),
        }
    }
}

impl Choice {
    fn push(&mut self, token_id: u32, text: &str, logprobs: Option<TokenLogprobs>) {
        self.token_ids.push(token_id);
        self.text.push_str(text);
        if let Some(TokenLogprobs { logprob, top }) = logprobs {
            self.logprobs.get_or_insert_default().push(Logprob { token_id, logprob, top });
        }
    }

    fn finish(&mut self, reason: FinishReason, text: &str, rates: Rates) {
        self.text.push_str(text);
        self.finish_reason = Some(reason.as_str());
        self.timings = rates;
    }
}

impl Answer {
    /// Takes an event in; returns the text that became certain.
    fn take(&mut self, event: GenerateEvent) -> String {
        match event {
            GenerateEvent::Started { prompt_token_ids, choices, .. } => {
                self.prompt_token_ids = prompt_token_ids;
                self.choices.resize_with(choices as usize, Choice::default);
                String::new()
            }
            GenerateEvent::Token { choice, token_id, text, logprobs, .. } => {
                if let Some(of) = self.choices.get_mut(choice as usize) {
                    of.push(token_id, &text, logprobs);
                }
                text
            }
            GenerateEvent::Finished { choice, reason, text, usage, timings, .. } => {
                if let Some(of) = self.choices.get_mut(choice as usize) {
                    of.finish(reason, &text, Rates::new(usage, timings));
                }
                text
            }
        }
    }

    /// As it is printed: a single choice is the answer.
    fn complete(mut self) -> Self {
        match self.choices.len() {
            0 | 1 => self.first = self.choices.pop().unwrap_or_default(),
            _ => self.first = self.choices[0].clone(),
        }
        self
    }

    /// Several choices as text.
    fn listed(&self) -> String {
        let one = |(number, choice): (usize, &Choice)| format!("[{number}]{}\n", choice.text);
        (1..).zip(&self.choices).map(one).collect()
    }
}

pub(crate) async fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let prompt = args.prompt.read()?;
    let params = SamplingParams {
        ignore_eos: args.ignore_eos,
        logprobs: args.logprobs,
        ..args.sampling.params(args.temperature, Some(args.max_tokens))
    };
    let choices = Choices { n: args.choices, best_of: args.best_of.unwrap_or(args.choices) };
    choices.validate().map_err(|_| {
        usage(format!("--best-of must be at least --choices, which is {}", args.choices))
    })?;
    let request = GenerateRequest { model: String::new(), prompt, params, choices };
    crate::target::with_session(&args.target, Needs::one_request(), async |session| {
        generate(session, request, args.output).await
    })
    .await
}

async fn generate(
    session: &Session,
    request: GenerateRequest,
    format: TextOrJson,
) -> anyhow::Result<()> {
    let single = request.choices.n == 1;
    let mut answer = Answer::default();
    let mut events = session.generate(request).await?;
    while let Some(event) = events.next().await? {
        let text = answer.take(event);
        if single && format == TextOrJson::Text {
            output::stream(&text)?;
        }
    }
    match format {
        TextOrJson::Text if single => output::write("\n"),
        TextOrJson::Text => output::write(answer.listed()),
        TextOrJson::Json => output::json(&answer.complete()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(choices: u32) -> Answer {
        let mut answer = Answer::default();
        answer.take(GenerateEvent::Started {
            request_id: "0193a5b0-0000-7000-8000-000000000000".parse().unwrap(),
            prompt_token_ids: vec![1, 2],
            seed: 0,
            choices,
            left_out: 0,
        });
        for choice in 0..choices {
            let token = |index, token_id, text: &str| GenerateEvent::Token {
                choice,
                index,
                token_id,
                text: text.to_owned(),
                logprobs: Some(TokenLogprobs { logprob: -0.5, top: vec![(token_id, -0.5)] }),
                calls: Vec::new(),
            };
            assert_eq!(answer.take(token(0, 7, "a")), "a");
            assert_eq!(answer.take(token(1, 8 + choice, "")), "");
            answer.take(GenerateEvent::Finished {
                choice,
                reason: FinishReason::Length,
                text: "b".to_owned(),
                calls: Vec::new(),
                usage: Usage { prompt_tokens: 2, completion_tokens: 2, ..Usage::default() },
                timings: Timings { queue_ms: 1.0, ttft_ms: 5.0, decode_ms: 10.0 },
            });
        }
        answer
    }

    #[test]
    fn several_choices_come_after_the_first() {
        assert_eq!(answer(2).listed(), "[1]ab\n[2]ab\n");
        let json = serde_json::to_value(answer(2).complete()).unwrap();
        assert_eq!(json["token_ids"], serde_json::json!([7, 8]));
        assert_eq!(json["choices"][0]["token_ids"], json["token_ids"]);
        assert_eq!(json["choices"][1]["token_ids"], serde_json::json!([7, 9]));
        assert_eq!(json["choices"][1]["finish_reason"], "length");
    }

    #[test]
    fn the_json_is_the_contract() {
        let answer = answer(1).complete();
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"prompt_token_ids":[1,2],"token_ids":[7,8],"text":"ab","finish_reason":"length","logprobs":[{"token_id":7,"logprob":-0.5,"top":[[7,-0.5]]},{"token_id":8,"logprob":-0.5,"top":[[8,-0.5]]}],"timings":{"ttft_ms":5.0,"prefill_tokens_per_s":500.0,"decode_tokens_per_s":100.0}}"#
        );
    }

    #[test]
    fn nothing_measured_is_no_rate() {
        let rates = Rates::new(Usage::default(), Timings::default());
        assert_eq!(rates, Rates::default());
    }
}
