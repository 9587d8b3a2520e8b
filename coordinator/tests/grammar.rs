//! Random answers under a grammar: whatever is drawn of what may come, the text is of the language.
#![allow(clippy::unwrap_used)]

mod text_common;

use std::sync::Arc;

use millrace_coordinator::text::{Grammars, TextModel, Tokenizer};
use millrace_shared::sampling::{Grammar, TokenMask, uniform};
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use text_common::testdata;

fn tokenizer() -> Arc<Tokenizer> {
    TextModel::from_folder(&testdata("llama")).unwrap().tokenizer
}

fn allowed(mask: &TokenMask, vocab: u32) -> Vec<u32> {
    (0..vocab).filter(|&id| mask.allows(id)).collect()
}

/// Draws an answer; `None` where it does not end in 2,000 tokens.
fn answer(
    tokenizer: &Tokenizer,
    grammars: &Arc<Grammars>,
    grammar: &Grammar,
    seed: u64,
) -> Option<String> {
    let mut matcher = grammars.compile(grammar).unwrap();
    let mut ids = Vec::new();
    for step in 0..2000 {
        let mask = matcher
            .mask()
            .unwrap_or_else(|e| panic!("{e} after {:?}", tokenizer.decode(&ids, false)));
        let choices = allowed(&mask, tokenizer.vocab_size());
        let end = choices.iter().find(|&&id| tokenizer.is_eos(id));
        let draw = uniform(seed, step);
        // Ends are rare among all tokens: half of the time where one is possible.
        let over = draw < 0.5 || choices.iter().all(|&id| tokenizer.is_eos(id));
        if end.is_some() && over {
            return Some(tokenizer.decode(&ids, true));
        }
        let texts: Vec<u32> = choices.into_iter().filter(|&id| !tokenizer.is_eos(id)).collect();
        let id = texts[(draw * texts.len() as f64) as usize];
        assert!(!tokenizer.is_special(id), "markup is no text");
        matcher.consume(&[id]).unwrap();
        ids.push(id);
    }
    None
}

#[test]
fn answers_are_what_the_schema_says() {
    let tokenizer = tokenizer();
    let grammars = Arc::new(Grammars::new(&tokenizer).unwrap());
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["cat", "dog"]},
            "age": {"type": "integer", "minimum": 3, "maximum": 17},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}
        },
        "required": ["name", "kind", "age", "tags"],
        "additionalProperties": false
    });
    let grammar = Grammar::JsonSchema(schema.to_string());
    for seed in 0..40 {
        let text = answer(&tokenizer, &grammars, &grammar, seed).expect("a bounded schema ends");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let object = value.as_object().unwrap();
        assert_eq!(object.keys().collect::<Vec<_>>(), ["name", "kind", "age", "tags"], "{text}");
        assert!(object["name"].as_str().unwrap().chars().count() <= 12, "{text}");
        assert!(["cat", "dog"].contains(&object["kind"].as_str().unwrap()), "{text}");
        assert!((3..=17).contains(&object["age"].as_i64().unwrap()), "{text}");
        assert!((1..=3).contains(&object["tags"].as_array().unwrap().len()), "{text}");
        assert!(!text.contains('\n') && text.starts_with("{\"name\": \""), "{text}");
    }
}

#[test]
fn regular_expressions_and_lark_hold() {
    let tokenizer = tokenizer();
    let grammars = Arc::new(Grammars::new(&tokenizer).unwrap());
    for seed in 0..20 {
        let regex = Grammar::Regex("[a-c]{2,5}-[0-9]+".into());
        let text = answer(&tokenizer, &grammars, &regex, seed).unwrap();
        let (letters, digits) = text.split_once('-').unwrap();
        assert!((2..=5).contains(&letters.len()), "{text}");
        assert!(letters.bytes().all(|b| (b'a'..=b'c').contains(&b)), "{text}");
        assert!(!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");
        let lark = Grammar::Lark(r#"start: "yes" | "no""#.into());
        let text = answer(&tokenizer, &grammars, &lark, seed).unwrap();
        assert!(["yes", "no"].contains(&text.as_str()), "{text}");
        let any = Grammar::JsonObject;
        if let Some(text) = answer(&tokenizer, &grammars, &any, seed) {
            // Numbers may be larger than any type holds.
            serde_json::from_str::<IgnoredAny>(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(text.starts_with('{'), "{text}");
        }
    }
}

/// The state follows from the tokens: that is what recovery relies on.
#[test]
fn the_state_is_made_anew_from_tokens() {
    let tokenizer = tokenizer();
    let grammars = Arc::new(Grammars::new(&tokenizer).unwrap());
    let grammar = Grammar::JsonSchema(
        json!({
            "type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]
        })
        .to_string(),
    );
    let mut matcher = grammars.compile(&grammar).unwrap();
    let fresh = matcher.fresh();
    let mut ids = Vec::new();
    for step in 0..12 {
        let choices = allowed(&matcher.mask().unwrap(), tokenizer.vocab_size());
        let id = choices[(uniform(9, step) * choices.len() as f64) as usize];
        if tokenizer.is_eos(id) {
            break;
        }
        matcher.consume(&[id]).unwrap();
        ids.push(id);
        let mut again = fresh.fresh();
        again.consume(&ids).unwrap();
        assert_eq!(again.mask().unwrap(), matcher.mask().unwrap());
        let other = Arc::new(Grammars::new(&tokenizer).unwrap());
        let mut elsewhere = other.compile(&grammar).unwrap();
        elsewhere.consume(&ids).unwrap();
        assert_eq!(elsewhere.mask().unwrap(), matcher.mask().unwrap());
    }
    assert!(ids.len() > 3, "{ids:?}");
}

#[test]
fn bad_grammars_are_refused() {
    let grammars = Arc::new(Grammars::new(&tokenizer()).unwrap());
    for (grammar, said) in [
        (Grammar::JsonSchema("{".into()), "not valid JSON"),
        (Grammar::JsonSchema("[]".into()), "must be a JSON object"),
        (Grammar::JsonSchema(r#"{"type": "objekt"}"#.into()), "objekt"),
        (Grammar::JsonSchema(r##"{"$ref": "#/nowhere"}"##.into()), "nowhere"),
        (Grammar::Regex("(a".into()), ""),
        (Grammar::Lark("start: missing".into()), "missing"),
    ] {
        let error = match grammars.compile(&grammar) {
            Ok(_) => panic!("{grammar:?} was taken"),
            Err(error) => error.to_string(),
        };
        assert!(!error.is_empty() && error.contains(said), "{grammar:?}: {error}");
        assert!(error.chars().count() < 500, "{error}");
    }
}
