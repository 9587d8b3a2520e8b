//! `millrace eval`: how well, and how exactly, a model predicts.

mod logits;
pub(crate) mod nll;

use clap::Subcommand;

/// What to evaluate.
#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Mean negative log-likelihood and perplexity of a text
    Nll(Box<nll::NllArgs>),
    /// The largest logits after every position of a sequence
    Logits(Box<logits::LogitsArgs>),
}

pub(crate) async fn run(command: EvalCommand) -> anyhow::Result<()> {
    match command {
        EvalCommand::Nll(args) => nll::run(*args).await,
        EvalCommand::Logits(args) => logits::run(*args).await,
    }
}
