//! The tokenizer of a model folder: `tokenizer.json` as the `tokenizers` crate reads it.
//!
//! Its own special tokens, normaliser and splitter are used as they are. Only what would make a
//! server's answers wrong is put aside: truncation, padding, random dropout. Decoding is ours, token
//! by token, so that a stream of tokens gives the text of the whole; decoders that cannot be written
//! so are refused by name. Files are bounded, and a panic of the crate on a hostile one is an error.

use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;
use tokenizers::models::ModelWrapper;

use super::settings::Settings;
use super::table::{MAX_TOKENS, Spelling, TokenTable, byte_value, too_many};
use super::tokenizer::{Model, Tokenizer};
use super::{TextError, ends, files};

/// Largest `tokenizer.json`; those of today have up to 40 MB.
const MAX_TOKENIZER: u64 = 128 << 20;

/// Builds the tokenizer of a folder.
///
/// # Errors
/// As [`Tokenizer::from_folder`].
pub(super) fn read(folder: &Path) -> Result<Tokenizer, TextError> {
    let path = folder.join("tokenizer.json");
    let Some(json) = files::read(&path, MAX_TOKENIZER)? else {
        let hint = if folder.join("tokenizer.model").exists() {
            "a tokenizer.model alone is not read: save the tokenizer with `transformers` \
             (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        } else {
            "copy it from where the model comes from"
        };
        return Err(files::unusable(&path, format!("it does not exist; {hint}")));
    };
    build(&json, &Settings::read(folder)?).map_err(|e| match e {
        TextError::Vocabulary(why) => files::unusable(&path, why),
        other => other,
    })
}

fn build(json: &[u8], settings: &Settings) -> Result<Tokenizer, TextError> {
    let inner = guarded(|| tokenizers::Tokenizer::from_bytes(json))?;
    let mut inner = inner.map_err(|e| TextError::Vocabulary(e.to_string()))?;
    inner.with_truncation(None).map_err(|e| TextError::Vocabulary(e.to_string()))?;
    inner.with_padding(None);
    check_model(&mut inner)?;

    let vocabulary = inner.get_vocab(true);
    let added = inner.get_added_tokens_decoder();
    let tokens = by_id(&vocabulary, |id| added.get(&id).map(|token| token.content.as_str()))?;
    let id_of = |text: &str| vocabulary.get(text).copied();
    let decoder = Decoder::read(inner.get_decoder())?;
    let named = ends::by_name(added.iter().map(|(&id, token)| (id, token.content.as_str())));

    let mut hidden: BTreeSet<u32> = named.values().copied().collect();
    hidden.extend(added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id));
    let mut table = TokenTable::default();
    for (id, text) in tokens.iter().enumerate() {
        let markup = added.contains_key(&(id as u32));
        let spelling = if markup { &Spelling::Plain } else { &decoder.spelling };
        match (decoder.bytes && !markup, byte_value(text)) {
            (true, Some(byte)) => table.push(text, &Spelling::Byte(byte))?,
            _ if decoder.joins && !text.is_empty() => table.push(&format!(" {text}"), spelling)?,
            _ => table.push(text, spelling)?,
        }
    }

    let mut eos: BTreeSet<u32> = named.into_values().collect();
    eos.extend(settings.end_ids(id_of, table.len())?);
    let (added_bos, adds) = prefix(&inner)?;
    let bos = settings.bos_id(id_of, table.len())?.or(added_bos);
    let markup = added.values().map(|token| token.content.clone()).collect();
    Ok(Tokenizer {
        special: Vec::new(),
        hidden,
        table,
        eos: eos.into_iter().collect(),
        bos,
        adds_bos: settings.adds_bos.unwrap_or(adds),
        strips_space: decoder.strips,
        grammars: OnceLock::new(),
        model: Box::new(Whole { inner, plain: OnceLock::new(), markup }),
    })
}

/// Refuses models of other purposes, and switches chance off.
fn check_model(inner: &mut tokenizers::Tokenizer) -> Result<(), TextError> {
    let certain = match inner.get_model() {
        ModelWrapper::WordPiece(_) => return Err(TextError::Model("WordPiece".to_owned())),
        ModelWrapper::BPE(bpe) if bpe.dropout.is_some() => {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            bpe
        }
        _ => return Ok(()),
    };
    inner.with_model(certain);
    Ok(())
}

