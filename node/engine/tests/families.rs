//! Every family against Hugging Face `transformers`: small models with weights that both sides compute
//! from the names of their tensors (`tests/testdata/families/make.py`), as safetensors and as GGUF.

#![allow(clippy::unwrap_used)]

#[path = "families/case.rs"]
mod case;
#[path = "families/gguf.rs"]
mod gguf;
#[path = "formats/rig.rs"]
mod rig;
#[path = "cpu_engine/tiny.rs"]
mod tiny;

use std::path::Path;

use case::{CASES, Case};
use millrace_engine::Isa;
use millrace_shared::model::gguf::{Gguf, GgufWriter};
use millrace_shared::model::{Activation, ModelFiles, TensorType};
use rig::{answers, pipeline, run, worst};
use serde_json::Value;

#[test]
fn logits_and_answers_are_those_of_transformers() {
    for case in CASES.map(Case::read) {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let layers = files.config.layers;
        let (prompt, answer) = (case.tokens("prompt"), case.tokens("answer"));
        let known = (&prompt[..], &answer[..], &case.logits()[..]);
        let (all, found) = answers(case.name, known, pipeline(&files, &[layers], Isa::best()));

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
        let halves = case.folder(TensorType::BF16, 1);
        let deviation = worst(&of(halves.path()), &case.logits());
        assert!(deviation < 0.1, "{} in BF16: {deviation}", case.name);
    }
}

#[test]
fn gguf_files_say_what_llama_cpp_says() {
    for case in CASES.map(Case::read) {
        let prompt = case.tokens("prompt");
        let folder = tempfile::tempdir().unwrap();
        let files = ModelFiles::open(&gguf::write(&case, folder.path())).unwrap();
        let layers = files.config.layers;
        let found = run(pipeline(&files, &[layers], Isa::best()), &prompt, 64);
        let deviation = worst(&found, &case::logits(&case.of_llama_cpp()));
        // llama.cpp has a table of f16 for GELU.
        let most =
            if files.config.features.activation == Activation::GeluTanh { 5e-3 } else { 1e-3 };
        assert!(deviation < most, "{}: {deviation}", case.name);
        let again = run(pipeline(&files, &[1, 2, layers], Isa::best()), &prompt, 13);
        assert!(again == found, "{} in three stages", case.name);
    }
}

#[test]
fn old_files_with_a_tensor_for_each_expert_say_the_same() {
    let case = Case::read("mixtral");
    let folder = tempfile::tempdir().unwrap();
    let path = gguf::write(&case, folder.path());
    let whole = ModelFiles::open(&path).unwrap();
    let (head, bytes) = (Gguf::open(&path).unwrap(), std::fs::read(&path).unwrap());
    let mut writer = GgufWriter::new();
    for (key, value) in head.metadata.iter() {
        writer.set(key, value.clone());
    }
    for t in &whole.tensors {
        let data = bytes[t.offset as usize..(t.offset + t.bytes) as usize].to_vec();
        writer.tensor(t.name.clone(), t.dtype, &t.dims, data).unwrap();
    }
    std::fs::write(&path, writer.to_bytes()).unwrap();
    let parts = ModelFiles::open(&path).unwrap();
    assert!(parts.tensor("blk.2.ffn_down.3.weight").is_some());
    let prompt = case.tokens("prompt");
    let found = run(pipeline(&parts, &[parts.config.layers], Isa::best()), &prompt, 64);
    assert!(worst(&found, &case::logits(&case.of_llama_cpp())) < 1e-3);
}

/// What a folder of a family says when its configuration has another value.
fn refusal(family: &'static str, key: &str, value: Value) -> String {
    let case = Case::read(family);
    let folder = case.folder(TensorType::F32, 1);
    let mut config = case.json["config"].clone();
    config[key] = value;
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    ModelFiles::open(folder.path()).unwrap_err().to_string()
}

#[test]
fn what_families_do_not_do_is_refused_by_name() {
    let long = |key: &str, value: Value| {
        let mut rope = Case::read("phi3_long").json["config"]["rope_parameters"].clone();
        rope[key] = value;
        rope
    };
    for (family, key, value, parts) in [
        ("qwen3_moe", "decoder_sparse_step", 2.into(), &["'decoder_sparse_step'"][..]),
        ("qwen3_moe", "mlp_only_layers", vec![0].into(), &["'mlp_only_layers'"]),
        ("qwen3_moe", "num_experts_per_tok", 7.into(), &["'num_experts_per_tok'", "1 to 6"]),
        ("qwen2_moe", "moe_intermediate_size", 64.into(), &["_exps", "768 rows"]),
        ("qwen2_moe", "shared_expert_intermediate_size", 32.into(), &["shared_expert", "32"]),
        ("mixtral", "num_local_experts", 3.into(), &["_exps", "rows"]),
        ("mixtral", "num_local_experts", 100_000.into(), &["'num_local_experts'", "1 to 1024"]),
        ("gpt2", "scale_attn_weights", false.into(), &["'scale_attn_weights'"]),
        ("gpt2", "n_positions", 64.into(), &["wpe", "64"]),
        ("gpt2", "n_inner", 128.into(), &["c_fc", "128"]),
        (
            "phi3_long",
            "rope_parameters",
            long("long_factor", vec![1.0].into()),
            &["'long_factor'", "8"],
        ),
        ("phi3_long", "rope_parameters", long("short_factor", Value::Null), &["'short_factor'"]),
        (
            "qwen2_yarn",
            "rope_parameters",
            serde_json::json!({ "rope_type": "yarn", "factor": -1.0 }),
            &["'factor'", "-1"],
        ),
    ] {
        let message = refusal(family, key, value);
        for part in parts {
            assert!(message.contains(part), "{family}: '{part}' is not in: {message}");
        }
    }
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
    let dynamic = serde_json::json!({ "rope_type": "dynamic", "factor": 4.0 });
    refused(&|f| set(f, "rope_parameters", dynamic.clone()), &["'dynamic'", "llama3, yarn"]);
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
