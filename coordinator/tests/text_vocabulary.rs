//! Tokenizers built from small vocabularies: what is refused, and what the rules of splitting do.
#![allow(clippy::unwrap_used)]

use millrace_coordinator::text::{ChatTemplate, TextError, Tokenizer};
use millrace_shared::model::gguf::{Gguf, GgufWriter};

fn alphabet() -> Vec<String> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut n = 0;
    (0..=255u8)
        .map(|b| {
            let code = if printable(b) {
                u32::from(b)
            } else {
                n += 1;
                0xff + n
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

struct Vocabulary {
    model: &'static str,
    pre: Option<&'static str>,
    extra: Vec<(&'static str, i32)>,
    merges: Vec<&'static str>,
}

impl Default for Vocabulary {
    fn default() -> Self {
        Self { model: "gpt2", pre: Some("gpt-2"), extra: Vec::new(), merges: Vec::new() }
    }
}

fn gguf(v: &Vocabulary) -> Gguf {
    let mut tokens = alphabet();
    let mut kinds = vec![1i32; tokens.len()];
    for (text, kind) in &v.extra {
        tokens.push((*text).to_owned());
        kinds.push(*kind);
    }
    let mut writer = GgufWriter::new();
    writer.set("tokenizer.ggml.model", v.model);
    if let Some(pre) = v.pre {
        writer.set("tokenizer.ggml.pre", pre);
    }
    writer.set("tokenizer.ggml.tokens", tokens).set("tokenizer.ggml.token_type", kinds);
    writer
        .set("tokenizer.ggml.merges", v.merges.iter().map(|m| (*m).to_owned()).collect::<Vec<_>>());
    let bytes = writer.to_bytes();
    Gguf::read(bytes.as_slice(), bytes.len() as u64).unwrap()
}

fn tokenizer(v: &Vocabulary) -> Result<Tokenizer, TextError> {
    Tokenizer::from_gguf(&gguf(v))
}

#[test]
fn unknown_kinds_are_refused_by_name() {
    let spm = Vocabulary { model: "llama", ..Vocabulary::default() };
    let message = tokenizer(&spm).unwrap_err().to_string();
    assert!(message.contains("'llama'") && message.contains("gpt2"), "{message}");
    let tekken = Vocabulary { pre: Some("tekken"), ..Vocabulary::default() };
    let message = tokenizer(&tekken).unwrap_err().to_string();
    assert!(message.contains("'tekken'") && message.contains("smollm"), "{message}");
    let none = Vocabulary { pre: None, ..Vocabulary::default() };
    assert!(tokenizer(&none).unwrap_err().to_string().contains("tokenizer.ggml.pre"));
}

#[test]
fn unsound_vocabularies_are_refused() {
    let absent = Vocabulary { merges: vec!["a b"], ..Vocabulary::default() };
    let message = tokenizer(&absent).unwrap_err().to_string();
    assert!(message.contains("'a b'") && message.contains("'ab'"), "{message}");
    let no_pair = Vocabulary { merges: vec!["ab"], ..Vocabulary::default() };
    assert!(tokenizer(&no_pair).unwrap_err().to_string().contains("no pair"));
}

#[test]
fn digits_split_as_the_rule_says() {
    let extra = vec![("12", 1), ("123", 1), ("34", 1)];
    let pieces = |pre| {
        let v = Vocabulary {
            pre: Some(pre),
            extra: extra.clone(),
            merges: vec!["1 2", "12 3", "3 4"],
            ..Vocabulary::default()
        };
        let t = tokenizer(&v).unwrap();
        let ids = t.encode("1234", true).unwrap();
        assert_eq!(t.decode(&ids, false), "1234");
        ids.len()
    };
    assert_eq!(pieces("gpt-2"), 2, "123 4: words keep their digits");
    assert_eq!(pieces("smollm"), 4, "digits one by one");
    assert_eq!(pieces("qwen2"), 4, "digits one by one");
    assert_eq!(pieces("llama-bpe"), 2, "digits in threes");
}

#[test]
fn special_tokens_are_found_longest_first() {
    let extra = vec![("<a>", 3), ("<a><b>", 3), ("<user>", 4), ("<|eot_id|>", 3)];
    let t = tokenizer(&Vocabulary { extra, ..Vocabulary::default() }).unwrap();
    assert_eq!(t.encode("<a><b><a>", true).unwrap(), [257, 256]);
    assert_eq!(t.encode("<user>", false).unwrap(), [258], "user-defined tokens always match");
    assert_eq!(t.encode("<a>", false).unwrap().len(), 3);
    assert_eq!(t.decode(&[256, 258], true), "<user>", "user-defined tokens are text");
    assert_eq!(t.eos_ids(), [259]);
}

#[test]
fn no_chat_template() {
    let message = ChatTemplate::from_gguf(&gguf(&Vocabulary::default())).unwrap_err().to_string();
    assert!(message.contains("no chat template") && message.contains("completions"), "{message}");
}
