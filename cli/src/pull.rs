//! `millrace pull`: fetch a model, print where it is.

use clap::Args;

use crate::{input, output};

/// Flags of `pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Catalogue name, for example smollm2:135m, or a model of the Hugging Face hub: org/name,
    /// org/name@revision or org/name:file, where file may be a quantisation such as Q4_K_M (a path
    /// is checked and printed)
    #[arg(value_name = "NAME")]
    name: String,
}

pub(crate) fn run(args: &PullArgs) -> anyhow::Result<()> {
    let path = input::pull(&args.name)?;
    output::write(format_args!("{}\n", path.display()))
}
