//! `millrace compress`: models made smaller, and what that costs. The work is millrace-compress's; here
//! are flags, tokenizers, bars and tables.

mod apply;
mod run;
mod table;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use millrace_compress::recipe::CALIBRATION_TOKENS;
use millrace_compress::{CALIBRATION_WINDOW, CompressError, StepReport, texts};
use millrace_coordinator::models::{ConsoleProgress, Progress as _};
use millrace_coordinator::text::TextModel;
use millrace_engine::target::TargetError;
use millrace_shared::model::{Description, ModelFiles};

pub(crate) use table::{check_page, print as print_entries, short, write_page};

use crate::error::usage;
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};
use crate::{input, output};

const STEPS: &str = "\
STEP is a line of TOML, as in a recipe's [[step]]:
  method = \"quantise\", type = \"q4_k\"            also q8_0 q6_k q5_0 q4_1 q4_0 f32 f16 bf16;
                                               importance = true or gptq = true; output = \"q6_k\"
  method = \"mixed\", bytes = 90000000            a type for each matrix, within a budget
  method = \"int8\"                              per = \"row\" or \"tensor\", affine = true
  method = \"fixed-point\", bits = 8, fraction_bits = 6      saturating; wrap = true is modulo 2^bits,
                                               modulo = 251 modulo that
  method = \"binary\"                            signs; per = \"row\" or \"tensor\" shares a magnitude
  method = \"magnitude\", sparsity = 0.5          or threshold = 0.05; pattern = \"tensor\" \"row\" \"2:4\"
                                               \"block\" or \"tile\", which the engine passes over;
                                               global = true
  method = \"signed-threshold\", theta = 0.0      w I(w > theta), as it reads
  method = \"clip\", min = -0.5, max = 0.5
  method = \"random\", sparsity = 0.5, seed = 1   the baseline; patterns as for magnitude
  method = \"wanda\", sparsity = 0.5              patterns as for magnitude; of a row, if none is said
  method = \"sparsegpt\", sparsity = 0.5          pattern = \"row\" or \"2:4\"
  method = \"low-rank\", size = 0.5               of the weights; or rank = 128, energy = 0.9, or
                                               bytes = 90000000 for all tensors; aware = true
  method = \"drop-layers\", count = 2             those of least influence
  method = \"merge-layers\", count = 2            pairs of neighbours
  method = \"keep-layers\", layers = [0, 1, 5]
  method = \"drop-heads\", count = 1              KV heads of each layer, with their query heads
  method = \"drop-channels\", fraction = 0.1
  method = \"width\", hidden = 512
  method = \"storage\"                           leaves zeros out of the file, in the smallest form;
                                               form = \"csr\" \"bitmask\" \"tiles\" or \"dense\"

For example, in a shell (TOML takes text in either kind of quotes):
  millrace compress apply model.gguf small.gguf \"method = 'quantise', type = 'q4_k', gptq = true\"

Methods without a GGUF type of their own are written as if: the file holds the values that such a
format would give, as f16 (--store) or q8_0, and is larger than the format; the report tells both.";

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum CompressCommand {
    /// Carry one step out
    #[command(after_help = STEPS)]
    Apply(apply::ApplyArgs),
    /// Carry a recipe (TOML) out, or go on with it; write model, report and plan
    #[command(after_help = STEPS)]
    Run(run::RunArgs),
    /// Try every method at two settings and print one table
    Table(table::TableArgs),
}

pub(crate) fn run(command: CompressCommand) -> anyhow::Result<()> {
    match command {
        CompressCommand::Apply(args) => apply::run(&args),
        CompressCommand::Run(args) => run::run(&args),
        CompressCommand::Table(args) => table::run(&args),
    }
}

/// Flags that all have.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// UTF-8 text like what the model will read [default: one of this program's]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Most tokens of it that are read
    #[arg(long, value_name = "TOKENS", default_value_t = CALIBRATION_TOKENS)]
    calibration_tokens: usize,
    /// Type of values that have no format of their own: f16, f32 or q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    store: String,
    /// Threads [default: the cores this process may use]; they change nothing but the time
    #[arg(long, short = 't', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Common {
    fn threads(&self) -> usize {
        threads(self.threads)
    }

    /// Token ids of the calibration text.
    fn calibration(&self, model: &Path) -> anyhow::Result<Vec<u32>> {
        let text = match &self.calibration {
            Some(path) => input::text(path)?,
            None => texts::CALIBRATION.to_owned(),
        };
        calibrating(model, &text, self.calibration_tokens)
    }
}

pub(crate) fn threads(given: Option<u16>) -> usize {
    given.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from)
}

/// Token ids of a text, by the model's own tokenizer, for windows of so many positions: each begins as
/// prompts of that model do. A model with less context has smaller windows.
fn tokenize(model: &Path, text: &str, window: usize) -> anyhow::Result<Vec<u32>> {
    let window = window.min(ModelFiles::open(model)?.config.context as usize);
    let told = || model.display().to_string();
    let tokenizer = TextModel::of(&Description::open(model)?).with_context(told)?.tokenizer;
    let ids = tokenizer.encode(text, true)?;
    let bos = tokenizer.bos_id().filter(|_| tokenizer.adds_bos());
    Ok(windows(ids, bos, window))
}

