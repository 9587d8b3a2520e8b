//! `millrace compress` with the program itself: what goes wrong is told, and leaves nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::GgufWriter;

fn command(dir: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env_remove("RUST_LOG")
        .env("MILLRACE_DIR", dir.join("state"))
        .env("MILLRACE_CACHE", dir.join("cache"))
        .current_dir(dir)
        .stdin(Stdio::null());
    command
}

fn millrace(dir: &Path, args: &[&str]) -> Output {
    let mut command = command(dir, env!("CARGO_BIN_EXE_millrace"));
    command.args(args).output().expect("the program starts")
}

#[track_caller]
fn fails(output: &Output, code: i32, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "stderr: {stderr}");
    assert!(stderr.contains(message), "'{message}' is not in: {stderr}");
}

/// One layer of ones, without a tokenizer.
fn model(dir: &Path) -> PathBuf {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("llama.block_count", 1u32)
        .set("llama.embedding_length", 64u32)
        .set("llama.attention.head_count", 2u32)
        .set("llama.feed_forward_length", 96u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("llama.vocab_size", 64u32);
    let mut tensor = |name: &str, dims: &[u64]| {
        let ones = (0..dims.iter().product()).flat_map(|_: u64| 1f32.to_le_bytes());
        w.tensor(name, TensorType::F32, dims, ones.collect::<Vec<u8>>()).expect("a valid tensor");
    };
    tensor("token_embd.weight", &[64, 64]);
    for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
        tensor(&format!("blk.0.{name}.weight"), &[64, 64]);
    }
    tensor("blk.0.attn_norm.weight", &[64]);
    tensor("blk.0.ffn_norm.weight", &[64]);
    tensor("blk.0.ffn_gate.weight", &[64, 96]);
    tensor("blk.0.ffn_up.weight", &[64, 96]);
    tensor("blk.0.ffn_down.weight", &[96, 64]);
    tensor("output_norm.weight", &[64]);
    let path = dir.join("ones.gguf");
    std::fs::write(&path, w.to_bytes()).expect("the model is written");
    path
}

#[test]
fn a_step_is_carried_out_and_told() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let args = ["compress", "apply", "ones.gguf", "out.gguf", "method = 'binary'"];
    let output = millrace(dir.path(), &args);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        stdout.contains("ffn_down.weight") && stdout.contains("GGUF has no such format"),
        "{stdout}"
    );
    assert!(dir.path().join("out.gguf").is_file());
    fails(&millrace(dir.path(), &args), 2, "--force replaces it");
}

#[test]
fn a_recipe_tells_as_json_and_as_a_page_what_was_made_of_what() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let at = |name: &str| dir.path().join(name);
    let recipe = "model = 'ones.gguf'\noutput = 'out.gguf'\n[[step]]\nmethod = 'binary'\n\
                  [[step]]\nmethod = 'quantise'\ntype = 'q4_0'\n";
    std::fs::write(at("r.toml"), recipe).unwrap();
    let run = |more: &[&str]| {
        millrace(dir.path(), &[&["compress", "run", "r.toml", "--no-eval"], more].concat())
    };
    let output = run(&[]);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("machines of kind cpu-4c-16g"), "{stdout}");
    let report = std::fs::read(at("out.gguf.report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert!(report["before"].is_null() && report["plan"]["after"]["nodes"] == 1, "{report}");
    let page = std::fs::read_to_string(at("out.gguf.report.html")).unwrap();
    let hash = report["run"]["result"]["blake3"].as_str().unwrap();
    assert!(
        page.contains(hash) && page.contains("step 2: method = &quot;quantise&quot;"),
        "{page}"
    );
    assert!(stdout.contains(hash), "{stdout}");
    assert!(!at("out.gguf.run.json").exists() && !at("out.gguf.step1").exists());
    fails(&run(&[]), 2, "--force replaces it");
    assert_eq!(run(&["--force"]).status.code(), Some(0));
}

#[test]
fn what_cannot_be_is_told_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let apply = |out: &str| {
        let args = ["compress", "apply", "--force", "ones.gguf", out, "method = 'binary'"];
        millrace(dir.path(), &args)
    };
    std::fs::create_dir(dir.path().join("d")).unwrap();
    fails(&apply("d"), 2, "d is a folder, which a file does not replace");
    fails(&apply("no/o.gguf"), 2, "there is no folder no: make it first");
    fails(&apply("ones.gguf"), 2, "read and written at once");
    let compare =
        |args: &[&str]| millrace(dir.path(), &[&["eval", "compare", "ones.gguf"], args].concat());
    fails(&compare(&["nix.gguf"]), 2, "there is no file 'nix.gguf'");
    fails(&compare(&["--html", "no/page.html"]), 2, "cannot write no/page.html");
    let before = std::fs::read(dir.path().join("ones.gguf")).unwrap();
    fails(&compare(&["--html", "ones.gguf"]), 2, "ones.gguf is there and is no page");
    let table = ["compress", "table", "ones.gguf", "--only", "binary row", "--state", "ones.gguf"];
    fails(&millrace(dir.path(), &table), 2, "ones.gguf is there and is no JSON object");
    let recipe = "model = 'ones.gguf'\noutput = 'x.gguf'\ncalibration = 't'\nevaluation = 't'\n\
                  [[step]]\nmethod = 'binary'\n";
    std::fs::write(dir.path().join("r.toml"), recipe).unwrap();
    std::fs::write(dir.path().join("t"), "A text.").unwrap();
    fails(&millrace(dir.path(), &["compress", "run", "r.toml"]), 2, "which flatters");
    assert_eq!(std::fs::read(dir.path().join("ones.gguf")).unwrap(), before);
}

#[test]
fn wrong_steps_and_recipes_name_the_key() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let apply = |step: &str| millrace(dir.path(), &["compress", "apply", "ones.gguf", "o", step]);
    fails(&apply("method = 'wanda', sparsty = 0.5"), 2, "sparsty");
    fails(&apply("method = 'clip', min = 1.0, max = 0.0"), 2, "min below max");
    std::fs::write(dir.path().join("r.toml"), "model = 'ones.gguf'\noutptu = 'o'\n").unwrap();
    fails(&millrace(dir.path(), &["compress", "run", "r.toml"]), 2, "outptu");
    assert!(!dir.path().join("o").exists());
}

#[test]
fn a_full_disk_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    std::fs::write(dir.path().join("out.gguf"), "old").unwrap();
    // Files may have 16 blocks, the result needs more.
    let script =
        "trap '' XFSZ; ulimit -f 16; exec \"$0\" compress apply --force ones.gguf out.gguf \"$1\"";
    let output = command(dir.path(), "sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_millrace"), "method = 'binary'"])
        .output()
        .expect("a shell");
    fails(&output, 1, "cannot write out.gguf: File too large (os error 27)\n");
    assert_eq!(std::fs::read(dir.path().join("out.gguf")).unwrap(), b"old");
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().into_string().ok())
        .filter(|name| name.ends_with(".part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
