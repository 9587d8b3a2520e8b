//! A model as Hugging Face keeps it: a folder with `config.json` and safetensors files.
//!
//! Only directories are read, never weights. Files are untrusted: lengths and offsets are checked
//! (by the `safetensors` crate, and here against the file), every tensor must have a place in the
//! family's graph and a shape that its configuration says, and none may be missing.

mod config;
mod copy;
mod names;
mod quantized;
mod rope;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

pub use copy::{FolderShape, FolderSource};

use super::{ModelConfig, TensorEntry, TensorType, check_rank, head_name};

/// Largest file of JSON that is read.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Largest header of a safetensors file (the format's own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most files of a model.
const MAX_FILES: usize = 4096;
/// The one file of a small model, and what names the files of a large one.
const ONE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Dimensions and family.
const CONFIG: &str = "config.json";

/// Why a folder is no usable model: the file, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct FolderError {
    /// Of the folder.
    pub path: PathBuf,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl FolderError {
    fn new(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self { path: path.into(), problem: problem.into() }
    }
}

/// Dimensions, tensors under canonical names, and the files they are in.
pub(super) type Opened = (ModelConfig, Vec<TensorEntry>, Vec<PathBuf>);

/// Reads the directories of a folder.
///
/// # Errors
/// If it is no sound model of a known family.
pub(super) fn open(folder: &Path) -> Result<Opened, FolderError> {
    let config_path = folder.join(CONFIG);
    let json = read_json(&config_path)?;
    let wrong = |problem| FolderError::new(&config_path, problem);
    let mut config = config::config(&json).map_err(wrong)?;
    let scheme = quantized::scheme(&json, folder)?;
    let paths = files(folder)?;
    let mut tensors: Vec<TensorEntry> = Vec::new();
    let mut seen = BTreeMap::new();
    for (file, path) in paths.iter().enumerate() {
        for (name, mut entry) in directory(path)? {
            let bad = |problem: String| {
                FolderError::new(path, format!("tensor '{}': {problem}", names::clip(&name)))
            };
            let Some(role) = scheme.role(&name, &mut entry).map_err(bad)? else { continue };
            let Some(canonical) = names::canonical(&config, &role.name) else { continue };
            if scheme.has_zero_bias(&canonical) && !config.has_place(&canonical) {
                quantized::only_zeros(path, &entry).map_err(bad)?;
                continue;
            }
            if !config.has_place(&canonical) {
                return Err(bad(format!(
                    "it has no place in the {} graph of {} layers as Millrace defines it",
                    config.family.as_str(),
                    config.layers
                )));
            }
            let canonical = match role.part {
                Some(part) => canonical.replace(".weight", &format!(".{part}")),
                None => canonical,
            };
            if seen.insert(canonical.clone(), ()).is_some() {
                return Err(bad("it is there twice".to_owned()));
            }
            tensors.push(TensorEntry { name: canonical, file: file as u16, ..entry });
        }
    }
    // A file may have a head that is the embedding again, or none though the configuration says so.
    config.tied_head = !seen.contains_key("output.weight");
    if config.tied_head && json.get("tie_word_embeddings") == Some(&Value::Bool(false)) {
        let problem =
            "'tie_word_embeddings' is false, but the files have no tensor 'lm_head.weight'";
        return Err(wrong(problem.to_owned()));
    }
    let tensors = super::split::split(&config, tensors, &HashSet::new())
        .map_err(|(tensor, problem)| FolderError::new(folder, format!("{tensor}: {problem}")))?;
    check(&config, &tensors, &paths)?;
    Ok((config, tensors, paths))
}

/// Every tensor of the graph is there, in the shape that the configuration says.
fn check(
    config: &ModelConfig,
    tensors: &[TensorEntry],
    paths: &[PathBuf],
) -> Result<(), FolderError> {
    let by_name: BTreeMap<&str, &TensorEntry> =
        tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    quantized::check(config, &by_name).map_err(|(name, problem)| {
        let path = paths.first().cloned().unwrap_or_default();
        let original = names::original(config, &name);
        FolderError::new(path, format!("tensor '{original}': {problem}"))
    })?;
    let ends = [u64::from(config.hidden), u64::from(config.vocab)];
    let mut wanted: Vec<(String, Vec<u64>)> = vec![
        ("token_embd.weight".to_owned(), ends.to_vec()),
        (head_name(config).to_owned(), ends.to_vec()),
    ];
    let outer = config.outer_tensors().into_iter();
    wanted.extend(outer.map(|(name, dims)| (name.to_owned(), dims)));
    for layer in 0..config.layers {
        for (name, mut dims) in config.layer_matrices() {
            if config.features.transposed {
                dims.reverse();
            }
            // Of a factored one the thin one before it has the inputs.
            if let Some(inner) = inner(&by_name, layer, &name) {
                let rank = inner.dims[1];
                check_rank(rank).map_err(|problem| {
                    let name = names::original(config, &inner.name);
                    let path = &paths[usize::from(inner.file)];
                    FolderError::new(path, format!("tensor '{name}' {problem}"))
                })?;
                wanted.push((inner.name.clone(), vec![dims[0], inner.dims[1]]));
                dims[0] = inner.dims[1];
            }
            wanted.push((format!("blk.{layer}.{name}.weight"), dims.to_vec()));
        }
        for (name, len) in config.layer_vectors() {
            wanted.push((format!("blk.{layer}.{name}"), vec![len]));
        }
    }
    for (name, dims) in wanted {
        let original = names::original(config, &name);
        let Some(entry) = by_name.get(name.as_str()) else {
            let path = paths.first().cloned().unwrap_or_default();
            return Err(FolderError::new(path, format!("tensor '{original}' is missing")));
        };
        if entry.dims != dims {
            let shape = |dims: &[u64]| dims.iter().rev().copied().collect::<Vec<u64>>();
            return Err(FolderError::new(
                &paths[usize::from(entry.file)],
                format!(
                    "tensor '{original}' has the shape {:?}, by {CONFIG} it must be {:?}",
                    shape(&entry.dims),
                    shape(&dims)
                ),
            ));
        }
    }
    Ok(())
}

