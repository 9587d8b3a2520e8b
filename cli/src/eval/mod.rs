//! `millrace eval`: how well, and how exactly, a model predicts.

mod logits;
mod models;
pub(crate) mod nll;

use clap::Subcommand;

/// What to evaluate.
#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Mean negative log-likelihood and perplexity of a text
    Nll(Box<nll::NllArgs>),
    /// The largest logits after every position of a sequence
    Logits(Box<logits::LogitsArgs>),
    /// Size, memory, speed and quality of models side by side: likelihood of a text, and how far each is
    /// from the first (KL divergence); --html makes a page with plots
    #[command(visible_alias = "kl")]
    Compare(Box<models::CompareArgs>),
    /// Tasks with a choice or an exact answer
    Tasks(Box<models::TasksArgs>),
    /// Tokens a second of a prompt and of an answer
    Speed(Box<models::SpeedArgs>),
}

pub(crate) async fn run(command: EvalCommand) -> anyhow::Result<()> {
    match command {
        EvalCommand::Nll(args) => nll::run(*args).await,
        EvalCommand::Logits(args) => logits::run(*args).await,
        EvalCommand::Compare(args) => models::compare(&args),
        EvalCommand::Tasks(args) => models::tasks(&args),
        EvalCommand::Speed(args) => models::speed(&args),
    }
}
