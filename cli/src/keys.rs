//! `millrace keys`: API keys of a running cluster, from anywhere, with an administrator's key.
//!
//! Beside the coordinator `millrace-coordinator key` does the same on its folder.

use clap::{Args, Subcommand};
use millrace_coordinator::cli::KeyArgs;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, KeyInfo, KeyLimits, KeyRequest};
use serde_json::json;

use crate::output::{self, TextOrJson};
use crate::table::{Align, Table};
use crate::target::RunningArgs;

const EXAMPLES: &str = "\
Examples:
  millrace keys                                        who may come in, and when they last did
  millrace keys create --name alice --expires 90d      a key; it is printed this once
  millrace keys create --name prometheus --scope read  for metrics alone
  millrace keys create --name batch --concurrent 4 --tokens-per-minute 20000
  millrace keys revoke 3f9c01d2aa40                    at once, also for those who are connected";

/// Flags of `keys`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct KeysArgs {
    #[command(flatten)]
    running: RunningArgs,
    /// json prints what the cluster answered
    #[arg(long, short, value_name = "FORMAT", default_value = "text", global = true)]
    output: TextOrJson,
    #[command(subcommand)]
    command: Option<KeysCommand>,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// List them (the default)
    List,
    /// Make a key and print it; it is shown this once
    Create(KeyArgs),
    /// Make a key invalid, from the next call on
    Revoke {
        /// As `list` shows it
        id: String,
    },
}

pub(crate) async fn run(args: KeysArgs) -> anyhow::Result<()> {
    let request = match args.command.unwrap_or(KeysCommand::List) {
        KeysCommand::List => KeyRequest::List,
        KeysCommand::Create(key) => KeyRequest::Create(key.key()),
        KeysCommand::Revoke { id } => KeyRequest::Revoke { id },
    };
    match (args.running.admin(AdminRequest::Keys(request)).await?, args.output) {
        (AdminReply::Keys(keys), TextOrJson::Json) => {
            output::json(&json!({"keys": serde_json::to_value(&keys)?}))
        }
        (AdminReply::Keys(keys), TextOrJson::Text) => output::write(table(&keys)),
        (AdminReply::NewKey { info, secret }, TextOrJson::Json) => {
            output::json(&json!({"info": serde_json::to_value(&info)?, "secret": secret}))
        }
        (AdminReply::NewKey { info, secret }, TextOrJson::Text) => {
            output::remark(&format!("key {}; it is shown this once:", info.id));
            output::write(format_args!("{secret}\n"))
        }
        _ => Err(anyhow::anyhow!("the cluster's answer makes no sense")),
    }
}

fn table(keys: &[KeyInfo]) -> Table {
    let columns = ["id", "name", "scope", "limits", "made", "last used", "ends"];
    let mut table = Table::new(&columns.map(|name| (name, Align::Left)));
    for info in keys {
        table.row([
            info.id.clone(),
            info.key.name.clone(),
            info.key.scope.to_string(),
            limits(info.key.limits),
            output::date(info.created),
            info.last_used.map_or_else(|| "never".to_owned(), output::date),
            info.key.expires.map_or_else(|| "never".to_owned(), output::date),
        ]);
    }
    table
}

fn limits(limits: KeyLimits) -> String {
    let KeyLimits { requests_per_minute, tokens_per_minute, concurrent } = limits;
    let all = [
        requests_per_minute.map(|n| format!("{n} requests/min")),
        tokens_per_minute.map(|n| format!("{n} tokens/min")),
        concurrent.map(|n| format!("{n} at once")),
    ];
    let all: Vec<String> = all.into_iter().flatten().collect();
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}
