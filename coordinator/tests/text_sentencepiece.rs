//! Vocabularies of GGUF files in SentencePiece's manner, against ids that `sentencepiece` gave.
//!
//! `testdata/tokenizers/make.py` trained the models: merges by score with byte fallback, the same
//! with many equal scores and user-defined tokens, without bytes; unigram with replaced characters
//! and merged spaces, and with byte fallback.
#![allow(clippy::unwrap_used)]

mod text_common;

use std::sync::Arc;

use millrace_coordinator::text::{TextError, Tokenizer};
use millrace_shared::model::gguf::{Gguf, GgufWriter};
use serde_json::Value;
use text_common::{check_streaming, ids, json};

fn model(name: &str) -> Value {
    json(&format!("spm-{name}.json"))
}

fn gguf(model: &Value, change: impl Fn(&mut GgufWriter<'_>)) -> Gguf {
    let list = |key: &str| model[key].as_array().unwrap().clone();
    let strings: Vec<String> =
        list("tokens").iter().map(|v| v.as_str().unwrap().to_owned()).collect();
    let scores: Vec<f32> = list("scores").iter().map(|v| v.as_f64().unwrap() as f32).collect();
    let types: Vec<i32> = list("token_type").iter().map(|v| v.as_i64().unwrap() as i32).collect();
    let map: Vec<u8> =
        list("precompiled_charsmap").iter().map(|v| v.as_u64().unwrap() as u8).collect();
    let mut w = GgufWriter::new();
    w.set("tokenizer.ggml.model", model["model"].as_str().unwrap())
        .set("tokenizer.ggml.tokens", strings)
        .set("tokenizer.ggml.scores", scores)
        .set("tokenizer.ggml.token_type", types);
    for key in ["add_space_prefix", "remove_extra_whitespaces"] {
        w.set(format!("tokenizer.ggml.{key}"), model[key].as_bool().unwrap());
    }
    if !map.is_empty() {
        w.set("tokenizer.ggml.precompiled_charsmap", map);
    }
    change(&mut w);
    let bytes = w.to_bytes();
    Gguf::read(bytes.as_slice(), bytes.len() as u64).unwrap()
}

fn tokenizer(name: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(&gguf(&model(name), |_| {})).unwrap())
}

fn check(name: &str, whole: bool) {
    let t = tokenizer(name);
    let cases = model(name)["cases"].as_array().unwrap().clone();
    assert!(cases.len() > 150, "cases are missing");
    for case in cases {
        let (text, want) = (case[0].as_str().unwrap(), ids(&case[1]));
        let got = t.encode(text, false).unwrap();
        assert_eq!(got, want, "{name}: {text:?}");
        if whole {
            // `▁` is a space by then.
            assert_eq!(t.decode(&got, true), text.replace('▁', " "), "{name}");
        }
        check_streaming(&t, &got);
    }
    check_streaming(&t, &[]);
    text_common::check_random_streams(&t);
}

#[test]
fn merges_by_score() {
    check("bpe", true);
}

#[test]
fn equal_scores_and_user_defined_tokens() {
    check("bpe-ties", true);
}

#[test]
fn unknown_characters() {
    check("bpe-unknown", false);
}

#[test]
fn unigram_with_replaced_characters() {
    check("unigram", false);
}

#[test]
fn unigram_with_bytes() {
    check("unigram-bytes", true);
}

/// Tokens that begin and end texts, markup in the text, and the space in front of every text.
#[test]
fn special_tokens() {
    let t = tokenizer("bpe");
    assert_eq!((t.bos_id(), t.eos_ids(), t.adds_bos()), (Some(1), [2].as_slice(), true));
    assert!(t.is_special(0) && t.is_special(1) && t.is_special(2) && !t.is_special(13));
    let hello = t.encode("Hello", true).unwrap();
    assert_eq!(t.encode_prompt("Hello").unwrap(), [&[1], hello.as_slice()].concat());
    assert_eq!(t.encode_prompt("<s>Hello").unwrap(), [&[1], hello.as_slice()].concat());
    assert_eq!(t.encode_prompt("").unwrap(), [1]);
    // As text it is no control token, even where pieces would make one.
    let spelled = t.encode("<s>Hello</s><0x0A><unk>", false).unwrap();
    assert!(spelled.iter().all(|&id| !t.is_special(id)));
    assert_eq!(t.decode(&spelled, true), "<s>Hello</s><0x0A><unk>");
    assert_eq!(t.decode(&hello, true), "Hello");
    assert_eq!(t.token_bytes(3 + 10), b"\n", "<0x0A>");
    let bos_off = gguf(&model("bpe"), |w| {
        w.set("tokenizer.ggml.add_bos_token", false);
    });
    assert!(!Tokenizer::from_gguf(&bos_off).unwrap().adds_bos());
}

/// Phi 3's markup takes the white space behind it, which its files say only by their name.
#[test]
fn white_space_behind_markup() {
    let phi = gguf(&model("bpe"), |w| {
        w.set("general.name", "Phi-3-mini");
    });
    let t = Tokenizer::from_gguf(&phi).unwrap();
    assert_eq!(t.encode("</s> \n Hello", true).unwrap(), t.encode("</s>Hello", true).unwrap());
    assert_ne!(t.encode("<s> Hello", true).unwrap(), t.encode("<s>Hello", true).unwrap());
}

#[test]
fn unsound_vocabularies_are_refused() {
    let failure = |name: &str, change: fn(&mut GgufWriter<'_>)| -> String {
        Tokenizer::from_gguf(&gguf(&model(name), change)).unwrap_err().to_string()
    };
    let message = failure("bpe", |w| {
        w.set("tokenizer.ggml.scores", vec![1.0f32; 5]);
    });
    assert!(message.contains("700 tokens but 5 scores"), "{message}");
    let message = failure("bpe", |w| {
        w.set("tokenizer.ggml.scores", vec![f32::NAN; 700]);
    });
    assert!(message.contains("score of token 0 is NaN"), "{message}");
    let message = failure("bpe", |w| {
        w.set("tokenizer.ggml.eos_token_id", 700u32);
    });
    assert!(message.contains("eos_token_id is 700"), "{message}");
    let message = failure("unigram", |w| {
        w.set("tokenizer.ggml.precompiled_charsmap", vec![200u8, 1, 1]);
    });
    assert!(message.contains("replaced characters"), "{message}");
}

#[test]
fn tokenizers_of_other_models_are_told() {
    let t = tokenizer("bpe");
    assert_eq!(t.vocab_size(), 700);
    t.check_rows(700).unwrap();
    t.check_rows(704).unwrap();
    for rows in [699, 32_000] {
        let error = t.check_rows(rows).unwrap_err();
        assert!(matches!(error, TextError::OtherModel { tokens: 700, .. }), "{error}");
        assert!(error.to_string().contains("another model's tokenizer"), "{error}");
    }
}
