//! `millrace quantize`: a smaller copy of a model file or folder, and what it cost in precision. The work is
//! the engine's; here are flags, the bar and the report.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use millrace_coordinator::models::{ConsoleProgress, NoProgress, Progress};
use millrace_engine::quantize::{
    self, Loss, Options, Plan, QuantizeError, Requantise, Rounding, TYPES, TensorReport,
};
use millrace_engine::target::TargetError;
use millrace_shared::model::TensorType;
use serde::Serialize;

use crate::error::usage;
use crate::eval::nll::{Likelihood, likelihood};
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};
use crate::target::TargetArgs;
use crate::{input, output};

const EXAMPLES: &str = "\
Examples:
  millrace quantize model-f16.gguf model-q8.gguf --type q8_0
      half the bytes; answers hardly change
  millrace quantize model-f16.gguf model-q4.gguf --type q4_1 --eval
      about a third, and the likelihood of a text before and after
  millrace quantize q4.gguf f32.gguf --type f32 --allow-requantize
      exactly the same numbers as floats, for programs that read nothing else

Only matrices get the type: vectors stay F32, and rows that do not divide into the type's blocks of
32 stay as they are. Embedding and output matrix get --output-type, which is q8_0 with four bits: a
four-bit one often picks another token. f16 and bf16 round, and f16 refuses weights above 65504.";

/// Flags of `quantize`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct QuantizeArgs {
    /// Path of a GGUF file or of a folder of safetensors, or catalogue name
    #[arg(value_name = "IN")]
    source: String,
    /// File to write, which llama.cpp reads too; of a folder, the folder to write
    #[arg(value_name = "OUT")]
    target: PathBuf,
    /// Type of matrices: q8_0, q4_0, q4_1, f32, f16 or bf16
    #[arg(long = "type", value_name = "TYPE", value_parser = any_type)]
    to: TensorType,
    /// Type of embedding and output matrix [default: q8_0 with q4_0 and q4_1, else as --type]
    #[arg(long, value_name = "TYPE", value_parser = any_type)]
    output_type: Option<TensorType>,
    /// Also convert matrices that are quantised already; each rounding adds its own loss
    #[arg(long)]
    allow_requantize: bool,
    /// Round q4_0 and q4_1 as the GGUF reference does, without the search for better scales
    #[arg(long)]
    reference: bool,
    /// Replace OUT if it is there
    #[arg(long)]
    force: bool,
    /// Threads [default: the cores this process may use]; they change nothing but the time
    #[arg(long, short = 't', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Also compute the likelihood of a text with both files [FILE: UTF-8, - reads stdin; without
    /// it: a short text of this program's]
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    eval: Option<Option<PathBuf>>,
    /// Show each tensor instead of one line for all layers
    #[arg(long)]
    per_tensor: bool,
    /// Print one JSON object, with every tensor
    #[arg(long)]
    json: bool,
}

fn any_type(s: &str) -> Result<TensorType, String> {
    quantize::parse_type(s, &TYPES)
}

/// What was done.
#[derive(Debug, Serialize)]
struct Report {
    source: PathBuf,
    target: PathBuf,
    #[serde(rename = "type")]
    to: &'static str,
    /// Bytes of all tensors.
    bytes_before: u64,
    bytes_after: u64,
    bits_per_weight_before: f64,
    bits_per_weight_after: f64,
    /// Of all tensors that changed: root of the mean squared error, relative to the weights'.
    relative_rmse: f64,
    max_error: f32,
    seconds: f64,
    /// Likelihoods of the text of `--eval`.
    eval: Option<Eval>,
    tensors: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Eval {
    before: Likelihood,
    after: Likelihood,
}

/// A tensor, or the tensors of all layers with the same place and types.
#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    from: &'static str,
    to: &'static str,
    bytes_before: u64,
    bytes_after: u64,
    relative_rmse: f64,
    max_error: f32,
}

