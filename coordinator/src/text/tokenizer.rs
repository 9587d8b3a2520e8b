//! Byte-level BPE from the vocabulary of a GGUF file.
//!
//! Special tokens are cut out of the text first, longest first, as llama.cpp does; what lies between
//! them is split into words and merged by the `tokenizers` crate. Nothing is ever added in front.
//! Bytes that the vocabulary has no token for are dropped, as the models' own tokenizers do.

use std::collections::BTreeSet;

use millrace_shared::model::gguf::{Array, Gguf, GgufError, Value};
use tokenizers::models::bpe::{BPE, Vocab};

use super::{TextError, bytes, pretokenizer::PreTokenizer};

/// Tokens that end an answer wherever they occur in a vocabulary, besides those the file names.
const END_TOKENS: [&str; 13] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

/// Keys of a file that name tokens that end an answer.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Longest run of white space: the splitter's regular expression gives up on much longer ones.
const MAX_WHITESPACE_RUN: usize = 250_000;

/// Kinds of tokens, by GGUF's numbers.
mod kind {
    pub(super) const NORMAL: i64 = 1;
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
    pub(super) const UNUSED: i64 = 5;
}

/// A token that is matched in the text as it stands.
#[derive(Debug)]
struct Special {
    text: String,
    id: u32,
    /// Control tokens are matched only on request and not shown; user-defined ones always.
    control: bool,
}

/// Text to token ids and back. Share it behind an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    words: tokenizers::Tokenizer,
    /// Longest first.
    special: Vec<Special>,
    /// Sorted ids that are not shown.
    hidden: BTreeSet<u32>,
    /// Bytes of all tokens, one after the other; token `i` is `ends[i-1]..ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    eos: Vec<u32>,
    bos: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    ///
    /// # Errors
    /// If the file has no vocabulary, or one that is unsound or of a kind that is not known.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let model = gguf.str("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(TextError::Model(model.to_owned()));
        }
        let pre = PreTokenizer::from_name(gguf.str("tokenizer.ggml.pre")?)?;
        let tokens = gguf.strings("tokenizer.ggml.tokens")?;
        let kinds = token_kinds(gguf, tokens.len())?;

        let mut special = Vec::new();
        let mut hidden = BTreeSet::new();
        for (id, (text, &kind)) in (0u32..).zip(tokens.iter().zip(&kinds)) {
            // A token that ends answers is never text, whatever type the file gives it.
            let control = kind == kind::CONTROL || END_TOKENS.contains(&text.as_str());
            if control || kind == kind::UNKNOWN {
                hidden.insert(id);
            }
            let matched = control || matches!(kind, kind::UNKNOWN | kind::USER_DEFINED);
            if matched && !text.is_empty() {
                let control = kind != kind::USER_DEFINED;
                special.push(Special { text: text.clone(), id, control });
            }
        }
        special.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));

        let (bytes, ends) = token_bytes(tokens, &kinds)?;
        Ok(Self {
            words: words(gguf, tokens, pre)?,
            special,
            hidden,
            bytes,
            ends,
            eos: end_ids(gguf, tokens)?,
            bos: gguf.opt_u32("tokenizer.ggml.bos_token_id")?.filter(|&i| in_range(i, tokens)),
        })
    }

    /// Token ids of a text, with nothing added. With `parse_special`, text that spells a control
    /// token (`<|im_end|>`) becomes that token; without, it is ordinary text.
    ///
    /// # Errors
    /// If the text has hundreds of thousands of white-space characters in a row.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, TextError> {
        check_whitespace(text)?;
        let mut pieces = vec![Piece::Text(text)];
        for special in self.special.iter().filter(|s| parse_special || !s.control) {
            if text.contains(&special.text) {
                pieces = cut(pieces, special);
            }
        }
        let mut ids = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => {
                    let encoding = self.words.encode_fast(text, false);
                    let encoding = encoding.map_err(|e| TextError::Encode(e.to_string()))?;
                    ids.extend_from_slice(encoding.get_ids());
                }
            }
        }
        Ok(ids)
    }

    /// Text of token ids; bytes that are no UTF-8 become U+FFFD. For a stream of tokens use
    /// [`super::Detokenizer`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Bytes that a token stands for; nothing for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let i = id as usize;
        let Some(&end) = self.ends.get(i) else { return &[] };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Whether a token is markup that answers do not show.
    pub fn is_special(&self, id: u32) -> bool {
        self.hidden.contains(&id)
    }

    /// Ids that end an answer, ascending.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Whether an id ends an answer.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos.binary_search(&id).is_ok()
    }

    /// The token that the file names as the beginning of texts (never added by [`Self::encode`]).
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens in the vocabulary.
    pub fn vocab_size(&self) -> u32 {
        self.ends.len() as u32
    }
}

