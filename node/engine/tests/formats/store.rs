//! Writes any folder of floats as published checkpoints have them quantised, and, beside it, what that
//! means in F32.

#![allow(dead_code)]

use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

/// How matrices are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Gptq,
    Awq,
    Fp8,
}

/// Name, type, shape, bytes.
pub(crate) type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

/// Inputs of a group.
const GROUP: usize = 32;

impl How {
    fn config(self) -> Value {
        match self {
            Self::Gptq => json!({
                "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": false,
                "checkpoint_format": "gptq_v2",
            }),
            Self::Awq => json!({ "quant_method": "awq", "bits": 4, "group_size": GROUP }),
            Self::Fp8 => json!({ "quant_method": "fp8" }),
        }
    }

    /// Tensors of a matrix `outputs x inputs`, and what they mean.
    fn quantise(self, stem: &str, rows: usize, cols: usize, x: &[f32]) -> (Vec<Stored>, Vec<f32>) {
        if self == Self::Fp8 {
            return eight_bits(stem, rows, cols, x);
        }
        let groups = cols / GROUP;
        let (mut scales, mut zeros) = (vec![0f32; groups * rows], vec![0u32; groups * rows]);
        let (mut quants, mut means) = (vec![0u32; rows * cols], vec![0f32; rows * cols]);
        for (i, x) in x.chunks_exact(GROUP).enumerate() {
            let (row, group) = (i / groups, i % groups);
            let low = x.iter().copied().fold(0f32, f32::min);
            let high = x.iter().copied().fold(0f32, f32::max);
            let scale = half::f16::from_f32((high - low) / 15.0).to_f32();
            let zero = (-low / scale).round();
            scales[group * rows + row] = scale;
            zeros[group * rows + row] = zero as u32;
            for (j, x) in x.iter().enumerate() {
                let q = ((x / scale).round() + zero).clamp(0.0, 15.0);
                quants[i * GROUP + j] = q as u32;
                means[i * GROUP + j] = scale * (q - zero);
            }
        }
        let (words, shape) = match self {
            Self::Gptq => {
                let mut words = vec![0u32; cols / 8 * rows];
                for (at, q) in quants.iter().enumerate() {
                    let (row, col) = (at / cols, at % cols);
                    words[col / 8 * rows + row] |= q << (col % 8 * 4);
                }
                (words, vec![cols / 8, rows])
            }
            _ => {
                let mut words = vec![0u32; cols * rows / 8];
                for (at, q) in quants.iter().enumerate() {
                    let (row, col) = (at / cols, at % cols);
                    words[col * (rows / 8) + row / 8] |= q << self.shift(row);
                }
                (words, vec![cols, rows / 8])
            }
        };
        let mut zero_words = vec![0u32; groups * rows / 8];
        for (at, zero) in zeros.iter().enumerate() {
            let (group, row) = (at / rows, at % rows);
            zero_words[group * (rows / 8) + row / 8] |= zero << self.shift(row);
        }
        let bytes = |words: Vec<u32>| words.into_iter().flat_map(u32::to_le_bytes).collect();
        let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
        let scales = scales.into_iter().flat_map(half).collect();
        let tensors = vec![
            (format!("{stem}.qweight"), Dtype::I32, shape, bytes(words)),
            (format!("{stem}.qzeros"), Dtype::I32, vec![groups, rows / 8], bytes(zero_words)),
            (format!("{stem}.scales"), Dtype::F16, vec![groups, rows], scales),
        ];
        (tensors, means)
    }

    /// Where an output's nibble is in its word.
    fn shift(self, row: usize) -> u32 {
        const ORDER: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
        4 * if self == Self::Awq { ORDER[row % 8] } else { row as u32 % 8 }
    }
}

