//! A copy of a folder with other types of matrices, or other shapes: how it is laid out. Nothing is
//! written here.
//!
//! The copy has one safetensors file, `config.json` with a mark that other libraries refuse, and the
//! rest of the small files (tokenizer, chat template, generation settings) as they are. A quantised
//! matrix `NAME.weight` is a tensor of bytes, `NAME.q8_0` and so on: rows of GGUF's blocks.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::quantized::{self, OWN, Scheme};
use super::{CONFIG, FolderError, INDEX, MAX_JSON_BYTES, ONE_FILE, directory, names};
use crate::model::{TensorEntry, TensorType};

/// Kinds of files that belong to a model beside its weights.
const KEPT: [&str; 4] = ["json", "jinja", "model", "txt"];
/// Dimensions as GGUF's keys have them behind the architecture's name, and as `config.json` has them;
/// what it has no key for follows from the others.
const SHAPE: [(&str, Option<&str>); 9] = [
    ("block_count", Some("num_hidden_layers")),
    ("embedding_length", Some("hidden_size")),
    ("feed_forward_length", Some("intermediate_size")),
    ("expert_feed_forward_length", Some("moe_intermediate_size")),
    ("attention.head_count", Some("num_attention_heads")),
    ("attention.head_count_kv", Some("num_key_value_heads")),
    ("attention.key_length", Some("head_dim")),
    ("attention.value_length", None),
    ("rope.dimension_count", None),
];

/// A folder to be copied.
#[derive(Clone, Debug)]
pub struct FolderSource {
    /// Where it is.
    pub folder: PathBuf,
    /// The files with tensors.
    pub paths: Vec<PathBuf>,
    /// Tensors by file and place in it, under canonical names where they have one, as they lie: several
    /// matrices may be in one.
    pub tensors: Vec<TensorEntry>,
    /// The small files that go along as they are.
    pub others: Vec<PathBuf>,
    /// Why its matrices cannot be given other types, if so.
    pub fixed: Option<String>,
    names: Vec<String>,
    config: Value,
}

/// Other dimensions of a copy.
#[derive(Clone, Debug, Default)]
pub struct FolderShape {
    /// By GGUF's keys behind the architecture's name.
    pub dimensions: Vec<(&'static str, u32)>,
    /// Which layers of the original its layers are like, where they are not the same.
    pub layers: Option<Vec<u32>>,
}

impl FolderSource {
    /// Reads directories.
    ///
    /// # Errors
    /// If it is no sound model of a known family.
    pub fn open(folder: &Path) -> Result<Self, FolderError> {
        let (model, _, paths) = super::open(folder)?;
        let config = super::read_json(&folder.join(CONFIG))?;
        let scheme = quantized::scheme(&config, folder)?;
        let own = config.get("quantization_config").is_some_and(|q| !q.is_null());
        let fixed = match scheme {
            Scheme::Plain if model.features.transposed => {
                Some(format!("matrices of {} lie the other way round", model.family.as_str()))
            }
            Scheme::Plain => None,
            _ => Some("its matrices are quantised already".to_owned()),
        };
        let (mut all_names, mut tensors) = (Vec::new(), Vec::new());
        for (file, path) in paths.iter().enumerate() {
            for (name, entry) in directory(path)? {
                let Some(canonical) = names::canonical(&model, &name) else { continue };
                tensors.push(TensorEntry { name: canonical, file: file as u16, ..entry });
                all_names.push(name);
            }
        }
        // A copy of floats with that mark is one with matrices that others do not know.
        let floats = tensors.iter().all(|t| t.dtype.is_float());
        let quantised = (own && !floats).then(|| "its matrices are quantised already".to_owned());
        let fixed = fixed.or(quantised);
        let others = others(folder).map_err(|e| FolderError::new(folder, e.to_string()))?;
        let folder = folder.to_owned();
        Ok(Self { folder, paths, tensors, others, fixed, names: all_names, config })
    }

    /// `config.json` of a copy with those dimensions; `own`: with a mark that other libraries refuse.
    /// Where it states the type of the weights, that becomes `floats`.
    ///
    /// # Errors
    /// Names a dimension that has no key, or a list that is not one of layers.
    pub fn config(
        &self,
        own: bool,
        shape: &FolderShape,
        floats: Option<TensorType>,
    ) -> Result<Vec<u8>, String> {
        let mut json = self.config.clone();
        if let Some(map) = json.as_object_mut() {
            map.remove("quantization_config");
        }
        if own {
            json["quantization_config"] = json!({ "quant_method": OWN });
        }
        // Of a model that also sees, the text part.
        let text = json.get("text_config").is_some_and(Value::is_object);
        let text = if text { &mut json["text_config"] } else { &mut json };
        let count = text["num_hidden_layers"].as_u64().unwrap_or(0) as usize;
        for (key, n) in &shape.dimensions {
            match SHAPE.iter().find(|(ours, _)| ours == key) {
                Some((_, Some(theirs))) => text[*theirs] = Value::from(*n),
                Some((_, None)) => {}
                None => return Err(format!("{CONFIG} has no key for '{key}'")),
            }
        }
        if let Some(layers) = &shape.layers {
            cut_lists(text, count, layers)?;
        }
        if let Some(name) = floats.and_then(type_name) {
            state_type(text, name);
            state_type(&mut json, name);
        }
        Ok(serde_json::to_vec_pretty(&json).expect("invariant: JSON can be written"))
    }

