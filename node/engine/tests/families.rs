//! Every family against Hugging Face `transformers`: small models with weights that both sides compute
//! from the names of their tensors (`tests/testdata/families/make.py`), as safetensors and as GGUF.

#![allow(clippy::unwrap_used)]

#[path = "families/case.rs"]
mod case;
#[path = "cpu_engine/tiny.rs"]
mod tiny;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use case::{CASES, Case};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, Isa, StageSpec, TensorSource};
use millrace_shared::model::gguf::GgufWriter;
use millrace_shared::model::{Dtype, Family, ModelFiles, TensorType};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{StepMeta, Want};
use serde_json::Value;
use tiny::{Pipeline, row, tables};

/// Stages that end at the given layers.
fn pipeline(files: &ModelFiles, ends: &[u32], isa: Isa) -> Pipeline {
    let source = |entry: &millrace_shared::model::TensorEntry| TensorSource {
        entry: entry.clone(),
        path: files.path_of(entry).to_owned(),
        offset: entry.offset,
    };
    let sources: Vec<TensorSource> = files.tensors.iter().map(source).collect();
    let stage = |i: usize| {
        let spec = StageSpec {
            config: files.config.clone(),
            layers: if i == 0 { 0 } else { ends[i - 1] }..ends[i],
            embed: i == 0,
            head: i + 1 == ends.len(),
            settings: EngineSettings {
                kv_blocks: 8,
                kv_block_size: 16,
                kv_dtype: Dtype::F32,
                activation_dtype: Dtype::F32,
                max_batch_tokens: 64,
                max_num_seqs: 1,
                max_model_len: 128,
            },
            threads: 1 + i % 2,
            host_threads: 2,
            isa,
            packed_cache: None,
        };
        let mut engine = CpuEngine::new();
        engine.load(&spec, &sources, &mut |_| {}).unwrap();
        engine
    };
    Pipeline::of((0..ends.len()).map(stage).collect(), files.config.hidden as usize, 16)
}

/// Bits of the logits of every position, computed in chunks.
fn run(mut p: Pipeline, tokens: &[u32], chunk: usize) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for (i, some) in tokens.chunks(chunk).enumerate() {
        let meta = StepMeta {
            rows: vec![row(1, i * chunk, some.len(), Want::Score { top_k: 1 })],
            tables: if i == 0 { tables(1, tokens.len(), 16, 0) } else { Vec::new() },
            ..StepMeta::default()
        };
        all.extend(p.step(&meta, some).unwrap().into_iter().map(|(_, _, logits)| logits));
    }
    all
}

fn floats(bits: &[u32]) -> Vec<f64> {
    bits.iter().map(|&b| f64::from(f32::from_bits(b))).collect()
}

/// The largest difference from what is expected, relative to the largest logit where that is above 1.
fn worst(found: &[Vec<u32>], expected: &[Vec<f64>]) -> f64 {
    let size = expected.iter().flatten().fold(1f64, |m, x| m.max(x.abs()));
    let row = |(found, expected): (&Vec<u32>, &Vec<f64>)| {
        let pairs = floats(found).into_iter().zip(expected.clone());
        pairs.map(|(a, b)| (a - b).abs() / size).fold(0.0, f64::max)
    };
    found.iter().zip(expected).map(row).fold(0.0, f64::max)
}

