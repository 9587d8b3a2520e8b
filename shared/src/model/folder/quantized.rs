//! Quantised matrices of folders: which tensors make one, by the conventions of GPTQ, AWQ and FP8
//! checkpoints, and by Millrace's own copies.
//!
//! A matrix is an entry `NAME.weight` of a type of its own, and its other tensors follow as entries
//! `NAME.scales`, `NAME.qzeros` and `NAME.g_idx`: each is hashed, fetched and named by its content like
//! any tensor, and the engine puts them together. Here only names, types and shapes are checked. A
//! copy that Millrace made has GGUF's blocks in tensors of bytes, `NAME.q8_0` and the like.
//!
//! Conventions: GPTQ as `gptqmodel` (and AutoGPTQ before) writes it, `qzeros` one less than the zeros
//! in the first version; AWQ as AutoAWQ's GEMM version; FP8 as `transformers`' fine-grained FP8 and
//! `compressed-tensors`' float-quantized.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde_json::Value;

use super::{FolderError, names, read_json};
use crate::model::{ModelConfig, TensorEntry, TensorType};

/// Where old GPTQ checkpoints keep what `quantization_config` says in newer ones.
const OLD_CONFIG: &str = "quantize_config.json";
/// Longest bias that is looked into.
const MAX_BIAS_BYTES: usize = 4 << 20;
/// What is known, for messages.
const KNOWN: &str = "supported: GPTQ and AWQ (GEMM) with 4 bits, FP8 (E4M3) with a scale for each \
     tensor, row or block of 128 x 128, as fp8 or compressed-tensors have it; of other models take the \
     F16 or BF16 files, with --quantize q8_0 or q4_0";
/// What `quantization_config` says of a copy that Millrace made.
pub(super) const OWN: &str = "millrace";

/// How a folder's matrices are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Not, or as Millrace does.
    Plain,
    /// `w = scale * (q - zero)`: the second version, and whether groups follow activations.
    Gptq {
        v2: bool,
        act: bool,
    },
    Awq,
    /// Whether scales are of blocks.
    Fp8 {
        blocks: bool,
    },
}

/// What a tensor is: its matrix (or itself) by a Hugging Face name, and which part of it.
pub(super) struct Role {
    pub(super) name: String,
    /// `None` for tensors that are what they are.
    pub(super) part: Option<&'static str>,
}

/// What the folder says of its weights.
///
/// # Errors
/// Names what is not supported, and what is.
pub(super) fn scheme(json: &Value, folder: &Path) -> Result<Scheme, FolderError> {
    let wrong = |problem: String| FolderError::new(folder.join(super::CONFIG), problem);
    let text = json.get("text_config").and_then(|t| t.get("quantization_config"));
    if let Some(said) = json.get("quantization_config").or(text).filter(|v| !v.is_null()) {
        return of_config(said).map_err(wrong);
    }
    let old = folder.join(OLD_CONFIG);
    if !old.is_file() {
        return Ok(Scheme::Plain);
    }
    let mut said = read_json(&old)?;
    if let Some(said) = said.as_object_mut() {
        said.entry("quant_method").or_insert_with(|| "gptq".into());
    }
    of_config(&said).map_err(|problem| FolderError::new(old, problem))
}

fn of_config(said: &Value) -> Result<Scheme, String> {
    let text = |key: &str| said.get(key).and_then(Value::as_str);
    let flag = |key: &str, usual: bool| said.get(key).and_then(Value::as_bool).unwrap_or(usual);
    let method = text("quant_method").unwrap_or("nothing by name");
    let bad = |what: String| {
        Err(format!(
            "its weights are quantised by {method}{what}, which is not supported ({KNOWN})"
        ))
    };
    let bits = || said.get("bits").or_else(|| said.get("w_bit")).and_then(Value::as_u64);
    match method {
        OWN => Ok(Scheme::Plain),
        "gptq" | "awq" if bits() != Some(4) => match bits() {
            None => bad(" without saying in how many bits".to_owned()),
            Some(bits) => bad(format!(" in {bits} bits")),
        },
        "gptq" => {
            let v2 = match text("checkpoint_format").unwrap_or("gptq") {
                "gptq" => false,
                "gptq_v2" => true,
                other => return bad(format!(" in the format '{}'", names::clip(other))),
            };
            Ok(Scheme::Gptq { v2, act: flag("desc_act", false) })
        }
        "awq" => match text("version").unwrap_or("gemm").to_ascii_lowercase().as_str() {
            "gemm" if flag("zero_point", true) => Ok(Scheme::Awq),
            "gemm" => bad(" without zero points".to_owned()),
            other => bad(format!(" in the version '{}'", names::clip(other))),
        },
        "fp8" => match (text("fmt").unwrap_or("e4m3"), said.get("weight_block_size")) {
            ("e4m3" | "float8_e4m3fn", None | Some(Value::Null)) => {
                Ok(Scheme::Fp8 { blocks: false })
            }
            ("e4m3" | "float8_e4m3fn", Some(size)) if is_128(size) => {
                Ok(Scheme::Fp8 { blocks: true })
            }
            (_, Some(size)) if !size.is_null() => bad(format!(" in blocks of {size}")),
            (other, _) => bad(format!(" as {}", names::clip(other))),
        },
        "compressed-tensors" => compressed(said).or_else(bad),
        _ => bad(String::new()),
    }
}

