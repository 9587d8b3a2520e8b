//! `millrace demo`: an answer that survives the death of a process.
//!
//! Starts a coordinator, three nodes and a stand-by, each a process of its own on this machine under
//! a throw-away CA; streams an answer, ends the middle node with SIGKILL in mid-sentence, and goes
//! on streaming when the stand-by has taken over. Then the same request runs undisturbed, and the
//! tokens are compared. Nothing is decided here that a real cluster would not decide by itself.

mod parts;
mod processes;

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use millrace_coordinator::models::ModelOptions;
use millrace_net::client::{Client, GenerateStream};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{ChatMessage, Choices, GenerateEvent, GenerateRequest, Prompt};

use crate::error::Interrupted;
use crate::{input, output};
pub(crate) use parts::{PartArgs, run as run_part};
use processes::Processes;

/// Stages of the pipeline, and so the nodes that serve.
const STAGES: usize = 3;
/// The stage that dies: the one in the middle.
const VICTIM: usize = 1;

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Who {
    /// The one with the middle stage.
    Node,
    /// The one that holds everything together.
    Coordinator,
}

/// Flags of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// GGUF file, folder of a model, catalogue name, or org/name:file of the hub
    #[arg(long, short, value_name = "MODEL", default_value = "smollm2:135m")]
    model: String,
    /// What to ask
    #[arg(
        value_name = "PROMPT",
        default_value = "Tell a story about a water mill that never stops."
    )]
    prompt: String,
    /// Most tokens of the answer
    #[arg(long, short = 'n', value_name = "N", default_value_t = 120, value_parser = clap::value_parser!(u32).range(2..=1500))]
    max_tokens: u32,
    /// The node dies when so many tokens are here [default: a third of --max-tokens]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    at: Option<u32>,
    /// Who dies: a node, or the coordinator, which is started again at once
    #[arg(long, value_name = "WHO", default_value = "node")]
    kill: Who,
    /// Nobody dies
    #[arg(long, conflicts_with = "kill")]
    no_kill: bool,
    #[command(flatten)]
    model_options: ModelOptions,
}

pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<()> {
    // Before signals are heard: until then one ends the program, download and all.
    let model = input::model_as(&args.model, args.model_options)?;
    let work = async {
        let mut cluster = start(&args, &model).await?;
        let result = show(&args, &mut cluster).await;
        match &result {
            Err(e) if !e.is::<output::StdoutError>() => output::remark(&cluster.logs()),
            _ => {}
        }
        result
    };
    // Dropping the work ends every process of it. Signals first: they are heard from then on.
    tokio::select! {
        biased;
        () = millrace_net::signals::terminated() => Err(Interrupted.into()),
        result = work => result,
    }
}

async fn start(args: &DemoArgs, model: &Path) -> anyhow::Result<Processes> {
    let mut cluster = Processes::start(model, STAGES).await?;
    let started = populate(args, &mut cluster).await;
    if started.is_err() {
        output::remark(&cluster.logs());
    }
    started.map(|()| cluster)
}

async fn populate(args: &DemoArgs, cluster: &mut Processes) -> anyhow::Result<()> {
    output::remark("a coordinator and three nodes, each a process of its own, on this machine");
    for index in 0..STAGES {
        cluster.add_node(&format!("node-{}", index + 1))?;
    }
    cluster.wait_ready().await?;
    if !args.no_kill && args.kill == Who::Node {
        // Last, so that it has no stage of its own; measured, so that it can take one at once.
        cluster.add_node("stand-by")?;
        cluster.wait_measured(STAGES + 1).await?;
    }
    Ok(())
}

/// What a run gave.
#[derive(Debug, Default)]
struct Seen {
    tokens: Vec<u32>,
    /// Tokens that were here when the node died.
    died_at: Option<u32>,
    /// The longest silence after that; without a death, the longest of all.
    pause: Duration,
}

async fn show(args: &DemoArgs, cluster: &mut Processes) -> anyhow::Result<()> {
    let client = cluster.client().await?;
    let status = client.status().await?;
    let names: Vec<String> = status.stages.iter().map(|s| s.node_name.clone()).collect();
    let described: Vec<String> = (status.stages.iter())
        .map(|s| format!("{} ({})", s.node_name, crate::serving::layers(s)))
        .collect();
    output::remark(&format!("layers: {}\n", described.join(" -> ")));
    let victim = match args.kill {
        Who::Node => names.get(VICTIM).context("the pipeline has too few stages")?,
        Who::Coordinator => processes::COORDINATOR,
    };
    let at = args.at.unwrap_or(args.max_tokens / 3).clamp(1, args.max_tokens - 1);
    let kill = (!args.no_kill).then_some((at, victim));
    let seen = stream(&client, args, cluster, kill).await?;
    output::remark("the same request once more, undisturbed");
    let truth = collect(ask(&client, args).await?).await?;
    client.close().await;
    report(&seen, &truth, (!args.no_kill).then_some(args.kill))
}

