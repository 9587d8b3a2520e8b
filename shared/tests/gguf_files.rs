//! GGUF directories: what a sound file gives, and what each kind of damage is called.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use millrace_shared::model::gguf::{Array, Gguf, GgufError, GgufWriter, Value, gemma_scale};
use millrace_shared::model::{
    Dtype, Family, ModelFiles, ModelManifest, RopeScaling, RopeStyle, SparseForm, SparseForms,
    TILE_ROWS, TensorType, numerics_id, sparse_keys, stage_tensors,
};
use millrace_shared::wire::control::EngineSettings;

/// A sound model of one layer: 64 wide, 2 heads, vocabulary of 32.
fn writer() -> GgufWriter<'static> {
    writer_without("")
}

/// The same without a tensor of that name.
fn writer_without(missing: &str) -> GgufWriter<'static> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("llama.block_count", 1u32)
        .set("llama.embedding_length", 64u32)
        .set("llama.attention.head_count", 2u32)
        .set("llama.attention.head_count_kv", 1u32)
        .set("llama.feed_forward_length", 96u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("tokenizer.ggml.tokens", vec!["t".to_owned(); 32])
        .set("test.nested", Value::Array(Array::Nested(vec![Array::U8(vec![1, 2])])))
        .set("test.floats", vec![0.5f64, 1.5]);
    let matrices: [(&str, &[u64], TensorType); 12] = [
        ("token_embd.weight", &[64, 32], TensorType::Q8_0),
        ("output_norm.weight", &[64], TensorType::F32),
        ("blk.0.attn_norm.weight", &[64], TensorType::F32),
        ("blk.0.attn_q.weight", &[64, 64], TensorType::Q4_1),
        ("blk.0.attn_k.weight", &[64, 32], TensorType::Q4_0),
        ("blk.0.attn_v.weight", &[64, 32], TensorType::F16),
        ("blk.0.attn_output.weight", &[64, 64], TensorType::BF16),
        ("blk.0.ffn_norm.weight", &[64], TensorType::F32),
        ("blk.0.ffn_gate.weight", &[64, 96], TensorType::Q8_0),
        ("blk.0.ffn_up.weight", &[64, 96], TensorType::Q8_0),
        ("blk.0.ffn_down.weight", &[96, 64], TensorType::Q8_0),
        ("rope_freqs.weight", &[16], TensorType::F32),
    ];
    for (name, dims, dtype) in matrices.into_iter().filter(|(name, ..)| *name != missing) {
        let bytes = dtype.bytes_of(dims.iter().product()).unwrap();
        w.tensor(name, dtype, dims, vec![7u8; bytes as usize]).unwrap();
    }
    w
}

fn parse(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(bytes, bytes.len() as u64)
}

