//! `millrace plan`: which machines hold which layers, and how fast that will be, without loading
//! anything. Of the model only the directory is read; the planner and the report are libraries.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use millrace_coordinator::plan::best;
use millrace_coordinator::plan::cluster::{Described, describe, parse, read, to_text};
use millrace_coordinator::plan::costs::ModelParts;
use millrace_coordinator::plan::kinds;
use millrace_coordinator::plan::pins::bind;
use millrace_coordinator::plan::report::{PlanReport, Question};
use millrace_shared::cluster_file::ClusterFile;
use millrace_shared::model::{Dtype, ModelConfig};
use millrace_shared::options::{DEFAULT_PREFILL_CHUNK, Pin, kv_dtype};
use millrace_shared::partition::{Goal, PartitionError, Problem, Promise, Wish};

use crate::error::usage;
use crate::input;
use crate::output::{self, TableOrJson};
use crate::target;

const EXAMPLES: &str = "\
Examples:
  millrace plan --model smollm2:135m --nodes 3xcpu-4c-16g
      which of three such machines hold what, and how fast (estimates from nominal figures)
  millrace-node probe --model model.gguf --output a.toml
      measure a machine; put the [[node]] entries of several into one file, then:
  millrace plan --model model.gguf --cluster cluster.toml --concurrency 32 --context 4096
  millrace plan --model model.gguf --cluster live --save cluster.toml
      ask the running cluster for its machines, and keep them for plans to play with
  millrace plan --model model.gguf --cluster cluster.toml --pin gpu-1=0-11
      the best cut where gpu-1 has the layers 0 to 11, these exactly
  millrace plan --model model.gguf --cluster cluster.toml --slo ttft=1s,itl=60ms --output json

A cluster's description is TOML: [[node]] with name, memory_bytes, measured or limits, and, by hand,
count and price_per_hour; [[link]] with from, to, rtt_ms, megabits_per_second or forbidden = true;
[network] with rtt_ms and megabits_per_second for all other links [default: 0.3 ms, 1 Gbit/s].";

/// Tokens of a stream where nothing is said and the model could do more.
const USUAL_CONTEXT: u32 = 4096;

/// Flags of `plan`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PlanArgs {
    /// Path of a GGUF file or of a model's folder, catalogue name, or org/name:file of the hub; only
    /// its header is read
    #[arg(long, short, value_name = "MODEL")]
    model: String,
    /// The cluster's description, or 'live' for the running cluster
    #[arg(long, value_name = "FILE|live", required_unless_present = "nodes")]
    cluster: Option<String>,
    /// Kinds of machines instead, such as 3xh100-80g,5xcpu-32c-128g
    #[arg(long, value_name = "KINDS", conflicts_with = "cluster")]
    nodes: Option<String>,
    /// Write the description of the cluster here
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// What counts: tokens a second of all streams, or the time between tokens of one
    #[arg(long, value_name = "WHAT", default_value = "throughput")]
    objective: Objective,
    /// Streams at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    concurrency: u32,
    /// Tokens of a stream, prompt and answer [default: the model's context, at most 4096]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Exactly so many stages [default: as many as serve best]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    stages: Option<u16>,
    /// Layers that a node must have, the first and the last of them included; the others are cut
    /// around them. May be given for several nodes
    #[arg(long, value_name = "NAME=FIRST-LAST")]
    pin: Vec<Pin>,
    /// Also find the load that keeps a promise, such as ttft=1s,itl=60ms
    #[arg(long, value_name = "ttft=TIME,itl=TIME", value_parser = slo)]
    slo: Option<(Duration, Duration)>,
    /// Tokens of the prompts that --slo is about
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Stored type of keys and values: f16, f32 or int8
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = kv_dtype)]
    kv_cache_dtype: Dtype,
    /// A table for people, or one JSON object
    #[arg(long, short, default_value = "table")]
    output: TableOrJson,
}

