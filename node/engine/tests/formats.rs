//! Quantised checkpoints as published: every convention against the dequantised model as
//! `transformers` runs it (`tests/testdata/formats/make.py` packs and dequantises independently).

#![allow(clippy::unwrap_used)]

#[path = "families/case.rs"]
mod case;
#[path = "formats/rig.rs"]
mod rig;
#[path = "formats/store.rs"]
mod store;
#[path = "cpu_engine/tiny.rs"]
mod tiny;

use std::path::{Path, PathBuf};

use case::Case;
use millrace_engine::Isa;
use millrace_engine::model::Source;
use millrace_engine::quantize::{self, Options};
use millrace_shared::model::{ModelFiles, TensorEntry, TensorType};
use rig::{pipeline, run, sources, worst};
use serde_json::Value;
use store::How;

/// Names, types of the matrices, and how far logits may be off: eight-bit activations beside four-bit
/// weights, one rounding to F16 in the others.
const CASES: [(&str, TensorType, f64); 7] = [
    ("gptq-asym-32", TensorType::GPTQ_4, 0.02),
    ("gptq-v2-all", TensorType::GPTQ_4_V2, 0.02),
    ("gptq-act-32", TensorType::GPTQ_4_ACT, 1e-3),
    ("awq-32", TensorType::AWQ_4, 0.02),
    ("fp8-tensor", TensorType::F8_E4M3, 1e-3),
    ("fp8-channel", TensorType::F8_E4M3, 1e-3),
    ("fp8-block", TensorType::F8_E4M3_B128, 1e-3),
];

fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    folder.ancestors().map(|f| f.join("tests/testdata/formats")).find(|f| f.is_dir()).unwrap()
}

fn expected(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder().join(format!("{name}.json"))).unwrap()).unwrap()
}

