//! The models on this machine and the cache folder, as a user meets them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use millrace_engine::cache::Cache;
use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::GgufWriter;
use serde_json::Value;

/// The folder of smollm2:135m in the cache: the beginning of its SHA-256.
const SMOLLM2: &str = "models/b179c9523d0e6a0f/SmolLM2-135M-Instruct.Q4_1.gguf";
const HUB: &str =
    "models/hub/models--org--tiny-GGUF/snapshots/0123456789abcdef0123456789abcdef01234567";

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn millrace(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_millrace"))
            .args(args)
            .env_remove("MILLRACE_CACHE_LIMIT")
            .env_remove("HF_HUB_CACHE")
            .env("MILLRACE_CACHE", self.at("cache"))
            .env("HF_HOME", self.at("hf"))
            .env("HF_HUB_OFFLINE", "1")
            .env("NO_COLOR", "1")
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .output()
            .expect("the program starts")
    }

    #[track_caller]
    fn succeeds(&self, args: &[&str]) -> String {
        let output = self.millrace(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "stderr: {stderr}");
        String::from_utf8(output.stdout).expect("output is UTF-8")
    }

    #[track_caller]
    fn fails(&self, args: &[&str], code: i32, message: &str) {
        let output = self.millrace(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "stderr: {stderr}");
        assert!(stderr.contains(message), "'{message}' is not in: {stderr}");
    }

    /// A model of one layer without weights worth the name.
    fn model(&self, path: &str) -> PathBuf {
        let mut w = GgufWriter::new();
        w.set("general.architecture", "llama")
            .set("llama.block_count", 1u32)
            .set("llama.embedding_length", 32u32)
            .set("llama.attention.head_count", 2u32)
            .set("llama.feed_forward_length", 64u32)
            .set("llama.context_length", 128u32)
            .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
        let mut tensor = |name: &str, dims: &[u64]| {
            let bytes = TensorType::Q8_0.bytes_of(dims.iter().product()).expect("whole blocks");
            w.tensor(name, TensorType::Q8_0, dims, vec![0; bytes as usize]).expect("a tensor");
        };
        tensor("token_embd.weight", &[32, 4096]);
        for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            tensor(&format!("blk.0.{name}.weight"), &[32, 32]);
        }
        tensor("blk.0.ffn_gate.weight", &[32, 64]);
        tensor("blk.0.ffn_up.weight", &[32, 64]);
        tensor("blk.0.ffn_down.weight", &[64, 32]);
        self.file(path, &w.to_bytes())
    }

    fn file(&self, path: &str, content: &[u8]) -> PathBuf {
        let path = self.at(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("the folder is made");
        std::fs::write(&path, content).expect("the file is written");
        path
    }

    /// Two models of the cache, one of other tools, packed weights.
    fn filled() -> Self {
        let home = Self::new();
        home.model(&format!("cache/{SMOLLM2}"));
        home.model(&format!("cache/{HUB}/tiny-Q8_0.gguf"));
        home.file(
            "cache/models/hub/models--org--tiny-GGUF/refs/main",
            &HUB.as_bytes()[HUB.len() - 40..],
        );
        home.file("cache/packed/0123.pack", &[0; 5000]);
        let theirs = "hf/hub/models--other--tiny";
        home.model(&format!("{theirs}/snapshots/abc/tiny.q8_0.gguf"));
        home.file(&format!("{theirs}/refs/main"), b"abc");
        home
    }
}

fn exists(paths: &[&Path]) -> Vec<bool> {
    paths.iter().map(|p| p.exists()).collect()
}

