//! `millrace inspect`: what a model holds, whether it runs, on what, and the memory that takes. Reads
//! directories, never weights; of a model that is not on this machine only these are fetched. Also
//! shows files that no engine here can compute with, saying why.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use clap::Args;
use millrace_coordinator::models;
use millrace_shared::model::gguf::{Array, Gguf, Value};
use millrace_shared::model::{Description, ModelFiles, TensorEntry};

use crate::error::usage;
use crate::inspect_report::{Load, Report, Subject};
use crate::output::TableOrJson;
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};
use crate::{input, output};

/// Characters of a metadata string that are shown.
const MAX_STRING_CHARS: usize = 72;
/// Elements of a metadata array that are shown.
const MAX_ARRAY_ITEMS: usize = 6;

/// Flags of `inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Path of a GGUF file or of a model's folder, catalogue name, or org/name:file of the hub; of
    /// what is not on this machine only the directory is fetched
    #[arg(value_name = "MODEL")]
    model: String,
    /// Tokens of a stream, for the memory [default: the model's context, at most 4096]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Streams at once, for the memory
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    concurrency: u32,
    /// Only what it is, whether it runs and the memory, without lists of keys and tensors
    #[arg(long, short)]
    brief: bool,
    /// Tables for people, or one JSON object
    #[arg(long, short, default_value = "table")]
    output: TableOrJson,
}

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    match models::on_this_machine(&args.model).map_err(input::failed)? {
        Some(path) => here(args, &path),
        None => {
            let files = input::header(&args.model)?;
            let (description, tensors) = (Some(&files.description), &files.tensors[..]);
            show_all(
                args,
                &Subject {
                    model: &args.model,
                    path: None,
                    description,
                    tensors,
                    files: Ok(&files),
                },
            )
        }
    }
}

/// A model on this machine, which may be unusable.
fn here(args: &InspectArgs, path: &Path) -> anyhow::Result<()> {
    let description = Description::open(path).with_context(|| path.display().to_string())?;
    let files = ModelFiles::open(path).map_err(|e| e.to_string());
    let tensors = match &description {
        Description::Gguf(gguf) => &gguf.tensors[..],
        Description::Folder(_) => &[],
    };
    show_all(
        args,
        &Subject {
            model: &args.model,
            path: Some(path.display().to_string()),
            description: Some(&description),
            tensors,
            files: files.as_ref().map_err(String::clone),
        },
    )
}

fn show_all(args: &InspectArgs, subject: &Subject<'_>) -> anyhow::Result<()> {
    if let (Some(context), Ok(files)) = (args.context, &subject.files)
        && context > files.config.context
    {
        return Err(usage(format!(
            "--context {context}: the model was made for at most {} tokens",
            files.config.context
        )));
    }
    let load = Load { context: args.context, concurrency: args.concurrency };
    let report = Report::new(subject, load);
    if args.output == TableOrJson::Json {
        return output::json(&report);
    }
    let name = subject.path.as_deref().unwrap_or(subject.model);
    match subject.description {
        Some(Description::Gguf(gguf)) => output::write(format_args!(
            "{name}\nGGUF version {}, {}, {} keys, {} tensors\n\n",
            gguf.version,
            bytes(gguf.file_len),
            gguf.metadata.len(),
            gguf.tensors.len()
        ))?,
        _ => {
            let (count, weights, tensors) = subject
                .files
                .as_ref()
                .map_or((0, 0, 0), |f| (f.paths.len(), f.weight_bytes(), f.tensors.len()));
            output::write(format_args!(
                "{name}\n{count} safetensors file(s), {} of weights, {tensors} tensors\n\n",
                bytes(weights)
            ))?;
        }
    }
    if !args.brief {
        if let Some(Description::Gguf(gguf)) = subject.description {
            output::write(format_args!("{}\n", metadata_table(gguf)))?;
        }
        let own = || subject.files.as_ref().map_or(subject.tensors, |f| &f.tensors);
        let listed = if subject.tensors.is_empty() { own() } else { subject.tensors };
        output::write(format_args!("{}\n", tensor_table(listed)))?;
        output::write(format_args!("{}\n", layer_table(listed)))?;
    }
    output::write(format_args!("{}\n", report.type_table()))?;
    output::write(report.summary())
}

fn metadata_table(gguf: &Gguf) -> Table {
    let mut table = Table::new(&[("key", Left), ("type", Left), ("value", Left)]);
    for (key, value) in gguf.metadata.iter() {
        table.row([clip(key), value.type_name(), show(value)]);
    }
    table
}

