//! `millrace requests` and `millrace request`: where requests are and what they wait for.

use clap::{Args, Subcommand};
use millrace_shared::wire::admin::{AdminReply, AdminRequest, RequestQuery, RequestReport};

use crate::output::{self, TextOrJson};
use crate::table::{Align, Table};
use crate::target::RunningArgs;

/// Flags of `requests`.
#[derive(Debug, Args)]
pub(crate) struct RequestsArgs {
    #[command(flatten)]
    running: RunningArgs,
    /// Only those that have not moved for a second, or whose client does not read
    #[arg(long)]
    stuck: bool,
    /// json prints what the cluster answered
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: TextOrJson,
}

/// Flags of `request`.
#[derive(Debug, Args)]
pub(crate) struct RequestArgs {
    #[command(flatten)]
    running: RunningArgs,
    /// json prints what the cluster answered
    #[arg(long, short, value_name = "FORMAT", default_value = "text", global = true)]
    output: TextOrJson,
    #[command(subcommand)]
    command: RequestCommand,
}

#[derive(Debug, Subcommand)]
enum RequestCommand {
    /// What it waits for, and where its time went; also of one that has ended and is kept, or was
    /// turned away
    Show {
        /// As `x-request-id` said
        id: String,
    },
    /// End it
    Cancel {
        /// As `x-request-id` said
        id: String,
    },
}

pub(crate) async fn list(args: RequestsArgs) -> anyhow::Result<()> {
    let query = RequestQuery::List { stuck: args.stuck };
    let reports = ask(&args.running, query).await?;
    if let TextOrJson::Json = args.output {
        return output::json(&reports);
    }
    if reports.is_empty() {
        return output::write(if args.stuck { "None is stuck.\n" } else { "There are none.\n" });
    }
    output::write(table(&reports))
}

pub(crate) async fn one(args: RequestArgs) -> anyhow::Result<()> {
    let query = match args.command {
        RequestCommand::Show { id } => RequestQuery::Show { id },
        RequestCommand::Cancel { id } => RequestQuery::Cancel { id },
    };
    let reports = ask(&args.running, query).await?;
    match args.output {
        TextOrJson::Json => output::json(&reports.first()),
        TextOrJson::Text => reports.iter().try_for_each(|r| output::write(text(r))),
    }
}

async fn ask(running: &RunningArgs, query: RequestQuery) -> anyhow::Result<Vec<RequestReport>> {
    match running.admin(AdminRequest::Requests(query)).await? {
        AdminReply::Requests(reports) => Ok(reports),
        other => Err(anyhow::anyhow!("the cluster's answer makes no sense: {other:?}")),
    }
}

fn table(reports: &[RequestReport]) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("request", Left),
        ("age", Right),
        ("prompt", Right),
        ("tokens", Right),
        ("state", Left),
    ]);
    for r in reports {
        table.row([
            r.id.clone(),
            format!("{:.1} s", r.age_seconds),
            r.prompt_tokens.to_string(),
            r.generated_tokens.to_string(),
            r.state.clone(),
        ]);
    }
    table
}

fn text(r: &RequestReport) -> String {
    let mut text = format!("request    {}\nstate      {}\n", r.id, r.state);
    if r.for_seconds > 0.0 {
        let stuck = if r.stuck { ": stuck" } else { "" };
        text.push_str(&format!("unmoved    for {:.1} s{stuck}\n", r.for_seconds));
    }
    if let Some(node) = &r.node {
        text.push_str(&format!("node       {node}\n"));
    }
    text.push_str(&format!(
        "tokens     {} of the prompt, {} generated\n",
        r.prompt_tokens, r.generated_tokens
    ));
    let again = match r.restarts {
        0 => String::new(),
        n => format!(", computed anew {n} times"),
    };
    text.push_str(&format!("age        {:.1} s{again}\n", r.age_seconds));
    for (name, seconds) in &r.spent {
        text.push_str(&format!("           {seconds:.1} s {name}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_in_words() {
        let report = RequestReport {
            id: "0193a5b0-0000-7000-8000-000000000000".to_owned(),
            request: None,
            state: "computing token 8; micro-batch 812 at stage 2 on gpu-b for 4.1 s".to_owned(),
            node: Some("gpu-b".to_owned()),
            for_seconds: 4.1,
            age_seconds: 9.0,
            spent: vec![("in the queue".to_owned(), 1.0), ("on the answer".to_owned(), 8.0)],
            prompt_tokens: 12,
            generated_tokens: 7,
            unread: 0,
            restarts: 1,
            stuck: true,
        };
        assert_eq!(
            text(&report),
            "request    0193a5b0-0000-7000-8000-000000000000\n\
             state      computing token 8; micro-batch 812 at stage 2 on gpu-b for 4.1 s\n\
             unmoved    for 4.1 s: stuck\n\
             node       gpu-b\n\
             tokens     12 of the prompt, 7 generated\n\
             age        9.0 s, computed anew 1 times\n           1.0 s in the queue\n           \
             8.0 s on the answer\n"
        );
        assert!(table(&[report]).to_string().contains("stage 2 on gpu-b"));
    }
}
