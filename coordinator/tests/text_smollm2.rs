//! The tokenizer and the chat template of the real model against llama.cpp's ids.
//!
//! `MILLRACE_TEST_MODEL` names the file; without it the model is fetched into the cache.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use millrace_coordinator::models::{NoProgress, resolve};
use millrace_coordinator::text::{
    ChatMessage, ChatTemplate, Detokenizer, TextModel, Tokenizer, TokenizerInfo,
};
use millrace_shared::model::gguf::Gguf;
use serde_json::Value;

fn model() -> Gguf {
    let path = match std::env::var_os("MILLRACE_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => resolve("smollm2:135m", &mut NoProgress)
            .expect("the test model: set MILLRACE_TEST_MODEL to its path, or allow fetching it"),
    };
    Gguf::open(path).unwrap()
}

fn fixture(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/testdata").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

#[test]
fn fixtures_hold() {
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model()).unwrap());
    let mut seen = 0;
    for case in fixture("smollm2-tokens.json") {
        let text = case["text"].as_str().unwrap();
        let want = ids(&case["ids"]);
        assert_eq!(tokenizer.encode(text, true).unwrap(), want, "{text:?}");
        assert_eq!(tokenizer.decode(&want, false), text);
        let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer)).with_special(true);
        let mut pieces: String = want.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push_str(&detokenizer.finish());
        assert_eq!(pieces, text);
        seen += 1;
    }
    for case in fixture("smollm2-reference.json") {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["token_ids"]), "{text:?}");
        seen += 1;
    }
    assert!(seen >= 20, "fixtures are missing");
}

#[test]
fn what_clients_are_told_of_it() {
    let info = TokenizerInfo::of(&TextModel::from_gguf(&model()).unwrap());
    let some = |text: &str| Some(text.to_owned());
    assert_eq!((info.bos_token, info.eos_token), (some("<|im_start|>"), some("<|im_end|>")));
    assert!(info.additional_special_tokens.contains(&"<|endoftext|>".to_owned()));
    assert!(info.chat_template.unwrap().contains("add_generation_prompt") && !info.add_bos_token);
}

#[test]
fn special_tokens() {
    let tokenizer = Tokenizer::from_gguf(&model()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.eos_ids(), [0, 2]);
    assert_eq!(tokenizer.bos_id(), Some(1));
    assert!(tokenizer.is_eos(2) && !tokenizer.is_eos(1) && tokenizer.is_special(1));
    assert_eq!(tokenizer.token_bytes(2), b"<|im_end|>");
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    let text = "<|im_start|>hi<|im_end|><|im_end|>";
    assert_eq!(tokenizer.encode(text, true).unwrap().first(), Some(&1));
    let plain = tokenizer.encode(text, false).unwrap();
    assert!(plain.iter().all(|id| !tokenizer.is_special(*id)), "{plain:?}");
    assert_eq!(tokenizer.decode(&plain, true), text);
    assert_eq!(tokenizer.decode(&[1, 6004, 2], true), "hi");
    assert!(tokenizer.encode("", true).unwrap().is_empty());
    assert!(tokenizer.encode(&" ".repeat(300_000), true).is_err());
}

/// Every token alone, in a stream with others, gives what decoding at once gives.
#[test]
fn detokenizer_equals_decoding_at_once() {
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model()).unwrap());
    let mut state = 7u64;
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer));
    let (mut ids, mut text) = (Vec::new(), String::new());
    for _ in 0..50_000 {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Half of them from the low ids, where single bytes are.
        let range = if state >> 63 == 0 { 300 } else { 49_152 };
        let id = ((state >> 33) % range) as u32;
        ids.push(id);
        text.push_str(&detokenizer.push(id));
    }
    text.push_str(&detokenizer.finish());
    assert_eq!(text, tokenizer.decode(&ids, true));
    assert!(text.contains('\u{fffd}'));
}

#[test]
fn chat_prompts_equal_the_fixtures() {
    let template = ChatTemplate::from_gguf(&model()).unwrap();
    for (name, question) in
        [("chat-greeting", "Hello! Who are you?"), ("chat-list", "List three primary colors.")]
    {
        let cases = fixture("smollm2-reference.json");
        let case = cases.iter().find(|c| c["name"] == name).unwrap();
        let message = ChatMessage::new("user", question);
        assert_eq!(
            template.render(&vec![message].into(), true).unwrap(),
            case["text"].as_str().unwrap()
        );
    }
}
