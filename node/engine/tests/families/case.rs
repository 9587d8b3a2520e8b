//! Small models of every family, as `tests/testdata/families/make.py` knows them.

#![allow(dead_code)]

use std::path::Path;

use millrace_shared::model::TensorType;
use serde_json::Value;

pub(crate) const CASES: [&str; 16] = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen2_yarn",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3_long",
    "phi3_short",
    "phi4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt2",
];

/// What `transformers` says of a model.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) json: Value,
}

impl Case {
    pub(crate) fn read(name: &'static str) -> Self {
        Self { name, json: read(&format!("{name}.json")) }
    }

    /// What llama.cpp says of it: the head of its GGUF file, and logits.
    pub(crate) fn of_llama_cpp(&self) -> Value {
        read(&format!("{}.gguf.json", self.name))
    }

    pub(crate) fn tokens(&self, key: &str) -> Vec<u32> {
        let list = self.json[key].as_array().unwrap();
        list.iter().map(|t| t.as_u64().unwrap() as u32).collect()
    }

    pub(crate) fn logits(&self) -> Vec<Vec<f64>> {
        logits(&self.json)
    }

    /// Names, shapes and elements of the tensors, by name.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let plus_one = self.json["plus_one"].as_bool().unwrap();
        let tensor = |(name, shape): (&String, &Value)| {
            let shape: Vec<usize> =
                shape.as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
            (name.clone(), shape.clone(), weights(name, &shape, plus_one))
        };
        self.json["tensors"].as_object().unwrap().iter().map(tensor).collect()
    }

    /// As checkpoints have them: with a tensor for each matrix of each expert, and GPT-2's under its
    /// first names, with a mask among them.
    fn published(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut all = Vec::new();
        if self.name == "gpt2" {
            all.push(("h.0.attn.bias".to_owned(), vec![1, 1, 2, 2], vec![1.0, 0.0, 1.0, 1.0]));
        }
        for (name, shape, data) in self.tensors() {
            let name = name.trim_start_matches("transformer.").to_owned();
            let stem = name.strip_suffix("gate_up_proj").or_else(|| name.strip_suffix("down_proj"));
            let (Some(stem), &[experts, rows, cols]) = (stem, &shape[..]) else {
                all.push((name, shape, data));
                continue;
            };
            let mixtral = self.name == "mixtral";
            let stem =
                if mixtral { stem.replace("mlp", "block_sparse_moe") } else { stem.to_owned() };
            let parts: &[&str] = match (name.ends_with("gate_up_proj"), mixtral) {
                (true, true) => &["w1", "w3"],
                (true, false) => &["gate_proj", "up_proj"],
                (false, true) => &["w2"],
                (false, false) => &["down_proj"],
            };
            let rows = rows / parts.len();
            for (i, data) in data.chunks(rows * cols).enumerate() {
                let (expert, part) = (i / parts.len(), parts[i % parts.len()]);
                assert!(expert < experts);
                all.push((
                    format!("{stem}{expert}.{part}.weight"),
                    vec![rows, cols],
                    data.to_vec(),
                ));
            }
        }
        all
    }

    /// Writes it as Hugging Face keeps it, over so many files (several: as it is published); with a
    /// tokenizer of one letter a token.
    pub(crate) fn folder(&self, dtype: TensorType, files: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write("config.json", self.json["config"].to_string().as_bytes());
        let letter = |i: u32| (char::from_u32(0x4e00 + i).unwrap().to_string(), Value::from(i));
        let vocab: serde_json::Map<String, Value> = (0..64).map(letter).collect();
        let tokenizer = serde_json::json!({
            "version": "1.0",
            "added_tokens": [],
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "\u{4e00}" },
        });
        write("tokenizer.json", tokenizer.to_string().as_bytes());
        let tensors = if files > 1 { self.published() } else { self.tensors() };
        let mut index = serde_json::Map::new();
        for (i, some) in tensors.chunks(tensors.len().div_ceil(files)).enumerate() {
            let file = match files {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{files:05}.safetensors", i + 1),
            };
            let data: Vec<Vec<u8>> = some.iter().map(|(_, _, x)| bytes(dtype, x)).collect();
            let mut views = Vec::new();
            for ((name, shape, _), data) in some.iter().zip(&data) {
                index.insert(name.clone(), file.clone().into());
                let dtype = match dtype {
                    TensorType::F32 => safetensors::Dtype::F32,
                    _ => safetensors::Dtype::BF16,
                };
                let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), data);
                views.push((name.clone(), view.unwrap()));
            }
            write(&file, &safetensors::serialize(views, None).unwrap());
        }
        if files > 1 {
            let index = serde_json::json!({ "metadata": {}, "weight_map": index });
            write("model.safetensors.index.json", index.to_string().as_bytes());
        }
        dir
    }
}

fn read(name: &str) -> Value {
    // Where it was built, or, carried elsewhere, where it runs.
    let places = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().chain([Path::new("")]);
    let mut folders = places.map(|f| f.join("tests/testdata/families"));
    let folder = folders.find(|f| f.is_dir()).unwrap();
    serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
}

/// Those of a file of expected answers.
pub(crate) fn logits(json: &Value) -> Vec<Vec<f64>> {
    let row = |r: &Value| r.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    json["logits"].as_array().unwrap().iter().map(row).collect()
}

/// As `make.py` has it.
fn uniform(name: &str, count: usize) -> Vec<f32> {
    let hash = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    let one = |i: usize| {
        let z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 23) - 1.0) as f32
    };
    (0..count).map(one).collect()
}

fn weights(name: &str, shape: &[usize], plus_one: bool) -> Vec<f32> {
    let x = uniform(name, shape.iter().product());
    let (scale, shift) = match shape {
        [_, _] if name.contains("embed") => (1.0, 0.0),
        [_, .., cols] => (2.0 / (*cols as f32).sqrt(), 0.0),
        _ if name.ends_with("bias") => (0.5, 0.0),
        _ => (0.25, if plus_one { 0.0 } else { 1.0 }),
    };
    x.into_iter().map(|x| x * scale + shift).collect()
}

fn bytes(dtype: TensorType, x: &[f32]) -> Vec<u8> {
    match dtype {
        TensorType::F32 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => x.iter().flat_map(|x| half::bf16::from_f32(*x).to_bits().to_le_bytes()).collect(),
    }
}
