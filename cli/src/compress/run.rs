//! `millrace compress run`: a recipe, from a model to a smaller one, with a report and a plan.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use millrace_compress::compare::{self, Entry, Original, Terms, judge};
use millrace_compress::recipe::{self, Provenance, Recipe, RunReport};
use millrace_compress::{Settings, page, parse_type, texts};
use millrace_coordinator::plan::report::PlanReport;
use millrace_shared::model::Dtype;
use serde::Serialize;

use super::{Bar, calibrating, failed, judged_by, print, table, threads};
use crate::error::usage;
use crate::plan::fewest;
use crate::table::bytes;
use crate::{input, output};

/// Flags of `compress run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Recipe: model, output, calibration, calibration_tokens, evaluation, store, and the steps
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
    /// Do not judge the models before and after, for which each is loaded whole
    #[arg(long)]
    no_eval: bool,
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
    plan: Plan,
    /// Not there until they are judged.
    before: Option<Entry>,
    after: Option<Entry>,
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
        true => {
            let text = read(&recipe.calibration, texts::CALIBRATION)?;
            calibrating(&model, &text, recipe.calibration_tokens)?
        }
        false => Vec::new(),
    };
    let terms = Terms { window: 512, threads, kv_dtype: Dtype::F16 };
    let tokens = match args.no_eval {
        true => Vec::new(),
        false => {
            let text = read(&recipe.evaluation, texts::HELD_OUT)?;
            if recipe.calibration.is_some() && text == read(&recipe.calibration, "")? {
                return Err(usage(format!(
                    "{}: evaluation is the calibration text, which flatters: judge by another, or leave \
                     evaluation out",
                    args.recipe.display()
                )));
            }
            judged_by(&model, &text, terms.window)?
        }
    };
    let output = folder.join(&recipe.output);
    let settings =
        Settings { calibration: &calibration, known: None, store, threads, overwrite: args.force };
    let [as_json, as_page] = reports(&output);
    page::check(&as_json, page::Kind::Json).map_err(failed)?;
    page::check(&as_page, page::Kind::Html).map_err(failed)?;
    // Before any work: a kind that there is.
    let before = Suffices::of(&model, args)?;
    let mut bar = Bar::default();
    let done = recipe::run(&recipe, &model, &output, &settings, &mut bar);
    bar.end();
    let run = done.map_err(failed)?;
    let plan = Plan {
        node_kind: args.node_kind.clone(),
        streams: args.streams,
        before,
        after: Suffices::of(&output, args)?,
    };
    let mut report = Report { run, plan, before: None, after: None };
    // Whatever becomes of the judging, it is known what was made of what.
    let beside = report.write(&output)?;
    if !args.no_eval {
        report.judge((&model, &output), &tokens, terms, &mut bar)?;
        report.write(&output)?;
    }
    recipe::finished(&output);
    if args.json {
        return output::json(&report);
    }
    report.run.steps.iter().try_for_each(print)?;
    table::print(&report.entries())?;
    report.remarks().iter().try_for_each(|told| output::write(format_args!("{told}\n")))?;
    output::write(format_args!("report: {}, {}\n", beside[0].display(), beside[1].display()))
}

/// Where reports of a model go.
fn reports(output: &Path) -> [PathBuf; 2] {
    ["report.json", "report.html"].map(|what| recipe::beside(output, what))
}

impl Report {
    /// Judges both models; the original is loaded first, and stays for comparison.
    fn judge(
        &mut self,
        (model, output): (&Path, &Path),
        tokens: &[u32],
        terms: Terms,
        bar: &mut Bar,
    ) -> anyhow::Result<()> {
        bar.judging("the model before");
        let mut original = Original::open(model, tokens, terms).map_err(failed)?;
        let before = judge("before", model, tokens, Some(&mut original), terms).map_err(failed)?;
        bar.judging("the model after");
        let mut after =
            judge("after", output, tokens, Some(&mut original), terms).map_err(failed)?;
        bar.end();
        if let Some(last) = self.run.steps.last() {
            after.format_bytes = last.bytes_format.min(after.file_bytes);
        }
        (self.before, self.after) = (Some(before), Some(after));
        Ok(())
    }

    fn entries(&self) -> Vec<Entry> {
        self.before.iter().chain(&self.after).cloned().collect()
    }

    /// Writes it as JSON and as a page; their paths.
    fn write(&self, output: &Path) -> anyhow::Result<[PathBuf; 2]> {
        let json = serde_json::to_vec_pretty(self).context("the report cannot be written")?;
        let name = self.run.recipe.output.display();
        let html =
            compare::page(&format!("{name}: what a recipe made"), &self.entries(), &self.remarks());
        let [as_json, as_page] = reports(output);
        page::write(&as_json, page::Kind::Json, &json).map_err(failed)?;
        page::write(&as_page, page::Kind::Html, html.as_bytes()).map_err(failed)?;
        Ok([as_json, as_page])
    }

    /// Where the model comes from, what was done, and how many machines it needs.
    fn remarks(&self) -> Vec<String> {
        let (run, plan) = (&self.run, &self.plan);
        let of = |what: &str, p: &Provenance| {
            let (path, size) = (p.path.display(), bytes(p.bytes));
            format!("{what}: {path}, {size} of tensors, BLAKE3 {}", p.blake3)
        };
        let mut told = vec![of("model", &run.source), of("result", &run.result)];
        told.extend(run.calibration.as_ref().map(|hash| format!("calibration: BLAKE3 {hash}")));
        for (i, step) in run.steps.iter().enumerate() {
            let resumed = if i < run.resumed { ", by an earlier run" } else { "" };
            let size = bytes(step.bytes_stored);
            told.push(format!("step {}: {}: {size}{resumed}", i + 1, step.step));
        }
        told.push(format!(
            "machines of kind {} that hold it with {} streams: before {}; now {}",
            plan.node_kind,
            plan.streams,
            Suffices::told(plan.before.as_ref()),
            Suffices::told(plan.after.as_ref())
        ));
        told
    }
}
