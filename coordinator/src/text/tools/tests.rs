//! Answers that have to call: whatever is drawn of what the grammar allows is read as calls whose
//! arguments are as the schema says.

use std::path::Path;
use std::sync::Arc;

use millrace_shared::id::RequestId;
use millrace_shared::sampling::{Grammar, uniform};
use millrace_shared::wire::rpc::{ChatMessage, Conversation, ToolChoice};
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::text::TextModel;

fn tokenizer() -> Arc<Tokenizer> {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testdata/tokenizers/llama");
    TextModel::from_folder(&testdata).unwrap().tokenizer
}

fn conversation(tool_choice: ToolChoice) -> Conversation {
    let day = json!({"$defs": {"day": {"enum": ["mon", "tue"]}}, "type": "object",
        "properties": {"day": {"$ref": "#/$defs/day"}}, "required": ["day"],
        "additionalProperties": false});
    let count = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1,
        "maximum": 9}}, "required": ["n"], "additionalProperties": false});
    Conversation {
        messages: vec![ChatMessage::new("user", "go")],
        tools: vec![
            json!({"name": "pick", "parameters": day}).to_string(),
            json!({"name": "count", "parameters": count}).to_string(),
        ],
        tool_choice,
        single_call: false,
    }
}

/// Draws an answer and reads it.
fn answer(tokenizer: &Arc<Tokenizer>, form: &CallForm, grammar: &Grammar, seed: u64) -> Piece {
    let mut matcher = tokenizer.grammars().unwrap().compile(grammar).unwrap();
    let mut parser = CallParser::new(form, RequestId(Uuid::from_u128(1)), 0);
    let mut piece = Piece::default();
    for step in 0..2000 {
        let mask = matcher.mask().unwrap();
        let all: Vec<u32> = (0..tokenizer.vocab_size()).filter(|&id| mask.allows(id)).collect();
        let ends = all.iter().any(|&id| tokenizer.is_eos(id));
        let draw = uniform(seed, step);
        let texts: Vec<u32> = all.into_iter().filter(|&id| !tokenizer.is_eos(id)).collect();
        if texts.is_empty() || (ends && draw < 0.5) {
            piece.append(parser.finish());
            return piece;
        }
        let id = texts[(draw * texts.len() as f64) as usize];
        matcher.consume(&[id]).unwrap();
        piece.append(parser.push(&String::from_utf8_lossy(tokenizer.token_bytes(id))));
    }
    panic!("the answer does not end");
}

fn check(name: &str, arguments: &str) {
    let value: Value = serde_json::from_str(arguments).unwrap();
    match name {
        "pick" => assert!(["mon", "tue"].contains(&value["day"].as_str().unwrap())),
        "count" => assert!((1..=9).contains(&value["n"].as_i64().unwrap())),
        other => panic!("nobody spoke of {other}"),
    }
}

#[test]
fn calls_that_are_required_are_made() {
    let tokenizer = tokenizer();
    for style in [CallStyle::Tagged, CallStyle::Json, CallStyle::Listed, CallStyle::Named] {
        for (choice, single) in [
            (ToolChoice::Required, false),
            (ToolChoice::Required, true),
            (ToolChoice::Named("count".into()), false),
        ] {
            let named = matches!(choice, ToolChoice::Named(_));
            let conversation = Conversation { single_call: single, ..conversation(choice) };
            let (form, grammar) = plan(&conversation, None, style, &tokenizer).unwrap();
            let (form, grammar) = (form.unwrap(), grammar.unwrap());
            for seed in 0..6 {
                let piece = answer(&tokenizer, &form, &grammar, seed);
                assert_eq!(piece.text, "", "{style:?}");
                assert!((1..=8).contains(&piece.calls.len()), "{style:?}: {piece:?}");
                assert!(!(single || named) || piece.calls.len() == 1, "{style:?}: {piece:?}");
                for call in &piece.calls {
                    assert!(!named || call.name == "count");
                    check(&call.name, &call.arguments);
                }
            }
        }
    }
}

/// Where a form is asked for besides, an answer has that form or calls.
#[test]
fn a_form_or_a_call() {
    let tokenizer = tokenizer();
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"], "additionalProperties": false});
    let asked = Some(Grammar::JsonSchema(schema.to_string()));
    let auto = conversation(ToolChoice::Auto);
    let (form, grammar) = plan(&auto, asked.clone(), CallStyle::Tagged, &tokenizer).unwrap();
    let (form, grammar) = (form.unwrap(), grammar.unwrap());
    let (mut said, mut called) = (0, 0);
    for seed in 0..24 {
        let piece = answer(&tokenizer, &form, &grammar, seed);
        if piece.calls.is_empty() {
            let value: Value = serde_json::from_str(&piece.text).unwrap();
            assert!(value["ok"].is_boolean());
            said += 1;
        } else {
            piece.calls.iter().for_each(|call| check(&call.name, &call.arguments));
            called += 1;
        }
    }
    assert!(said > 0 && called > 0, "{said} and {called}");
    let regex = Some(Grammar::Regex("a".into()));
    let error = plan(&auto, regex, CallStyle::Tagged, &tokenizer).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("grammar"), "{error}");
    // A call that is required leaves no other answer to have the form.
    for choice in [ToolChoice::Required, ToolChoice::Named("count".into())] {
        let required = conversation(choice);
        let with = |asked| plan(&required, asked, CallStyle::Tagged, &tokenizer).unwrap();
        assert_eq!(with(asked.clone()), with(None));
    }
    // Nothing is in the way where none is called.
    let none = conversation(ToolChoice::None);
    assert_eq!(plan(&none, asked.clone(), CallStyle::Json, &tokenizer).unwrap(), (None, asked));
}

#[test]
fn choices_that_make_no_sense() {
    let tokenizer = tokenizer();
    for choice in [ToolChoice::Required, ToolChoice::Named("no".into())] {
        let mut conversation = conversation(choice.clone());
        if choice == ToolChoice::Required {
            conversation.tools.clear();
        }
        let error = plan(&conversation, None, CallStyle::Json, &tokenizer).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tool_choice"), "{error}");
    }
}
