//! `millrace tokenize`: text to ids, on this machine alone.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use millrace_coordinator::text::TextModel;
use millrace_shared::model::Description;
use serde_json::json;

use crate::output::{self, TextOrJson};
use crate::{input, table};

/// Flags of `tokenize`.
#[derive(Debug, Args)]
pub(crate) struct TokenizeArgs {
    /// Path of a GGUF file or of a model's folder, or catalogue name
    #[arg(long, short, value_name = "MODEL")]
    model: String,
    /// UTF-8 text to tokenise; - reads stdin. Special tokens are parsed, none are added
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    file: PathBuf,
    /// json prints {"ids":[…]}; text prints one token per line
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    output: TextOrJson,
}

pub(crate) fn run(args: &TokenizeArgs) -> anyhow::Result<()> {
    let path = input::model(&args.model)?;
    let text =
        TextModel::of(&Description::open(&path)?).with_context(|| path.display().to_string())?;
    let tokenizer = text.tokenizer;
    let ids = tokenizer.encode(&input::text(&args.file)?, true)?;
    match args.output {
        TextOrJson::Json => output::json(&json!({ "ids": ids })),
        TextOrJson::Text => {
            use table::Align::{Left, Right};
            let mut table = table::Table::new(&[("id", Right), ("bytes", Left)]);
            for id in ids {
                let piece = String::from_utf8_lossy(tokenizer.token_bytes(id));
                table.row([id.to_string(), format!("{piece:?}")]);
            }
            output::write(table)
        }
    }
}