/// With `bos` at the beginning of each window.
fn windows(ids: Vec<u32>, bos: Option<u32>, window: usize) -> Vec<u32> {
    let Some(bos) = bos else { return ids };
    let rest = ids.strip_prefix(&[bos]).unwrap_or(&ids);
    let parts = rest.chunks(window.max(2) - 1);
    parts.flat_map(|part| std::iter::once(bos).chain(part.iter().copied())).collect()
}

/// Token ids of a text to judge by, for windows of so many positions.
pub(crate) fn judged_by(model: &Path, text: &str, window: usize) -> anyhow::Result<Vec<u32>> {
    let ids = tokenize(model, text, window)?;
    match ids.len() {
        0..=2 => Err(usage("the text to judge by has hardly a token: give a longer one")),
        _ => Ok(ids),
    }
}

/// Token ids of a calibration text, of which so many are read at most.
fn calibrating(model: &Path, text: &str, most: usize) -> anyhow::Result<Vec<u32>> {
    let mut ids = tokenize(model, text, CALIBRATION_WINDOW)?;
    ids.truncate(most);
    Ok(ids)
}

/// What no other try can mend exits as wrong usage.
pub(crate) fn failed(error: CompressError) -> anyhow::Error {
    match error {
        CompressError::Target(TargetError::Exists(_)) => {
            usage(format!("{error}: --force replaces it"))
        }
        CompressError::Target(TargetError::SameFile(_) | TargetError::Unnamed(_))
        | CompressError::Settings(_) => usage(error.to_string()),
        other => other.into(),
    }
}

/// A bar for one piece of work after another.
#[derive(Default)]
pub(crate) struct Bar(ConsoleProgress);

impl Bar {
    fn begin(&mut self, what: &str, total: u64) {
        self.0.begin(what, Some(total));
    }

    fn advance(&mut self, done: u64) {
        self.0.advance(done);
    }

    /// A model is read and timed: it takes as long as it takes.
    pub(crate) fn judging(&mut self, name: &str) {
        self.0.begin(&format!("judging {name}"), None);
    }

    pub(crate) fn end(&mut self) {
        self.0.end();
    }
}

impl millrace_compress::recipe::Progress for Bar {
    fn begin(&mut self, step: usize, of: usize, what: &str, bytes: u64) {
        self.0.begin(&format!("step {step} of {of}: {what}"), Some(bytes));
    }

    fn advance(&mut self, done: u64) {
        self.0.advance(done);
    }
}

/// What a step did, one line for like matrices of all layers.
fn print(report: &StepReport) -> anyhow::Result<()> {
    let mut groups: Vec<(String, Vec<&millrace_compress::TensorReport>)> = Vec::new();
    for t in &report.tensors {
        let place = t.name.splitn(3, '.').nth(2).filter(|_| t.name.starts_with("blk."));
        let key = format!("{} {}", place.unwrap_or(&t.name), t.to);
        match groups.iter_mut().find(|g| g.0 == key) {
            Some(group) => group.1.push(t),
            None => groups.push((key, vec![t])),
        }
    }
    let mut table = Table::new(&[
        ("tensors", Left),
        ("number", Right),
        ("from", Left),
        ("to", Left),
        ("in the file", Right),
        ("in its format", Right),
        ("error", Right),
        ("of outputs", Right),
        ("zeros", Right),
    ]);
    for (_, all) in &groups {
        let first = all[0];
        let one = StepReport {
            tensors: all.iter().map(|t| (*t).clone()).collect(),
            ..StepReport::default()
        };
        let place = first.name.splitn(3, '.').nth(2).filter(|_| first.name.starts_with("blk."));
        table.row([
            place.unwrap_or(&first.name).to_owned(),
            all.len().to_string(),
            first.from.clone(),
            first.to.clone(),
            bytes(all.iter().map(|t| t.bytes_stored).sum()),
            bytes(all.iter().map(|t| t.bytes_format).sum()),
            percent(one.error()),
            one.output_error().map_or_else(|| "-".to_owned(), percent),
            percent(one.sparsity()),
        ]);
    }
    output::write(format_args!("{}\n", report.step))?;
    if !groups.is_empty() {
        output::write(table)?;
    }
    output::write(format_args!(
        "all tensors: {} before, {} in the file, {} in the method's own format\n",
        bytes(report.bytes_before),
        bytes(report.bytes_stored),
        bytes(report.bytes_format)
    ))?;
    report.notes.iter().try_for_each(|note| output::write(format_args!("note: {note}\n")))
}

fn percent(part: f64) -> String {
    format!("{:.2} %", part * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_begin_as_prompts_do() {
        assert_eq!(windows(vec![5, 6, 7], None, 2), [5, 6, 7]);
        assert_eq!(windows(vec![5, 6, 7, 8], Some(1), 3), [1, 5, 6, 1, 7, 8]);
        // Texts that begin so already do it once.
        assert_eq!(windows(vec![1, 5, 6, 7], Some(1), 4), [1, 5, 6, 7]);
        assert_eq!(windows(Vec::new(), Some(1), 4), [0u32; 0]);
    }
}
