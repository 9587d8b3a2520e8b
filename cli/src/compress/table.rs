//! `millrace compress table`: every method at two settings, on one model.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use millrace_compress::compare::{self, Entry, Terms};
use millrace_compress::survey::{survey, variants};
use millrace_compress::{Settings, page, parse_type, texts};
use millrace_shared::model::Dtype;

use super::{Common, failed, judged_by};
use crate::error::usage;
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};
use crate::{input, output};

/// Flags of `compress table`.
#[derive(Debug, Args)]
pub(crate) struct TableArgs {
    /// Path of a GGUF file, or catalogue name
    #[arg(value_name = "MODEL")]
    model: String,
    /// Methods with this in their names alone
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// UTF-8 text to judge by [default: held-out documents of this program's]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Also write a page with plots
    #[arg(long, value_name = "FILE.html")]
    html: Option<PathBuf>,
    /// Keep what is done in this file, and go on with what it has
    #[arg(long, value_name = "FILE.json")]
    state: Option<PathBuf>,
    /// Print one JSON list
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &TableArgs) -> anyhow::Result<()> {
    check_page(args.html.as_deref())?;
    if let Some(state) = &args.state {
        page::check(state, page::Kind::Json).map_err(|e| usage(format!("--state: {e}")))?;
    }
    let model = input::model(&args.model)?;
    let chosen = variants(&model, args.only.as_deref()).map_err(failed)?;
    let text = match &args.file {
        Some(path) => input::text(path)?,
        None => texts::HELD_OUT.to_owned(),
    };
    let terms = Terms { window: 512, threads: args.common.threads(), kv_dtype: Dtype::F16 };
    let tokens = judged_by(&model, &text, terms.window)?;
    let calibration = args.common.calibration(&model)?;
    let threads = args.common.threads();
    let store = parse_type(&args.common.store).map_err(failed)?;
    let settings =
        Settings { calibration: &calibration, known: None, store, threads, overwrite: true };
    let (mut done, begun) = (0, Instant::now());
    let mut each = |entry: &Entry, of: usize| {
        done += 1;
        let told = match &entry.failed {
            Some(why) => why.clone(),
            None => format!("NLL {:.4}", entry.quality.mean_nll),
        };
        let seconds = begun.elapsed().as_secs();
        eprintln!("{done} of {of} after {seconds} s, {}: {told}", entry.name);
    };
    let how = (terms, args.state.as_deref());
    let entries = survey(&model, &chosen, &tokens, &settings, how, &mut each).map_err(failed)?;
    write_page(args.html.as_deref(), &format!("Compressing {}", short(&model)), &entries)?;
    if args.json { output::json(&entries) } else { print(&entries) }
}

/// What a model is called: its file's or folder's name.
pub(crate) fn short(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

/// Before any work: whether a page can be where it is wanted.
pub(crate) fn check_page(path: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    page::check(path, page::Kind::Html).map_err(|e| usage(format!("--html: {e}")))
}

/// Writes the page, if one is wanted.
pub(crate) fn write_page(
    path: Option<&Path>,
    title: &str,
    entries: &[Entry],
) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let remarks = [
        "Bytes are those of the method's own format; a file may be larger, where GGUF has no such type.",
        "Speeds are those of this machine at that moment, and of the file as it is stored; beside them how many times as fast as the original, both timed in turns.",
    ];
    let html = compare::page(title, entries, &remarks.map(str::to_owned));
    page::write(path, page::Kind::Html, html.as_bytes()).map_err(failed)
}

/// The table.
pub(crate) fn print(entries: &[Entry]) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        ("model", Left),
        ("bytes", Right),
        ("in the file", Right),
        ("in memory", Right),
        ("weights' error", Right),
        ("outputs'", Right),
        ("NLL", Right),
        ("KL", Right),
        ("same token", Right),
        ("prompt tok/s", Right),
        ("answer tok/s", Right),
        ("prompt x", Right),
        ("answer x", Right),
    ]);
    let part = |x: f64| format!("{:.2} %", x * 100.0);
    let dash = || "-".to_owned();
    for e in entries {
        if let Some(why) = &e.failed {
            let mut row = vec![e.name.clone(), format!("failed: {why}")];
            row.resize(13, String::new());
            table.row(row);
            continue;
        }
        table.row([
            e.name.clone(),
            bytes(e.format_bytes),
            bytes(e.file_bytes),
            bytes(e.memory_bytes),
            e.errors.map_or_else(dash, |(w, _)| part(w)),
            e.errors.and_then(|(_, o)| o).map_or_else(dash, part),
            format!("{:.4}", e.quality.mean_nll),
            e.quality.mean_kl.map_or_else(dash, |k| format!("{k:.5}")),
            e.quality.same_top.map_or_else(dash, part),
            format!("{:.0}", e.speed.prefill),
            format!("{:.1}", e.speed.decode),
            e.speed.beside.map_or_else(dash, |[p, _]| format!("{p:.2}")),
            e.speed.beside.map_or_else(dash, |[_, d]| format!("{d:.2}")),
        ]);
    }
    output::write(table)
}
