//! `millrace eval logits`: the raw logits, for comparison with other engines.

use std::path::PathBuf;

use clap::Args;
use millrace_shared::wire::rpc::{PositionScore, ScoreRequest};
use serde::Serialize;

use crate::error::usage;
use crate::input;
use crate::output::{self, TextOrJson};
use crate::table::Align::{Left, Right};
use crate::table::Table;
use crate::target::{self, Needs, TargetArgs};

/// Flags of `eval logits`.
#[derive(Debug, Args)]
pub(crate) struct LogitsArgs {
    /// JSON list of the token ids to feed; - reads stdin
    #[arg(long, value_name = "FILE.json")]
    token_ids: PathBuf,
    /// How many of the largest logits to print per position (1 to 64)
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=64))]
    top: u8,
    /// json prints `{"top":[[[id,logit],…],…]}`, one list per position
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: TextOrJson,
    #[command(flatten)]
    target: TargetArgs,
}

/// What `--output json` prints.
#[derive(Debug, Serialize)]
struct Logits {
    top: Vec<Vec<(u32, f32)>>,
}

pub(super) async fn run(args: LogitsArgs) -> anyhow::Result<()> {
    let tokens = input::token_ids(&args.token_ids)?;
    if tokens.is_empty() {
        return Err(usage(format!("{} holds no token ids", args.token_ids.display())));
    }
    let request = ScoreRequest { model: String::new(), tokens, top_k: args.top };
    let needs = Needs::one_request();
    let scores =
        target::with_session(&args.target, needs, async |s| s.score(request).await).await?;
    print(args.output, scores)
}

fn print(format: TextOrJson, scores: Vec<PositionScore>) -> anyhow::Result<()> {
    let top: Vec<_> = scores.into_iter().map(|s| s.top_logits).collect();
    if format == TextOrJson::Json {
        return output::json(&Logits { top });
    }
    let mut table = Table::new(&[("position", Right), ("id:logit, best first", Left)]);
    for (position, top) in top.iter().enumerate() {
        let list: Vec<String> = top.iter().map(|(id, logit)| format!("{id}:{logit:.4}")).collect();
        table.row([position.to_string(), list.join(" ")]);
    }
    output::write(table)
}