enum Piece<'a> {
    Text(&'a str),
    Token(u32),
}

/// Cuts every occurrence of a token out of the pieces that are still text.
fn cut<'a>(pieces: Vec<Piece<'a>>, special: &Special) -> Vec<Piece<'a>> {
    let mut out = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let Piece::Text(text) = piece else {
            out.push(piece);
            continue;
        };
        for (i, part) in text.split(special.text.as_str()).enumerate() {
            if i > 0 {
                out.push(Piece::Token(special.id));
            }
            if !part.is_empty() {
                out.push(Piece::Text(part));
            }
        }
    }
    out
}

fn check_whitespace(text: &str) -> Result<(), TextError> {
    let mut run = 0;
    for c in text.chars() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        if run > MAX_WHITESPACE_RUN {
            return Err(TextError::Encode(format!(
                "more than {MAX_WHITESPACE_RUN} white-space characters in a row"
            )));
        }
    }
    Ok(())
}

fn in_range(id: u32, tokens: &[String]) -> bool {
    (id as usize) < tokens.len()
}

fn token_kinds(gguf: &Gguf, count: usize) -> Result<Vec<i64>, TextError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let kinds: Vec<i64> = match gguf.metadata.get(KEY) {
        None => vec![kind::NORMAL; count],
        Some(Value::Array(Array::I32(v))) => v.iter().map(|&k| k.into()).collect(),
        Some(Value::Array(Array::U32(v))) => v.iter().map(|&k| k.into()).collect(),
        Some(v) => {
            return Err(TextError::File(GgufError::WrongType {
                key: KEY.to_owned(),
                found: v.type_name(),
                expected: "an array of 32-bit integers",
            }));
        }
    };
    if kinds.len() != count {
        return Err(TextError::Vocabulary(format!(
            "{count} tokens but {} token types",
            kinds.len()
        )));
    }
    Ok(kinds)
}

/// Bytes of all tokens: markup as it is spelled, the rest through the byte alphabet.
fn token_bytes(tokens: &[String], kinds: &[i64]) -> Result<(Vec<u8>, Vec<u32>), TextError> {
    let table = bytes::table();
    let mut all = Vec::new();
    let mut ends = Vec::with_capacity(tokens.len());
    for (text, &kind) in tokens.iter().zip(kinds) {
        match kind {
            kind::UNKNOWN | kind::CONTROL | kind::USER_DEFINED | kind::UNUSED => {
                all.extend_from_slice(text.as_bytes());
            }
            _ => bytes::decode_into(text, &table, &mut all),
        }
        let end = u32::try_from(all.len());
        ends.push(end.map_err(|_| TextError::Vocabulary("it exceeds 4 GiB".to_owned()))?);
    }
    Ok((all, ends))
}

fn words(
    gguf: &Gguf,
    tokens: &[String],
    pre: PreTokenizer,
) -> Result<tokenizers::Tokenizer, TextError> {
    let vocab: Vocab = tokens.iter().cloned().zip(0u32..).collect();
    let merges = gguf.strings("tokenizer.ggml.merges")?;
    let merges = merges.iter().map(|merge| {
        // The first character may itself be a space only in vocabularies without a byte alphabet.
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| TextError::Vocabulary(format!("merge '{merge}' is no pair")))?;
        for part in [left.to_owned(), right.to_owned(), format!("{left}{right}")] {
            if !vocab.contains_key(&part) {
                return Err(TextError::Vocabulary(format!(
                    "merge '{merge}' needs the token '{part}', which is absent"
                )));
            }
        }
        Ok((left.to_owned(), right.to_owned()))
    });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre.ignores_merges())
        .build()
        .map_err(|e| TextError::Vocabulary(e.to_string()))?;
    let mut words = tokenizers::Tokenizer::new(bpe);
    words.with_pre_tokenizer(Some(pre.build()?));
    Ok(words)
}

fn end_ids(gguf: &Gguf, tokens: &[String]) -> Result<Vec<u32>, TextError> {
    let mut ids = BTreeSet::new();
    for key in END_KEYS {
        if let Some(id) = gguf.opt_u32(key)? {
            if !in_range(id, tokens) {
                return Err(TextError::Vocabulary(format!(
                    "{key} is {id}, but there are {} tokens",
                    tokens.len()
                )));
            }
            ids.insert(id);
        }
    }
    for (id, text) in (0u32..).zip(tokens) {
        if END_TOKENS.contains(&text.as_str()) {
            ids.insert(id);
        }
    }
    Ok(ids.into_iter().collect())
}
