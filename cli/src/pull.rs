//! `millrace pull`: fetch a model, print where it is.

use clap::Args;

use crate::{input, output};

/// Flags of `pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Catalogue name, for example smollm2:135m (a path is checked and printed)
    #[arg(value_name = "NAME")]
    name: String,
}

pub(crate) fn run(args: &PullArgs) -> anyhow::Result<()> {
    let path = input::model(&args.name)?;
    output::write(format_args!("{}\n", path.display()))
}
