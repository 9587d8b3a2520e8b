//! Text to token ids and back, whatever kind of vocabulary the model has.
//!
//! [`super::gguf`] and [`super::folder`] build it. For vocabularies of GGUF files special tokens are
//! cut out of the text first, longest first, as llama.cpp does; what lies between them goes to a
//! [`Model`]. A `tokenizer.json` finds its own special tokens. [`Tokenizer::encode`] adds nothing
//! in front; [`Tokenizer::encode_prompt`] adds the token that begins texts where the model wants it.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use millrace_shared::model::gguf::Gguf;

use super::table::TokenTable;
use super::{GrammarError, Grammars, TextError, folder, gguf};

/// Longest run of white space: regular expressions of splitters give up on much longer ones.
const MAX_WHITESPACE_RUN: usize = 250_000;

/// Ids of a piece of text.
pub(super) trait Model: Debug + Send + Sync {
    /// Appends the ids of `text`. `parse_special` is for models that find special tokens themselves.
    fn encode(&self, text: &str, parse_special: bool, ids: &mut Vec<u32>) -> Result<(), TextError>;
}

/// A token that is matched in the text as it stands.
#[derive(Debug)]
pub(super) struct Special {
    pub(super) text: String,
    pub(super) id: u32,
    /// Control tokens are matched only on request and not shown; user-defined ones always.
    pub(super) control: bool,
    /// White space behind it is dropped.
    pub(super) strips: bool,
}

/// Text to token ids and back. Share it behind an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    pub(super) model: Box<dyn Model>,
    /// Longest first; empty where the model finds them itself.
    pub(super) special: Vec<Special>,
    /// Ids that are not shown.
    pub(super) hidden: BTreeSet<u32>,
    pub(super) table: TokenTable,
    /// Ids that end an answer, ascending.
    pub(super) eos: Vec<u32>,
    pub(super) bos: Option<u32>,
    pub(super) adds_bos: bool,
    /// Whether texts begin with a space of the vocabulary's own, which decoding takes away.
    pub(super) strips_space: bool,
    /// Made when a request first asks for it.
    pub(super) grammars: OnceLock<Result<Arc<Grammars>, GrammarError>>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// If the file has no vocabulary, or one that is unsound or of a kind that is not known.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TextError> {
        gguf::read(file)
    }

    /// Builds the tokenizer of a model folder: `tokenizer.json`, and what `tokenizer_config.json`,
    /// `generation_config.json` and `config.json` say about tokens that begin and end texts.
    ///
    /// # Errors
    /// If there is no `tokenizer.json`, or a file is too large, unsound, or of a kind that is not
    /// known.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        folder::read(folder)
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
                Piece::Text("") => {}
                Piece::Text(text) => self.model.encode(text, parse_special, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// What compiles grammars for these tokens. The first call takes some tenths of a second.
    ///
    /// # Errors
    /// As [`Grammars::new`].
    pub fn grammars(&self) -> Result<&Arc<Grammars>, GrammarError> {
        let made = self.grammars.get_or_init(|| Grammars::new(self).map(Arc::new));
        made.as_ref().map_err(Clone::clone)
    }

    /// Token ids of a prompt as the model was trained to see it: [`Self::encode`] with special
    /// tokens, behind the token that begins texts, where the model wants one and the text does not
    /// spell it (chat templates do). A token that ends texts is never added: a prompt goes on.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = self.encode(text, true)?;
        if let Some(bos) = self.bos.filter(|_| self.adds_bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
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
        let strip = self.strips_space && bytes.first() == Some(&b' ');
        String::from_utf8_lossy(&bytes[usize::from(strip)..]).into_owned()
    }

    /// Bytes that a token stands for; nothing for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.get(id)
    }

    /// Whether a token is markup that answers do not show.
    pub fn is_special(&self, id: u32) -> bool {
        self.hidden.contains(&id)
    }

    /// Tokens that answers do not show, ascending.
    pub fn special_ids(&self) -> impl Iterator<Item = u32> {
        self.hidden.iter().copied()
    }

    /// The token of this text that answers do not show.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.special_ids().find(|&id| self.token_bytes(id) == text.as_bytes())
    }

    /// Ids that end an answer, ascending.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Whether an id ends an answer.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos.binary_search(&id).is_ok()
    }

    /// The token that the model names as the beginning of texts (never added by [`Self::encode`]).
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Whether prompts begin with [`Self::bos_id`].
    pub fn adds_bos(&self) -> bool {
        self.adds_bos && self.bos.is_some()
    }

    /// Whether decoding takes the space away with which the vocabulary begins every text.
    pub fn strips_space(&self) -> bool {
        self.strips_space
    }

    /// Tokens in the vocabulary: one more than the largest id.
    pub fn vocab_size(&self) -> u32 {
        self.table.len()
    }

    /// Checks that the tokenizer can be that of a model with `rows` rows in its embedding. Models
    /// often have a few rows more than tokens, for alignment.
    ///
    /// # Errors
    /// If a token has no row, or if most rows have no token: it is another model's tokenizer.
    pub fn check_rows(&self, rows: u32) -> Result<(), TextError> {
        let tokens = self.vocab_size();
        if tokens > rows || tokens < rows / 2 {
            return Err(TextError::OtherModel { tokens, rows });
        }
        Ok(())
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
        for (i, mut part) in text.split(special.text.as_str()).enumerate() {
            if i > 0 {
                out.push(Piece::Token(special.id));
                if special.strips {
                    part = part.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
                }
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
                "it has more than {MAX_WHITESPACE_RUN} white-space characters in a row"
            )));
        }
    }
    Ok(())
}
