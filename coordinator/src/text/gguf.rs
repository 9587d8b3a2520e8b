//! The tokenizer that a GGUF file describes in its metadata.
//!
//! Four kinds: `gpt2` (BPE over bytes, by the `tokenizers` crate and a rule of splitting), `gemma4`
//! (BPE with merges over whole texts), `llama` (SentencePiece's merges by score) and `t5`
//! (SentencePiece's unigram model). What the file leaves open is as llama.cpp has it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use millrace_shared::model::gguf::{Array, Gguf, GgufError, Value};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::{Replace, ReplacePattern};

use super::normalize::{CharsMap, Normalizer};
use super::pieces::{Fallback, Pieces};
use super::pretokenizer::PreTokenizer;
use super::table::{MAX_TOKENS, SPACE, Spelling, TokenTable, byte_value, too_many};
use super::tokenizer::{Model, Special, Tokenizer};
use super::unigram::Unigram;
use super::{TextError, ends};

/// Keys of a file that name tokens that end an answer.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Kinds of tokens, by GGUF's numbers.
mod kind {
    pub(super) const NORMAL: i64 = 1;
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
    pub(super) const UNUSED: i64 = 5;
    pub(super) const BYTE: i64 = 6;
}

/// Kinds of vocabularies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Gpt2(&'static PreTokenizer),
    Gemma4,
    Llama,
    T5,
}

/// A file's vocabulary, checked for lengths.
struct Vocabulary<'a> {
    gguf: &'a Gguf,
    family: Family,
    tokens: &'a [String],
    kinds: Vec<i64>,
    /// Tokens that end answers by their name.
    ends: BTreeMap<&'a str, u32>,
}

