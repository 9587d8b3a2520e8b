//! A copy of a folder with other types of matrices: how it is laid out. Nothing is written here.
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
    /// `config.json` of the copy.
    pub config: Vec<u8>,
    /// Why its matrices cannot be given other types, if so.
    pub fixed: Option<String>,
    names: Vec<String>,
}

impl FolderSource {
    /// Reads directories.
    ///
    /// # Errors
    /// If it is no sound model of a known family.
    pub fn open(folder: &Path) -> Result<Self, FolderError> {
        let (model, _, paths) = super::open(folder)?;
        let mut json = super::read_json(&folder.join(CONFIG))?;
        let scheme = quantized::scheme(&json, folder)?;
        let own = json.get("quantization_config").is_some_and(|q| !q.is_null());
        let fixed = match scheme {
            Scheme::Plain if own => Some("its matrices are quantised already".to_owned()),
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
        json["quantization_config"] = json!({ "quant_method": OWN });
        let config = serde_json::to_vec_pretty(&json).expect("invariant: JSON can be written");
        let others = others(folder).map_err(|e| FolderError::new(folder, e.to_string()))?;
        let folder = folder.to_owned();
        Ok(Self { folder, paths, tensors, others, config, fixed, names: all_names })
    }

    /// The beginning of the copy's file, up to the first tensor's bytes, and where its tensors are to
    /// lie, one after the other.
    ///
    /// # Panics
    /// If a type does not fit a tensor: rows are to be whole blocks.
    pub fn lay_out(&self, types: &[TensorType]) -> (Vec<u8>, Vec<TensorEntry>) {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let (mut tensors, mut at) = (Vec::new(), 0);
        for ((entry, name), &dtype) in self.tensors.iter().zip(&self.names).zip(types) {
            let bytes = dtype.bytes_of(entry.elements());
            let bytes = bytes.expect("invariant: whoever chose the types looked at the rows");
            let mut shape: Vec<u64> = entry.dims.iter().rev().copied().collect();
            let (mut name, mut kind) = (name.clone(), dtype.as_str());
            if !matches!(dtype, TensorType::F32 | TensorType::F16 | TensorType::BF16) {
                let row = shape.pop().and_then(|cols| dtype.bytes_of(cols));
                shape.push(row.expect("invariant: whole rows"));
                let stem = name.strip_suffix(".weight").unwrap_or(&name);
                name = format!("{stem}.{}", dtype.as_str().to_ascii_lowercase());
                kind = "U8";
            }
            let place = json!({ "dtype": kind, "shape": shape, "data_offsets": [at, at + bytes] });
            header.insert(name, place);
            tensors.push(TensorEntry { dtype, file: 0, offset: at, bytes, ..entry.clone() });
            at += bytes;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut head = (header.len() as u64).to_le_bytes().to_vec();
        head.extend(header);
        tensors.iter_mut().for_each(|t| t.offset += head.len() as u64);
        (head, tensors)
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