fn tensor_table(tensors: &[TensorEntry]) -> Table {
    let mut table =
        Table::new(&[("tensor", Left), ("type", Left), ("shape", Left), ("bytes", Right)]);
    for t in tensors {
        let dims: Vec<String> = t.dims.iter().map(u64::to_string).collect();
        table.row([
            clip(&t.name),
            t.dtype.as_str().to_owned(),
            dims.join(" x "),
            t.bytes.to_string(),
        ]);
    }
    table
}

/// Bytes per layer; what belongs to no layer is in a row of its own.
fn layer_table(tensors: &[TensorEntry]) -> Table {
    let mut layers: BTreeMap<u32, (usize, u64)> = BTreeMap::new();
    let mut others: Vec<&TensorEntry> = Vec::new();
    for t in tensors {
        match layer_of(&t.name) {
            Some(layer) => {
                let entry = layers.entry(layer).or_default();
                entry.0 += 1;
                entry.1 += t.bytes;
            }
            None => others.push(t),
        }
    }
    let mut table = Table::new(&[("layer", Right), ("tensors", Right), ("bytes", Right)]);
    for (layer, (count, bytes)) in &layers {
        table.row([layer.to_string(), count.to_string(), bytes.to_string()]);
    }
    let rest: u64 = others.iter().map(|t| t.bytes).sum();
    table.row(["none".to_owned(), others.len().to_string(), rest.to_string()]);
    let all: u64 = tensors.iter().map(|t| t.bytes).sum();
    table.row(["all".to_owned(), tensors.len().to_string(), all.to_string()]);
    table
}

fn layer_of(name: &str) -> Option<u32> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// At most [`MAX_STRING_CHARS`], control characters escaped: files are not to drive the terminal.
fn clip(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars().take(MAX_STRING_CHARS) {
        if c.is_control() {
            shown.extend(c.escape_debug());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(MAX_STRING_CHARS).is_some() {
        shown.push_str(&format!("… ({} bytes)", text.len()));
    }
    shown
}

fn show(value: &Value) -> String {
    match value {
        Value::U8(v) => v.to_string(),
        Value::I8(v) => v.to_string(),
        Value::U16(v) => v.to_string(),
        Value::I16(v) => v.to_string(),
        Value::U32(v) => v.to_string(),
        Value::I32(v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        Value::Str(v) => clip(v),
        Value::Array(v) => show_array(v),
        Value::U64(v) => v.to_string(),
        Value::I64(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
    }
}

fn show_array(array: &Array) -> String {
    fn first<T>(items: &[T], show: impl Fn(&T) -> String) -> Vec<String> {
        items.iter().take(MAX_ARRAY_ITEMS).map(show).collect()
    }
    let mut items = match array {
        Array::U8(v) => first(v, u8::to_string),
        Array::I8(v) => first(v, i8::to_string),
        Array::U16(v) => first(v, u16::to_string),
        Array::I16(v) => first(v, i16::to_string),
        Array::U32(v) => first(v, u32::to_string),
        Array::I32(v) => first(v, i32::to_string),
        Array::F32(v) => first(v, f32::to_string),
        Array::Bool(v) => first(v, bool::to_string),
        Array::Str(v) => first(v, |s| format!("\"{}\"", clip(s))),
        Array::Nested(v) => first(v, |a| format!("[{} items]", a.len())),
        Array::U64(v) => first(v, u64::to_string),
        Array::I64(v) => first(v, i64::to_string),
        Array::F64(v) => first(v, f64::to_string),
    };
    if array.len() > items.len() {
        items.push(format!("… {} in all", array.len()));
    }
    format!("[{}]", items.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_are_abbreviated_and_escaped() {
        assert_eq!(show(&Value::from("a\x1b[2J\nb")), "a\\u{1b}[2J\\nb");
        assert!(show(&Value::from("x".repeat(500).as_str())).ends_with("… (500 bytes)"));
        assert_eq!(show(&Value::from(vec![1u32; 3])), "[1, 1, 1]");
        assert_eq!(show(&Value::from(vec![0i32; 9])), "[0, 0, 0, 0, 0, 0, … 9 in all]");
    }

    #[test]
    fn layers_of_tensors() {
        assert_eq!(layer_of("blk.12.attn_q.weight"), Some(12));
        assert_eq!(layer_of("token_embd.weight"), None);
    }
}
