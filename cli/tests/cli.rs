//! The program as a user meets it: what it prints, where, and with which exit code. No model is
//! needed here; whole clusters are tested elsewhere.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::GgufWriter;

/// The program with an environment of its own: no cluster, no cache of the user's.
fn millrace(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().expect("the program starts")
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace"));
    command
        .args(args)
        .env_remove("MILLRACE_CLUSTER")
        .env_remove("MILLRACE_THREADS")
        .env_remove("RUST_LOG")
        .env("MILLRACE_DIR", dir.join("state"))
        .env("MILLRACE_CACHE", dir.join("cache"))
        .env("NO_COLOR", "1")
        .current_dir(dir)
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

#[track_caller]
fn fails(output: &Output, code: i32, message: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "stderr: {stderr}");
    assert!(stderr.contains(message), "'{message}' is not in: {stderr}");
    assert!(output.stdout.is_empty(), "stdout of a failure: {}", text(&output.stdout));
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "stderr: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A file with two layers, one of a type that the engine does not compute with, and a byte-level
/// vocabulary.
fn tiny_model(dir: &Path) -> PathBuf {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.push("hi".to_owned());
    let vocab = tokens.len() as u64;
    let mut writer = GgufWriter::new();
    writer
        .set("general.architecture", "llama")
        .set("general.name", "tiny \u{1b}[31m")
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "smollm")
        .set("tokenizer.ggml.token_type", vec![1i32; tokens.len()])
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.merges", vec!["h i".to_owned()])
        .set("tokenizer.ggml.eos_token_id", 0u32);
    let mut tensor = |name: &str, dtype: TensorType, dims: &[u64]| {
        let bytes = dtype.bytes_of(dims.iter().product()).expect("whole blocks");
        writer.tensor(name, dtype, dims, vec![0; bytes as usize]).expect("a valid tensor");
    };
    tensor("token_embd.weight", TensorType::F32, &[32, vocab]);
    tensor("blk.0.attn_q.weight", TensorType::Q8_0, &[32, 32]);
    tensor("blk.1.attn_q.weight", TensorType::Q8_1, &[32, 32]);
    let path = dir.join("tiny.gguf");
    std::fs::write(&path, writer.to_bytes()).expect("the model is written");
    path
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[test]
fn help_shows_every_command_and_examples() {
    let dir = dir();
    let help = succeeds(&millrace(dir.path(), &["--help"]));
    for word in [
        "run",
        "up",
        "generate",
        "embed",
        "tokenize",
        "eval",
        "pull",
        "inspect",
        "quantize",
        "bench",
        "Examples:",
        "smollm2:135m",
    ] {
        assert!(help.contains(word), "{word} is not in: {help}");
    }
    let commands: [&[&str]; 12] = [
        &["run"],
        &["up"],
        &["generate"],
        &["embed"],
        &["tokenize"],
        &["eval", "nll"],
        &["eval", "logits"],
        &["pull"],
        &["inspect"],
        &["quantize"],
        &["bench", "engine"],
        &["bench", "serve"],
    ];
    for args in commands {
        let help = succeeds(&millrace(dir.path(), &[args, &["--help"]].concat()));
        assert!(help.contains("Usage: millrace"), "{help}");
    }
}

#[test]
fn the_contract_of_flags() {
    let dir = dir();
    let engine = ["--threads", "--cuts", "--prefill-chunk", "--micro-batches", "--kv-cache-dtype"];
    let engine = engine.iter().chain(&["--prefix-cache", "--speculate"]);
    for args in
        [&["run"][..], &["up"], &["generate"], &["embed"], &["eval", "nll"], &["bench", "serve"]]
    {
        let help = succeeds(&millrace(dir.path(), &[args, &["--help"]].concat()));
        for flag in engine.clone().chain(&["--activation-dtype", "--engine", "--stages"]) {
            assert!(help.contains(flag), "{args:?} lacks {flag}");
        }
    }
}

#[test]
fn wrong_usage_exits_with_two() {
    let dir = dir();
    let d = dir.path();
    let cases: [(&[&str], &str); 16] = [
        (&["nonsense"], "unrecognized subcommand"),
        (&["run"], "MODEL"),
        (&["run", "x.gguf", "--stages", "0"], "--stages"),
        (&["run", "x.gguf", "--temperature", "-1"], "--temperature"),
        (&["generate", "--max-tokens", "1"], "--prompt"),
        (&["generate", "--prompt", "a", "--token-ids", "b"], "cannot be used with"),
        (&["generate", "--prompt", "a", "--model", "m", "--cluster", "c"], "cannot be used with"),
        (&["generate", "--prompt", "a", "--stages", "2"], "--model"),
        (&["generate", "--prompt-file", "missing.txt"], "cannot read missing.txt"),
        (&["generate", "--prompt", "a", "--cluster", "missing.toml"], "missing.toml"),
        (&["embed"], "nothing to embed: give texts, or lines on stdin"),
        (&["embed", "a", "--pooling", "max"], "use mean or last"),
        (&["embed", "a", "--dimensions", "0"], "--dimensions"),
        (&["eval", "logits", "--token-ids", "x", "--top", "65"], "--top"),
        (&["bench", "serve", "--concurrency", "0"], "--concurrency"),
        (&["tokenize", "--model", "m", "--output", "yaml"], "yaml"),
    ];
    for (args, message) in cases {
        fails(&millrace(d, args), 2, message);
    }
}

#[test]
fn an_unknown_model_is_named_with_what_there_is() {
    let dir = dir();
    for args in [&["pull", "nosuch:1b"][..], &["inspect", "nosuch:1b"], &["run", "nosuch:1b", "x"]]
    {
        let output = millrace(dir.path(), args);
        fails(&output, 2, "nosuch:1b");
        assert!(text(&output.stderr).contains("smollm2:135m"), "{}", text(&output.stderr));
    }
}

#[test]
fn without_a_cluster_the_message_says_what_to_type() {
    let dir = dir();
    let output = millrace(dir.path(), &["generate", "--prompt", "a"]);
    fails(&output, 2, "no cluster to talk to");
    assert!(text(&output.stderr).contains("millrace up --model"), "{}", text(&output.stderr));
    let output = millrace(dir.path(), &["generate", "--prompt", "a", "--prefill-chunk", "3"]);
    fails(&output, 2, "--model");
}

#[test]
fn inspect_knows_the_parts_of_quantised_matrices() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/testdata/formats/awq-32");
    let output = succeeds(&millrace(dir.path(), &["inspect", "--brief", model]));
    assert!(output.contains("cpu, in the matrices beside them"), "{output}");
    assert!(!output.contains("unsupported"), "{output}");
}