/// Builds the tokenizer that a file describes.
///
/// # Errors
/// If the file has no vocabulary, or one that is unsound or of a kind that is not known.
pub(super) fn read(gguf: &Gguf) -> Result<Tokenizer, TextError> {
    let v = Vocabulary::read(gguf)?;
    let model: Box<dyn Model> = match v.family {
        Family::Gpt2(pre) => Box::new(v.words(pre)?),
        Family::Gemma4 => Box::new(v.gemma4()?),
        Family::Llama => Box::new(v.pieces()?),
        Family::T5 => Box::new(v.unigram()?),
    };
    let (special, hidden) = v.special();
    let sentence_piece = matches!(v.family, Family::Llama | Family::T5);
    Ok(Tokenizer {
        model,
        special,
        hidden,
        table: v.table()?,
        eos: v.end_ids()?,
        bos: v.id("tokenizer.ggml.bos_token_id", (v.family == Family::Llama).then_some(1))?,
        adds_bos: v.adds_bos()?,
        strips_space: sentence_piece && v.prefix_space()?,
        grammars: OnceLock::new(),
    })
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self, TextError> {
        let family = match gguf.str("tokenizer.ggml.model")? {
            "gpt2" => Family::Gpt2(PreTokenizer::from_name(gguf.str("tokenizer.ggml.pre")?)?),
            "gemma4" => Family::Gemma4,
            "llama" => Family::Llama,
            "t5" => Family::T5,
            other => return Err(TextError::Model(other.to_owned())),
        };
        let tokens = gguf.strings("tokenizer.ggml.tokens")?;
        if tokens.len() > MAX_TOKENS {
            return Err(too_many(tokens.len() as u64));
        }
        let mut kinds = token_kinds(gguf, tokens.len())?;
        let named = (0u32..).zip(tokens.iter().map(String::as_str));
        // It may be HTML: Qwen has it so.
        let ends = ends::by_name(
            named.filter(|&(id, text)| text != "</s>" || kinds[id as usize] != kind::NORMAL),
        );
        for (text, kind) in tokens.iter().zip(&mut kinds) {
            // A token that ends answers is never text, whatever kind the file gives it.
            if ends.contains_key(text.as_str()) {
                *kind = kind::CONTROL;
            } else if !matches!(family, Family::Gpt2(_)) && *kind == kind::NORMAL {
                // Files without kinds.
                let bytes = gguf.metadata.get(TYPES_KEY).is_none() && byte_value(text).is_some();
                *kind = if bytes { kind::BYTE } else { *kind };
            }
        }
        Ok(Self { gguf, family, tokens, kinds, ends })
    }

    /// Ids, texts and kinds.
    fn iter(&self) -> impl Iterator<Item = (u32, &'a str, i64)> + '_ {
        (0u32..)
            .zip(self.tokens)
            .zip(&self.kinds)
            .map(|((id, text), &kind)| (id, text.as_str(), kind))
    }

    fn special(&self) -> (Vec<Special>, BTreeSet<u32>) {
        let (mut special, mut hidden) = (Vec::new(), BTreeSet::new());
        let strips = self.strips_behind_special();
        for (id, text, kind) in self.iter() {
            if matches!(kind, kind::CONTROL | kind::UNKNOWN) {
                hidden.insert(id);
            }
            let matched = matches!(kind, kind::CONTROL | kind::UNKNOWN | kind::USER_DEFINED);
            if matched && !text.is_empty() {
                let strips = strips && !["<unk>", "<s>", "<|endoftext|>"].contains(&text);
                let control = kind != kind::USER_DEFINED;
                special.push(Special { text: text.to_owned(), id, control, strips });
            }
        }
        special.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        (special, hidden)
    }

    /// Phi 3's markup takes the white space behind it; files do not say so, but for their name.
    fn strips_behind_special(&self) -> bool {
        let name = self.gguf.opt_str("general.name").ok().flatten().unwrap_or_default();
        let name = name.to_lowercase();
        self.family == Family::Llama && (name.contains("phi-3") || name.contains("phi3"))
    }

    /// Bytes of all tokens: markup as it is spelled, the rest as the family spells text.
    fn table(&self) -> Result<TokenTable, TextError> {
        let spaces = || Spelling::Replaced(vec![(SPACE.to_owned(), " ".to_owned())]);
        let text_spelling = match self.family {
            Family::Gpt2(_) => Spelling::Alphabet,
            Family::Gemma4 | Family::Llama | Family::T5 => spaces(),
        };
        let byte_level = matches!(self.family, Family::Gpt2(_));
        let mut table = TokenTable::default();
        for (_, text, kind) in self.iter() {
            match (kind, byte_value(text)) {
                (kind::UNKNOWN | kind::CONTROL, _) => table.push(text, &Spelling::Plain)?,
                (kind::USER_DEFINED | kind::UNUSED, _) if byte_level => {
                    table.push(text, &Spelling::Plain)?;
                }
                (kind::BYTE, Some(byte)) => table.push(text, &Spelling::Byte(byte))?,
                _ => table.push(text, &text_spelling)?,
            }
        }
        Ok(table)
    }

    /// The id that a key names, or else `default`; none where it is outside the vocabulary.
    fn id(&self, key: &str, default: Option<u32>) -> Result<Option<u32>, TextError> {
        let id = self.gguf.opt_u32(key)?.or(default);
        Ok(id.filter(|&id| (id as usize) < self.tokens.len()))
    }

    fn adds_bos(&self) -> Result<bool, TextError> {
        let said = self.gguf.opt_bool("tokenizer.ggml.add_bos_token")?;
        Ok(match self.family {
            Family::Gpt2(pre) => said.unwrap_or(pre.adds_bos),
            // Files of this family say wrongly that they do not.
            Family::Gemma4 => true,
            Family::Llama => said.unwrap_or(true),
            Family::T5 => said.unwrap_or(false),
        })
    }

    fn prefix_space(&self) -> Result<bool, TextError> {
        let said = self.gguf.opt_bool("tokenizer.ggml.add_space_prefix")?;
        Ok(said.unwrap_or(self.family == Family::Llama))
    }

    fn end_ids(&self) -> Result<Vec<u32>, TextError> {
        let mut ids: BTreeSet<u32> = self.ends.values().copied().collect();
        for key in END_KEYS {
            if let Some(id) = self.gguf.opt_u32(key)? {
                if id as usize >= self.tokens.len() {
                    let count = self.tokens.len();
                    return Err(unsound(format!("{key} is {id}, but there are {count} tokens")));
                }
                ids.insert(id);
            }
        }
        if ids.is_empty() && self.family == Family::Llama {
            ids.extend(self.id(END_KEYS[0], Some(2))?);
        }
        Ok(ids.into_iter().collect())
    }

    fn bpe(&self, whole_words: bool, byte_fallback: bool) -> Result<BPE, TextError> {
        let vocab: Vocab = self.tokens.iter().cloned().zip(0u32..).collect();
        let merges = self.gguf.strings("tokenizer.ggml.merges")?;
        let merges = merges.iter().map(|merge| {
            // The first character may itself be a space, in vocabularies without a byte alphabet.
            let first = merge.chars().next().map_or(0, char::len_utf8);
            let space = merge[first..].find(' ').map(|at| first + at);
            let (left, right) = space
                .map(|at| (&merge[..at], &merge[at + 1..]))
                .ok_or_else(|| unsound(format!("merge '{merge}' is no pair")))?;
            for part in [left.to_owned(), right.to_owned(), format!("{left}{right}")] {
                if !vocab.contains_key(&part) {
                    return Err(unsound(format!(
                        "merge '{merge}' needs the token '{part}', which is absent"
                    )));
                }
            }
            Ok((left.to_owned(), right.to_owned()))
        });
        let merges = merges.collect::<Result<Vec<_>, _>>()?;
        BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(whole_words)
            .byte_fallback(byte_fallback)
            .build()
            .map_err(|e| unsound(e.to_string()))
    }

    fn words(&self, pre: &PreTokenizer) -> Result<Words, TextError> {
        let mut words = tokenizers::Tokenizer::new(self.bpe(pre.whole_words, false)?);
        words.with_normalizer(pre.normalizer()).map_err(|e| unsound(e.to_string()))?;
        words.with_pre_tokenizer(Some(pre.build()?));
        Ok(Words(words))
    }

    /// Merges over whole texts, in which spaces are `▁`.
    fn gemma4(&self) -> Result<Words, TextError> {
        let mut words = tokenizers::Tokenizer::new(self.bpe(false, true)?);
        let spaces = Replace::new(ReplacePattern::String(" ".to_owned()), SPACE);
        let spaces = spaces.map_err(|e| unsound(e.to_string()))?;
        words.with_normalizer(Some(spaces)).map_err(|e| unsound(e.to_string()))?;
        Ok(Words(words))
    }

    fn pieces(&self) -> Result<Pieces, TextError> {
        let scores = self.scores()?;
        let text = self.scored_text(&scores);
        let normalizer = Normalizer { prefix_space: self.prefix_space()?, ..Normalizer::default() };
        Ok(Pieces::new(text, self.fallback(Some(0))?, normalizer))
    }

    fn unigram(&self) -> Result<Unigram, TextError> {
        let scores = self.scores()?;
        let normal = self.iter().zip(&scores).filter(|((_, _, kind), _)| *kind == kind::NORMAL);
        let worst = normal.map(|(_, &score)| score).fold(f32::INFINITY, f32::min);
        if worst.is_infinite() {
            return Err(unsound("it has no ordinary pieces".to_owned()));
        }
        let merge_spaces = self.gguf.opt_bool("tokenizer.ggml.remove_extra_whitespaces")?;
        let normalizer = Normalizer {
            table: self.chars_map()?,
            prefix_space: self.prefix_space()?,
            merge_spaces: merge_spaces.unwrap_or(false),
        };
        let text = self.scored_text(&scores).map(|(text, id, score)| {
            let user_defined = self.kinds[id as usize] == kind::USER_DEFINED;
            (text, id, if user_defined { 0.0 } else { score })
        });
        Ok(Unigram::new(text, worst, self.fallback(Some(2))?, normalizer))
    }

    /// The pieces that text can become, with their scores.
    fn scored_text<'s>(&'s self, scores: &'s [f32]) -> impl Iterator<Item = (&'s str, u32, f32)> {
        let text = self.iter().zip(scores).filter(|((_, _, kind), _)| {
            !matches!(*kind, kind::CONTROL | kind::UNKNOWN | kind::BYTE)
        });
        text.map(|((id, text, _), &score)| (text, id, score))
    }

    fn scores(&self) -> Result<Vec<f32>, TextError> {
        const KEY: &str = "tokenizer.ggml.scores";
        let scores: Vec<f32> = match self.gguf.metadata.get(KEY) {
            Some(Value::Array(Array::F32(v))) => v.clone(),
            Some(Value::Array(Array::I32(v))) => v.iter().map(|&s| s as f32).collect(),
            None => return Err(GgufError::MissingKey(KEY.to_owned()).into()),
            Some(v) => return Err(wrong_type(KEY, v, "an array of 32-bit floats")),
        };
        let count = self.tokens.len();
        if scores.len() != count {
            return Err(unsound(format!("{count} tokens but {} scores", scores.len())));
        }
        match scores.iter().position(|score| !score.is_finite()) {
            Some(id) => Err(unsound(format!("the score of token {id} is {}", scores[id]))),
            None => Ok(scores),
        }
    }

    fn fallback(&self, unknown: Option<u32>) -> Result<Fallback, TextError> {
        let mut table = Box::new([0; 256]);
        let mut found = BTreeSet::new();
        for (id, text, _) in self.iter().filter(|(_, _, kind)| *kind == kind::BYTE) {
            if let Some(byte) = byte_value(text) {
                table[usize::from(byte)] = id;
                found.insert(byte);
            }
        }
        let kind = self.iter().find(|(_, _, kind)| *kind == kind::UNKNOWN).map(|(id, ..)| id);
        let unknown = self.id("tokenizer.ggml.unknown_token_id", kind.or(unknown))?;
        Ok(Fallback { bytes: (found.len() == 256).then_some(table), unknown })
    }

    fn chars_map(&self) -> Result<Option<CharsMap>, TextError> {
        const KEY: &str = "tokenizer.ggml.precompiled_charsmap";
        match self.gguf.metadata.get(KEY) {
            None => Ok(None),
            Some(Value::Array(Array::U8(v))) => CharsMap::read(v).map(Some),
            Some(Value::Array(Array::I8(v))) => {
                CharsMap::read(&v.iter().map(|&b| b as u8).collect::<Vec<_>>()).map(Some)
            }
            Some(v) => Err(wrong_type(KEY, v, "an array of bytes")),
        }
    }
}