#[test]
fn models_are_listed() {
    let home = Home::filled();
    let text = home.succeeds(&["list"]);
    for part in ["smollm2:135m", "org/tiny-GGUF:Q8_0", "other/tiny:Q8_0", "HF cache", "llama"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    for part in ["qwen2.5:0.5b", "Apache-2.0", "runs here", "491.4 MB"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let json: Value =
        serde_json::from_str(&home.succeeds(&["list", "--output", "json"])).expect("JSON");
    let models = json["models"].as_array().expect("models");
    let names: Vec<&str> = models.iter().filter_map(|m| m["name"].as_str()).collect();
    assert_eq!(names, ["org/tiny-GGUF:Q8_0", "other/tiny:Q8_0", "smollm2:135m"]);
    assert_eq!(models[0]["type"], "Q8_0");
    assert_eq!(models[1]["place"], "huggingface");
    assert_eq!(models[2]["parameters"], 32 * 4096 + 4 * 1024 + 3 * 2048);
    let empty = Home::new();
    assert!(empty.succeeds(&["list"]).contains("No models on this machine yet"));
    // What is listed can be named, without a hub.
    for name in names {
        let text = home.succeeds(&["inspect", "--brief", name]);
        assert!(text.contains("family      llama"), "{text}");
    }
    let path = home.succeeds(&["pull", "org/tiny-GGUF"]);
    assert!(path.trim().ends_with("tiny-Q8_0.gguf"), "{path}");
}

#[test]
fn models_are_removed() {
    let home = Home::filled();
    let (own, hub) = (home.at(&format!("cache/{SMOLLM2}")), home.at(&format!("cache/{HUB}")));
    let theirs = home.at("hf/hub/models--other--tiny/snapshots/abc/tiny.q8_0.gguf");
    home.fails(&["rm", "nosuch"], 2, "there is no model 'nosuch' here");
    home.fails(&["rm", "other/tiny"], 2, "Hugging Face");
    // One that is used stays.
    let held = Cache::new(&home.at("cache")).hold(std::slice::from_ref(&own));
    assert!(home.succeeds(&["list"]).contains("in use"));
    home.fails(&["rm", "smollm2:135m"], 1, "in use by a running process");
    assert_eq!(exists(&[&own, &hub, &theirs]), [true; 3]);
    drop(held);
    let text = home.succeeds(&["rm", "smollm2:135m", "org/tiny-GGUF"]);
    assert!(text.contains("removed smollm2:135m") && text.contains("are free again"), "{text}");
    assert_eq!(exists(&[&own, &hub, &theirs]), [false, false, true]);
    assert!(!home.at("cache/models/hub/models--org--tiny-GGUF").exists());
}

#[test]
fn the_cache_is_shown_and_pruned() {
    let home = Home::filled();
    let packed = home.at("cache/packed/0123.pack");
    let text = home.succeeds(&["cache", "list"]);
    for part in ["models", "packed weights", "5.0 kB", "No limit is set"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    assert!(text.lines().skip(1).all(|line| line.chars().count() <= 80), "{text}");
    let json: Value =
        serde_json::from_str(&home.succeeds(&["cache", "list", "--output", "json"])).expect("JSON");
    assert_eq!(json["kinds"][0]["things"], 2);
    assert!(home.succeeds(&["cache", "prune"]).contains("0 B are free again"));
    let text = home.succeeds(&["cache", "prune", "--to", "0", "--dry-run"]);
    assert!(text.contains("models: 2 would go, ") && text.contains("would be free"), "{text}");
    assert!(packed.exists());
    let held = Cache::new(&home.at("cache")).hold(&[home.at(&format!("cache/{SMOLLM2}"))]);
    let text = home.succeeds(&["cache", "prune", "--older-than", "0h", "--to", "0"]);
    assert!(text.contains("models: 1 went, ") && text.contains("packed weights: 1 went"), "{text}");
    assert!(home.at(&format!("cache/{SMOLLM2}")).exists() && !packed.exists());
    drop(held);
    home.fails(&["cache", "prune", "--older-than", "soon"], 2, "30d");
    home.fails(&["cache", "prune", "--to", "much"], 2, "8GiB");
}

#[test]
fn commands_that_keep_things_take_a_limit() {
    let home = Home::new();
    for command in ["run", "up"] {
        let help = home.succeeds(&[command, "--help"]);
        assert!(help.contains("--cache-limit") && help.contains("MILLRACE_CACHE_LIMIT"), "{help}");
    }
    home.fails(&["up", "--model", "x", "--cache-limit", "much"], 2, "8GiB");
}

#[test]
fn inspect_says_what_a_model_takes() {
    let home = Home::new();
    let path = home.model("m.gguf");
    let path = path.to_str().expect("a UTF-8 path");
    let args = ["inspect", path, "--context", "64", "--concurrency", "4", "--output", "json"];
    let json: Value = serde_json::from_str(&home.succeeds(&args)).expect("JSON");
    assert_eq!((json["family"].as_str(), json["format"].as_str()), (Some("llama"), Some("gguf")));
    assert_eq!(json["dimensions"]["layers"], 1);
    // Keys and values of 32 halves each, in one layer.
    let memory = &json["memory"];
    assert_eq!(memory["kv_per_token_f16"], 128, "{json}");
    assert_eq!(memory["kv_f16"], 128 * 64 * 4);
    assert_eq!(memory["layers"].as_array().map(Vec::len), Some(1));
    assert_eq!(memory["fits_here"], true);
    let text = home.succeeds(&["inspect", path]);
    assert!(text.contains("blk.0.ffn_up.weight") && text.contains("KV cache"), "{text}");
    home.fails(&["inspect", path, "--context", "4000"], 2, "at most 128 tokens");
}