/// The thin matrix before a factored one and those that share its input.
fn inner<'a>(
    by_name: &BTreeMap<&str, &'a TensorEntry>,
    layer: u32,
    matrix: &str,
) -> Option<&'a TensorEntry> {
    let first: &[&str] = match matrix {
        "attn_k" | "attn_v" => &["attn_q"],
        "ffn_up" => &["ffn_gate", "ffn_up"],
        own => &[own],
    };
    let find = |first: &&str| by_name.get(&*format!("blk.{layer}.{first}_in.weight"));
    first.iter().find_map(find).copied().filter(|inner| inner.dims.len() == 2)
}

/// A file of JSON.
///
/// # Errors
/// If it cannot be read, is too large or no JSON.
pub(super) fn read_json(path: &Path) -> Result<Value, FolderError> {
    let io = |e: std::io::Error| FolderError::new(path, format!("cannot read it: {e}"));
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    if len > MAX_JSON_BYTES {
        return Err(FolderError::new(path, format!("{len} bytes are too many ({MAX_JSON_BYTES})")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES).read_to_end(&mut bytes).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|e| FolderError::new(path, format!("no JSON: {e}")))
}

/// The safetensors files of a folder, in order of their names.
fn files(folder: &Path) -> Result<Vec<PathBuf>, FolderError> {
    let (one, index) = (folder.join(ONE_FILE), folder.join(INDEX));
    if !index.is_file() {
        if one.is_file() {
            return Ok(vec![one]);
        }
        return Err(FolderError::new(
            folder,
            format!("it has neither '{ONE_FILE}' nor '{INDEX}': weights must be safetensors"),
        ));
    }
    let json = read_json(&index)?;
    let bad = |problem: String| FolderError::new(&index, problem);
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| bad("it has no 'weight_map'".to_owned()))?;
    let mut names: Vec<&str> = Vec::new();
    for (tensor, file) in map {
        let plain = |f: &&str| !f.contains(['/', '\\']) && f.ends_with(".safetensors");
        match file.as_str().filter(plain) {
            Some(file) => names.push(file),
            None => {
                let tensor = names::clip(tensor);
                return Err(bad(format!("tensor '{tensor}' is in {file}, no safetensors file")));
            }
        }
    }
    names.sort_unstable();
    names.dedup();
    if names.is_empty() || names.len() > MAX_FILES {
        return Err(bad(format!("it names {} files (1 to {MAX_FILES})", names.len())));
    }
    let missing = names.iter().find(|name| !folder.join(name).is_file());
    if let Some(missing) = missing {
        return Err(bad(format!("its file '{missing}' is missing: fetch the model again")));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Names and places of the tensors of a safetensors file.
fn directory(path: &Path) -> Result<Vec<(String, TensorEntry)>, FolderError> {
    let bad = |problem: String| FolderError::new(path, problem);
    let io = |e: std::io::Error| bad(format!("cannot read it: {e}"));
    let mut file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(|_| bad("it is empty or cut off".to_owned()))?;
    let header_len = u64::from_le_bytes(size);
    if header_len > MAX_HEADER_BYTES || header_len.saturating_add(8) > len {
        return Err(bad(format!(
            "no safetensors file: a header of {header_len} bytes in a file of {len}"
        )));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(io)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| bad(format!("its header is damaged: {e}")))?;
    drop(header);
    let data = 8 + header_len;
    if data + metadata.data_len() as u64 != len {
        return Err(bad(format!(
            "its tensors take {} bytes and there are {}: the file is cut off or damaged",
            metadata.data_len(),
            len - data
        )));
    }
    let mut entries = Vec::new();
    for (name, info) in metadata.tensors() {
        let dims: Vec<u64> = info.shape.iter().rev().map(|&d| d as u64).collect();
        let (start, end) = info.data_offsets;
        let dtype = match info.dtype {
            Dtype::F32 => TensorType::F32,
            Dtype::F16 => TensorType::F16,
            Dtype::BF16 => TensorType::BF16,
            // Of quantised matrices.
            Dtype::I32 => TensorType::I32,
            Dtype::U8 => TensorType::I8,
            Dtype::F8_E4M3 => TensorType::F8_E4M3,
            // Masks and tables of positions that old files carry are passed over by their names.
            _ if names::is_ignored(&name) => continue,
            other => {
                return Err(bad(format!(
                    "tensor '{}' is {other:?}: F32, F16, BF16 and F8_E4M3 are supported",
                    names::clip(&name)
                )));
            }
        };
        let entry = TensorEntry {
            name: String::new(),
            dtype,
            dims,
            file: 0,
            offset: data + start as u64,
            bytes: (end - start) as u64,
            hash: [0; 32],
        };
        entries.push((name, entry));
    }
    entries.sort_by_key(|(_, entry)| entry.offset);
    Ok(entries)
}

/// The folder of such a model, where the path is one, or the `config.json` or a weights file in one.
pub fn model_folder(path: &Path) -> Option<PathBuf> {
    if path.is_dir() {
        return path.join(CONFIG).is_file().then(|| path.to_owned());
    }
    let name = path.file_name()?.to_str()?;
    let parent =
        path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let belongs = name == CONFIG || name == INDEX || name.ends_with(".safetensors");
    (belongs && fs::metadata(parent.join(CONFIG)).is_ok()).then(|| parent.to_owned())
}
