//! The GGUF files that llama.cpp's converter makes of the small models: the head as it wrote it, the
//! weights computed here. The hash of the whole shows that not a byte is different.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use millrace_shared::model::gguf::Gguf;
use millrace_shared::model::{ModelFiles, TensorEntry, TensorType};
use serde_json::Value;

use super::case::Case;

/// Writes the file.
pub(crate) fn write(case: &Case, folder: &Path) -> PathBuf {
    let json = case.of_llama_cpp();
    let head = json["head"].as_str().unwrap();
    let mut bytes = base64::engine::general_purpose::STANDARD.decode(head).unwrap();
    let len = json["bytes"].as_u64().unwrap();
    let gguf = Gguf::read(&bytes[..], len).unwrap();
    let weights = Weights::of(case, &json);
    bytes.resize(len as usize, 0);
    for tensor in &gguf.tensors {
        let data: Vec<u8> = weights.get(tensor).iter().flat_map(|x| x.to_le_bytes()).collect();
        let at = tensor.offset as usize;
        bytes[at..at + tensor.bytes as usize].copy_from_slice(&data);
    }
    let hash = json["blake3"].as_str().unwrap();
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), hash, "{}", case.name);
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A model's weights under canonical names, and how the converter changes them.
struct Weights<'a> {
    case: &'a Case,
    files: ModelFiles,
    all: HashMap<String, Vec<f32>>,
}

impl<'a> Weights<'a> {
    fn of(case: &'a Case, json: &Value) -> Self {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let bytes = std::fs::read(&files.paths[0]).unwrap();
        let read = |t: &TensorEntry| {
            let bytes = &bytes[t.offset as usize..(t.offset + t.bytes) as usize];
            let floats = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            (t.name.clone(), floats.collect())
        };
        let mut all: HashMap<String, Vec<f32>> = files.tensors.iter().map(read).collect();
        for (name, list) in json["computed"].as_object().unwrap() {
            let list = list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32);
            all.insert(name.clone(), list.collect());
        }
        Self { case, files, all }
    }

    fn get(&self, tensor: &TensorEntry) -> Vec<f32> {
        let (name, c) = (tensor.name.as_str(), &self.files.config);
        let cols = tensor.dims[0] as usize;
        if let Some(stem) = name.strip_suffix("_exps.weight") {
            let one = |expert: u64| self.all[&format!("{stem}.{expert}.weight")].clone();
            return (0..tensor.dims[2]).flat_map(one).collect();
        }
        let layer = name.rsplitn(3, '.').last().unwrap();
        let together: &[&str] = match self.case.name.starts_with("phi") {
            true if name.ends_with("attn_qkv.weight") => &["attn_q", "attn_k", "attn_v"],
            true if name.ends_with("ffn_up.weight") => &["ffn_gate", "ffn_up"],
            _ => &[],
        };
        if !together.is_empty() {
            let one = |part: &&str| self.all[&format!("{layer}.{part}.weight")].clone();
            return together.iter().flat_map(one).collect();
        }
        let plain = &self.all[name];
        let turned = name.contains("attn_q.weight") || name.contains("attn_k.weight");
        if c.family.gguf_name() == "llama" && turned {
            return reordered(plain, c.head_dim as usize, cols);
        }
        if c.features.gain_plus_one && name.contains("norm") {
            return plain.iter().map(|x| x + 1.0).collect();
        }
        if c.features.transposed && name.starts_with("blk.") && tensor.dims.len() == 2 {
            let rows = plain.len() / cols;
            return (0..rows).flat_map(|r| (0..cols).map(move |k| plain[k * rows + r])).collect();
        }
        plain.clone()
    }
}

/// Rows of each head so that elements which are rotated together are neighbours.
fn reordered(data: &[f32], dim: usize, cols: usize) -> Vec<f32> {
    let head = |head: &[f32]| -> Vec<f32> {
        let row = |r: usize| &head[r * cols..(r + 1) * cols];
        (0..dim / 2).flat_map(|i| [row(i), row(dim / 2 + i)].concat()).collect()
    };
    data.chunks_exact(dim * cols).flat_map(head).collect()
}
