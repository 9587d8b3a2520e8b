//! `tokenizer.json` and its companions, against what Python's `tokenizers` make of the same folder.
//!
//! `testdata/tokenizers/make.py` made three small ones: byte-level BPE, BPE with byte fallback as
//! Llama 2 has it, unigram with Metaspace.
#![allow(clippy::unwrap_used)]

mod text_common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use millrace_coordinator::text::{ChatMessage, TextModel, Tokenizer};
use millrace_shared::sampling::SamplingParams;
use serde_json::{Value, json};
use tempfile::TempDir;
use text_common::{check_random_streams, check_streaming, ids, testdata};

/// Checks ids and text of all cases. What is no UTF-8 is decoded otherwise there: one bad byte makes
/// the bytes around it unreadable, too, so no stream could give that.
fn check(name: &str) -> TextModel {
    let model = TextModel::from_folder(&testdata(name)).unwrap();
    let t = &model.tokenizer;
    let cases = text_common::json(&format!("{name}/cases.json"));
    for case in cases["encode"].as_array().unwrap() {
        let text = case[0].as_str().unwrap();
        assert_eq!(t.encode(text, true).unwrap(), ids(&case[1]), "{name}: {text:?}");
        assert_eq!(t.encode(text, false).unwrap(), ids(&case[2]), "{name}: {text:?} as text");
    }
    for case in cases["decode"].as_array().unwrap() {
        let (ids, want) = (ids(&case[0]), case[1].as_str().unwrap());
        if !want.contains('\u{fffd}') {
            assert_eq!(t.decode(&ids, true), want, "{name}: {ids:?}");
        }
        check_streaming(t, &ids);
    }
    check_random_streams(t);
    model
}

fn user(content: &str) -> ChatMessage {
    ChatMessage::new("user", content)
}

#[test]
fn byte_level() {
    let model = check("bytelevel");
    let t = &model.tokenizer;
    assert_eq!((t.bos_id(), t.eos_ids()), (Some(0), [1, 3].as_slice()));
    assert!(t.adds_bos(), "the post-processor says so");
    assert_eq!(t.encode_prompt("a").unwrap()[0], 0);
    assert_eq!(t.decode(&t.encode("a <tool> b<|im_end|>", true).unwrap(), true), "a <tool> b");
    let template = model.template.unwrap();
    assert_eq!(template.render(&vec![user("hi")].into(), true).unwrap(), "<|bos|>hi");
}

#[test]
fn llama() {
    let model = check("llama");
    let t = &model.tokenizer;
    assert_eq!((t.bos_id(), t.eos_ids(), t.adds_bos()), (Some(1), [2].as_slice(), true));
    assert_eq!(t.token_bytes(3 + 10), b"\n", "<0x0A>");
    let text = model.template.unwrap().render(&vec![user("hi")].into(), true).unwrap();
    assert_eq!(text, "<|bos|>hi<|im_end|>");
    assert_eq!(t.encode_prompt(&text).unwrap(), t.encode(&text, true).unwrap(), "not twice");
}

#[test]
fn unigram() {
    let model = check("unigram");
    assert!(!model.tokenizer.adds_bos());
    assert!(model.template.unwrap_err().contains("no chat template"));
}

