//! What runs in the processes of `millrace demo`: this same program, as a coordinator or a node.
//!
//! A part ends when its stdin does: the one who started it holds the other end, so that no process
//! is left over however the demo ends.

use std::ffi::OsString;
use std::io::Read;
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::{Args, Parser, ValueEnum};
use millrace_coordinator::cli as coordinator;
use millrace_node::cli as node;
use millrace_node::enrol;
use tokio::sync::oneshot;

use crate::output;

/// Flags of the hidden command.
#[derive(Debug, Args)]
pub(crate) struct PartArgs {
    /// What to be.
    part: Part,
    /// Flags of `millrace-coordinator serve` or `millrace-node run`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Part {
    Coordinator,
    Node,
}

/// How long the nodes of a demo may take to join.
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);
/// Nodes that may join.
const TOKEN_USES: u32 = 64;

pub(crate) async fn run(args: PartArgs) -> anyhow::Result<()> {
    let name: &[&str] = match args.part {
        Part::Coordinator => &["millrace-coordinator", "serve"],
        Part::Node => &["millrace-node", "run"],
    };
    let words: Vec<OsString> = name.iter().map(OsString::from).chain(args.flags).collect();
    match args.part {
        Part::Coordinator => match coordinator::Cli::try_parse_from(words)?.command {
            coordinator::Command::Serve(args) => serve(args.resolve()?).await,
            other => bail!("not a part of a demo: {other:?}"),
        },
        Part::Node => match node::Cli::try_parse_from(words)?.command {
            node::Command::Run(args) => work(args.resolve()?).await,
            node::Command::Probe(_) => bail!("not a part of a demo"),
        },
    }
}

/// Says on stdout, in one line, how nodes join, and where members connect.
async fn serve(config: millrace_coordinator::Config) -> anyhow::Result<()> {
    let running = millrace_coordinator::start(config).await?;
    let token = coordinator::create_token(&running.dir, TOKEN_USES, TOKEN_LIFETIME)?;
    output::stream(&format!("{token} {}\n", running.cluster))?;
    end_of_stdin()?.await.map_err(|_| anyhow!("the thread that reads stdin is gone"))
}

async fn work(config: millrace_node::Config) -> anyhow::Result<()> {
    let ended = end_of_stdin()?;
    let membership = enrol::membership(&config).await?;
    let mut running = millrace_node::start(config, membership).await?;
    tokio::select! {
        reason = running.refused() => Err(anyhow!("the coordinator refuses this node: {reason}")),
        _ = ended => Ok(()),
    }
}

fn end_of_stdin() -> std::io::Result<oneshot::Receiver<()>> {
    let (sender, ended) = oneshot::channel();
    std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        let _ = sender.send(());
    })?;
    Ok(ended)
}