/// The `tokenizers` crate's BPE, for text without special tokens.
#[derive(Debug)]
struct Words(tokenizers::Tokenizer);

impl Model for Words {
    fn encode(&self, text: &str, _: bool, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let encoding = self.0.encode_fast(text, false);
        let encoding = encoding.map_err(|e| TextError::Encode(e.to_string()))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

const TYPES_KEY: &str = "tokenizer.ggml.token_type";

fn token_kinds(gguf: &Gguf, count: usize) -> Result<Vec<i64>, TextError> {
    let kinds: Vec<i64> = match gguf.metadata.get(TYPES_KEY) {
        None => vec![kind::NORMAL; count],
        Some(Value::Array(Array::I32(v))) => v.iter().map(|&k| k.into()).collect(),
        Some(Value::Array(Array::U32(v))) => v.iter().map(|&k| k.into()).collect(),
        Some(v) => return Err(wrong_type(TYPES_KEY, v, "an array of 32-bit integers")),
    };
    if kinds.len() != count {
        return Err(unsound(format!("{count} tokens but {} token types", kinds.len())));
    }
    Ok(kinds)
}

fn unsound(what: String) -> TextError {
    TextError::Vocabulary(what)
}

fn wrong_type(key: &str, found: &Value, expected: &'static str) -> TextError {
    let found = found.type_name();
    TextError::File(GgufError::WrongType { key: key.to_owned(), found, expected })
}
