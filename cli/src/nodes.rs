//! `millrace nodes` and `millrace doctor`: what operators do to a running cluster.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use millrace_coordinator::recut::render;
use millrace_shared::wire::admin::{
    AdminReply, AdminRequest, EdgeStatus, NodeRole, NodeStatus, RecutReport,
};

use crate::bundle;
use crate::output::{self, TextOrJson};
use crate::table::{self, Align, Table};
use crate::target::RunningArgs;

const EXAMPLES: &str = "\
Examples:
  millrace nodes                       who is there and what each does
  millrace nodes cordon gpu-2          move the layers off gpu-2 before a reboot; requests go on
  millrace nodes uncordon gpu-2        it may be used again
  millrace nodes drain gpu-2           the same as cordon, and then its process ends
  millrace nodes recut                 what a new cut would bring; --apply makes it
  millrace nodes revoke gpu-2          never let it in again: lost, stolen or sold";

/// Flags of `nodes`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct NodesArgs {
    #[command(flatten)]
    running: RunningArgs,
    /// json prints what the cluster answered
    #[arg(long, short, value_name = "FORMAT", default_value = "text", global = true)]
    output: TextOrJson,
    #[command(subcommand)]
    command: Option<NodesCommand>,
}

#[derive(Debug, Subcommand)]
enum NodesCommand {
    /// List them (the default)
    List,
    /// Use a node no more: its layers go to others while requests go on
    Cordon {
        /// Its name or id
        node: String,
    },
    /// Hand a node's layers over while requests go on, then end its process
    Drain {
        /// Its name or id
        node: String,
    },
    /// Let a cordoned node be used again
    Uncordon {
        /// Its name or id
        node: String,
    },
    /// Never let a node in again, and close its connection; to come back it has to enrol anew
    Revoke {
        /// Its name, or its id where it is not there
        node: String,
    },
    /// Show what a new cut over the nodes of now would bring
    Recut {
        /// Make it
        #[arg(long)]
        apply: bool,
    },
}

/// Flags of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    running: RunningArgs,
    /// json prints what the cluster answered
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: TextOrJson,
    /// Write what helps to find out what went wrong into a zip file: the last minute's steps of all
    /// members, plan, settings, versions, metrics; no prompts, tokens or secrets
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
}

pub(crate) async fn run(args: NodesArgs) -> anyhow::Result<()> {
    let request = match args.command.unwrap_or(NodesCommand::List) {
        NodesCommand::List => AdminRequest::Nodes,
        NodesCommand::Cordon { node } => AdminRequest::Cordon { node },
        NodesCommand::Drain { node } => AdminRequest::Drain { node },
        NodesCommand::Uncordon { node } => AdminRequest::Uncordon { node },
        NodesCommand::Revoke { node } => AdminRequest::RevokeNode { node },
        NodesCommand::Recut { apply } => AdminRequest::Recut { apply },
    };
    print(args.running.admin(request).await?, args.output)
}

/// Fails where a way that the pipeline uses is closed.
pub(crate) async fn doctor(args: DoctorArgs) -> anyhow::Result<()> {
    if let Some(path) = &args.bundle {
        return bundle::write(&args.running, path).await;
    }
    let reply = args.running.admin(AdminRequest::Doctor).await?;
    let closed = match &reply {
        AdminReply::Edges(edges) => edges.iter().filter(|e| e.outcome.is_err()).count(),
        _ => 0,
    };
    print(reply, args.output)?;
    anyhow::ensure!(closed == 0, "{closed} ways between members are closed");
    Ok(())
}

fn print(reply: AdminReply, format: TextOrJson) -> anyhow::Result<()> {
    if let TextOrJson::Json = format {
        return output::json(&serde_json::to_value(&reply)?);
    }
    match reply {
        AdminReply::Nodes(nodes) => output::write(nodes_table(&nodes)),
        AdminReply::Recut(report) => output::write(recut_text(&report)),
        AdminReply::Edges(edges) => output::write(edges_text(&edges)),
        AdminReply::Description(text) => output::write(text),
        // Not printed: answers to others hold secrets.
        _ => Err(anyhow::anyhow!("the cluster's answer makes no sense")),
    }
}

fn nodes_table(nodes: &[NodeStatus]) -> Table {
    use Align::{Left, Right};
    let mut nodes: Vec<&NodeStatus> = nodes.iter().collect();
    nodes.sort_by(|a, b| (&a.host, &a.name).cmp(&(&b.host, &b.name)));
    let mut table = Table::new(&[
        ("machine", Left),
        ("node", Left),
        ("does", Left),
        ("threads", Right),
        ("memory", Right),
        ("address", Left),
        ("hardware", Left),
        ("id", Left),
    ]);
    let mut machine = None;
    for node in nodes {
        // Nodes of one machine stand together, under its name.
        let again = machine.replace(&node.host) == Some(&node.host);
        let role = match node.role {
            NodeRole::Stage { first_layer, end_layer, head } => {
                let layers = match (first_layer, end_layer) {
                    (first, end) if first < end => format!("layers {first}-{}", end - 1),
                    _ => "no layers".to_owned(),
                };
                format!("{layers}{}", if head { " + head" } else { "" })
            }
            NodeRole::StandBy => "stand-by".to_owned(),
            NodeRole::Cordoned => "cordoned".to_owned(),
            NodeRole::Suspect => "silent".to_owned(),
        };
        let why: Vec<&str> = node.cordons.iter().map(|r| r.as_str()).collect();
        let role = match (why.is_empty(), node.role) {
            (true, _) => role,
            (false, NodeRole::Cordoned) => format!("cordoned: {}", why.join(", ")),
            (false, _) => format!("{role}, cordoned: {}", why.join(", ")),
        };
        table.row([
            if again { String::new() } else { node.host.clone() },
            node.name.clone(),
            role,
            node.threads.to_string(),
            table::bytes(node.memory_bytes),
            node.address.clone(),
            node.hardware.clone(),
            node.id.to_string(),
        ]);
    }
    table
}

fn recut_text(report: &RecutReport) -> String {
    let verdict = match (report.applied, report.gain) {
        (true, _) => "It is being made; 'millrace nodes' shows when it serves.",
        (false, gain) if gain < 1.05 => "Not worth a pause. To make it all the same: --apply",
        _ => "To make it: millrace nodes recut --apply",
    };
    format!("{}\n{verdict}\n", render(report))
}

fn edges_text(edges: &[EdgeStatus]) -> String {
    use Align::{Left, Right};
    if edges.is_empty() {
        return "One node: there are no ways between members.\n".to_owned();
    }
    let mut table = Table::new(&[
        ("from", Left),
        ("to", Left),
        ("round trip", Right),
        ("bandwidth", Right),
        ("in use", Left),
    ]);
    for edge in edges {
        let outcome = match &edge.outcome {
            Ok(seconds) => format!("{:.2} ms", seconds * 1e3),
            Err(_) => "closed".to_owned(),
        };
        let used = if edge.used { "yes" } else { "" };
        let rate = edge.bytes_per_second.filter(|_| edge.outcome.is_ok());
        let rate = rate.map_or_else(|| "-".to_owned(), |r| format!("{:.0} Mbit/s", r * 8e-6));
        table.row([edge.from.clone(), edge.to.clone(), outcome, rate, used.to_owned()]);
    }
    let mut text = table.to_string();
    for problem in edges.iter().filter_map(|e| e.outcome.as_ref().err()) {
        text.push_str(&format!("\n{problem}"));
    }
    if text.ends_with('\n') { text } else { format!("{text}\n") }
}
