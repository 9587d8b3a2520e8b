//! What `millrace inspect` says of a model: whether it runs, on what, and the memory that takes.

use std::collections::BTreeMap;

use millrace_coordinator::plan::costs::ModelParts;
use millrace_node::hardware::Hardware;
use millrace_shared::model::gguf::Value;
use millrace_shared::model::{
    Description, Dtype, ModelFiles, StageTensors, TensorEntry, TensorType,
};
use millrace_shared::options::DEFAULT_PREFILL_CHUNK;
use serde::Serialize;

use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};

/// Tokens of a stream where nothing is said and the model could do more.
const USUAL_CONTEXT: u32 = 4096;
/// Names of tensors that cannot be computed with, as far as they are listed for people.
const MAX_NAMES: usize = 4;

/// What the memory is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Tokens of a stream; `None` for what is usual.
    pub(crate) context: Option<u32>,
    /// Streams at once.
    pub(crate) concurrency: u32,
}

/// A model, for programs as it is.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    model: String,
    path: Option<String>,
    format: &'static str,
    file_bytes: u64,
    tensors: usize,
    parameters: u64,
    family: Option<String>,
    runs: bool,
    engine: Option<&'static str>,
    problem: Option<String>,
    types: Vec<TypeRow>,
    unsupported: Vec<String>,
    dimensions: Option<Dimensions>,
    memory: Option<Memory>,
}

/// The tensors of one type.
#[derive(Debug, Serialize)]
struct TypeRow {
    #[serde(rename = "type")]
    name: &'static str,
    tensors: usize,
    elements: u64,
    bytes: u64,
    /// As what the CPU engine computes with it; `None` where it does not.
    computed_as: Option<&'static str>,
    /// All of them are parts of quantised matrices.
    parts: bool,
}

#[derive(Debug, Serialize)]
struct Dimensions {
    layers: u32,
    width: u32,
    heads: u32,
    key_value_heads: u32,
    head_width: u32,
    feed_forward: u32,
    /// How many a row goes through, of how many.
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<[u32; 2]>,
    vocabulary: u32,
    context: u32,
    window: Option<u32>,
}

/// Bytes on one machine.
#[derive(Debug, Serialize)]
struct Memory {
    weights: u64,
    layers: Vec<u64>,
    embedding: u64,
    head: u64,
    /// The head is the embedding.
    head_is_embedding: bool,
    kv_per_token_f16: u64,
    kv_per_token_int8: u64,
    context: u32,
    concurrency: u32,
    kv_f16: u64,
    kv_int8: u64,
    total_f16: u64,
    free_here: u64,
    fits_here: bool,
}

/// What is known of a model before it is known whether it runs.
#[derive(Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) model: &'a str,
    pub(crate) path: Option<String>,
    pub(crate) description: Option<&'a Description>,
    /// As the file lists them, where the model as such cannot be read.
    pub(crate) tensors: &'a [TensorEntry],
    pub(crate) files: Result<&'a ModelFiles, String>,
}

impl Report {
    pub(crate) fn new(subject: &Subject<'_>, load: Load) -> Self {
        let tensors = subject.files.as_ref().map_or(subject.tensors, |f| &f.tensors);
        let checked = subject
            .files
            .as_ref()
            .map_err(String::clone)
            .and_then(|f| f.check_supported_types().map(|()| *f).map_err(|e| e.to_string()));
        let files = subject.files.as_ref().ok();
        let whole = tensors.iter().filter(|t| !t.is_part());
        let unsupported = tensors.iter().filter(|t| !t.dtype.is_supported() && !t.is_part());
        let (format, file_bytes) = match subject.description {
            Some(Description::Gguf(gguf)) => ("gguf", gguf.file_len),
            _ => ("safetensors", tensors.iter().map(|t| t.bytes).sum()),
        };
        Self {
            model: subject.model.to_owned(),
            path: subject.path.clone(),
            format,
            file_bytes,
            tensors: tensors.len(),
            parameters: whole.map(TensorEntry::elements).sum(),
            family: files
                .map(|f| f.config.family.as_str().to_owned())
                .or_else(|| architecture(subject.description)),
            runs: checked.is_ok(),
            engine: checked.is_ok().then_some("cpu"),
            unsupported: unsupported.map(|t| t.name.clone()).collect(),
            types: types(tensors),
            dimensions: files.map(|f| Dimensions::of(f)),
            memory: checked.as_ref().ok().map(|f| Memory::of(f, load)),
            problem: checked.err(),
        }
    }

    /// The types of tensors, and what the engine makes of them.
    pub(crate) fn type_table(&self) -> Table {
        let mut table = Table::new(&[
            ("type", Left),
            ("tensors", Right),
            ("elements", Right),
            ("bytes", Right),
            ("engine", Left),
        ]);
        for row in &self.types {
            let engine = match row.computed_as {
                Some(own) if own == row.name => "cpu".to_owned(),
                Some(other) => format!("cpu, as {other}"),
                None if row.parts => "cpu, in the matrices beside them".to_owned(),
                None => "unsupported".to_owned(),
            };
            let numbers = [row.tensors as u64, row.elements, row.bytes].map(|n| n.to_string());
            let [tensors, elements, bytes] = numbers;
            table.row([row.name.to_owned(), tensors, elements, bytes, engine]);
        }
        table
    }