/// The message for a file that must be refused; it must contain all `parts`.
fn refused(bytes: &[u8], parts: &[&str]) {
    let message = parse(bytes).and_then(|g| g.config()).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

/// Header with given counts and then raw bytes.
fn header(tensors: u64, keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(tensors.to_le_bytes());
    out.extend(keys.to_le_bytes());
    rest.iter().for_each(|r| out.extend(*r));
    out
}

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

#[test]
fn a_sound_file() {
    let bytes = writer().to_bytes();
    let gguf = parse(&bytes).unwrap();
    assert_eq!((gguf.version, gguf.file_len), (3, bytes.len() as u64));
    assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
    assert_eq!(gguf.strings("tokenizer.ggml.tokens").unwrap().len(), 32);
    assert_eq!(gguf.opt_bool("absent").unwrap(), None);
    let keys: Vec<&str> = gguf.metadata.iter().map(|(k, _)| k).collect();
    assert_eq!((keys[0], keys[9]), ("general.architecture", "test.nested"));
    for t in &gguf.tensors {
        assert_eq!(t.offset % 32, 0);
        assert!(t.offset >= gguf.data_offset && t.offset + t.bytes <= gguf.file_len);
        let data = &bytes[t.offset as usize..(t.offset + t.bytes) as usize];
        assert!(data.iter().all(|&b| b == 7), "{}", t.name);
    }
    let config = gguf.config().unwrap();
    assert_eq!((config.layers, config.hidden, config.head_dim, config.vocab), (1, 64, 32, 32));
    assert_eq!((config.heads, config.kv_heads, config.ffn, config.context), (2, 1, 96, 128));
    assert_eq!((config.rope.base, config.rope.dim), (10_000.0, 32));
    assert_eq!(
        (config.rope.style, config.rope.scaling),
        (RopeStyle::Interleaved, RopeScaling::Linear(1.0))
    );
    assert!(config.tied_head && config.rope_factors);
    let files = ModelFiles::of_gguf(gguf.clone(), Path::new("sound.gguf")).unwrap();
    files.check_supported_types().unwrap();
    let stage = millrace_shared::model::StageTensors { layers: 0..1, embed: false, head: false };
    assert_eq!(stage_tensors(&config, &gguf.tensors, &stage).len(), 10);
}

#[test]
fn getters_name_the_key() {
    let gguf = parse(&writer().to_bytes()).unwrap();
    assert!(gguf.u32("absent.key").unwrap_err().to_string().contains("absent.key"));
    let message = gguf.u32("general.architecture").unwrap_err().to_string();
    assert!(message.contains("general.architecture") && message.contains("string"), "{message}");
    let message = gguf.strings("test.floats").unwrap_err().to_string();
    assert!(message.contains("array of f64"), "{message}");
}

#[test]
fn other_kinds_of_files_are_recognised() {
    let mut safetensors = 900u64.to_le_bytes().to_vec();
    safetensors.extend(b"{\"__metadata__\":{}}");
    for (bytes, part) in [
        (safetensors.as_slice(), "safetensors"),
        (b"PK\x03\x04rest of it", "zip"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"tjgg\x01\0\0\0", "before GGUF"),
        (b"", "empty"),
        (b"GG", "unknown"),
        (&[0; 64], "zeros"),
    ] {
        refused(bytes, &["not a GGUF file", part]);
    }
    refused(b"GGUF\x01\0\0\0", &["version 1", "supported: 2 and 3"]);
    refused(b"GGUF\0\0\0\x03", &["big-endian"]);
}

#[test]
fn huge_counts_take_no_memory() {
    refused(&header(u64::MAX, 0, &[]), &["number of tensors", "limit"]);
    refused(&header(0, u64::MAX, &[]), &["number of keys", "limit"]);
    refused(&header(100, 100, &[]), &["truncated at byte 24"]);
    let key = string("k");
    let pad = [0u8; 64];
    let long_string = header(0, 1, &[&key, &8u32.to_le_bytes(), &u64::MAX.to_le_bytes(), &pad]);
    refused(&long_string, &["truncated", "key 'k'"]);
    let element = 4u32.to_le_bytes();
    let array = |kind: &[u8], n: u64| {
        header(0, 1, &[&key, &9u32.to_le_bytes(), kind, &n.to_le_bytes(), &pad])
    };
    refused(&array(&element, u64::MAX), &["truncated", "key 'k'"]);
    refused(&array(&element, 1 << 40), &["truncated", "key 'k'"]);
    refused(&array(&99u32.to_le_bytes(), 1), &["unknown type 99"]);
    refused(&header(0, 1, &[&u64::MAX.to_le_bytes(), &pad]), &["truncated", "name of key 1 of 1"]);
}

#[test]
fn nesting_ends() {
    let mut bytes = header(0, 1, &[&string("deep"), &9u32.to_le_bytes()]);
    for _ in 0..100_000 {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    refused(&bytes, &["'deep'", "nest"]);
}

#[test]
fn malformed_metadata() {
    let value = [4u32.to_le_bytes(), 7u32.to_le_bytes()].concat();
    let key = string("twice");
    let pad = [0u8; 32];
    refused(&header(0, 2, &[&key, &value, &key, &value]), &["'twice' appears twice"]);
    let bad_text =
        header(0, 1, &[&key, &8u32.to_le_bytes(), &2u64.to_le_bytes(), &[0xff, 0xfe], &pad]);
    refused(&bad_text, &["'twice'", "UTF-8"]);
    refused(&header(0, 1, &[&key, &7u32.to_le_bytes(), &[2], &pad]), &["bool must be 0 or 1"]);
    refused(&header(0, 1, &[&key, &13u32.to_le_bytes(), &pad]), &["unknown value type 13"]);
    let odd =
        header(0, 1, &[&string("general.alignment"), &4u32.to_le_bytes(), &24u32.to_le_bytes()]);
    refused(&odd, &["general.alignment", "power of two"]);
}

/// A file with one tensor entry as given and `data` bytes after it.
fn one_tensor(dims: &[u64], kind: u32, offset: u64, data: usize) -> Vec<u8> {
    let mut out = header(1, 0, &[&string("w"), &(dims.len() as u32).to_le_bytes()]);
    dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

#[test]
fn hostile_tensors() {
    assert!(parse(&one_tensor(&[32, 2], 0, 0, 256)).is_ok());
    refused(&one_tensor(&[32, 2], 0, 0, 255), &["'w'", "outside the file"]);
    refused(&one_tensor(&[32, 2], 0, 32, 256), &["'w'", "outside the file"]);
    refused(&one_tensor(&[32], 0, u64::MAX - 31, 256), &["'w'", "outside the file"]);
    refused(&one_tensor(&[32], 0, 1, 256), &["'w'", "aligned to 32"]);
    refused(&one_tensor(&[1 << 40, 1 << 40], 0, 0, 256), &["'w'", "overflows"]);
    refused(&one_tensor(&[1 << 62], 0, 0, 256), &["'w'", "overflows"]);
    refused(&one_tensor(&[0, 4], 0, 0, 256), &["'w'", "no elements"]);
    refused(&one_tensor(&[33], 2, 0, 256), &["'w'", "no multiple of the 32"]);
    refused(&one_tensor(&[1; 5], 0, 0, 256), &["'w'", "5 dimensions"]);
    refused(&one_tensor(&[], 0, 0, 256), &["'w'", "0 dimensions"]);
    refused(&one_tensor(&[32], 4, 0, 256), &["'w'", "unknown ggml type number 4"]);
    refused(&one_tensor(&[32], 777, 0, 256), &["'w'", "unknown ggml type number 777"]);
}

#[test]
fn overlapping_and_equal_tensors() {
    let entry = |name: &str, offset: u64| {
        let mut e = string(name);
        e.extend(1u32.to_le_bytes());
        e.extend(16u64.to_le_bytes());
        e.extend(0u32.to_le_bytes());
        e.extend(offset.to_le_bytes());
        e
    };
    let pad = [0u8; 256];
    refused(
        &header(2, 0, &[&entry("a", 0), &entry("b", 32), &pad]),
        &["'b'", "overlaps tensor 'a'"],
    );
    refused(&header(2, 0, &[&entry("a", 0), &entry("a", 64), &pad]), &["'a'", "twice"]);
}

#[test]
fn types_without_kernels_are_listed_but_named() {
    let mut gguf = parse(&writer().to_bytes()).unwrap();
    let entry = gguf.tensors.iter_mut().find(|t| t.name == "blk.0.ffn_up.weight").unwrap();
    entry.dtype = TensorType::IQ2_XS;
    let files = ModelFiles::of_gguf(gguf, Path::new("q2.gguf")).unwrap();
    let message = files.check_supported_types().unwrap_err().to_string();
    assert!(message.contains("'blk.0.ffn_up.weight'") && message.contains("IQ2_XS"), "{message}");
}

#[test]
fn every_truncation_is_refused() {
    let bytes = writer().to_bytes();
    let directory = parse(&bytes).unwrap().data_offset as usize;
    for n in 0..directory {
        let error = parse(&bytes[..n]).unwrap_err();
        let expected = matches!(
            error,
            GgufError::Truncated { .. } | GgufError::Magic { .. } | GgufError::Tensor { .. }
        );
        assert!(expected, "{n}: {error}");
    }
    let message = parse(&bytes[..600]).unwrap_err().to_string();
    assert!(message.contains("truncated at byte") && message.contains("key"), "{message}");
    // A file that shrank after its length was taken.
    let shrunk = Gguf::read(&bytes[..600], bytes.len() as u64).unwrap_err();
    assert!(shrunk.to_string().contains("truncated"), "{shrunk}");
}

fn with(change: impl FnOnce(&mut GgufWriter<'static>)) -> Vec<u8> {
    let mut w = writer();
    change(&mut w);
    w.to_bytes()
}

#[test]
fn implausible_models() {
    let set = |key: &str, value: Value| {
        with(|w| {
            w.set(key, value);
        })
    };
    let cases: [(&str, Value, &[&str]); 12] = [
        ("general.architecture", "mamba".into(), &["'mamba'", "supported: llama"]),
        ("llama.block_count", 100_000u32.into(), &["llama.block_count", "implausible"]),
        ("llama.block_count", 0u32.into(), &["llama.block_count", "implausible"]),
        ("llama.block_count", (-1i32).into(), &["llama.block_count", "i32"]),
        ("llama.embedding_length", u64::MAX.into(), &["llama.embedding_length", "32 bits"]),
        ("llama.embedding_length", 65u32.into(), &["do not divide"]),
        ("llama.attention.head_count_kv", 3u32.into(), &["head_count_kv", "multiple"]),
        ("llama.attention.layer_norm_rms_epsilon", f32::NAN.into(), &["epsilon"]),
        ("llama.rope.dimension_count", 33u32.into(), &["rope.dimension_count"]),
        ("llama.rope.freq_base", 0f32.into(), &["rope.freq_base"]),
        (
            "llama.rope.scaling.type",
            "dynamic".into(),
            &["'dynamic'", "linear", "rope_freqs.weight"],
        ),
        ("llama.expert_count", 8u32.into(), &["expert_used_count"]),
    ];
    for (key, value, parts) in cases {
        refused(&set(key, value), parts);
    }
    let tokens = with(|w| {
        w.set("tokenizer.ggml.tokens", vec!["t".to_owned(); 31]);
    });
    refused(&tokens, &["token_embd.weight", "31 tokens"]);
    let bias = with(|w| {
        w.tensor("blk.0.attn_q.bias", TensorType::F32, &[64], vec![0u8; 256]).unwrap();
    });
    refused(&bias, &["'blk.0.attn_q.bias'", "no place"]);
    let layer = with(|w| {
        w.tensor("blk.1.attn_norm.weight", TensorType::F32, &[64], vec![0u8; 256]).unwrap();
    });
    refused(&layer, &["'blk.1.attn_norm.weight'", "1 layers"]);
}

/// As llama.cpp reads it: linear where no type is given, the old key where the new one is missing,
/// and zero for no scaling.
#[test]
fn rope_scaling() {
    const TYPE: &str = "llama.rope.scaling.type";
    const FACTOR: &str = "llama.rope.scaling.factor";
    const OLD: &str = "llama.rope.scale_linear";
    let cases: [(&[(&str, Value)], f32); 9] = [
        (&[], 1.0),
        (&[(TYPE, "linear".into())], 1.0),
        (&[(TYPE, "linear".into()), (FACTOR, 4f32.into())], 4.0),
        (&[(FACTOR, 4f32.into())], 4.0),
        (&[(FACTOR, 0f32.into())], 1.0),
        (&[(OLD, 2f32.into())], 2.0),
        (&[(OLD, 0f32.into())], 1.0),
        (&[(FACTOR, 4f32.into()), (OLD, 2f32.into())], 4.0),
        (&[(TYPE, "none".into()), (FACTOR, 4f32.into())], 1.0),
    ];
    for (keys, expected) in cases {
        let bytes = with(|w| {
            for (key, value) in keys {
                w.set(*key, value.clone());
            }
        });
        let scaling = parse(&bytes).unwrap().config().unwrap().rope.scaling;
        assert_eq!(scaling, RopeScaling::Linear(expected), "{keys:?}");
    }
    refused(
        &with(|w| {
            w.set(FACTOR, -1f32);
        }),
        &[FACTOR, "no scale"],
    );
    refused(
        &with(|w| {
            w.set(OLD, f32::NAN);
        }),
        &[OLD, "no scale"],
    );
}

#[test]
fn opening_names_the_file() {
    let message = Gguf::open("/does/not/exist.gguf").unwrap_err().to_string();
    assert!(message.contains("/does/not/exist.gguf"), "{message}");
}

#[test]
fn manifests_hash_what_computes() {
    let gguf = parse(&writer().to_bytes()).unwrap();
    let config = gguf.config().unwrap();
    let make = |tensors| ModelManifest::new("m".to_owned(), config.clone(), tensors);
    let base = make(gguf.tensors.clone());
    assert!(base.is_consistent());
    let mut moved = gguf.tensors.clone();
    moved.reverse();
    moved[0].offset += 4096;
    assert_eq!(make(moved).content_hash, base.content_hash, "order and place do not matter");
    let mut other = gguf.tensors.clone();
    other[3].hash[31] ^= 1;
    assert_ne!(make(other).content_hash, base.content_hash);
    let mut forged = base.clone();
    forged.config.rms_eps *= 2.0;
    assert!(!forged.is_consistent());

    let settings = |kv_dtype, activation_dtype, max_model_len| EngineSettings {
        kv_blocks: 1,
        kv_block_size: 64,
        kv_dtype,
        activation_dtype,
        max_batch_tokens: 1,
        max_num_seqs: 1,
        max_model_len,
    };
    let long = RopeScaling::Long { original_context: 4096.0, attention_factor: 1.0 };
    let of = |scaling, max| {
        let settings = settings(Dtype::F16, Dtype::F32, max);
        numerics_id(&base.content_hash, "cpu 1", scaling, &settings)
    };
    assert_eq!(of(RopeScaling::Linear(1.0), 4096), of(RopeScaling::Linear(1.0), 4097));
    assert_eq!(of(long, 64), of(long, 4096));
    assert_ne!(of(long, 4096), of(long, 4097), "two lists of factors");
    let id =
        |revision, kv, act| numerics_id(&base.content_hash, revision, long, &settings(kv, act, 64));
    let first = id("cpu 1", Dtype::F16, Dtype::F32);
    assert_eq!(first, id("cpu 1", Dtype::F16, Dtype::F32));
    assert_ne!(first, id("cpu 2", Dtype::F16, Dtype::F32));
    assert_ne!(first, id("cpu 1", Dtype::F32, Dtype::F32));
    assert_ne!(first, id("cpu 1", Dtype::F16, Dtype::Bf16));
}

/// Values, places and starts of `blk.0.attn_v.weight`, in that form, of 64 columns and 32 rows.
fn without_zeros(form: SparseForm) -> Vec<(String, TensorType, Vec<u64>)> {
    let [index, starts] = form.parts();
    let names = ["weight", index, starts].map(|end| format!("blk.0.attn_v.{end}"));
    let shapes = form.shapes(TensorType::F16, [64, 32], (3, 3 * TILE_ROWS));
    names.into_iter().zip(shapes).map(|(name, (dtype, dims))| (name, dtype, dims)).collect()
}

fn sparse_file(
    tensors: &[(String, TensorType, Vec<u64>)],
    keys: &[(&str, Value)],
) -> Result<ModelFiles, GgufError> {
    let mut w = writer_without("blk.0.attn_v.weight");
    for (name, dtype, dims) in tensors {
        let bytes = dtype.bytes_of(dims.iter().product()).unwrap();
        w.tensor(name, *dtype, dims, vec![0u8; bytes as usize]).unwrap();
    }
    for (key, value) in keys {
        w.set(*key, value.clone());
    }
    ModelFiles::of_gguf(parse(&w.to_bytes())?, Path::new("sparse.gguf"))
}

#[test]
fn matrices_without_their_zeros_have_the_shape_that_is_stated() {
    let name = || "blk.0.attn_v.weight".to_owned();
    let keys = sparse_keys(&[(name(), [64, 32])]);
    for form in SparseForm::ALL {
        let good = without_zeros(form);
        let files = sparse_file(&good, &keys).unwrap();
        let tensor = files.tensor("blk.0.attn_v.weight").unwrap();
        assert_eq!(tensor.dims, [64, 32]);
        assert_eq!(SparseForms::of_tensors(&files.tensors).of(tensor), Some(form));
        assert_eq!(files.tensors.iter().filter(|t| t.is_part()).count(), 2);
        files.check_supported_types().unwrap();

        let refused = |tensors: &[(String, TensorType, Vec<u64>)], keys: &[(&str, Value)], part| {
            let message = sparse_file(tensors, keys).unwrap_err().to_string();
            assert!(message.contains(part), "{}: '{part}' is not in: {message}", form.as_str());
        };
        refused(&good[..2], &keys, "there is no");
        refused(&good[..1], &keys, "cannot be a matrix without its zeros");
        refused(&good, &[], "no place in the llama graph");
        refused(&good, &keys[..1], "one of two u64 for each");
        refused(&good, &sparse_keys(&[(name(), [64, 33])]), "no matrix of the model");
        refused(&good, &sparse_keys(&[(name(), [0, 32])]), "does not fit");
        refused(&good, &sparse_keys(&[(name(), [u64::MAX, 2])]), "no matrix of the model");
        refused(&good, &sparse_keys(&[(name(), [64, 32]), (name(), [64, 32])]), "does not fit");
        let other = "token_embd.weight".to_owned();
        refused(&good, &sparse_keys(&[(other, [64, 32])]), "no place in the llama graph");
        for i in 0..3 {
            let mut bad = good.clone();
            bad[i].1 = TensorType::I64;
            refused(&bad, &keys, "does not fit");
            // Whether there are as many bits as values is seen when they are read.
            if i > 0 || form != SparseForm::Bitmask {
                let mut bad = good.clone();
                *bad[i].2.last_mut().unwrap() += 1;
                refused(&bad, &keys, "does not fit");
            }
        }
    }
    let mut two = without_zeros(SparseForm::Csr);
    two.extend(without_zeros(SparseForm::Tiles).split_off(1));
    let message = sparse_file(&two, &keys).unwrap_err().to_string();
    assert!(message.contains("cannot be a matrix without its zeros"), "{message}");
    // A part that nobody reads.
    let mut stray = without_zeros(SparseForm::Csr);
    stray.push(without_zeros(SparseForm::Tiles).remove(2));
    let message = sparse_file(&stray, &keys).unwrap_err().to_string();
    assert!(message.contains("kept in another form"), "{message}");
}

/// Files of Gemma do not state it; the largest of a generation is known by its layers.
#[test]
fn the_largest_gemma_scales_attention_by_all_heads_width() {
    let scale = |family, layers| gemma_scale(family, (layers, 4608, 32, 128));
    let (all, one) = (Some(1.0 / 12.0), Some(1.0 / 128f32.sqrt()));
    assert_eq!((scale(Family::Gemma2, 46), scale(Family::Gemma2, 45)), (all, one));
    assert_eq!((scale(Family::Gemma3, 62), scale(Family::Gemma3, 46)), (all, one));
    assert_eq!(scale(Family::Llama, 46), None);
}