fn is_128(size: &Value) -> bool {
    *size == serde_json::json!([128, 128])
}

/// `compressed-tensors`: one way for all matrices, in eight-bit floats.
fn compressed(said: &Value) -> Result<Scheme, String> {
    let format = said.get("format").and_then(Value::as_str).unwrap_or("no format");
    if format != "float-quantized" {
        return Err(format!(" as '{}'", names::clip(format)));
    }
    let groups = said.get("config_groups").and_then(Value::as_object);
    let groups: Vec<&Value> = groups.into_iter().flat_map(|g| g.values()).collect();
    let [group] = groups[..] else { return Err(format!(" in {} ways", groups.len())) };
    let weights = group.get("weights").unwrap_or(&Value::Null);
    let is = |key: &str, wanted: Value| weights.get(key) == Some(&wanted);
    if !is("num_bits", 8.into()) || !is("type", "float".into()) {
        return Err(" not as eight-bit floats".to_owned());
    }
    match weights.get("strategy").and_then(Value::as_str) {
        Some("tensor" | "channel") => Ok(Scheme::Fp8 { blocks: false }),
        Some("block") if weights.get("block_structure").is_some_and(is_128) => {
            Ok(Scheme::Fp8 { blocks: true })
        }
        other => Err(format!(" by '{}'", names::clip(other.unwrap_or("no strategy")))),
    }
}

impl Scheme {
    /// What a tensor is, which gets its type and its shape as a matrix; `None` for what the engine
    /// has no use for.
    ///
    /// # Errors
    /// If it is of a type that has no meaning there.
    pub(super) fn role(self, name: &str, entry: &mut TensorEntry) -> Result<Option<Role>, String> {
        let plain = || Ok(Some(Role { name: name.to_owned(), part: None }));
        let Some((stem, kind)) = name.rsplit_once('.') else { return plain() };
        let part = |part| Ok(Some(Role { name: format!("{stem}.weight"), part: Some(part) }));
        let matrix = || Ok(Some(Role { name: format!("{stem}.weight"), part: None }));
        if let Some(dtype) = own_type(kind).filter(|_| entry.dtype == TensorType::I8) {
            own_shape(entry, dtype)?;
            return matrix();
        }
        match (self, kind) {
            (Self::Gptq { .. } | Self::Awq, "qweight") => {
                let &[first, second] = &entry.dims[..] else {
                    return Err(format!("{} dimensions are no matrix", entry.dims.len()));
                };
                if entry.dtype != TensorType::I32 {
                    return Err("it must be of I32".to_owned());
                }
                (entry.dtype, entry.dims) = match self {
                    Self::Gptq { v2, act } => (gptq(v2, act), vec![second * 8, first]),
                    _ => (TensorType::AWQ_4, vec![second, first * 8]),
                };
                matrix()
            }
            (Self::Gptq { .. } | Self::Awq, "scales") => part("scales"),
            (Self::Gptq { .. } | Self::Awq, "qzeros") => part("qzeros"),
            (Self::Gptq { .. }, "g_idx") => part("g_idx"),
            (Self::Fp8 { blocks: true }, "weight") if entry.dtype == TensorType::F8_E4M3 => {
                entry.dtype = TensorType::F8_E4M3_B128;
                matrix()
            }
            (Self::Fp8 { .. }, "weight_scale" | "weight_scale_inv") => part("scales"),
            // Of activations, which are quantised as the engine does.
            (Self::Fp8 { .. }, "input_scale" | "output_scale" | "k_scale" | "v_scale") => Ok(None),
            _ => plain(),
        }
    }
}

impl Scheme {
    /// Whether a tensor without a place may be a bias that a library wrote beside every matrix.
    pub(super) fn has_zero_bias(self, canonical: &str) -> bool {
        matches!(self, Self::Gptq { .. }) && canonical.ends_with(".bias")
    }
}

/// A bias that is none.
///
/// # Errors
/// If it is one, or cannot be read.
pub(super) fn only_zeros(path: &Path, entry: &TensorEntry) -> Result<(), String> {
    let len = usize::try_from(entry.bytes).ok().filter(|&len| len <= MAX_BIAS_BYTES);
    let mut bytes = vec![0; len.ok_or("it has no place in the graph, and is too long for a bias")?];
    let io = |e: std::io::Error| format!("cannot read it: {e}");
    let mut file = File::open(path).map_err(io)?;
    file.seek(SeekFrom::Start(entry.offset)).map_err(io)?;
    file.read_exact(&mut bytes).map_err(io)?;
    if bytes.iter().all(|&byte| byte == 0) {
        Ok(())
    } else {
        Err("this bias has no place in the family's graph".to_owned())
    }
}

