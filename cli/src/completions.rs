//! `millrace completions SHELL`: what a shell needs to complete commands and flags. One file serves
//! all three programs.

use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};
use millrace_coordinator::cli as coordinator;
use millrace_node::cli as node;
use millrace_shared::flags::extend;

use crate::{Cli, PROGRAM, output};

const EXAMPLES: &str = "\
Install:
  millrace completions bash > /usr/share/bash-completion/completions/millrace
  millrace completions zsh  > /usr/share/zsh/site-functions/_millrace
  millrace completions fish > ~/.config/fish/completions/millrace.fish
or, for this shell alone: source <(millrace completions bash)";

/// Flags of `completions`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// bash, zsh, fish, elvish or powershell
    shell: Shell,
}

pub(crate) fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    output::write(script(args.shell))
}

/// The completions of the three programs, one after the other.
fn script(shell: Shell) -> String {
    let programs = [
        (extend(Cli::command(), PROGRAM), "millrace"),
        (extend(coordinator::Cli::command(), coordinator::PROGRAM), "millrace-coordinator"),
        (extend(node::Cli::command(), node::PROGRAM), "millrace-node"),
    ];
    let mut text = Vec::new();
    for (mut command, name) in programs {
        generate(shell, &mut command, name, &mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}
