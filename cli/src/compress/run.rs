//! `millrace compress run`: a recipe, from a model to a smaller one, with a report and a plan.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use millrace_compress::compare::{Entry, Original, Terms, judge};
use millrace_compress::recipe::{self, Recipe, RunReport};
use millrace_compress::{Settings, parse_type, texts};
use millrace_shared::model::Dtype;
use serde::Serialize;

use super::{Bar, failed, print, table, threads, tokenize};
use crate::{input, output};

/// Flags of `compress run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Recipe: model, output, calibration, evaluation, store, and the steps
    #[arg(value_name = "RECIPE.toml")]
    recipe: PathBuf,
    /// Replace the recipe's output if it is there
    #[arg(long)]
    force: bool,
    /// Memory of a node, for the plan: how many of them hold the model
    #[arg(long, value_name = "GIGABYTES", default_value_t = 16.0)]
    node_memory: f64,
    /// Threads [default: the cores this process may use]
    #[arg(long, short = 't', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is written beside the model.
#[derive(Serialize)]
struct Report {
    run: RunReport,
    before: Entry,
    after: Entry,
    plan: Plan,
}

/// How many nodes suffice: each holds weights, and as much again for cache and activations is kept free
/// of a quarter of its memory.
#[derive(Serialize)]
struct Plan {
    node_memory_bytes: u64,
    nodes_before: u64,
    nodes_after: u64,
    /// As measured on this machine, one sequence.
    tokens_per_second_before: f64,
    tokens_per_second_after: f64,
}

pub(super) fn run(args: &RunArgs) -> anyhow::Result<()> {
    let recipe = Recipe::open(&args.recipe).map_err(failed)?;
    let folder = args.recipe.parent().unwrap_or_else(|| Path::new(""));
    let store = parse_type(&recipe.store).map_err(failed)?;
    let threads = threads(args.threads);
    let near = folder.join(&recipe.model);
    let model = if near.exists() { near } else { input::model(&recipe.model)? };
    let read = |path: &Option<PathBuf>, own: &str| match path {
        Some(path) => input::text(&folder.join(path)),
        None => Ok(own.to_owned()),
    };
    let calibration = match recipe.needs_calibration() {
        true => tokenize(&model, &read(&recipe.calibration, texts::CALIBRATION)?)?,
        false => Vec::new(),
    };
    let tokens = tokenize(&model, &read(&recipe.evaluation, texts::HELD_OUT)?)?;
    let output = folder.join(&recipe.output);
    let settings =
        Settings { calibration: &calibration, known: None, store, threads, overwrite: args.force };
    let mut bar = Bar::default();
    let done = recipe::run(&recipe, &model, &output, &settings, &mut bar);
    bar.end();
    let run = done.map_err(failed)?;
    let report = report(args, run, (&model, &output), &tokens, threads)?;
    let beside = output.with_extension("report.json");
    let json = serde_json::to_vec_pretty(&report).context("the report cannot be written")?;
    std::fs::write(&beside, json).with_context(|| beside.display().to_string())?;
    if args.json {
        return output::json(&report);
    }
    report.run.steps.iter().try_for_each(print)?;
    table::print(&[report.before, report.after])?;
    let plan = &report.plan;
    output::write(format_args!(
        "nodes of {:.0} GB that hold it: {} before, {} now; tokens a second on this machine: {:.1} \
         before, {:.1} now\nreport: {}\n",
        args.node_memory,
        plan.nodes_before,
        plan.nodes_after,
        plan.tokens_per_second_before,
        plan.tokens_per_second_after,
        beside.display()
    ))
}

fn report(
    args: &RunArgs,
    run: RunReport,
    (model, output): (&Path, &Path),
    tokens: &[u32],
    threads: usize,
) -> anyhow::Result<Report> {
    let terms = Terms { window: 512, threads, kv_dtype: Dtype::F16 };
    let mut original = Original::open(model, tokens, terms).map_err(failed)?;
    let before = judge("before", model, tokens, Some(&mut original), terms).map_err(failed)?;
    let mut after = judge("after", output, tokens, Some(&mut original), terms).map_err(failed)?;
    if let Some(last) = run.steps.last() {
        after.format_bytes = last.bytes_format.min(after.file_bytes);
    }
    let node = (args.node_memory * 1e9) as u64;
    let nodes = |bytes: u64| bytes.div_ceil((node / 4 * 3).max(1)).max(1);
    let plan = Plan {
        node_memory_bytes: node,
        nodes_before: nodes(before.memory_bytes),
        nodes_after: nodes(after.memory_bytes),
        tokens_per_second_before: before.speed.decode,
        tokens_per_second_after: after.speed.decode,
    };
    Ok(Report { run, before, after, plan })
}
