//! `millrace list` and `millrace rm`: the models on this machine, and those that can be fetched.

use std::time::SystemTime;

use clap::Args;
use millrace_coordinator::models::{self, CATALOGUE, CatalogueEntry, KeptModel, Place};
use millrace_engine::cache::Cache;
use millrace_node::hardware::Hardware;
use millrace_shared::model::gguf::Value;
use millrace_shared::model::{Description, ModelFiles};
use serde::Serialize;

use crate::error::usage;
use crate::input::{self, ago};
use crate::output::{self, TableOrJson};
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};

/// What serving takes beside the weights, as a share of them, and in any case: a short KV cache, a
/// step's values, the program.
const BESIDE_SHARE: f64 = 0.15;
const BESIDE_BYTES: f64 = 300e6;

/// Flags of `list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// A table for people, or one JSON object
    #[arg(long, short, default_value = "table")]
    output: TableOrJson,
}

/// Flags of `rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// As 'millrace list' names it
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

#[derive(Serialize)]
struct List {
    models: Vec<Row>,
    catalogue: Vec<Offer>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    /// What is wrong with it, if its files cannot be read.
    problem: Option<String>,
    family: Option<&'static str>,
    parameters: Option<u64>,
    #[serde(rename = "type")]
    dtype: Option<&'static str>,
    bytes: u64,
    last_used_seconds_ago: u64,
    in_use: bool,
    place: &'static str,
    path: String,
}

impl Row {
    fn new(model: &KeptModel) -> Self {
        let files = ModelFiles::open(&model.path);
        let age = SystemTime::now().duration_since(model.last_used).unwrap_or_default();
        let files_ref = files.as_ref().ok();
        Self {
            name: model.name.clone(),
            problem: files.as_ref().err().map(ToString::to_string),
            family: files_ref.map(|f| f.config.family.as_str()),
            parameters: files_ref.map(|f| f.tensors.iter().map(|t| t.elements()).sum()),
            dtype: files_ref.map(main_type),
            bytes: model.bytes,
            last_used_seconds_ago: age.as_secs(),
            in_use: model.in_use,
            place: match model.place {
                Place::Cache => "cache",
                Place::HuggingFace => "huggingface",
            },
            path: model.path.display().to_string(),
        }
    }
}

/// What llama.cpp's mixtures of types are called, by `general.file_type`.
const MIXTURES: [(u64, &str); 13] = [
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (21, "Q2_K_S"),
    (25, "IQ4_NL"),
    (30, "IQ4_XS"),
    (38, "MXFP4"),
];

/// What the file calls its mixture of types, else the type of most weights.
fn main_type(files: &ModelFiles) -> &'static str {
    if let Description::Gguf(gguf) = &files.description {
        let stated = gguf.metadata.get("general.file_type").and_then(Value::as_u64);
        let mixture = MIXTURES.iter().find(|(number, _)| Some(*number) == stated);
        if let Some((_, name)) = mixture {
            return name;
        }
    }
    let mut sums = std::collections::BTreeMap::<&'static str, u64>::new();
    for tensor in &files.tensors {
        *sums.entry(tensor.dtype.as_str()).or_default() += tensor.elements();
    }
    sums.into_iter().max_by_key(|&(_, n)| n).map_or("-", |(name, _)| name)
}

#[derive(Serialize)]
struct Offer {
    name: &'static str,
    description: &'static str,
    parameters: &'static str,
    licence: &'static str,
    bytes: u64,
    sha256: &'static str,
    needs_bytes: u64,
    runs_here: bool,
}

impl Offer {
    fn new(entry: &CatalogueEntry, memory: u64) -> Self {
        let needs = entry.bytes as f64 * (1.0 + BESIDE_SHARE) + BESIDE_BYTES;
        Self {
            name: entry.name,
            description: entry.description,
            parameters: entry.parameters,
            licence: entry.licence,
            bytes: entry.bytes,
            sha256: entry.sha256,
            needs_bytes: needs as u64,
            runs_here: needs <= memory as f64,
        }
    }
}

pub(crate) fn list(args: &ListArgs) -> anyhow::Result<()> {
    let kept = models::kept().map_err(input::failed)?;
    let memory = Hardware::probe().memory_bytes;
    let here = |e: &&CatalogueEntry| !kept.iter().any(|m| m.name == e.name);
    let list = List {
        models: kept.iter().map(Row::new).collect(),
        catalogue: CATALOGUE.iter().filter(here).map(|e| Offer::new(e, memory)).collect(),
    };
    match args.output {
        TableOrJson::Json => output::json(&list),
        TableOrJson::Table => tables(&list, memory),
    }
}

