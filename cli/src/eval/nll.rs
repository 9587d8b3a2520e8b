//! `millrace eval nll`: the likelihood of a text. The text is cut into windows that do not overlap,
//! and each is scored from its second token, so the figure does not depend on the pipeline.

use std::path::PathBuf;

use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use millrace_compress::texts;
use millrace_shared::wire::rpc::{PositionScore, Prompt, ScoreRequest};
use serde::Serialize;

use crate::error::usage;
use crate::input;
use crate::output::{self, TextOrJson};
use crate::target::{self, Needs, Session, TargetArgs};

/// Longest window unless `--context` says otherwise.
const DEFAULT_CONTEXT: u32 = 2048;
/// Windows in flight, so that every stage has work.
const WINDOWS_IN_FLIGHT: usize = 4;

/// Flags of `eval nll`.
#[derive(Debug, Args)]
pub(crate) struct NllArgs {
    /// UTF-8 text to score; - reads stdin [default: held-out documents of this program's]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens per window [default: the smaller of 2048 and the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    context: Option<u32>,
    /// json prints {"tokens","mean_nll","perplexity"}
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: TextOrJson,
    #[command(flatten)]
    target: TargetArgs,
}

/// What `--output json` prints.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Likelihood {
    /// Tokens that were scored.
    pub(crate) tokens: u64,
    /// Nats per scored token.
    pub(crate) mean_nll: f64,
    /// Its exponential.
    pub(crate) perplexity: f64,
}

pub(super) async fn run(args: NllArgs) -> anyhow::Result<()> {
    let text = match &args.file {
        Some(path) => input::text(path)?,
        None => texts::HELD_OUT.to_owned(),
    };
    let result = likelihood(&args.target, text, args.context).await?;
    match args.output {
        TextOrJson::Json => output::json(&result),
        TextOrJson::Text => output::write(format_args!(
            "{} tokens scored, {:.6} nats per token, perplexity {:.4}\n",
            result.tokens, result.mean_nll, result.perplexity
        )),
    }
}

/// The likelihood of a text under a model, in windows of `context` tokens or the default.
///
/// # Errors
/// If the target cannot be reached or started, or the text has fewer than two tokens.
pub(crate) async fn likelihood(
    target: &TargetArgs,
    text: String,
    context: Option<u32>,
) -> anyhow::Result<Likelihood> {
    let needs = Needs { requests: WINDOWS_IN_FLIGHT as u32, ..Needs::one_request() };
    target::with_session(target, needs, async |session| score(session, text, context).await).await
}

async fn score(
    session: &Session,
    text: String,
    context: Option<u32>,
) -> anyhow::Result<Likelihood> {
    let limit = session.model().await?.max_model_len;
    let context = context.unwrap_or_else(|| DEFAULT_CONTEXT.min(limit));
    if context > limit {
        return Err(usage(format!("--context {context} is more than the {limit} that is served")));
    }
    let tokens = session.tokenize(Prompt::Text(text)).await?;
    let windows = tokens.chunks(context as usize).filter(|w| w.len() > 1);
    let requests =
        windows.map(|w| ScoreRequest { model: String::new(), tokens: w.to_vec(), top_k: 0 });
    // In order, so that the sum has the same rounding every time.
    stream::iter(requests)
        .map(|request| session.score(request))
        .buffered(WINDOWS_IN_FLIGHT)
        .try_fold((0, 0.0), async |(count, sum), scores| Ok(add(count, sum, &scores)))
        .await
        .and_then(|(count, sum)| summary(count, sum))
}

fn add(count: u64, sum: f64, scores: &[PositionScore]) -> (u64, f64) {
    scores
        .iter()
        .filter_map(|s| s.next_logprob)
        .fold((count, sum), |(n, sum), logprob| (n + 1, sum - f64::from(logprob)))
}

fn summary(tokens: u64, nll: f64) -> anyhow::Result<Likelihood> {
    if tokens == 0 {
        return Err(usage("the text has fewer than two tokens: there is nothing to score"));
    }
    let mean_nll = nll / tokens as f64;
    Ok(Likelihood { tokens, mean_nll, perplexity: mean_nll.exp() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_position_of_a_window_scores_nothing() {
        let at = |position, next_logprob| PositionScore {
            position,
            next_logprob,
            ..PositionScore::default()
        };
        let window = [at(0, Some(-1.0)), at(1, Some(-3.0)), at(2, None)];
        let (count, sum) = add(0, 0.0, &window);
        let (count, sum) = add(count, sum, &window);
        let result = summary(count, sum).unwrap();
        assert_eq!((result.tokens, result.mean_nll), (4, 2.0));
        assert!((result.perplexity - 7.389_056).abs() < 1e-5);
        assert!(summary(0, 0.0).is_err());
    }
}