#[test]
fn inspect_shows_a_file_that_cannot_be_served() {
    let dir = dir();
    let model = tiny_model(dir.path());
    let shown =
        succeeds(&millrace(dir.path(), &["inspect", model.to_str().expect("a UTF-8 path")]));
    for part in [
        "general.architecture",
        "tiny \\u{1b}[31m",
        "95 in all",
        "blk.1.attn_q.weight",
        "Q8_1",
        "unsupported",
        "32 x 32",
        "Cannot be served",
    ] {
        assert!(shown.contains(part), "'{part}' is not in: {shown}");
    }
    assert!(!shown.contains('\u{1b}'), "a file must not drive the terminal");
}

#[test]
fn a_file_that_is_no_model_fails_with_its_name() {
    let dir = dir();
    std::fs::write(dir.path().join("bad.gguf"), b"not a model at all").expect("written");
    fails(&millrace(dir.path(), &["inspect", "bad.gguf"]), 1, "bad.gguf");
}

#[test]
fn tokenize_prints_the_contract() {
    let dir = dir();
    let model = tiny_model(dir.path());
    let model = model.to_str().expect("a UTF-8 path");
    std::fs::write(dir.path().join("text"), "hi!").expect("written");
    let args = ["tokenize", "--model", model, "--file", "text", "--output", "json"];
    assert_eq!(succeeds(&millrace(dir.path(), &args)), "{\"ids\":[94,0]}\n");
    std::fs::write(dir.path().join("latin1"), b"caf\xe9").expect("written");
    let output = millrace(dir.path(), &["tokenize", "--model", model, "--file", "latin1"]);
    fails(&output, 2, "not UTF-8 text: the first bad byte is at offset 3");
}

#[test]
fn a_reader_that_leaves_is_a_clean_end() {
    let dir = dir();
    let model = tiny_model(dir.path());
    let mut child = command(dir.path(), &["inspect", model.to_str().expect("a UTF-8 path")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(0), "stderr: {}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "stderr: {}", text(&output.stderr));
}