fn tables(list: &List, memory: u64) -> anyhow::Result<()> {
    if list.models.is_empty() {
        output::write("No models on this machine yet.\n")?;
    } else {
        output::write(kept_table(&list.models))?;
    }
    if list.catalogue.is_empty() {
        return Ok(());
    }
    output::write(format_args!(
        "\nTo be had by 'millrace pull NAME', or run at once; of memory, {} are free:\n\n{}",
        bytes(memory),
        offer_table(&list.catalogue)
    ))?;
    output::write("\nAny other model of the Hugging Face hub: org/name[:file].\n")
}

fn kept_table(models: &[Row]) -> Table {
    let mut table = Table::new(&[
        ("name", Left),
        ("family", Left),
        ("params", Right),
        ("type", Left),
        ("size", Right),
        ("last used", Left),
        ("where", Left),
    ]);
    for row in models {
        let age = std::time::Duration::from_secs(row.last_used_seconds_ago);
        table.row([
            row.name.clone(),
            row.family.unwrap_or("unusable").to_owned(),
            row.parameters.map_or_else(|| "-".to_owned(), count),
            row.dtype.unwrap_or("-").to_owned(),
            bytes(row.bytes),
            if row.in_use { "in use".to_owned() } else { ago(age) },
            if row.place == "cache" { "cache" } else { "HF cache" }.to_owned(),
        ]);
    }
    table
}

fn offer_table(offers: &[Offer]) -> Table {
    let mut table = Table::new(&[
        ("name", Left),
        ("params", Right),
        ("size", Right),
        ("licence", Left),
        ("runs here", Left),
    ]);
    for offer in offers {
        let runs = match offer.runs_here {
            true => "yes".to_owned(),
            false => format!("no, needs about {}", bytes(offer.needs_bytes)),
        };
        table.row([
            offer.name.to_owned(),
            offer.parameters.to_owned(),
            bytes(offer.bytes),
            offer.licence.to_owned(),
            runs,
        ]);
    }
    table
}

/// Parameters as people say them: 135M, 7.6B.
fn count(n: u64) -> String {
    let n = n as f64;
    match n {
        n if n < 1e6 => format!("{:.0}K", n / 1e3),
        n if n < 999.5e6 => format!("{:.0}M", n / 1e6),
        n => format!("{:.1}B", n / 1e9),
    }
}

pub(crate) fn remove(args: &RmArgs) -> anyhow::Result<()> {
    let kept = models::kept().map_err(input::failed)?;
    let cache = Cache::new(&models::cache_dir().map_err(input::failed)?);
    let mut chosen: Vec<&KeptModel> = Vec::new();
    for name in &args.names {
        let model = only(&kept, name)?;
        if model.place == Place::HuggingFace {
            return Err(usage(format!(
                "{} belongs to Hugging Face's own tools: remove it with 'hf cache rm', or delete {}",
                model.name,
                model.path.display()
            )));
        }
        chosen.push(model);
    }
    for model in chosen {
        let gone = cache.remove(&model.files);
        if gone.is_empty() {
            return Err(anyhow::anyhow!(
                "{} is in use by a running process: stop that first",
                model.name
            ));
        }
        let freed: u64 = gone.iter().map(|t| t.bytes).sum();
        output::write(format_args!("removed {}, {} are free again\n", model.name, bytes(freed)))?;
    }
    Ok(())
}

/// The one model that a name means.
fn only<'a>(kept: &'a [KeptModel], name: &str) -> anyhow::Result<&'a KeptModel> {
    match models::named(kept, name).as_slice() {
        [one] => Ok(one),
        [] => Err(usage(format!("there is no model '{name}' here; 'millrace list' shows all"))),
        many => {
            let names: Vec<&str> = many.iter().map(|m| m.name.as_str()).collect();
            Err(usage(format!("'{name}' may be {}: name one", names.join(" or "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_as_people_say_them() {
        assert_eq!(count(134_515_008), "135M");
        assert_eq!(count(7_615_616_512), "7.6B");
        assert_eq!(count(999_900_000), "1.0B");
        assert_eq!(count(12_000), "12K");
    }

    #[test]
    fn what_fits() {
        let entry = &CATALOGUE[0];
        assert!(Offer::new(entry, 1 << 30).runs_here);
        assert!(!Offer::new(entry, 100 << 20).runs_here);
    }
}