    /// In a few lines: whether it runs, and what that takes.
    pub(crate) fn summary(&self) -> String {
        let mut lines = Vec::new();
        match &self.problem {
            None => lines.push("Can be served, on the CPU engine.".to_owned()),
            Some(problem) => lines.push(format!("Cannot be served: {problem}")),
        }
        let mut line = |name: &str, text: String| lines.push(format!("  {name:<12}{text}"));
        line("family", self.family.clone().unwrap_or_else(|| "unknown".to_owned()));
        if !self.unsupported.is_empty() {
            let n = self.unsupported.len();
            let more = if n > MAX_NAMES { ", …" } else { "" };
            let names = self.unsupported[..n.min(MAX_NAMES)].join(", ");
            line("unsupported", format!("{n} tensors: {names}{more}"));
        }
        if let Some(d) = &self.dimensions {
            let (w, ffn) = (d.width, d.feed_forward);
            let experts = match d.experts {
                Some([used, all]) => format!(", {used} of {all} experts for each row"),
                None => String::new(),
            };
            line("layers", format!("{} of width {w}, feed-forward {ffn}{experts}", d.layers));
            let (kv, width) = (d.key_value_heads, d.head_width);
            let heads = d.heads;
            line("attention", format!("{heads} heads of width {width}, {kv} for keys and values"));
            let window = d.window.map_or(String::new(), |w| format!(", window {w}"));
            line("context", format!("{} tokens{window}", d.context));
            line("vocabulary", d.vocabulary.to_string());
        }
        if let Some(m) = &self.memory {
            m.lines(&mut line);
        }
        lines.join("\n") + "\n"
    }
}

/// What a file that is no usable model says it is.
fn architecture(description: Option<&Description>) -> Option<String> {
    match description? {
        Description::Gguf(gguf) => {
            let Value::Str(name) = gguf.metadata.get("general.architecture")? else {
                return None;
            };
            Some(name.chars().filter(|c| !c.is_control()).take(40).collect())
        }
        Description::Folder(_) => None,
    }
}

fn types(tensors: &[TensorEntry]) -> Vec<TypeRow> {
    let mut types: BTreeMap<&str, TypeRow> = BTreeMap::new();
    for t in tensors {
        let row = types.entry(t.dtype.as_str()).or_insert_with(|| TypeRow {
            name: t.dtype.as_str(),
            tensors: 0,
            elements: 0,
            bytes: 0,
            computed_as: t.dtype.computed_as().map(TensorType::as_str),
            parts: true,
        });
        row.parts &= t.is_part();
        row.tensors += 1;
        row.elements += t.elements();
        row.bytes += t.bytes;
    }
    types.into_values().collect()
}

impl Dimensions {
    fn of(files: &ModelFiles) -> Self {
        let c = &files.config;
        Self {
            layers: c.layers,
            width: c.hidden,
            heads: c.heads,
            key_value_heads: c.kv_heads,
            head_width: c.head_dim,
            feed_forward: c.ffn,
            experts: c.features.experts.map(|e| [e.used, e.count]),
            vocabulary: c.vocab,
            context: c.context,
            window: c.features.window.as_ref().map(|w| w.size),
        }
    }
}

impl Memory {
    fn of(files: &ModelFiles, load: Load) -> Self {
        let config = &files.config;
        let parts = ModelParts { config, tensors: &files.tensors };
        let context = load.context.unwrap_or_else(|| USUAL_CONTEXT.min(config.context));
        let positions = u64::from(context) * u64::from(load.concurrency);
        let batch = load.concurrency.saturating_add(DEFAULT_PREFILL_CHUNK);
        let costs = parts.costs(positions, Dtype::F16, batch, None);
        let all = StageTensors { layers: 0..config.layers, embed: true, head: true };
        let weights = parts.memory_bytes(&all, None);
        let kv = |dtype| u64::from(config.layers) * config.kv_bytes_per_position(dtype);
        let (f16, int8) = (kv(Dtype::F16), kv(Dtype::Int8));
        let total = weights + positions * f16 + costs.stage_bytes;
        let free = Hardware::probe().memory_bytes;
        Self {
            weights,
            layers: costs.layer_bytes,
            embedding: costs.embed_bytes,
            head: costs.head_bytes,
            head_is_embedding: costs.tied_head,
            kv_per_token_f16: f16,
            kv_per_token_int8: int8,
            context,
            concurrency: load.concurrency,
            kv_f16: positions * f16,
            kv_int8: positions * int8,
            total_f16: total,
            free_here: free,
            fits_here: total <= free,
        }
    }

    fn lines(&self, line: &mut dyn FnMut(&str, String)) {
        let (least, most) = (self.layers.iter().min(), self.layers.iter().max());
        let layer = match (least, most) {
            (Some(&a), Some(&b)) if bytes(a) != bytes(b) => format!("{} to {}", bytes(a), bytes(b)),
            (Some(&a), _) => bytes(a),
            _ => "nothing".to_owned(),
        };
        line("weights", format!("{} in memory, {layer} a layer", bytes(self.weights)));
        let (embedding, head) = (bytes(self.embedding), bytes(self.head));
        line(
            "",
            match self.head_is_embedding {
                true => format!("embedding {embedding}, which is the head too"),
                false => format!("embedding {embedding}, head {head}"),
            },
        );
        let (f16, int8) = (bytes(self.kv_per_token_f16), bytes(self.kv_per_token_int8));
        line("KV cache", format!("{f16} a token in f16, {int8} in int8"));
        let (n, context) = (self.concurrency, self.context);
        let streams = if n == 1 { "stream" } else { "streams" };
        let (f16, int8) = (bytes(self.kv_f16), bytes(self.kv_int8));
        line("", format!("{n} {streams} of {context} tokens: {f16} in f16, {int8} in int8"));
        let free = bytes(self.free_here);
        line(
            "in all",
            match self.fits_here {
                true => format!("{}; here {free} are free", bytes(self.total_f16)),
                false => format!(
                    "{}, more than the {free} that are free here: 'millrace plan' cuts it",
                    bytes(self.total_f16)
                ),
            },
        );
    }
}