pub(crate) async fn run(args: QuantizeArgs) -> anyhow::Result<()> {
    let source = input::model(&args.source)?;
    let plan = plan(&args, &source)?;
    if !args.force && args.target.exists() {
        return Err(explain(TargetError::Exists(args.target).into()));
    }
    let text = args.eval.as_ref().map(|file| input::text_or_sample(file.as_deref())).transpose()?;
    let begun = Instant::now();
    let tensors = write(&args, &plan)?;
    let seconds = begun.elapsed().as_secs_f64();
    let eval = match text {
        None => None,
        Some(text) => Some(Eval {
            before: evaluate(&source, text.clone()).await?,
            after: evaluate(&args.target, text).await?,
        }),
    };
    let report = report(&args, source, &tensors, seconds, eval);
    if args.json {
        return output::json(&report);
    }
    print(&report, if args.per_tensor { report.tensors.clone() } else { groups(&tensors) })
}

fn plan(args: &QuantizeArgs, source: &Path) -> anyhow::Result<Plan> {
    let options = Options {
        output: args.output_type,
        rounding: if args.reference { Rounding::Reference } else { Rounding::Search },
        requantise: if args.allow_requantize { Requantise::Allow } else { Requantise::Refuse },
        ..Options::new(args.to)
    };
    quantize::plan_of(source, &options)
        .map_err(explain)
        .with_context(|| format!("cannot quantise {}", source.display()))
}

fn write(args: &QuantizeArgs, plan: &Plan) -> anyhow::Result<Vec<TensorReport>> {
    let threads = args
        .threads
        .map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    let mut console = ConsoleProgress::new();
    let progress: &mut dyn Progress =
        if std::io::stderr().is_terminal() { &mut console } else { &mut NoProgress };
    progress.begin(
        &format!("quantising to {}", args.to.as_str().to_ascii_lowercase()),
        Some(plan.source_bytes()),
    );
    let written = plan.write(&args.target, args.force, threads, &mut |done| progress.advance(done));
    progress.end();
    written.map_err(explain)
}

/// What can be said about an error in terms of flags.
fn explain(error: QuantizeError) -> anyhow::Error {
    match error {
        QuantizeError::Target(TargetError::Exists(_)) => {
            usage(format!("{error}: --force replaces it"))
        }
        QuantizeError::Target(TargetError::SameFile(_) | TargetError::Unnamed(_))
        | QuantizeError::Type(_)
        | QuantizeError::Fixed { .. } => usage(error.to_string()),
        QuantizeError::Quantised { .. } => usage(format!(
            "{error}: take the original F32, F16 or BF16 file, or add --allow-requantize and bear both losses"
        )),
        other => other.into(),
    }
}

async fn evaluate(model: &Path, text: String) -> anyhow::Result<Likelihood> {
    let path = model.to_str().context("--eval needs a path of UTF-8")?;
    let result = likelihood(&TargetArgs::of_model(path), text, None).await;
    result.with_context(|| format!("--eval with {path}"))
}

fn report(
    args: &QuantizeArgs,
    source: PathBuf,
    tensors: &[TensorReport],
    seconds: f64,
    eval: Option<Eval>,
) -> Report {
    let sum = |of: fn(&TensorReport) -> u64| tensors.iter().map(of).sum::<u64>();
    let (before, after) = (sum(|t| t.bytes_before), sum(|t| t.bytes_after));
    let weights = sum(|t| t.elements) as f64;
    let loss = tensors.iter().fold(Loss::default(), |l, t| l.plus(t.loss));
    Report {
        source,
        target: args.target.clone(),
        to: args.to.as_str(),
        bytes_before: before,
        bytes_after: after,
        bits_per_weight_before: before as f64 * 8.0 / weights,
        bits_per_weight_after: after as f64 * 8.0 / weights,
        relative_rmse: loss.relative_rmse(),
        max_error: loss.max_error,
        seconds,
        eval,
        tensors: tensors.iter().map(|t| row(t.name.clone(), t, t.loss)).collect(),
    }
}

fn row(name: String, t: &TensorReport, loss: Loss) -> Row {
    Row {
        name,
        from: t.from.as_str(),
        to: t.to.as_str(),
        bytes_before: t.bytes_before,
        bytes_after: t.bytes_after,
        relative_rmse: loss.relative_rmse(),
        max_error: loss.max_error,
    }
}

