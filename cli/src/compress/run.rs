//! `millrace compress run`: a recipe, from a model to a smaller one, with a report and a plan.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use millrace_compress::compare::{Entry, Original, Terms, judge};
use millrace_compress::recipe::{self, Recipe, RunReport};
use millrace_compress::{Settings, parse_type, texts};
use millrace_coordinator::plan::report::PlanReport;
use millrace_shared::model::Dtype;
use serde::Serialize;

use super::{Bar, failed, print, table, threads, tokenize};
use crate::plan::fewest;
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
    /// Kind of machine for the plan, as `millrace plan --nodes` names them: how many of them hold the
    /// model, and how fast that will be
    #[arg(long, value_name = "KIND", default_value = "cpu-4c-16g")]
    node_kind: String,
    /// Streams at once, for the plan
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    streams: u32,
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

/// How many machines of a kind suffice, and what the planner predicts for them; estimates from nominal
/// figures.
#[derive(Serialize)]
struct Plan {
    node_kind: String,
    streams: u32,
    /// Not there if no number of them holds the model.
    before: Option<Suffices>,
    after: Option<Suffices>,
}

/// The fewest machines, and the plan for them.
#[derive(Serialize)]
struct Suffices {
    nodes: u32,
    plan: PlanReport,
}

impl Suffices {
    fn of(model: &Path, args: &RunArgs) -> anyhow::Result<Option<Self>> {
        let found = fewest(model, &args.node_kind, args.streams)?;
        Ok(found.map(|(nodes, plan)| Self { nodes, plan }))
    }

    fn told(found: Option<&Self>) -> String {
        found.map_or_else(
            || "more than can be".to_owned(),
            |s| format!("{}, {:.1} tokens/s predicted", s.nodes, s.plan.tokens_per_second),
        )
    }
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
    // Before any work: a kind that there is.
    fewest(&model, &args.node_kind, args.streams)?;
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
        "machines of kind {} that hold it with {} streams: before {}; now {}\nreport: {}\n",
        plan.node_kind,
        plan.streams,
        Suffices::told(plan.before.as_ref()),
        Suffices::told(plan.after.as_ref()),
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
    let plan = Plan {
        node_kind: args.node_kind.clone(),
        streams: args.streams,
        before: Suffices::of(model, args)?,
        after: Suffices::of(output, args)?,
    };
    Ok(Report { run, before, after, plan })
}