fn report(seen: &Seen, truth: &[u32], killed: Option<Who>) -> anyhow::Result<()> {
    let who = match killed {
        Some(Who::Coordinator) => "the coordinator".to_owned(),
        _ => format!("stage {}", VICTIM + 1),
    };
    let killed = killed.is_some();
    let same = seen.tokens.iter().zip(truth).filter(|(a, b)| a == b).count();
    let all = seen.tokens.len().max(truth.len());
    let pause = seen.pause.as_secs_f64();
    output::write(match (killed, seen.died_at) {
        (true, Some(at)) => format!(
            "{who} died at token {at}, pause {pause:.1} s, {same} of {all} tokens identical to the \
             run without the fault\n"
        ),
        (true, None) => "the answer ended before its time: give --at a smaller number\n".to_owned(),
        (false, _) => format!(
            "nobody died, longest pause {pause:.2} s, {same} of {all} tokens identical to a \
             second run\n"
        ),
    })?;
    match (same == all, killed == seen.died_at.is_some()) {
        (true, true) => Ok(()),
        (false, _) => Err(anyhow!("the tokens differ: this must not be")),
        (_, false) => Err(anyhow!("no node died")),
    }
}

async fn ask(client: &Client, args: &DemoArgs) -> anyhow::Result<GenerateStream> {
    let message = ChatMessage::new("user", &args.prompt);
    Ok(client
        .generate(GenerateRequest {
            model: String::new(),
            prompt: Prompt::Chat(vec![message].into()),
            // Sampled, for that is what has to survive too; the seed makes it the same each time.
            params: SamplingParams {
                max_tokens: Some(args.max_tokens),
                temperature: 0.6,
                seed: Some(7),
                ignore_eos: true,
                ..SamplingParams::default()
            },
            choices: Choices::default(),
        })
        .await?)
}

/// Streams the answer to stdout; `kill`: at which token which node dies.
async fn stream(
    client: &Client,
    args: &DemoArgs,
    cluster: &mut Processes,
    kill: Option<(u32, &str)>,
) -> anyhow::Result<Seen> {
    /// A silence after the death that is worth a mark in the text.
    const NOTABLE: Duration = Duration::from_millis(200);
    let mut events = ask(client, args).await?;
    let mut seen = Seen::default();
    let mut last: Option<Instant> = None;
    let mut marked = false;
    while let Some(event) = events.next().await {
        match event? {
            GenerateEvent::Started { .. } => {}
            GenerateEvent::Token { token_id, text, .. } => {
                let silence = last.map_or(Duration::ZERO, |at| at.elapsed());
                if seen.died_at.is_some() && !marked && silence >= NOTABLE {
                    marked = true;
                    mark(&format!("goes on after {:.1} s", silence.as_secs_f64()), "32")?;
                }
                if kill.is_none() || seen.died_at.is_some() {
                    seen.pause = seen.pause.max(silence);
                }
                seen.tokens.push(token_id);
                output::stream(&text)?;
                last = Some(Instant::now());
                let here = seen.tokens.len() as u32;
                if let Some((_, name)) = kill.filter(|k| k.0 == here) {
                    cluster.kill(name).await?;
                    seen.died_at = Some(here);
                    let what = match name {
                        processes::COORDINATOR => "the one that holds it together".to_owned(),
                        _ => format!("stage {} of {STAGES}", VICTIM + 1),
                    };
                    mark(&format!("kill -9 {name}, {what}"), "31;1")?;
                }
            }
            GenerateEvent::Finished { text, .. } => output::stream(&format!("{text}\n\n"))?,
        }
    }
    Ok(seen)
}

async fn collect(mut events: GenerateStream) -> anyhow::Result<Vec<u32>> {
    let mut tokens = Vec::new();
    while let Some(event) = events.next().await {
        if let GenerateEvent::Token { token_id, .. } = event? {
            tokens.push(token_id);
        }
    }
    Ok(tokens)
}

/// A mark in the text, coloured where stdout is a terminal.
fn mark(what: &str, colour: &str) -> anyhow::Result<()> {
    let colours = std::io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    output::stream(&match colours {
        true => format!(" \x1b[{colour}m[{what}]\x1b[0m "),
        false => format!(" [{what}] "),
    })
}