/// E4M3 with a scale for each row.
fn eight_bits(stem: &str, rows: usize, cols: usize, x: &[f32]) -> (Vec<Stored>, Vec<f32>) {
    let value = |b: u8| match b >> 3 {
        0 => f32::from(b & 7) / 512.0,
        e => (1.0 + f32::from(b & 7) / 8.0) * 2f32.powi(i32::from(e) - 7),
    };
    let table: Vec<f32> = (0..=126).map(value).collect();
    let (mut bytes, mut means, mut scales) = (Vec::new(), Vec::new(), Vec::new());
    for row in x.chunks_exact(cols) {
        let scale = row.iter().fold(0f32, |m, x| m.max(x.abs())) / 448.0;
        scales.extend(scale.to_le_bytes());
        for x in row {
            let size = (x / scale).abs();
            let above = table.partition_point(|&v| v < size).min(126);
            let below = above.saturating_sub(1);
            let near = if table[above] - size < size - table[below] { above } else { below };
            let sign = if *x < 0.0 { -1.0 } else { 1.0 };
            bytes.push(near as u8 | if *x < 0.0 { 0x80 } else { 0 });
            means.push(sign * table[near] * scale);
        }
    }
    let tensors = vec![
        (format!("{stem}.weight"), Dtype::F8_E4M3, vec![rows, cols], bytes),
        (format!("{stem}.weight_scale"), Dtype::F32, vec![rows, 1], scales),
    ];
    (tensors, means)
}

/// All tensors of a folder.
pub(crate) fn tensors(folder: &Path) -> Vec<Stored> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = std::fs::read(&path).unwrap();
            let stored = |(name, view): (String, TensorView<'_>)| {
                (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())
            };
            all.extend(SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(stored));
        }
    }
    all
}

/// A folder with these tensors, and configuration and tokenizer of another.
pub(crate) fn folder(of: &Path, quantised: Value, tensors: &[Stored]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(of.join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = quantised;
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(of.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    dir
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn f32s(name: &str, shape: Vec<usize>, x: &[f32]) -> Stored {
    let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    (name.to_owned(), Dtype::F32, shape, bytes)
}

/// A folder of F32 as `how` has it, and what that means.
pub(crate) fn store(of: &Path, how: How) -> [tempfile::TempDir; 2] {
    let (mut quantised, mut plain) = (Vec::new(), Vec::new());
    for tensor in tensors(of) {
        let (name, _, shape, data) = &tensor;
        let small = ["embed", "lm_head", "gate.weight", "gate_inp", "shared_expert_gate"];
        let kept = shape.len() != 2 || small.iter().any(|part| name.contains(part));
        let Some(stem) = name.strip_suffix(".weight").filter(|_| !kept) else {
            quantised.push(tensor.clone());
            plain.push(tensor);
            continue;
        };
        let (tensors, means) = how.quantise(stem, shape[0], shape[1], &floats(data));
        quantised.extend(tensors);
        plain.push(f32s(name, shape.clone(), &means));
    }
    [folder(of, how.config(), &quantised), folder(of, Value::Null, &plain)]
}

/// What a copy that Millrace quantised means.
pub(crate) fn dequantised(copy: &Path) -> tempfile::TempDir {
    let half = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32();
    let plain = |(name, dtype, shape, data): Stored| {
        let Some((stem, kind)) = name.rsplit_once('.').filter(|_| dtype == Dtype::U8) else {
            return (name, dtype, shape, data);
        };
        let mut x = Vec::new();
        let nibble = |b: &[u8], i: usize| f32::from((b[i % 16] >> (i / 16 * 4)) & 15);
        match kind {
            "q8_0" => data.chunks_exact(34).for_each(|b| {
                x.extend(b[2..].iter().map(|&q| half(b) * f32::from(q as i8)));
            }),
            "q4_0" => data.chunks_exact(18).for_each(|b| {
                x.extend((0..32).map(|i| half(b) * (nibble(&b[2..], i) - 8.0)));
            }),
            "q4_1" => data.chunks_exact(20).for_each(|b| {
                x.extend((0..32).map(|i| half(b) * nibble(&b[4..], i) + half(&b[2..])));
            }),
            other => panic!("'{other}' is no type of a copy"),
        }
        let mut shape = shape;
        let rows: usize = shape[..shape.len() - 1].iter().product();
        *shape.last_mut().unwrap() = x.len() / rows;
        f32s(&format!("{stem}.weight"), shape, &x)
    };
    let tensors: Vec<Stored> = tensors(copy).into_iter().map(plain).collect();
    folder(copy, Value::Null, &tensors)
}
