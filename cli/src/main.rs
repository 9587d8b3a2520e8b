//! The `millrace` command.
//!
//! One file per subcommand; what they share is in [`target`] (which cluster to talk to, or start),
//! [`sampling`], [`input`], [`output`] and [`table`]. Nothing here decides anything about models or
//! schedules: a command parses flags, calls a library, and prints.
//!
//! Data goes to stdout, everything else to stderr. Exit codes: 0 clean, also when the reader of
//! stdout went away; 1 a failure at run time; 2 wrong flags, files or configuration; 130 interrupted.
#![forbid(unsafe_code)]

mod bench;
mod bundle;
mod cache;
mod chat;
mod completions;
mod compress;
mod demo;
#[cfg(test)]
mod deploy_check;
mod editor;
mod embed;
mod error;
mod eval;
mod generate;
mod input;
mod inspect;
mod inspect_report;
mod kept;
mod keys;
mod nodes;
mod output;
mod plan;
#[cfg(test)]
mod protocol_check;
mod pull;
mod quantize;
mod requests;
mod run;
mod sampling;
#[cfg(test)]
mod secrets_check;
mod serving;
mod table;
mod target;
mod tokenize;
mod tokens;
mod top;
mod up;

use std::process::exit;

use clap::{Parser, Subcommand};
use millrace_coordinator::text::renderers;
use millrace_net::telemetry::{self, LogFormat};
use millrace_shared::flags::{Program, parse_or_exit};

/// How the environment twins of flags begin.
const PROGRAM: Program = Program { prefix: "MILLRACE", main: "" };

const EXAMPLES: &str = "\
Examples:
  millrace run smollm2:135m \"Why is the sky blue?\"    answer once
  millrace run smollm2:135m                           chat
  millrace demo                                       kill a machine in mid-sentence, lose nothing
  millrace up --model smollm2:135m --stages 3         serve over HTTP and QUIC until Ctrl-C
  millrace generate --prompt \"Once upon\" --output json   ask a running cluster
  millrace bench serve --model smollm2:135m --stages 2  measure a whole pipeline
  millrace chat                                       talk to it
  millrace top                                        watch it work
  millrace plan --model M.gguf --nodes 3xh100-80g     which machines a model needs
  millrace nodes cordon gpu-2                         move the layers off a node, requests go on
  millrace keys create --name alice --expires 90d     an API key for somebody else
  millrace inspect ./model.gguf                       what a model file holds
  millrace pull Qwen/Qwen3-0.6B-GGUF                  fetch a model of the Hugging Face hub
  millrace quantize ./f16.gguf ./q8.gguf --type q8_0  a smaller copy of a model file
  millrace compress table smollm2:135m                every way to make it smaller, and the price

MODEL is the path of a GGUF file or of a model's folder, a catalogue name such as smollm2:135m
('millrace list' shows all), or org/name[@revision][:file] of the Hugging Face hub. Commands that talk to a
running cluster find it by --cluster FILE, $MILLRACE_CLUSTER, or client.toml in $MILLRACE_DIR.
Exit status: 0 clean, 1 failure, 2 wrong usage or configuration, 130 interrupted.";

