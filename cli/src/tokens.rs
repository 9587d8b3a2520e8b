//! `millrace tokens`: join tokens of a running cluster, from anywhere, with an administrator's key.
//!
//! Beside the coordinator `millrace-coordinator token` does the same on its folder.

use clap::{Args, Subcommand};
use millrace_coordinator::cli::TokenArgs;
use millrace_net::join::JoinToken;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, TokenInfo, TokenRequest};
use serde_json::json;

use crate::output::{self, TextOrJson};
use crate::table::{Align, Table};
use crate::target::RunningArgs;

const EXAMPLES: &str = "\
Examples:
  millrace tokens                                who may still join, and until when
  millrace tokens create                         for one machine, for a day; it is printed this once
  millrace tokens create --uses 8 --expires 2h   for eight
  millrace tokens revoke 3f9c01d2aa40            nobody joins with it any more; who did stays";

/// Flags of `tokens`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TokensArgs {
    #[command(flatten)]
    running: RunningArgs,
    /// json prints what the cluster answered
    #[arg(long, short, value_name = "FORMAT", default_value = "text", global = true)]
    output: TextOrJson,
    #[command(subcommand)]
    command: Option<TokensCommand>,
}

#[derive(Debug, Subcommand)]
enum TokensCommand {
    /// List them (the default)
    List,
    /// Make a token and print it; it is shown this once
    Create(TokenArgs),
    /// Make a token invalid; nodes that joined with it stay
    Revoke {
        /// As `list` shows it
        id: String,
    },
}

pub(crate) async fn run(args: TokensArgs) -> anyhow::Result<()> {
    let request = match args.command.unwrap_or(TokensCommand::List) {
        TokensCommand::List => TokenRequest::List,
        TokensCommand::Create(TokenArgs { uses, expires }) => {
            TokenRequest::Create { uses, seconds: expires.as_secs() }
        }
        TokensCommand::Revoke { id } => TokenRequest::Revoke { id },
    };
    match (args.running.admin(AdminRequest::Tokens(request)).await?, args.output) {
        (AdminReply::Tokens(tokens), TextOrJson::Json) => {
            output::json(&json!({"tokens": serde_json::to_value(&tokens)?}))
        }
        (AdminReply::Tokens(tokens), TextOrJson::Text) => output::write(table(&tokens)),
        (AdminReply::NewToken { info, token }, TextOrJson::Json) => {
            output::json(&json!({"info": serde_json::to_value(&info)?, "token": token}))
        }
        (AdminReply::NewToken { info, token }, TextOrJson::Text) => {
            let machines = match info.left {
                1 => "another machine".to_owned(),
                n => format!("{n} other machines"),
            };
            let quic = token.parse::<JoinToken>()?.addr;
            output::remark(&format!(
                "token {}; it is shown this once. On {machines}, until {}:\n  \
                 millrace-node run --coordinator {quic} --token TOKEN",
                info.id,
                output::date(info.expires),
            ));
            output::write(format_args!("{token}\n"))
        }
        _ => Err(anyhow::anyhow!("the cluster's answer makes no sense")),
    }
}

fn table(tokens: &[TokenInfo]) -> Table {
    let mut table = Table::new(&[
        ("id", Align::Left),
        ("left", Align::Right),
        ("joined", Align::Right),
        ("ends", Align::Left),
    ]);
    for token in tokens {
        table.row([
            token.id.clone(),
            token.left.to_string(),
            token.nodes.len().to_string(),
            output::date(token.expires),
        ]);
    }
    table
}