    /// The name of a tensor in the files: its own, that of the same tensor of another layer, or, of the
    /// thin matrix before factored ones, that of the first of these.
    fn name_of(&self, canonical: &str) -> Option<String> {
        let own = |name: &str| {
            self.tensors.iter().position(|t| t.name == name).map(|i| self.names[i].clone())
        };
        if let Some(name) = own(canonical) {
            return Some(name);
        }
        let (layer, rest) = canonical.strip_prefix("blk.")?.split_once('.')?;
        let (rest, inner) = match rest.strip_suffix("_in.weight") {
            Some(rest) => (format!("{rest}.weight"), true),
            None => (rest.to_owned(), false),
        };
        let like = |t: &&TensorEntry| {
            let parts = t.name.strip_prefix("blk.").and_then(|name| name.split_once('.'));
            parts.is_some_and(|(_, other)| other == rest)
        };
        let name = own(&self.tensors.iter().find(like)?.name)?;
        // The layer is the first number in it.
        let is_number = |part: &&str| part.parse::<u32>().is_ok();
        let number = name.split('.').position(|part| is_number(&part))?;
        let parts = name.split('.').enumerate();
        let parts: Vec<&str> = parts.map(|(i, p)| if i == number { layer } else { p }).collect();
        let name = parts.join(".");
        match inner {
            true => Some(format!("{}_in.weight", name.strip_suffix(".weight")?)),
            false => Some(name),
        }
    }

    /// The beginning of the copy's file, up to the first tensor's bytes, and where its tensors (name,
    /// type, dimensions fastest first) are to lie, one after the other.
    ///
    /// # Errors
    /// Names a tensor that the folder has nothing like.
    ///
    /// # Panics
    /// If a type does not fit a tensor: rows are to be whole blocks.
    pub fn lay_out(
        &self,
        slots: impl IntoIterator<Item = (String, TensorType, Vec<u64>)>,
    ) -> Result<(Vec<u8>, Vec<TensorEntry>), String> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let (mut tensors, mut at) = (Vec::new(), 0);
        for (canonical, dtype, dims) in slots {
            let bytes = dtype.bytes_of(dims.iter().product());
            let bytes = bytes.expect("invariant: whoever chose the types looked at the rows");
            let mut shape: Vec<u64> = dims.iter().rev().copied().collect();
            let named = self.name_of(&canonical);
            let mut name =
                named.ok_or_else(|| format!("the folder has nothing like '{canonical}'"))?;
            let mut kind = dtype.as_str();
            if !dtype.is_float() {
                let row = shape.pop().and_then(|cols| dtype.bytes_of(cols));
                shape.push(row.expect("invariant: whole rows"));
                let stem = name.strip_suffix(".weight").unwrap_or(&name);
                name = format!("{stem}.{}", dtype.as_str().to_ascii_lowercase());
                kind = "U8";
            }
            let place = json!({ "dtype": kind, "shape": shape, "data_offsets": [at, at + bytes] });
            if header.insert(name, place).is_some() {
                return Err(format!("'{canonical}' is there twice"));
            }
            let (file, hash) = (0, [0; 32]);
            tensors.push(TensorEntry {
                name: canonical,
                dtype,
                dims,
                file,
                offset: at,
                bytes,
                hash,
            });
            at += bytes;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut head = (header.len() as u64).to_le_bytes().to_vec();
        head.extend(header);
        tensors.iter_mut().for_each(|t| t.offset += head.len() as u64);
        Ok((head, tensors))
    }

    /// Name of the copy's file of weights.
    pub fn weights_name() -> &'static str {
        ONE_FILE
    }

    /// Name of the copy's configuration.
    pub fn config_name() -> &'static str {
        CONFIG
    }

    /// Whether there is such a copy in a folder.
    pub fn is_copy(folder: &Path) -> bool {
        let config = super::read_json(&folder.join(CONFIG));
        config.is_ok_and(|c| c["quantization_config"]["quant_method"] == OWN)
    }

    /// Every file that the copy depends on.
    pub fn all_files(&self) -> Vec<PathBuf> {
        [&[self.folder.join(CONFIG)], &self.paths[..], &self.others[..]].concat()
    }
}

/// Lists with a value for each of `count` layers get those of the layers that are left.
fn cut_lists(text: &mut Value, count: usize, layers: &[u32]) -> Result<(), String> {
    let lists = text.as_object_mut().into_iter().flatten();
    for (key, value) in lists.filter(|(key, _)| key.contains("layer")) {
        let Value::Array(list) = value else { continue };
        if list.is_empty() {
            continue;
        }
        if list.len() != count {
            let len = list.len();
            return Err(format!(
                "'{key}' of {CONFIG} lists {len} values, not one for each of {count} layers: it cannot \
                 be cut with them"
            ));
        }
        *list = layers.iter().map(|&l| list[l as usize].clone()).collect();
    }
    Ok(())
}

/// As `transformers` calls it.
fn type_name(dtype: TensorType) -> Option<&'static str> {
    match dtype {
        TensorType::F32 => Some("float32"),
        TensorType::F16 => Some("float16"),
        TensorType::BF16 => Some("bfloat16"),
        _ => None,
    }
}

/// Changes what is stated of the weights' type, where something is.
fn state_type(json: &mut Value, name: &str) {
    for key in ["dtype", "torch_dtype"] {
        if let Some(stated) = json.get_mut(key).filter(|v| v.is_string()) {
            *stated = name.into();
        }
    }
}

/// Small files beside the weights, by name.
fn others(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let kept = path.extension().and_then(|e| e.to_str()).is_some_and(|e| KEPT.contains(&e));
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stale = name == CONFIG || name == INDEX || name.starts_with('.');
        // Links lead to files where a hub's cache keeps them.
        let small =
            std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= MAX_JSON_BYTES);
        if kept && !stale && small {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
