//! `millrace compress apply`: one step.

use std::path::PathBuf;

use clap::Args;
use millrace_compress::{Needs, Settings, Source, Step, apply, parse_type};

use super::{Bar, Common, failed, print};
use crate::{input, output};

/// Flags of `compress apply`.
#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Path of a GGUF file or of a folder of safetensors, or catalogue name
    #[arg(value_name = "IN")]
    source: String,
    /// File to write; of a folder, the folder to write
    #[arg(value_name = "OUT")]
    target: PathBuf,
    /// What to do
    #[arg(value_name = "STEP")]
    step: String,
    /// Replace OUT if it is there
    #[arg(long)]
    force: bool,
    /// Print one JSON object, with every tensor
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &ApplyArgs) -> anyhow::Result<()> {
    let step = Step::parse(&args.step).map_err(failed)?;
    let store = parse_type(&args.common.store).map_err(failed)?;
    let model = input::model(&args.source)?;
    let calibration = match step.needs() {
        Needs::Nothing => Vec::new(),
        _ => args.common.calibration(&model)?,
    };
    let source = Source::open(&model).map_err(failed)?;
    let settings = Settings {
        calibration: &calibration,
        known: None,
        store,
        threads: args.common.threads(),
        overwrite: args.force,
    };
    let mut bar = Bar::default();
    bar.begin(&step.describe(), source.weight_bytes() * step.passes());
    let done = apply(&source, &args.target, &step, &settings, &mut |b| bar.advance(b));
    bar.end();
    let report = done.map_err(failed)?;
    if args.json { output::json(&report) } else { print(&report) }
}