fn best(logits: &[u32]) -> u32 {
    let logits = floats(logits);
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

#[test]
fn logits_and_answers_are_those_of_transformers() {
    for case in CASES.map(Case::read) {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let layers = files.config.layers;
        let (prompt, answer) = (case.tokens("prompt"), case.tokens("answer"));
        let all = [&prompt[..], &answer[..answer.len() - 1]].concat();
        let found = run(pipeline(&files, &[layers], Isa::best()), &all, 64);
        let deviation = worst(&found[..prompt.len()], &case.logits());
        assert!(deviation < 1e-3, "{}: {deviation}", case.name);
        let said: Vec<u32> = found[prompt.len() - 1..].iter().map(|l| best(l)).collect();
        assert_eq!(said, answer, "{}", case.name);

        // Wherever it is cut, however it comes in, whatever computes it.
        for (ends, chunk, isa) in [
            (&[1, 2, layers][..], 64, Isa::best()),
            (&[layers], 7, Isa::best()),
            (&[layers], 1, Isa::best()),
            (&[2, layers, layers], 13, Isa::Scalar),
        ] {
            let again = run(pipeline(&files, ends, isa), &all, chunk);
            assert!(again == found, "{} cut at {ends:?}, chunks of {chunk}, {isa}", case.name);
        }
    }
}

#[test]
fn other_files_of_the_same_model_say_the_same() {
    for case in CASES.map(Case::read) {
        let prompt = case.tokens("prompt");
        let of = |path: &Path| {
            let files = ModelFiles::open(path).unwrap();
            let layers = files.config.layers;
            run(pipeline(&files, &[layers], Isa::best()), &prompt, 64)
        };
        let folder = case.folder(TensorType::F32, 1);
        let expected = of(folder.path());
        let shards = case.folder(TensorType::F32, 3);
        assert!(of(shards.path()) == expected, "{} in three files", case.name);
        let gguf = gguf(&case, &ModelFiles::open(folder.path()).unwrap(), shards.path());
        // GGUF has no words for Mistral's window and for a scale other than the heads' width.
        let mut config = case.json["config"].clone();
        match case.name {
            "mistral" => config["sliding_window"] = Value::Null,
            "gemma2" => config["query_pre_attn_scalar"] = 16.into(),
            _ => {}
        }
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let expected = of(folder.path());
        let expected: Vec<Vec<f64>> = expected.iter().map(|l| floats(l)).collect();
        let deviation = worst(&of(&gguf), &expected);
        assert!(deviation < 1e-5, "{} as GGUF: {deviation}", case.name);
        let halves = case.folder(TensorType::BF16, 1);
        let deviation = worst(&of(halves.path()), &case.logits());
        assert!(deviation < 0.1, "{} in BF16: {deviation}", case.name);
    }
}

/// The model as llama.cpp's converter writes it.
fn gguf(case: &Case, files: &ModelFiles, folder: &Path) -> PathBuf {
    let c = &files.config;
    let arch = if c.family == Family::Mistral { "llama" } else { c.family.as_str() };
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", arch);
    let key = |what: &str| format!("{arch}.{what}");
    for (what, value) in [
        ("block_count", c.layers),
        ("embedding_length", c.hidden),
        ("attention.head_count", c.heads),
        ("attention.head_count_kv", c.kv_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("feed_forward_length", c.ffn),
        ("context_length", c.context),
        ("rope.dimension_count", c.rope.dim),
    ] {
        writer.set(key(what), value);
    }
    writer.set(key("attention.layer_norm_rms_epsilon"), c.rms_eps);
    writer.set(key("rope.freq_base"), c.rope.base);
    if let Some(window) = c.features.window.filter(|_| c.family != Family::Mistral) {
        writer.set(key("attention.sliding_window"), window.size);
    }
    if c.family == Family::Gemma2 {
        writer.set(key("attn_logit_softcapping"), c.features.attention_softcap);
        writer.set(key("final_logit_softcapping"), c.features.logit_softcap);
    }
    let read = |entry: &millrace_shared::model::TensorEntry| {
        let all = std::fs::read(files.path_of(entry)).unwrap();
        all[entry.offset as usize..(entry.offset + entry.bytes) as usize].to_vec()
    };
    let mut fused: HashMap<String, (Vec<u64>, Vec<u8>)> = HashMap::new();
    for entry in &files.tensors {
        let (mut data, mut name, mut dims) = (read(entry), entry.name.clone(), entry.dims.clone());
        if arch == "llama" && (name.contains("attn_q.") || name.contains("attn_k.")) {
            data = reordered(&data, c.head_dim as usize, c.hidden as usize * 4);
        }
        if c.features.gain_plus_one && name.contains("norm") {
            data = (data.chunks_exact(4))
                .flat_map(|b| (f32::from_le_bytes(b.try_into().unwrap()) + 1.0).to_le_bytes())
                .collect();
        }
        // As Phi's files have them.
        let parts = [
            ("attn_q.", "attn_qkv."),
            ("attn_k.", "attn_qkv."),
            ("attn_v.", "attn_qkv."),
            ("ffn_gate.", "ffn_up."),
            ("ffn_up.", "ffn_up."),
        ];
        if c.family == Family::Phi3
            && let Some((part, whole)) = parts.iter().find(|(part, _)| name.contains(part))
        {
            name = name.replace(part, whole);
            let (all_dims, all) =
                fused.remove(&name).unwrap_or_else(|| (vec![dims[0], 0], Vec::new()));
            dims[1] += all_dims[1];
            data = [all, data].concat();
            fused.insert(name, (dims, data));
            continue;
        }
        writer.tensor(name, TensorType::F32, &dims, data).unwrap();
    }
    for (name, (dims, data)) in fused {
        writer.tensor(name, TensorType::F32, &dims, data).unwrap();
    }
    if case.name == "llama3" {
        let factors: Vec<u8> = llama3_factors(case).iter().flat_map(|x| x.to_le_bytes()).collect();
        let dims = [factors.len() as u64 / 4];
        writer.tensor("rope_freqs.weight".to_owned(), TensorType::F32, &dims, factors).unwrap();
    }
    let path = folder.join("model.gguf");
    std::fs::write(&path, writer.to_bytes()).unwrap();
    path
}

/// Rows of each head so that elements which are rotated together are neighbours.
fn reordered(data: &[u8], dim: usize, row_bytes: usize) -> Vec<u8> {
    let head = |head: &[u8]| -> Vec<u8> {
        let row = |r: usize| &head[r * row_bytes..(r + 1) * row_bytes];
        (0..dim / 2).flat_map(|i| [row(i), row(dim / 2 + i)].concat()).collect()
    };
    data.chunks_exact(dim * row_bytes).flat_map(head).collect()
}

/// The factors that the converter writes for Llama 3's scaling.
fn llama3_factors(case: &Case) -> Vec<f32> {
    let scaling = &case.json["config"]["rope_parameters"];
    let number = |key: &str| scaling[key].as_f64().unwrap();
    let context = number("original_max_position_embeddings");
    let (low, high, factor) =
        (number("low_freq_factor"), number("high_freq_factor"), number("factor"));
    let one = |pair: usize| {
        let wavelength =
            std::f64::consts::TAU * number("rope_theta").powf(2.0 * pair as f64 / 16.0);
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..8).map(|pair| one(pair) as f32).collect()
}

#[test]
fn damaged_and_contradictory_folders_are_refused_by_name() {
    let case = Case::read("qwen2");
    let refused = |change: &dyn Fn(&Path), parts: &[&str]| {
        let folder = case.folder(TensorType::F32, 2);
        change(folder.path());
        let message = ModelFiles::open(folder.path()).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    };
    let set = |folder: &Path, key: &str, value: Value| {
        let mut config = case.json["config"].clone();
        config[key] = value;
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    };
    const FIRST: &str = "model-00001-of-00002.safetensors";
    refused(&|f| set(f, "model_type", "mamba".into()), &["config.json", "'mamba'", "qwen2, qwen3"]);
    refused(&|f| set(f, "hidden_size", 0.into()), &["config.json", "'hidden_size'", "implausible"]);
    refused(&|f| set(f, "hidden_size", 128.into()), &["has the shape", "128"]);
    refused(&|f| set(f, "num_hidden_layers", 2.into()), &["model.layers.2", "no place"]);
    refused(&|f| set(f, "num_hidden_layers", 4.into()), &["model.layers.3", "missing"]);
    refused(&|f| set(f, "vocab_size", 32.into()), &["embed_tokens", "32"]);
    refused(&|f| set(f, "tie_word_embeddings", false.into()), &["tie_word_embeddings", "lm_head"]);
    refused(&|f| set(f, "hidden_act", "relu".into()), &["'relu'", "silu"]);
    let yarn = serde_json::json!({ "rope_type": "yarn", "factor": 4.0 });
    refused(&|f| set(f, "rope_parameters", yarn.clone()), &["'yarn'", "llama3"]);
    let gptq = serde_json::json!({ "quant_method": "gptq" });
    refused(&|f| set(f, "quantization_config", gptq.clone()), &["gptq", "--quantize"]);
    let remove = |f: &Path| std::fs::remove_file(f.join(FIRST)).unwrap();
    refused(&remove, &["index.json", FIRST, "missing"]);
    let truncate = |f: &Path| {
        let bytes = std::fs::read(f.join(FIRST)).unwrap();
        std::fs::write(f.join(FIRST), &bytes[..bytes.len() - 4]).unwrap();
    };
    refused(&truncate, &[FIRST, "cut off or damaged"]);
    let header = |len: u64, json: &str| {
        let bytes = [&len.to_le_bytes()[..], json.as_bytes()].concat();
        move |f: &Path| std::fs::write(f.join(FIRST), &bytes).unwrap()
    };
    refused(&header(u64::MAX, "{}"), &[FIRST, "a header of 18446744073709551615 bytes"]);
    refused(&header(2, "xx"), &[FIRST, "header is damaged"]);
    let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    refused(&header(overlap.len() as u64, overlap), &[FIRST, "header is damaged"]);
    let up = r#"{"weight_map":{"a":"../../etc/passwd"}}"#;
    let index = |f: &Path| std::fs::write(f.join("model.safetensors.index.json"), up).unwrap();
    refused(&index, &["index.json", "no safetensors file"]);
    refused(&|f| std::fs::write(f.join("config.json"), "{").unwrap(), &["config.json", "no JSON"]);
}
