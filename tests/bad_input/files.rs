//! Model files: damaged, hostile, and of a kind that cannot be served.

use std::io::Read;
use std::path::Path;

use harness::processes::{self, command, fails_with};
use harness::{alone, model};
use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::GgufWriter;

use crate::cluster::serve;

/// Header with these counts, and then raw bytes.
fn header(tensors: u64, keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    let counts = [tensors.to_le_bytes(), keys.to_le_bytes()].concat();
    [&b"GGUF\x03\0\0\0"[..], &counts, &rest.concat()].concat()
}

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

/// A complete model of one layer, but for what the arguments spoil.
fn tiny(architecture: &str, query: TensorType) -> GgufWriter<'static> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", architecture)
        .set("llama.block_count", 1u32)
        .set("llama.embedding_length", 64u32)
        .set("llama.attention.head_count", 2u32)
        .set("llama.attention.head_count_kv", 1u32)
        .set("llama.feed_forward_length", 96u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "smollm")
        .set("tokenizer.ggml.tokens", vec!["t".to_owned(); 32])
        .set("tokenizer.ggml.merges", Vec::<String>::new());
    let matrices: [(&str, &[u64], TensorType); 11] = [
        ("token_embd.weight", &[64, 32], TensorType::F32),
        ("output_norm.weight", &[64], TensorType::F32),
        ("blk.0.attn_norm.weight", &[64], TensorType::F32),
        ("blk.0.attn_q.weight", &[64, 64], query),
        ("blk.0.attn_k.weight", &[64, 32], TensorType::F32),
        ("blk.0.attn_v.weight", &[64, 32], TensorType::F32),
        ("blk.0.attn_output.weight", &[64, 64], TensorType::F32),
        ("blk.0.ffn_norm.weight", &[64], TensorType::F32),
        ("blk.0.ffn_gate.weight", &[64, 96], TensorType::F32),
        ("blk.0.ffn_up.weight", &[64, 96], TensorType::F32),
        ("blk.0.ffn_down.weight", &[96, 64], TensorType::F32),
    ];
    for (name, dims, dtype) in matrices {
        let bytes = dtype.bytes_of(dims.iter().product()).unwrap();
        w.tensor(name, dtype, dims, vec![0; bytes as usize]).unwrap();
    }
    w
}

/// One tensor whose data would begin far behind the end of the file.
fn outside() -> Vec<u8> {
    let entry = [
        &string("token_embd.weight")[..],
        &1u32.to_le_bytes(),
        &8u64.to_le_bytes(),
        &0u32.to_le_bytes(),
        &(1u64 << 40).to_le_bytes(),
        &[0; 64],
    ];
    header(1, 0, &[&entry.concat()])
}

/// Files that are no models; what must be said of each.
fn damaged() -> Vec<(&'static str, Vec<u8>, &'static [&'static str])> {
    let head = {
        let mut bytes = vec![0; 4 << 20];
        std::fs::File::open(model()).unwrap().read_exact(&mut bytes).unwrap();
        bytes
    };
    let long_array = {
        let kind = [&9u32.to_le_bytes()[..], &0u32.to_le_bytes(), &(1u64 << 50).to_le_bytes()];
        header(0, 1, &[&string("k"), &kind.concat()])
    };
    let long_string =
        header(0, 1, &[&string("k"), &8u32.to_le_bytes(), &u64::MAX.to_le_bytes(), b"x"]);
    vec![
        ("truncated-header", head[..1000].to_vec(), &["truncated at byte"]),
        ("truncated-data", head, &["tensor"]),
        ("wrong-magic", b"GGML rather than GGUF, for once".to_vec(), &["not a GGUF file"]),
        ("empty", Vec::new(), &["not a GGUF file", "empty"]),
        ("huge-tensor-count", header(u64::MAX, 0, &[]), &["18446744073709551615", "limit"]),
        ("huge-key-count", header(0, 1 << 60, &[]), &["1152921504606846976", "limit"]),
        ("huge-array", long_array, &["key 'k'"]),
        ("huge-string", long_string, &["key 'k'"]),
        ("offset-outside", outside(), &["token_embd.weight"]),
        ("version", b"GGUF\x09\0\0\0rest".to_vec(), &["GGUF version 9"]),
    ]
}

fn inspect(home: &Path, file: &str) -> std::process::Output {
    let mut inspect = command("millrace", home);
    inspect.args(["inspect", file]);
    processes::run(inspect)
}

#[test]
fn damaged_model_files() {
    let _turn = alone();
    let home = tempfile::tempdir().unwrap();
    for (name, bytes, parts) in damaged() {
        let file = format!("{name}.gguf");
        std::fs::write(home.path().join(&file), bytes).unwrap();
        let parts = [&[file.as_str()], parts].concat();
        fails_with(&inspect(home.path(), &file), &parts);
        fails_with(&serve(home.path(), &file, &[]), &parts);
    }
}

#[test]
fn models_that_cannot_be_served() {
    let _turn = alone();
    let home = tempfile::tempdir().unwrap();
    let cases: [(GgufWriter<'_>, &[&str]); 2] = [
        (tiny("perceptron", TensorType::F32), &["architecture 'perceptron' is not supported"]),
        (tiny("llama", TensorType::Q8_1), &["blk.0.attn_q.weight", "Q8_1"]),
    ];
    for (writer, parts) in cases {
        std::fs::write(home.path().join("m.gguf"), writer.to_bytes()).unwrap();
        fails_with(&serve(home.path(), "m.gguf", &[]), parts);
        let shown = inspect(home.path(), "m.gguf");
        let text = String::from_utf8(shown.stdout).unwrap();
        assert!(shown.status.success() && text.contains("Cannot be served"), "{text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}