fn gptq(v2: bool, act: bool) -> TensorType {
    match (v2, act) {
        (false, false) => TensorType::GPTQ_4,
        (true, false) => TensorType::GPTQ_4_V2,
        (false, true) => TensorType::GPTQ_4_ACT,
        (true, true) => TensorType::GPTQ_4_V2_ACT,
    }
}

/// How the names of quantised matrices end in a copy that Millrace made.
fn own_type(kind: &str) -> Option<TensorType> {
    let blocks = |t: &TensorType| t.is_ggml() && t.is_supported() && t.block_elements() > 1;
    TensorType::ALL.iter().copied().filter(blocks).find(|t| t.as_str().to_ascii_lowercase() == kind)
}

/// Rows of bytes as rows of blocks.
fn own_shape(entry: &mut TensorEntry, dtype: TensorType) -> Result<(), String> {
    let row = entry.dims.first().copied().unwrap_or(0);
    if entry.dims.len() < 2 || !row.is_multiple_of(dtype.block_bytes()) {
        return Err(format!("its rows of {row} bytes are no whole {} blocks", dtype.as_str()));
    }
    entry.dims[0] = row / dtype.block_bytes() * dtype.block_elements();
    entry.dtype = dtype;
    Ok(())
}

/// Every quantised matrix has its parts, in shapes that fit.
///
/// # Errors
/// The entry that is wrong (by its canonical name), and how.
pub(super) fn check(
    config: &ModelConfig,
    by_name: &BTreeMap<&str, &TensorEntry>,
) -> Result<(), (String, String)> {
    for (name, matrix) in by_name.iter().filter(|(_, t)| !t.dtype.parts().is_empty()) {
        let stem = name.strip_suffix("weight").unwrap_or(name);
        if !name.starts_with("blk.") || config.features.transposed {
            let problem = format!("{} is supported in layers alone", matrix.dtype.as_str());
            return Err(((*name).to_owned(), problem));
        }
        for (part, needed) in matrix.dtype.parts() {
            let part_name = format!("{stem}{part}");
            match by_name.get(part_name.as_str()) {
                Some(entry) => {
                    check_part(matrix, part, entry).map_err(|problem| (part_name, problem))?;
                }
                None if *needed => {
                    let problem = format!(
                        "it is missing beside a matrix of {} (matrices of which several lie in one \
                         are not supported in this format)",
                        matrix.dtype.as_str()
                    );
                    return Err((part_name, problem));
                }
                None => {}
            }
        }
        let groups = |part| by_name.get(format!("{stem}{part}").as_str()).map(|e| e.dims.get(1));
        if let (Some(scales), Some(zeros)) = (groups("scales"), groups("qzeros"))
            && scales != zeros
        {
            let problem = "it has another number of groups than the scales beside it".to_owned();
            return Err((format!("{stem}qzeros"), problem));
        }
    }
    Ok(())
}

fn check_part(matrix: &TensorEntry, part: &str, entry: &TensorEntry) -> Result<(), String> {
    let &[cols, rows] = &matrix.dims[..] else { return Err("it belongs to no matrix".to_owned()) };
    let float = entry.dtype.is_float();
    let shape: Vec<u64> = entry.dims.iter().rev().copied().collect();
    let fits = match (matrix.dtype, part) {
        (TensorType::F8_E4M3, _) => {
            let one = entry.elements() == 1;
            float && (one || (entry.elements() == rows && entry.dims.len() <= 2))
        }
        (TensorType::F8_E4M3_B128, _) => float && shape == [rows.div_ceil(128), cols.div_ceil(128)],
        (_, "g_idx") => entry.dtype == TensorType::I32 && shape == [cols],
        (_, "scales") => {
            float && shape.len() == 2 && shape[1] == rows && groups(cols, shape[0], matrix.dtype)
        }
        (_, _) => {
            entry.dtype == TensorType::I32
                && rows.is_multiple_of(8)
                && shape.len() == 2
                && shape[1] == rows / 8
                && groups(cols, shape[0], matrix.dtype)
        }
    };
    if fits {
        return Ok(());
    }
    Err(format!(
        "{} of shape {shape:?} does not fit a matrix of {} with {rows} rows of {cols} (groups are \
         whole blocks of 32 inputs)",
        entry.dtype.as_str(),
        matrix.dtype.as_str()
    ))
}

/// Whether that many groups divide the inputs, into whole blocks where they are not scattered.
fn groups(cols: u64, count: u64, dtype: TensorType) -> bool {
    let step = if dtype.read_as() == TensorType::INT4 { 32 } else { 1 };
    count > 0 && cols.is_multiple_of(count) && (cols / count).is_multiple_of(step)
}