/// A copy of a folder with files changed; a null deletes.
fn changed(name: &str, files: &[(&str, Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(testdata(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    for (file, value) in files {
        let path = folder.path().join(file);
        match value {
            Value::Null => fs::remove_file(path).unwrap(),
            Value::String(text) => fs::write(path, text).unwrap(),
            value => fs::write(path, value.to_string()).unwrap(),
        }
    }
    folder
}

fn failure(name: &str, files: &[(&str, Value)]) -> String {
    Tokenizer::from_folder(changed(name, files).path()).unwrap_err().to_string()
}

/// The `tokenizer.json` of a folder with one change.
fn tokenizer_with(name: &str, change: impl Fn(&mut Value)) -> (&'static str, Value) {
    let mut json = text_common::json(&format!("{name}/tokenizer.json"));
    change(&mut json);
    ("tokenizer.json", json)
}

#[test]
fn unusable_files_are_named() {
    let message = failure("llama", &[("tokenizer.json", Value::Null)]);
    assert!(message.contains("tokenizer.json: it does not exist"), "{message}");
    let message =
        failure("llama", &[("tokenizer.json", Value::Null), ("tokenizer.model", json!("x"))]);
    assert!(message.contains("save_pretrained"), "{message}");
    let message = failure("llama", &[("tokenizer.json", json!("{\"model\": "))]);
    assert!(message.contains("tokenizer.json: "), "{message}");
    let message = failure("llama", &[("tokenizer_config.json", json!({"bos_token": 7}))]);
    assert!(message.contains("tokenizer_config.json: "), "{message}");
    let message = failure("llama", &[("tokenizer_config.json", json!({"eos_token": "<no>"}))]);
    assert!(message.contains("eos_token is '<no>', which is not in the vocabulary"), "{message}");
    let message = failure("llama", &[("generation_config.json", json!({"eos_token_id": 9999}))]);
    assert!(message.contains("eos_token_id is 9999"), "{message}");
}

#[test]
fn files_have_a_largest_size() {
    let folder = changed("llama", &[]);
    let file = fs::File::create(folder.path().join("tokenizer.json")).unwrap();
    file.set_len((128 << 20) + 1).unwrap();
    let message = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    assert!(message.contains("more than 134217728 bytes"), "{message}");
}

#[test]
fn hostile_vocabularies() {
    let far = tokenizer_with("llama", |json| {
        json["model"]["vocab"]["far"] = json!(4_294_967_295u32);
    });
    let message = failure("llama", &[far]);
    assert!(message.contains("ids up to 4294967295, at most 2097152"), "{message}");
    let twice = tokenizer_with("llama", |json| json["model"]["vocab"]["twice"] = json!(300));
    let message = failure("llama", &[twice]);
    assert!(message.contains("token 300 is both"), "{message}");
    // An added token takes the id of another.
    let taken = tokenizer_with("llama", |json| json["model"]["vocab"]["taken"] = json!(2));
    let t = Tokenizer::from_folder(changed("llama", &[taken]).path()).unwrap();
    assert_eq!(t.token_bytes(2), b"<|im_end|>");
    let absent = tokenizer_with("llama", |json| json["model"]["merges"] = json!([["q", "zzz"]]));
    assert!(failure("llama", &[absent]).contains("tokenizer.json: "));
    // Ids that no token has stand for nothing.
    let hole = tokenizer_with("llama", |json| json["model"]["vocab"]["far"] = json!(5000));
    let t = Tokenizer::from_folder(changed("llama", &[hole]).path()).unwrap();
    assert_eq!((t.vocab_size(), t.token_bytes(4999)), (5001, b"".as_slice()));
    assert!(t.check_rows(600).unwrap_err().to_string().contains("another model's"), "too few rows");
}

#[test]
fn other_kinds_are_refused_by_name() {
    let word_piece = tokenizer_with("llama", |json| {
        json["model"] = json!({"type": "WordPiece", "unk_token": "<unk>",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
            "vocab": {"<unk>": 0, "<|bos|>": 1, "<|im_end|>": 2}});
    });
    let message = failure("llama", &[word_piece]);
    assert!(message.contains("'WordPiece' is not supported"), "{message}");
    let ctc = tokenizer_with("llama", |json| {
        json["decoder"] = json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "b",
            "cleanup": true});
    });
    let message = failure("llama", &[ctc]);
    assert!(message.contains("CTC") && message.contains("ByteLevel"), "{message}");
}

/// What would cut, pad or vary prompts is put aside.
#[test]
fn truncation_padding_and_dropout() {
    let file = tokenizer_with("bytelevel", |json| {
        json["truncation"] = json!({"direction": "Right", "max_length": 4,
            "strategy": "LongestFirst", "stride": 0});
        json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|bos|>"});
        json["model"]["dropout"] = json!(0.5);
    });
    let folder = changed("bytelevel", &[file]);
    let t = Tokenizer::from_folder(folder.path()).unwrap();
    let same = Tokenizer::from_folder(&testdata("bytelevel")).unwrap();
    for text in ["", "Hello World, all human beings are born free and equal in dignity"] {
        assert_eq!(t.encode(text, true).unwrap(), same.encode(text, true).unwrap());
    }
}

#[test]
fn settings_are_found_where_they_are() {
    // Without the tokenizer's configuration, ids of the model's count.
    let folder = changed(
        "llama",
        &[
            ("tokenizer_config.json", Value::Null),
            ("generation_config.json", Value::Null),
            ("config.json", json!({"bos_token_id": 1, "eos_token_id": [2, 5]})),
        ],
    );
    let t = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!((t.bos_id(), t.eos_ids(), t.adds_bos()), (Some(1), [2, 5].as_slice(), false));
    // The configuration's template counts where there is no file of its own.
    let config = json!({"chat_template": "{{ eos_token }}!", "eos_token": "<|im_end|>"});
    let files = [("tokenizer_config.json", config), ("chat_template.jinja", Value::Null)];
    let model = TextModel::from_folder(changed("llama", &files).path()).unwrap();
    assert_eq!(
        model.template.unwrap().render(&vec![user("")].into(), true).unwrap(),
        "<|im_end|>!"
    );
    let several = json!({"chat_template": [{"name": "a", "template": ""},
        {"name": "b", "template": ""}]});
    let model =
        TextModel::from_folder(changed("bytelevel", &[("tokenizer_config.json", several)]).path());
    let message = model.unwrap().template.unwrap_err();
    assert!(message.contains("several (a, b)"), "{message}");
}

/// How a model's makers advise to choose tokens counts where requests say nothing.
#[test]
fn sampling_is_as_the_folder_advises() {
    let sampling = |advice: Value| {
        let folder = changed("llama", &[("generation_config.json", advice)]);
        TextModel::from_folder(folder.path()).map(|model| model.sampling).map_err(|e| e.to_string())
    };
    let usual = SamplingParams::default();
    assert_eq!(sampling(Value::Null).unwrap(), usual);
    let advice = json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
        "repetition_penalty": 1.05, "transformers_version": "4.51.0"});
    let advised = SamplingParams {
        temperature: 0.6,
        top_p: 0.9,
        top_k: 20,
        repetition_penalty: 1.05,
        ..usual
    };
    assert_eq!(sampling(advice).unwrap(), advised);
    for (key, value) in [("temperature", json!(-1.0)), ("top_p", json!(1.5))] {
        let message = sampling(json!({ key: value })).unwrap_err();
        assert!(message.contains("generation_config.json") && message.contains(key), "{message}");
    }
}

/// Without a decoder tokens are words.
#[test]
fn words_without_a_decoder() {
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "unk_token": "?",
            "vocab": {"?": 0, "one": 1, "two": 2}}});
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let t = Arc::new(Tokenizer::from_folder(Path::new(folder.path())).unwrap());
    let ids = t.encode("two  one three", true).unwrap();
    assert_eq!(ids, [2, 1, 0]);
    assert_eq!(t.decode(&ids, true), "two one ?");
    check_random_streams(&t);
}
