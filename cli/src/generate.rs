//! `millrace generate`: continue a prompt exactly as given. The contract for scripts.

use std::path::PathBuf;

use clap::Args;
use millrace_shared::sampling::{MAX_LOGPROBS, SamplingParams};
use millrace_shared::wire::rpc::{GenerateEvent, GenerateRequest, Prompt, TokenLogprobs, Usage};
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

/// What `--output json` prints.
#[derive(Debug, Default, Serialize)]
struct Answer {
    prompt_token_ids: Vec<u32>,
    token_ids: Vec<u32>,
    text: String,
    finish_reason: Option<&'static str>,
    logprobs: Option<Vec<Logprob>>,
    timings: Rates,
}

#[derive(Debug, Serialize)]
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
    pub(crate) fn new(usage: Usage, timings: millrace_shared::wire::rpc::Timings) -> Self {
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

impl Answer {
    /// Takes an event in; returns the text that became certain.
    fn take(&mut self, event: GenerateEvent) -> String {
        match event {
            GenerateEvent::Started { prompt_token_ids, .. } => {
                self.prompt_token_ids = prompt_token_ids;
                String::new()
            }
            GenerateEvent::Token { token_id, text, logprobs, .. } => {
                self.token_ids.push(token_id);
                self.text.push_str(&text);
                if let (Some(list), Some(TokenLogprobs { logprob, top })) =
                    (&mut self.logprobs, logprobs)
                {
                    list.push(Logprob { token_id, logprob, top });
                }
                text
            }
            GenerateEvent::Finished { reason, text, usage, timings } => {
                self.text.push_str(&text);
                self.finish_reason = Some(reason.as_str());
                self.timings = Rates::new(usage, timings);
                text
            }
        }
    }
}

pub(crate) async fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let prompt = args.prompt.read()?;
    let params = SamplingParams {
        ignore_eos: args.ignore_eos,
        logprobs: args.logprobs,
        ..args.sampling.params(args.temperature, Some(args.max_tokens))
    };
    let request = GenerateRequest { model: String::new(), prompt, params };
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
    let logprobs = request.params.logprobs.map(|_| Vec::new());
    let mut answer = Answer { logprobs, ..Answer::default() };
    let mut events = session.generate(request).await?;
    while let Some(event) = events.next().await? {
        let text = answer.take(event);
        if format == TextOrJson::Text {
            output::stream(&text)?;
        }
    }
    match format {
        TextOrJson::Text => output::write("\n"),
        TextOrJson::Json => output::json(&answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_shared::wire::rpc::{FinishReason, Timings};

    #[test]
    fn the_json_is_the_contract() {
        let mut answer = Answer { logprobs: Some(Vec::new()), ..Answer::default() };
        let id = "0193a5b0-0000-7000-8000-000000000000".parse().unwrap();
        answer.take(GenerateEvent::Started {
            request_id: id,
            prompt_token_ids: vec![1, 2],
            seed: 0,
        });
        let token = |index, token_id, text: &str| GenerateEvent::Token {
            index,
            token_id,
            text: text.to_owned(),
            logprobs: Some(TokenLogprobs { logprob: -0.5, top: vec![(token_id, -0.5)] }),
        };
        assert_eq!(answer.take(token(0, 7, "a")), "a");
        assert_eq!(answer.take(token(1, 8, "")), "");
        answer.take(GenerateEvent::Finished {
            reason: FinishReason::Length,
            text: "b".to_owned(),
            usage: Usage { prompt_tokens: 2, completion_tokens: 2, cached_tokens: 0 },
            timings: Timings { queue_ms: 1.0, ttft_ms: 5.0, decode_ms: 10.0 },
        });
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