fn tokens(case: &Value) -> Vec<u32> {
    case["prompt"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

fn logits(case: &Value) -> Vec<Vec<f64>> {
    let row = |r: &Value| r.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    case["logits"].as_array().unwrap().iter().map(row).collect()
}

/// What the engine reads of a matrix, some rows at a time.
fn values(source: &Source, rows_at_once: u64) -> Vec<f32> {
    let entry = source.entry();
    let row_bytes = entry.dtype.bytes_of(entry.dims[0]).unwrap();
    let mut all = Vec::new();
    for first in (0..entry.dims[1]).step_by(rows_at_once as usize) {
        let rows = rows_at_once.min(entry.dims[1] - first);
        let mut bytes = vec![0; (rows * row_bytes) as usize];
        source.open().unwrap().read(first * row_bytes, &mut bytes).unwrap();
        let float = |b: &[u8]| f32::from_le_bytes(b[..4].try_into().unwrap());
        if entry.dtype == TensorType::F16 {
            let half = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32() + 0.0;
            all.extend(bytes.chunks_exact(2).map(half));
            continue;
        }
        assert_eq!(entry.dtype, TensorType::INT4);
        for block in bytes.chunks_exact(24) {
            let quant = |i: usize| (block[8 + i % 16] >> (i / 16 * 4)) & 15;
            let value = |i: usize| float(block).mul_add(f32::from(quant(i)), float(&block[4..]));
            all.extend((0..32).map(|i| value(i) + 0.0));
        }
    }
    all
}

#[test]
fn matrices_mean_what_their_libraries_say() {
    for (name, dtype, _) in CASES {
        let case = expected(name);
        let files = ModelFiles::open(&folder().join(name)).unwrap();
        let sources = Source::of_tensors(&sources(&files)).unwrap();
        let mut seen = 0;
        for (theirs, sum) in case["sums"].as_object().unwrap() {
            let ours = theirs
                .replace("model.layers.", "blk.")
                .replace("self_attn.o_proj", "attn_output")
                .replace("self_attn.", "attn_")
                .replace("mlp.", "ffn_")
                .replace("_proj", "");
            assert_eq!(files.tensor(&ours).unwrap().dtype, dtype, "{name}");
            let source = sources.iter().find(|s| s.entry().name == ours).unwrap();
            for rows in [8, 24, 1 << 20] {
                let bytes: Vec<u8> =
                    values(source, rows).into_iter().flat_map(f32::to_le_bytes).collect();
                assert_eq!(
                    u64::from(crc32c::crc32c(&bytes)),
                    sum.as_u64().unwrap(),
                    "{name} {ours}"
                );
            }
            seen += 1;
        }
        assert_eq!(seen, 7, "{name}");
    }
}

#[test]
fn logits_are_those_of_the_dequantised_model() {
    for (name, _, bound) in CASES {
        let case = expected(name);
        let files = ModelFiles::open(&folder().join(name)).unwrap();
        files.check_supported_types().unwrap();
        let tokens = tokens(&case);
        let found = run(pipeline(&files, &[1], Isa::best()), &tokens, 64);
        let deviation = worst(&found, &logits(&case));
        assert!(deviation < bound, "{name}: {deviation}");
        for (ends, chunk, isa) in
            [(&[0, 1, 1][..], 64, Isa::best()), (&[1], 5, Isa::best()), (&[0, 1], 13, Isa::Scalar)]
        {
            let again = run(pipeline(&files, ends, isa), &tokens, chunk);
            assert!(again == found, "{name} cut at {ends:?}, chunks of {chunk}, {isa}");
        }
    }
}

/// A copy of a checkpoint whose configuration, or files, are changed.
fn changed(name: &str, change: &dyn Fn(&mut Value)) -> tempfile::TempDir {
    let (from, to) = (folder().join(name), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("model.safetensors"), to.path().join("model.safetensors")).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    to
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let refused = |name: &str, key: &str, value: Value, parts: &[&str]| {
        let folder = changed(name, &|c| c["quantization_config"][key] = value.clone());
        let message = ModelFiles::open(folder.path()).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    };
    let known = "supported: GPTQ and AWQ";
    refused("awq-32", "quant_method", "hqq".into(), &["config.json", "hqq", known, "--quantize"]);
    refused("gptq-asym-32", "bits", 8.into(), &["gptq", "8 bits", known]);
    refused("gptq-asym-32", "checkpoint_format", "marlin".into(), &["gptq", "'marlin'", known]);
    refused("awq-32", "version", "gemv".into(), &["awq", "'gemv'", known]);
    refused("awq-32", "zero_point", false.into(), &["awq", "zero points", known]);
    refused("fp8-block", "weight_block_size", serde_json::json!([64, 64]), &["fp8", "[64,64]"]);
    refused("fp8-tensor", "fmt", "e5m2".into(), &["fp8", "e5m2", known]);
    refused("fp8-channel", "format", "pack-quantized".into(), &["'pack-quantized'", known]);
    // Scales of rows are none of blocks, and AWQ's words none of GPTQ.
    refused("fp8-tensor", "weight_block_size", serde_json::json!([128, 128]), &["scales", "fit"]);
    refused("awq-32", "quant_method", "gptq".into(), &["scales", "does not fit"]);
    let plain = changed("gptq-asym-32", &|c| c["quantization_config"] = Value::Null);
    let message = ModelFiles::open(plain.path()).unwrap_err().to_string();
    assert!(message.contains("no place"), "{message}");
    // What old files say beside `config.json`.
    let old = r#"{ "bits": 4, "group_size": 32, "desc_act": false }"#;
    std::fs::write(plain.path().join("quantize_config.json"), old).unwrap();
    ModelFiles::open(plain.path()).unwrap();
}

#[test]
fn scattered_groups_must_be_announced() {
    let hidden = changed("gptq-act-32", &|c| c["quantization_config"]["desc_act"] = false.into());
    let files = ModelFiles::open(hidden.path()).unwrap();
    let sources = Source::of_tensors(&sources(&files)).unwrap();
    let source = sources.iter().find(|s| s.entry().name == "blk.0.attn_q.weight").unwrap();
    let row = source.entry().dtype.bytes_of(64).unwrap() as usize;
    let message = source.open().unwrap().read(0, &mut vec![0; row]).unwrap_err().to_string();
    assert!(message.contains("attn_q") && message.contains("desc_act"), "{message}");
}

/// A peer that names scales and zeros of other groups, or shorter ones, makes nobody read beyond them.
#[test]
fn parts_are_read_inside_their_tensors_alone() {
    let files = ModelFiles::open(&folder().join("gptq-asym-32")).unwrap();
    let read = |change: &dyn Fn(&mut TensorEntry)| {
        let mut changed = sources(&files);
        let zeros = changed.iter_mut().find(|s| s.entry.name == "blk.0.attn_q.qzeros").unwrap();
        change(&mut zeros.entry);
        let sources = Source::of_tensors(&changed).unwrap();
        let source = sources.iter().find(|s| s.entry().name == "blk.0.attn_q.weight").unwrap();
        let row = source.entry().dtype.bytes_of(64).unwrap() as usize;
        source.open().unwrap().read(0, &mut vec![0; row]).map_err(|e| e.to_string())
    };
    read(&|_| {}).unwrap();
    let message = read(&|zeros| zeros.dims[1] = 1).unwrap_err();
    assert!(message.contains("attn_q") && message.contains("same groups"), "{message}");
    let message = read(&|zeros| zeros.bytes = 4).unwrap_err();
    assert!(message.contains("qzeros") && message.contains("too small"), "{message}");
}

/// Logits of a folder, the same at one stage and at three.
fn logits_of(folder: &Path, tokens: &[u32], name: &str) -> Vec<Vec<u32>> {
    let files = ModelFiles::open(folder).unwrap_or_else(|e| panic!("{name}: {e}"));
    let layers = files.config.layers;
    let found = run(pipeline(&files, &[layers], Isa::best()), tokens, 64);
    let again = run(pipeline(&files, &[1, 2, layers], Isa::best()), tokens, 7);
    assert!(again == found, "{name} at three stages");
    found
}

/// How far logits are from those of the same weights in F32, at most: with eight-bit activations
/// beside quantised matrices, or weights rounded to F16. Of mixtures at half of the positions: where
/// experts nearly tie, a small difference chooses others.
fn close(folder: &Path, plain: &Path, tokens: &[u32], bound: f64, name: &str) {
    let expected = logits_of(plain, tokens, name);
    let expected: Vec<Vec<f64>> = expected.iter().map(|row| rig::floats(row)).collect();
    let mut found = rig::deviations(&logits_of(folder, tokens, name), &expected);
    found.sort_by(f64::total_cmp);
    let mixture = name.contains("moe") || name.contains("mixtral");
    let deviation = found[if mixture { found.len() / 2 } else { found.len() - 1 }];
    assert!(deviation < bound, "{name}: {deviation}");
}

/// The matrix of families and formats: this, with `families.rs` for floats and GGUF.
#[test]
fn every_family_in_every_format_of_folders() {
    for case in case::CASES.map(Case::read) {
        let tokens = &case.tokens("prompt")[..12];
        let published = case.folder(TensorType::F32, 2);
        for (how, bound) in [(How::Gptq, 0.06), (How::Awq, 0.06), (How::Fp8, 2e-3)] {
            let name = format!("{} as {how:?}", case.name);
            let [folder, plain] = store::store(published.path(), how);
            // Several matrices in one, and matrices the other way round.
            if case.name.starts_with("phi") || case.name == "gpt2" {
                ModelFiles::open(folder.path()).unwrap_err();
                continue;
            }
            close(folder.path(), plain.path(), tokens, bound, &name);
        }
        for to in [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_1] {
            let name = format!("{} as {}", case.name, to.as_str());
            let plan = quantize::plan_of(published.path(), &Options::new(to));
            if case.name == "gpt2" {
                let message = plan.unwrap_err().to_string();
                assert!(message.contains("the other way round"), "{message}");
                continue;
            }
            let home = tempfile::tempdir().unwrap();
            let copy = home.path().join("copy");
            plan.unwrap().write(&copy, false, 2, &mut |_| {}).unwrap();
            assert!(copy.join("tokenizer.json").is_file(), "{name}");
            close(&copy, store::dequantised(&copy).path(), tokens, 0.06, &name);
            let again = quantize::plan_of(&copy, &Options::new(to)).unwrap_err().to_string();
            assert!(again.contains("quantised already"), "{again}");
        }
    }
}

#[test]
fn copies_of_folders_replace_copies_alone() {
    let case = Case::read("qwen3_moe");
    let source = case.folder(TensorType::BF16, 1);
    let plan = quantize::plan_of(source.path(), &Options::new(TensorType::Q8_0)).unwrap();
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("copy");
    let write = |overwrite| plan.write(&target, overwrite, 2, &mut |_| {});
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("precious"), "x").unwrap();
    assert!(write(true).is_err() && target.join("precious").is_file());
    std::fs::remove_dir_all(&target).unwrap();
    write(false).unwrap();
    assert!(write(false).is_err());
    write(true).unwrap();
    assert!(plan.write(source.path(), true, 2, &mut |_| {}).is_err(), "onto itself");
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1, "nothing is left behind");
}