/// What a plan is to be good at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Objective {
    Throughput,
    Latency,
}

fn slo(text: &str) -> Result<(Duration, Duration), String> {
    let wrong =
        |part: &str| format!("'{part}': write both times, such as ttft=1s,itl=60ms (units: ms, s)");
    let (mut ttft, mut itl) = (None, None);
    for part in text.split(',') {
        let (name, time) = part.split_once('=').ok_or_else(|| wrong(part))?;
        let (number, scale) = match time.strip_suffix("ms") {
            Some(number) => (number, 1e-3),
            None => (time.strip_suffix('s').ok_or_else(|| wrong(part))?, 1.0),
        };
        let seconds = number.parse::<f64>().map_err(|_| wrong(part))? * scale;
        let time = Duration::try_from_secs_f64(seconds).map_err(|_| wrong(part))?;
        match name {
            "ttft" => ttft = Some(time),
            "itl" => itl = Some(time),
            _ => return Err(wrong(part)),
        }
    }
    Ok((ttft.ok_or_else(|| wrong(text))?, itl.ok_or_else(|| wrong(text))?))
}

pub(crate) async fn run(args: PlanArgs) -> anyhow::Result<()> {
    let file = cluster(&args).await?;
    if let Some(path) = &args.save {
        std::fs::write(path, to_text(&file))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let files = input::header(&args.model)?;
    files.check_supported_types().with_context(|| args.model.clone())?;
    let parts = ModelParts { config: &files.config, tensors: &files.tensors };
    let mut described = describe(&file, &parts).map_err(usage)?;
    pin(&args.pin, &mut described).map_err(usage)?;
    let report = plan(&args, &parts, &described)?;
    match args.output {
        TableOrJson::Table => output::write(report),
        TableOrJson::Json => output::json(&report),
    }
}

async fn cluster(args: &PlanArgs) -> anyhow::Result<ClusterFile> {
    match (&args.nodes, args.cluster.as_deref()) {
        (Some(kinds), _) => kinds::parse(kinds).map_err(|e| usage(format!("--nodes: {e}"))),
        (None, Some("live")) => {
            let text = target::live_cluster().await?;
            parse(&text).map_err(|e| anyhow::anyhow!("the cluster's answer: {e}"))
        }
        (None, Some(path)) => read(path.as_ref()).map_err(|e| usage(format!("--cluster: {e}"))),
        (None, None) => Err(usage("give --cluster FILE, --cluster live or --nodes KINDS")),
    }
}

/// Most machines that [`fewest`] tries.
const MOST_MACHINES: u32 = 256;

/// The fewest machines of a kind that hold a model with `streams` streams, and the plan for them; `None`
/// if there are none so few.
///
/// # Errors
/// If there is no such kind, or no sound model at the path.
pub(crate) fn fewest(
    model: &std::path::Path,
    kind: &str,
    streams: u32,
) -> anyhow::Result<Option<(u32, PlanReport)>> {
    let name = model.to_str().context("a plan needs a path of UTF-8")?;
    let files = input::header(name)?;
    let parts = ModelParts { config: &files.config, tensors: &files.tensors };
    for machines in 1..=MOST_MACHINES {
        let nodes = format!("{machines}x{kind}");
        let file = kinds::parse(&nodes).map_err(|e| usage(format!("--node-kind: {e}")))?;
        let described = describe(&file, &parts).map_err(usage)?;
        let args = PlanArgs {
            model: name.to_owned(),
            cluster: None,
            nodes: Some(nodes),
            save: None,
            objective: Objective::Throughput,
            concurrency: streams,
            context: None,
            stages: None,
            pin: Vec::new(),
            slo: None,
            prompt_tokens: 256,
            kv_cache_dtype: Dtype::F16,
            output: TableOrJson::Json,
        };
        if let Ok(report) = plan(&args, &parts, &described) {
            return Ok(Some((machines, report)));
        }
    }
    Ok(None)
}

/// Pins nodes; here, where all nodes are known, each name must be one of theirs.
fn pin(pins: &[Pin], described: &mut Described) -> Result<(), String> {
    let names: Vec<String> = described.nodes.iter().map(|n| n.name.clone()).collect();
    for (i, pin) in pins.iter().enumerate() {
        if !names.contains(&pin.node) {
            return Err(format!(
                "--pin {pin}: no node is called '{}'; there are: {}",
                pin.node,
                names.join(", ")
            ));
        }
        if let Some(other) = pins[..i].iter().find(|other| other.node == pin.node) {
            return Err(format!("--pin {other} and --pin {pin}: pin '{}' once", pin.node));
        }
    }
    bind(pins, &mut described.nodes, |n, pin| names[n] == pin.node);
    Ok(())
}

/// Tokens of a stream.
fn context(args: &PlanArgs, config: &ModelConfig) -> anyhow::Result<u32> {
    match args.context {
        Some(tokens) if tokens > config.context => Err(usage(format!(
            "--context {tokens}: the model was made for at most {} tokens",
            config.context
        ))),
        Some(tokens) => Ok(tokens),
        None => Ok(config.context.min(USUAL_CONTEXT)),
    }
}

fn plan(
    args: &PlanArgs,
    parts: &ModelParts<'_>,
    described: &Described,
) -> anyhow::Result<PlanReport> {
    let context = context(args, parts.config)?;
    let positions = u64::from(context) * u64::from(args.concurrency);
    let batch = args.concurrency.saturating_add(DEFAULT_PREFILL_CHUNK);
    let every = (&described.nodes[..], &described.kept[..]);
    let (model, nodes) = parts.mixed(every, positions, args.kv_cache_dtype, batch);
    let network = &described.network;
    let problem = Problem { model: &model, nodes: &nodes, network, rows: 1.0 };
    let wish = Wish {
        goal: match args.objective {
            Objective::Throughput => Goal::Throughput,
            Objective::Latency => Goal::Latency,
        },
        streams: args.concurrency,
        stages: args.stages.map(usize::from),
        micro_batches: None,
    };
    let choice = best(&problem, &wish, &[]).map_err(|e| usage(why_not(&e, args, context)))?;
    let promise = args.slo.map(|(ttft, itl)| Promise {
        first_token_seconds: ttft.as_secs_f64(),
        inter_token_seconds: itl.as_secs_f64(),
        prompt_tokens: args.prompt_tokens.min(context),
        prefill_chunk: DEFAULT_PREFILL_CHUNK,
    });
    let question = Question {
        model_name: args.model.clone(),
        parts: *parts,
        kv_dtype: args.kv_cache_dtype,
        context,
        wish,
        promise,
    };
    Ok(PlanReport::new(&question, &problem, &described.facts, &choice, true))
}

/// In the words of this command's flags.
fn why_not(error: &PartitionError, args: &PlanArgs, context: u32) -> String {
    let text =
        error.to_string().replace("lower --kv-cache-tokens", "lower --concurrency or --context");
    match error {
        PartitionError::DoesNotFit { .. } | PartitionError::DoesNotFitInOrder { .. } => {
            format!("{text} (the KV cache is for {} streams of {context} tokens)", args.concurrency)
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises() {
        let ms = Duration::from_millis;
        assert_eq!(slo("ttft=1s,itl=60ms"), Ok((ms(1000), ms(60))));
        assert_eq!(slo("itl=0.05s,ttft=800ms"), Ok((ms(800), ms(50))));
        for bad in
            ["", "ttft=1s", "ttft=1,itl=2", "ttft=xs,itl=1s", "ttft=-1s,itl=1s", "a=1s,itl=1s"]
        {
            assert!(slo(bad).is_err_and(|e| e.contains("ttft=1s,itl=60ms")), "{bad}");
        }
    }
}
