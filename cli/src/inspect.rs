//! `millrace inspect`: what a model file holds. Reads the directory of the file, never the weights,
//! and also shows files that no engine here can compute with, saying why.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use clap::Args;
use millrace_shared::model::gguf::{Array, Gguf, Value};
use millrace_shared::model::{Description, Dtype, ModelFiles, TensorEntry, TensorType};

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
    /// Path of a GGUF file or of a model's folder, or catalogue name
    #[arg(value_name = "MODEL")]
    model: String,
}

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let path = input::model(&args.model)?;
    let gguf = match Description::open(&path).with_context(|| path.display().to_string())? {
        Description::Gguf(gguf) => *gguf,
        Description::Folder(path) => return folder(&path),
    };
    output::write(format_args!(
        "{}\nGGUF version {}, {}, {} keys, {} tensors\n\n",
        path.display(),
        gguf.version,
        bytes(gguf.file_len),
        gguf.metadata.len(),
        gguf.tensors.len()
    ))?;
    output::write(format_args!("{}\n", metadata_table(&gguf)))?;
    tables(&gguf.tensors)?;
    let files = ModelFiles::of_gguf(gguf, &path).map_err(|e| e.to_string());
    output::write(verdict(files.as_ref()))
}

fn tables(tensors: &[TensorEntry]) -> anyhow::Result<()> {
    output::write(format_args!("{}\n", tensor_table(tensors)))?;
    output::write(format_args!("{}\n", layer_table(tensors)))?;
    output::write(format_args!("{}\n", type_table(tensors)))
}

/// A folder of safetensors files; the names of tensors are GGUF's, as everywhere here.
fn folder(path: &Path) -> anyhow::Result<()> {
    let files = match ModelFiles::open(path) {
        Ok(files) => files,
        Err(e) => return output::write(verdict(Err(&e.to_string()))),
    };
    output::write(format_args!(
        "{}\n{} safetensors file(s), {} of weights, {} tensors\n\n",
        path.display(),
        files.paths.len(),
        bytes(files.weight_bytes()),
        files.tensors.len()
    ))?;
    tables(&files.tensors)?;
    output::write(verdict(Ok(&files)))
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

fn type_table(tensors: &[TensorEntry]) -> Table {
    let mut types: BTreeMap<&str, (Option<TensorType>, usize, u64, u64)> = BTreeMap::new();
    for t in tensors {
        let entry = types.entry(t.dtype.as_str()).or_default();
        entry.0 = t.dtype.computed_as();
        entry.1 += 1;
        entry.2 += t.elements();
        entry.3 += t.bytes;
    }
    let mut table = Table::new(&[
        ("type", Left),
        ("tensors", Right),
        ("elements", Right),
        ("bytes", Right),
        ("engine", Left),
    ]);
    for (name, (computed, count, elements, bytes)) in &types {
        let engine = match computed.map(TensorType::as_str) {
            Some(own) if own == *name => "cpu".to_owned(),
            Some(other) => format!("cpu, as {other}"),
            None => "unsupported".to_owned(),
        };
        table.row([
            (*name).to_owned(),
            count.to_string(),
            elements.to_string(),
            bytes.to_string(),
            engine,
        ]);
    }
    table
}

/// Whether Millrace can serve the model, and what a stage of it takes.
fn verdict(files: Result<&ModelFiles, &String>) -> String {
    let checked = files
        .map_err(String::clone)
        .and_then(|f| f.check_supported_types().map(|()| f).map_err(|e| e.to_string()));
    let files = match checked {
        Ok(files) => files,
        Err(problem) => return format!("Cannot be served: {problem}\n"),
    };
    let c = &files.config;
    let layers: u64 =
        files.tensors.iter().filter(|t| layer_of(&t.name).is_some()).map(|t| t.bytes).sum();
    let kv = |dtype| u64::from(c.layers) * c.kv_bytes_per_position(dtype);
    let window = match &c.features.window {
        Some(window) => format!(", window {}", window.size),
        None => String::new(),
    };
    format!(
        "Can be served, on the CPU engine: family {}, {} layers of width {}, {} heads over {} key-value heads of {}, feed-forward {}, vocabulary {}, context {}{window}.\nMemory: {} a layer, {} for what is in no layer; KV cache of one stream at {} tokens: {} in f16, {} in int8.\n",
        c.family.as_str(),
        c.layers,
        c.hidden,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.ffn,
        c.vocab,
        c.context,
        bytes(layers / u64::from(c.layers)),
        bytes(files.weight_bytes() - layers),
        c.context,
        bytes(kv(Dtype::F16) * u64::from(c.context)),
        bytes(kv(Dtype::Int8) * u64::from(c.context)),
    )
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