/// Texts of the tokens by id, nothing where there is none. Where an added token has taken an id of
/// the vocabulary's, it counts.
fn by_id<'a>(
    vocabulary: &'a HashMap<String, u32>,
    added: impl Fn(u32) -> Option<&'a str>,
) -> Result<Vec<&'a str>, TextError> {
    let Some(largest) = vocabulary.values().copied().max() else {
        return Err(TextError::Vocabulary("its vocabulary is empty".to_owned()));
    };
    if largest as usize >= MAX_TOKENS {
        return Err(too_many(largest.into()));
    }
    let mut tokens = vec![""; largest as usize + 1];
    for (text, &id) in vocabulary {
        let text: &str = text;
        let place = &mut tokens[id as usize];
        *place = match (added(id), *place) {
            (Some(added), _) => added,
            (None, "") => text,
            (None, other) => {
                let (a, b) = (text.min(other), text.max(other));
                return Err(TextError::Vocabulary(format!("token {id} is both '{a}' and '{b}'")));
            }
        };
    }
    Ok(tokens)
}

/// What the post-processor puts in front of a text, and whether it does.
fn prefix(inner: &tokenizers::Tokenizer) -> Result<(Option<u32>, bool), TextError> {
    let (with, without) = (encode(inner, "a", true)?, encode(inner, "a", false)?);
    let first = with.first().copied().filter(|id| without.first() != Some(id));
    Ok((first, first.is_some()))
}

/// How tokens become text.
struct Decoder {
    spelling: Spelling,
    /// `<0x0A>` is a byte.
    bytes: bool,
    /// One space at the beginning of the text goes.
    strips: bool,
    /// There is a space between any two tokens.
    joins: bool,
}

impl Decoder {
    /// Reads the decoder of a `tokenizer.json`; none means that tokens are joined by spaces.
    fn read(decoder: Option<&tokenizers::DecoderWrapper>) -> Result<Self, TextError> {
        let mut out = Self { spelling: Spelling::Plain, bytes: false, strips: false, joins: false };
        let Some(decoder) = decoder else {
            return Ok(Self { joins: true, strips: true, ..out });
        };
        let json = serde_json::to_value(decoder);
        out.add(&json.map_err(|e| TextError::Decoder(e.to_string()))?)?;
        Ok(out)
    }

    fn add(&mut self, json: &Value) -> Result<(), TextError> {
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
        match text("type").as_str() {
            "ByteLevel" => self.spelling = Spelling::Alphabet,
            "ByteFallback" => self.bytes = true,
            "Fuse" => {}
            "Metaspace" => {
                self.replace(text("replacement"), " ".to_owned());
                self.strips = text("prepend_scheme") != "never";
            }
            "Replace" if json["pattern"]["String"].is_string() => {
                let from = json["pattern"]["String"].as_str().unwrap_or_default();
                self.replace(from.to_owned(), text("content"));
            }
            "Strip" if text("content") == " " && json["start"] == 1 && json["stop"] == 0 => {
                self.strips = true;
            }
            "Sequence" => {
                for step in json["decoders"].as_array().into_iter().flatten() {
                    self.add(step)?;
                }
            }
            _ => return Err(TextError::Decoder(json.to_string())),
        }
        Ok(())
    }

    fn replace(&mut self, from: String, to: String) {
        match &mut self.spelling {
            Spelling::Replaced(pairs) => pairs.push((from, to)),
            spelling => *spelling = Spelling::Replaced(vec![(from, to)]),
        }
    }
}

/// A `tokenizer.json`, which finds its own special tokens.
#[derive(Debug)]
struct Whole {
    inner: tokenizers::Tokenizer,
    /// The same for text that spells special tokens without meaning them; made when there is some.
    plain: OnceLock<tokenizers::Tokenizer>,
    /// Tokens that are found in text.
    markup: Vec<String>,
}

impl Model for Whole {
    fn encode(&self, text: &str, parse_special: bool, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let same = parse_special || !self.markup.iter().any(|token| text.contains(token));
        let inner = if same { &self.inner } else { self.plain.get_or_init(|| self.plain()) };
        ids.append(&mut encode(inner, text, false)?);
        Ok(())
    }
}

impl Whole {
    fn plain(&self) -> tokenizers::Tokenizer {
        let mut plain = self.inner.clone();
        plain.set_encode_special_tokens(true);
        plain
    }
}

fn encode(inner: &tokenizers::Tokenizer, text: &str, add: bool) -> Result<Vec<u32>, TextError> {
    let encoding = guarded(|| inner.encode_fast(text, add))?;
    Ok(encoding.map_err(|e| TextError::Encode(e.to_string()))?.get_ids().to_vec())
}

/// What the crate does, with a panic as an error.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, TextError> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|_| TextError::Vocabulary("the tokenizer failed on it".to_owned()))
}
