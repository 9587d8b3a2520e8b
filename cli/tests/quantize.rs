//! `millrace quantize` and `--quantize` with the program itself, on a tiny model of floats.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::{Gguf, GgufWriter, Value};

/// The program with a cache of its own, in `dir`.
fn millrace(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(args)
        .env_remove("MILLRACE_CLUSTER")
        .env_remove("RUST_LOG")
        .env("MILLRACE_THREADS", "1")
        .env("MILLRACE_DIR", dir.join("state"))
        .env("MILLRACE_CACHE", dir.join("cache"))
        .env("NO_COLOR", "1")
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "stderr: {}", text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn fails(output: &Output, code: i32, message: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "stderr: {stderr}");
    assert!(stderr.contains(message), "'{message}' is not in: {stderr}");
}

/// Small random numbers, the same ones each time.
fn floats(state: &mut u64, count: u64) -> Vec<u8> {
    let mut number = || {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        ((*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.5
    };
    (0..count).flat_map(|_| number().to_le_bytes()).collect()
}

/// Two layers of F32 and a byte-level vocabulary without merges.
fn model(dir: &Path) -> PathBuf {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ".to_owned(), "<end>".to_owned()]);
    let vocab = tokens.len() as u64;
    let mut kinds = vec![1i32; tokens.len()];
    kinds[tokens.len() - 1] = 3;
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("general.file_type", 0u32)
        .set("llama.block_count", 2u32)
        .set("llama.embedding_length", 64u32)
        .set("llama.attention.head_count", 2u32)
        .set("llama.attention.head_count_kv", 1u32)
        .set("llama.feed_forward_length", 96u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "smollm")
        .set("tokenizer.ggml.token_type", kinds)
        .set("tokenizer.ggml.eos_token_id", tokens.len() as u32 - 1)
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.merges", Vec::<String>::new());
    let mut state = 88_172_645_463_325_252;
    let mut tensor = |name: &str, dims: &[u64]| {
        let data = floats(&mut state, dims.iter().product());
        w.tensor(name, TensorType::F32, dims, data).expect("a valid tensor");
    };
    tensor("token_embd.weight", &[64, vocab]);
    for layer in 0..2 {
        for (name, dims) in [
            ("attn_norm", &[64][..]),
            ("attn_q", &[64, 64]),
            ("attn_k", &[64, 32]),
            ("attn_v", &[64, 32]),
            ("attn_output", &[64, 64]),
            ("ffn_norm", &[64]),
            ("ffn_gate", &[64, 96]),
            ("ffn_up", &[64, 96]),
            ("ffn_down", &[96, 64]),
        ] {
            tensor(&format!("blk.{layer}.{name}.weight"), dims);
        }
    }
    tensor("output_norm.weight", &[64]);
    let path = dir.join("tiny.gguf");
    std::fs::write(&path, w.to_bytes()).expect("the model is written");
    path
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn types(path: &Path) -> (TensorType, TensorType, TensorType) {
    let gguf = Gguf::open(path).expect("a sound file");
    let of = |name: &str| gguf.tensor(name).expect("the tensor").dtype;
    (of("token_embd.weight"), of("blk.1.ffn_up.weight"), of("blk.1.ffn_norm.weight"))
}

#[test]
fn a_copy_and_its_report() {
    use TensorType::{F16, F32, Q4_0, Q8_0};
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    model(dir.path());
    let out = millrace(dir.path(), &["quantize", "tiny.gguf", "q4.gguf", "--type", "q4_0"]);
    let shown = succeeds(&out);
    for part in ["blk.*.ffn_up.weight (2)", "Q4_0", "Q8_0", "bits per weight", "rmse", "q4.gguf"] {
        assert!(shown.contains(part), "'{part}' is not in: {shown}");
    }
    assert!(out.stderr.is_empty(), "quiet without a terminal: {}", text(&out.stderr));
    assert_eq!(types(&at("q4.gguf")), (Q8_0, Q4_0, F32));
    let kind = Gguf::open(at("q4.gguf")).expect("sound").metadata.get("general.file_type").cloned();
    assert_eq!(kind, Some(Value::U32(2)));

    let args = ["quantize", "tiny.gguf", "f16.gguf", "--type", "F16", "--output-type", "q8_0"];
    succeeds(&millrace(dir.path(), &args));
    assert_eq!(types(&at("f16.gguf")), (Q8_0, F16, F32));

    std::fs::write(at("eval.txt"), "the quick brown fox jumps over it").expect("written");
    let args =
        ["quantize", "tiny.gguf", "q8.gguf", "--type", "q8_0", "--json", "--eval", "eval.txt"];
    let report = succeeds(&millrace(dir.path(), &args));
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let number = |path: &str| report.pointer(path).and_then(|v| v.as_f64()).expect(path);
    assert_eq!(report["tensors"].as_array().map(Vec::len), Some(20));
    assert!(number("/relative_rmse") < 0.01 && number("/relative_rmse") > 0.0);
    assert!(number("/bits_per_weight_after") < 9.0);
    let (before, after) = (number("/eval/before/mean_nll"), number("/eval/after/mean_nll"));
    assert!((before - after).abs() < 0.05 && before > 1.0, "{before} {after}");

    let shown = succeeds(&millrace(
        dir.path(),
        &["quantize", "tiny.gguf", "a.gguf", "--type", "q8_0", "--eval"],
    ));
    assert!(shown.contains("eval nll: "), "the program's own text: {shown}");
}

#[test]
fn what_is_refused() {
    let dir = dir();
    let d = dir.path();
    model(d);
    let run = |args: &[&str]| millrace(d, &[&["quantize"], args].concat());
    succeeds(&run(&["tiny.gguf", "q4.gguf", "--type", "q4_1"]));
    let whole = std::fs::read(d.join("q4.gguf")).expect("read");
    fails(&run(&["tiny.gguf", "q4.gguf", "--type", "q8_0"]), 2, "--force");
    fails(&run(&["tiny.gguf", "tiny.gguf", "--type", "q8_0", "--force"]), 2, "another name");
    fails(&run(&["q4.gguf", "q8.gguf", "--type", "q8_0"]), 2, "--allow-requantize");
    fails(&run(&["tiny.gguf", "x.gguf", "--type", "q3_k"]), 2, "q8_0, q4_0, q4_1, f32");
    fails(&run(&["tiny.gguf", "no/x.gguf", "--type", "q8_0"]), 1, "cannot make a file in no");
    assert_eq!(std::fs::read(d.join("q4.gguf")).expect("read"), whole);
    assert!(!d.join("q8.gguf").exists() && !d.join("x.gguf").exists());
    succeeds(&run(&["q4.gguf", "f32.gguf", "--type", "f32", "--allow-requantize"]));
    succeeds(&run(&["tiny.gguf", "q4.gguf", "--type", "q8_0", "--force"]));
    assert_eq!(types(&d.join("q4.gguf")).1, TensorType::Q8_0);
}

/// The one copy in the cache, and when it was made.
fn kept(dir: &Path) -> (PathBuf, SystemTime) {
    let folder = std::fs::read_dir(dir.join("cache/quantized")).expect("a folder of copies");
    let paths = folder.map(|e| e.expect("an entry").path());
    let mut copies = paths.filter(|p| p.extension().is_some_and(|e| e == "gguf"));
    let copy = copies.next().expect("a copy");
    assert_eq!(copies.next(), None, "one copy");
    let made = std::fs::metadata(&copy).and_then(|m| m.modified()).expect("a time");
    (copy, made)
}

#[test]
fn on_load_a_copy_is_made_once_and_served() {
    let dir = dir();
    let d = dir.path();
    let source = model(d);
    // A copy that nobody has used for long makes room.
    let old = d.join("cache/quantized/old.gguf");
    std::fs::create_dir_all(d.join("cache/quantized")).expect("a folder");
    let long_ago = SystemTime::now() - Duration::from_hours(61 * 24);
    let file = std::fs::File::create(&old).expect("a file");
    file.set_modified(long_ago).expect("a time");
    let ask = |model: &str, more: &[&str]| {
        let args = ["generate", "--model", model, "--prompt", "abc", "--max-tokens", "6"];
        millrace(d, &[&args[..], &["--temperature", "0", "--output", "json"], more].concat())
    };
    let first = ask("tiny.gguf", &["--quantize", "q4_0", "--stages", "2"]);
    let answer = succeeds(&first);
    assert!(
        text(&first.stderr).contains("quantising the model to q4_0"),
        "{}",
        text(&first.stderr)
    );
    let (copy, made) = kept(d);
    assert_eq!(types(&copy).1, TensorType::Q4_0);

    // Again, under another name: the same content, the same copy, the same tokens.
    std::fs::rename(&source, d.join("renamed.gguf")).expect("renamed");
    let again = ask("renamed.gguf", &["--quantize", "q4_0"]);
    let tokens =
        |s: &str| serde_json::from_str::<serde_json::Value>(s).expect("JSON")["token_ids"].clone();
    assert_eq!(tokens(&succeeds(&again)), tokens(&answer));
    assert!(!text(&again.stderr).contains("quantising"), "{}", text(&again.stderr));
    assert_eq!(kept(d), (copy.clone(), made));
    let uses = std::fs::read_dir(d.join("cache/uses")).expect("a folder of uses");
    let name = copy.file_name().expect("a name").to_string_lossy().into_owned();
    let names_it = |path: PathBuf| std::fs::read_to_string(path).is_ok_and(|l| l.contains(&name));
    assert!(uses.flatten().any(|e| names_it(e.path())), "use is marked");
    let copy = copy.to_str().expect("a UTF-8 path");
    assert_eq!(tokens(&succeeds(&ask(copy, &[]))), tokens(&answer));

    fails(&ask(copy, &["--quantize", "q8_0"]), 2, "leave --quantize out");
    fails(&ask("renamed.gguf", &["--quantize", "q4_k"]), 2, "q8_0, q4_0, q4_1");
    let no_model = millrace(d, &["generate", "--prompt", "a", "--quantize", "q8_0"]);
    fails(&no_model, 2, "--model");
}

#[test]
fn every_command_that_starts_a_model_has_the_flag() {
    let dir = dir();
    for args in [
        &["run"][..],
        &["up"],
        &["generate"],
        &["eval", "nll"],
        &["bench", "serve"],
        &["bench", "engine"],
    ] {
        let help = succeeds(&millrace(dir.path(), &[args, &["--help"]].concat()));
        assert!(help.contains("--quantize <TYPE>"), "{args:?}: {help}");
    }
}