/// Serve one language model with many machines.
#[derive(Debug, Parser)]
#[command(name = "millrace", version, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer a prompt, or chat, with a cluster inside this process
    Run(run::RunArgs),
    /// Show an answer that survives the death of a process
    Demo(demo::DemoArgs),
    /// One process of a demo
    #[command(hide = true)]
    DemoPart(demo::PartArgs),
    /// Serve a model over HTTP and QUIC until stopped
    Up(up::UpArgs),
    /// Chat with a running cluster, or one started for it
    Chat(Box<chat::ChatArgs>),
    /// Continue a prompt as it is, without a chat template
    Generate(generate::GenerateArgs),
    /// Make vectors of texts
    Embed(embed::EmbedArgs),
    /// Turn a text into the model's token ids
    Tokenize(tokenize::TokenizeArgs),
    /// Make a model smaller: quantise, prune, factorise, cut; and know what that costs
    #[command(subcommand)]
    Compress(compress::CompressCommand),
    /// Judge models: likelihood of a text, distance, tasks, speed, logits
    #[command(subcommand)]
    Eval(eval::EvalCommand),
    /// Fetch a model of the catalogue or of the Hugging Face hub and print its path
    Pull(pull::PullArgs),
    /// List the models on this machine, and those of the catalogue
    List(kept::ListArgs),
    /// Remove a fetched model
    Rm(kept::RmArgs),
    /// What the cache folder holds, and removing what is not needed
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// Show what a model holds, whether it runs, and the memory it takes
    Inspect(inspect::InspectArgs),
    /// Plan a cluster for a model: who holds what, how fast, what would help
    Plan(Box<plan::PlanArgs>),
    /// Write a smaller copy of a model file: Q8_0, Q4_0, Q4_1, or floats
    Quantize(Box<quantize::QuantizeArgs>),
    /// List the nodes of a running cluster, take one out of use, cut the model anew
    Nodes(nodes::NodesArgs),
    /// List, make and revoke the API keys of a running cluster
    Keys(keys::KeysArgs),
    /// List, make and revoke the tokens with which nodes join a running cluster
    Tokens(tokens::TokensArgs),
    /// Try the network ways between all members of a running cluster
    Doctor(nodes::DoctorArgs),
    /// Watch a running cluster: stages, links, KV cache, requests
    Top(top::TopArgs),
    /// Print the completions of a shell, for all three programs
    Completions(completions::CompletionsArgs),
    /// What the requests of a running cluster wait for
    Requests(requests::RequestsArgs),
    /// One request: what it waits for, or its end
    Request(requests::RequestArgs),
    /// Measure the engine alone, or a whole pipeline
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

impl Command {
    /// What is logged unless `RUST_LOG` says otherwise: a server tells its life, a command only
    /// what went wrong.
    fn log_filter(&self) -> &'static str {
        match self {
            Self::Up(_) | Self::DemoPart(_) => "warn,millrace=info",
            _ => "warn",
        }
    }
}

async fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => run::run(args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::DemoPart(args) => demo::run_part(args).await,
        Command::Up(args) => up::run(args).await,
        Command::Chat(args) => chat::run(*args).await,
        Command::Generate(args) => generate::run(args).await,
        Command::Embed(args) => embed::run(args).await,
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Compress(command) => compress::run(command),
        Command::Eval(command) => eval::run(command).await,
        Command::Pull(args) => pull::run(&args),
        Command::List(args) => kept::list(&args),
        Command::Rm(args) => kept::remove(&args),
        Command::Cache(command) => cache::run(&command),
        Command::Inspect(args) => inspect::run(&args),
        Command::Plan(args) => plan::run(*args).await,
        Command::Quantize(args) => quantize::run(*args).await,
        Command::Nodes(args) => nodes::run(args).await,
        Command::Keys(args) => keys::run(args).await,
        Command::Tokens(args) => tokens::run(args).await,
        Command::Doctor(args) => nodes::doctor(args).await,
        Command::Top(args) => top::run(args).await,
        Command::Completions(args) => completions::run(&args),
        Command::Requests(args) => requests::list(args).await,
        Command::Request(args) => requests::one(args).await,
        Command::Bench(command) => bench::run(command).await,
    }
}

fn main() {
    if renderers::serve_if_asked() {
        return;
    }
    renderers::enable();
    let cli = parse_or_exit::<Cli>(PROGRAM);
    // Not dropped before the exit: neither an actor that is still running nor a thread that waits
    // for a key on stdin may hold up the end, or have a say in it.
    let system = actix_rt::System::new();
    let result = telemetry::init_with(LogFormat::Text, cli.command.log_filter())
        .map_err(error::usage)
        .and_then(|()| system.block_on(Box::pin(dispatch(cli.command))))
        .and_then(|()| output::flush());
    exit(error::report(result));
}