/// One row for the tensors of all layers with the same place and types, in file order.
fn groups(tensors: &[TensorReport]) -> Vec<Row> {
    let mut index = BTreeMap::new();
    let mut groups: Vec<(Row, Loss, usize)> = Vec::new();
    for t in tensors {
        let name = group_name(&t.name);
        let at =
            *index.entry((name.clone(), t.from.as_str(), t.to.as_str())).or_insert_with(|| {
                let empty =
                    Row { bytes_before: 0, bytes_after: 0, ..row(name, t, Loss::default()) };
                groups.push((empty, Loss::default(), 0));
                groups.len() - 1
            });
        let (row, loss, count) = &mut groups[at];
        row.bytes_before += t.bytes_before;
        row.bytes_after += t.bytes_after;
        *loss = loss.plus(t.loss);
        *count += 1;
    }
    let finish = |(row, loss, count): (Row, Loss, usize)| Row {
        name: if count > 1 { format!("{} ({count})", row.name) } else { row.name },
        relative_rmse: loss.relative_rmse(),
        max_error: loss.max_error,
        ..row
    };
    groups.into_iter().map(finish).collect()
}

/// `blk.7.ffn_up.weight` as `blk.*.ffn_up.weight`; escaped, since files are not to drive the
/// terminal.
fn group_name(name: &str) -> String {
    let name: String = name.chars().take(80).flat_map(char::escape_debug).collect();
    match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) if layer.bytes().all(|b| b.is_ascii_digit()) => format!("blk.*.{rest}"),
        _ => name,
    }
}

fn print(report: &Report, rows: Vec<Row>) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        ("tensor", Left),
        ("from", Left),
        ("to", Left),
        ("before", Right),
        ("after", Right),
        ("rmse", Right),
        ("max error", Right),
    ]);
    for r in rows {
        let copied = r.from == r.to;
        let figure = |text: String| if copied { "-".to_owned() } else { text };
        table.row([
            r.name.escape_debug().to_string(),
            r.from.to_owned(),
            r.to.to_owned(),
            bytes(r.bytes_before),
            bytes(r.bytes_after),
            figure(format!("{:.3} %", r.relative_rmse * 100.0)),
            figure(format!("{:.2e}", r.max_error)),
        ]);
    }
    output::write(table)?;
    output::write(format_args!(
        "\n{} -> {}, {:.2} -> {:.2} bits per weight; rmse {:.3} % of the weights' rms; {:.2} s\n",
        bytes(report.bytes_before),
        bytes(report.bytes_after),
        report.bits_per_weight_before,
        report.bits_per_weight_after,
        report.relative_rmse * 100.0,
        report.seconds
    ))?;
    if let Some(Eval { before, after }) = &report.eval {
        output::write(format_args!(
            "eval nll: {:.6} -> {:.6} nats per token ({} tokens), perplexity {:.4} -> {:.4}\n",
            before.mean_nll, after.mean_nll, after.tokens, before.perplexity, after.perplexity
        ))?;
    }
    output::write(format_args!("{}\n", report.target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_one_row() {
        let tensor = |name: &str, error: f64| TensorReport {
            name: name.to_owned(),
            from: TensorType::F32,
            to: TensorType::Q8_0,
            elements: 32,
            bytes_before: 128,
            bytes_after: 34,
            loss: Loss { squares: 100.0, squared_error: error, max_error: error as f32 },
        };
        let all = [
            tensor("token_embd.weight", 1.0),
            tensor("blk.0.a.weight", 1.0),
            tensor("blk.11.a.weight", 7.0),
            tensor("blk.x.a.weight", 0.0),
        ];
        let rows = groups(&all);
        let names: Vec<&str> = rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["token_embd.weight", "blk.*.a.weight (2)", "blk.x.a.weight"]);
        assert_eq!((rows[1].bytes_before, rows[1].bytes_after), (256, 68));
        assert!((rows[1].relative_rmse - 0.2).abs() < 1e-9);
        assert!((rows[1].max_error - 7.0).abs() < 1e-6);
    }
}
