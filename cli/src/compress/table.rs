//! `millrace compress table`: every method at two settings, on one model.

use std::path::PathBuf;

use clap::Args;
use millrace_compress::compare::{Entry, Terms, page};
use millrace_compress::survey::{survey, variants};
use millrace_compress::{Settings, parse_type, texts};
use millrace_shared::model::Dtype;

use super::{Common, failed, tokenize};
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
    /// Print one JSON list
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &TableArgs) -> anyhow::Result<()> {
    let chosen = variants(args.only.as_deref()).map_err(failed)?;
    let model = input::model(&args.model)?;
    let text = match &args.file {
        Some(path) => input::text(path)?,
        None => texts::HELD_OUT.to_owned(),
    };
    let tokens = tokenize(&model, &text)?;
    let calibration = args.common.calibration(&model)?;
    let threads = args.common.threads();
    let store = parse_type(&args.common.store).map_err(failed)?;
    let settings = Settings { calibration: &calibration, store, threads, overwrite: true };
    let terms = Terms { window: 512, threads, kv_dtype: Dtype::F16 };
    let mut each = |entry: &Entry| {
        let told = match &entry.failed {
            Some(why) => why.clone(),
            None => format!("NLL {:.4}", entry.quality.mean_nll),
        };
        eprintln!("{}: {told}", entry.name);
    };
    let entries = survey(&model, &chosen, &tokens, &settings, terms, &mut each).map_err(failed)?;
    write_page(args.html.as_deref(), &format!("Compressing {}", args.model), &entries)?;
    if args.json { output::json(&entries) } else { print(&entries) }
}

/// Writes the page, if one is wanted.
pub(crate) fn write_page(
    path: Option<&std::path::Path>,
    title: &str,
    entries: &[Entry],
) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let remarks = [
        "Bytes are those of the method's own format; a file may be larger, where GGUF has no such type.",
        "Speeds are those of this machine at that moment, and of the file as it is stored.",
    ];
    std::fs::write(path, page(title, entries, &remarks.map(str::to_owned)))
        .map_err(|e| crate::error::usage(format!("cannot write {}: {e}", path.display())))
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
    ]);
    let part = |x: f64| format!("{:.2} %", x * 100.0);
    let dash = || "-".to_owned();
    for e in entries {
        if let Some(why) = &e.failed {
            let mut row = vec![e.name.clone(), format!("failed: {why}")];
            row.resize(11, String::new());
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
        ]);
    }
    output::write(table)
}
