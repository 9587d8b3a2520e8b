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
    gguf_with(v, |_| {})
}

fn gguf_with(v: &Vocabulary, change: impl Fn(&mut GgufWriter<'_>)) -> Gguf {
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
    change(&mut writer);
    let bytes = writer.to_bytes();
    Gguf::read(bytes.as_slice(), bytes.len() as u64).unwrap()
}

fn tokenizer(v: &Vocabulary) -> Result<Tokenizer, TextError> {
    Tokenizer::from_gguf(&gguf(v))
}

#[test]
fn unknown_kinds_are_refused_by_name() {
    let bert = Vocabulary { model: "bert", ..Vocabulary::default() };
    let message = tokenizer(&bert).unwrap_err().to_string();
    assert!(message.contains("'bert'") && message.contains("gpt2, gemma4, llama"), "{message}");
    let kimi = Vocabulary { pre: Some("kimi-k2"), ..Vocabulary::default() };
    let message = tokenizer(&kimi).unwrap_err().to_string();
    assert!(message.contains("'kimi-k2'") && message.contains("smollm"), "{message}");
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

/// A name that ends answers elsewhere may be ordinary text here (`</s>` in HTML).
#[test]
fn ordinary_text_ends_no_answer() {
    let extra = vec![("</s>", 1), ("<|im_end|>", 1)];
    let t = tokenizer(&Vocabulary { extra, ..Vocabulary::default() }).unwrap();
    assert_eq!(t.eos_ids(), [257]);
    assert!(!t.is_special(256) && t.is_special(257));
}

#[test]
fn prompts_begin_as_the_model_wants() {
    let with = |pre, add: Option<bool>| {
        let v = Vocabulary { pre: Some(pre), extra: vec![("<s>", 3)], ..Vocabulary::default() };
        let t = Tokenizer::from_gguf(&gguf_with(&v, |w| {
            w.set("tokenizer.ggml.bos_token_id", 256u32);
            if let Some(add) = add {
                w.set("tokenizer.ggml.add_bos_token", add);
            }
        }));
        t.unwrap().encode_prompt("a").unwrap()[0] == 256
    };
    assert!(with("llama-bpe", None) && with("tekken", None) && with("qwen2", Some(true)));
    assert!(!with("llama-bpe", Some(false)) && !with("qwen2", None));
}

/// Gemma 4: merges over whole texts, spaces as `▁`, bytes as `<0x0A>`.
#[test]
fn gemma4() {
    let mut tokens: Vec<String> = (0..=255).map(|b| format!("<0x{b:02X}>")).collect();
    let mut kinds = vec![6i32; 256];
    for (text, kind) in [("<bos>", 3), ("▁", 1), ("a", 1), ("▁a", 1), ("\n", 1), ("\n\n", 1)] {
        tokens.push(text.to_owned());
        kinds.push(kind);
    }
    let mut w = GgufWriter::new();
    w.set("tokenizer.ggml.model", "gemma4")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", kinds)
        .set("tokenizer.ggml.bos_token_id", 256u32)
        .set("tokenizer.ggml.merges", vec!["\n \n".to_owned(), "▁ a".to_owned()]);
    let bytes = w.to_bytes();
    let t = Tokenizer::from_gguf(&Gguf::read(bytes.as_slice(), bytes.len() as u64).unwrap());
    let t = t.unwrap();
    let ids = t.encode_prompt(" a\n\na é").unwrap();
    assert_eq!(ids, [256, 259, 261, 258, 257, 0xc3, 0xa9]);
    assert_eq!(t.decode(&ids, true), " a\n\na é");
}

#[test]
fn no_chat_template() {
    let message = ChatTemplate::from_gguf(&gguf(&Vocabulary::default())).unwrap_err().to_string();
    assert!(message.contains("no chat template") && message.contains("completions"), "{message}");
}
