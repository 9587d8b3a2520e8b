//! The bytes that each token stands for, by id.

use super::{TextError, bytes};

/// Most tokens that a vocabulary may have; the largest of today have a quarter of a million.
pub(super) const MAX_TOKENS: usize = 1 << 21;

/// How a vocabulary of pieces spells a space.
pub(super) const SPACE: &str = "\u{2581}";

/// Bytes of all tokens, one after the other; token `i` is `ends[i-1]..ends[i]`.
#[derive(Debug, Default)]
pub(super) struct TokenTable {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

/// How the text of a token is written in the vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// As it is.
    Plain,
    /// By GPT-2's alphabet, a character for each byte.
    Alphabet,
    /// With characters that stand for others (`▁` for a space).
    Replaced(Vec<(String, String)>),
    /// A single byte, `<0x0A>`.
    Byte(u8),
}

impl TokenTable {
    /// Adds the next token.
    ///
    /// # Errors
    /// If there are too many, or they are too long.
    pub(super) fn push(&mut self, text: &str, spelling: &Spelling) -> Result<(), TextError> {
        if self.ends.len() >= MAX_TOKENS {
            return Err(too_many(self.ends.len() as u64 + 1));
        }
        match spelling {
            Spelling::Plain => self.bytes.extend_from_slice(text.as_bytes()),
            Spelling::Alphabet => bytes::decode_into(text, &mut self.bytes),
            Spelling::Byte(byte) => self.bytes.push(*byte),
            Spelling::Replaced(pairs) => {
                let mut text = text.to_owned();
                for (from, to) in pairs {
                    text = text.replace(from.as_str(), to);
                }
                self.bytes.extend_from_slice(text.as_bytes());
            }
        }
        let end = u32::try_from(self.bytes.len());
        self.ends.push(end.map_err(|_| TextError::Vocabulary("it exceeds 4 GiB".to_owned()))?);
        Ok(())
    }

    /// Bytes of a token; nothing for ids outside the vocabulary.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let i = id as usize;
        let Some(&end) = self.ends.get(i) else { return &[] };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Tokens.
    pub(super) fn len(&self) -> u32 {
        self.ends.len() as u32
    }
}

/// The error for too many tokens.
pub(super) fn too_many(found: u64) -> TextError {
    TextError::Vocabulary(format!("it has ids up to {found}, at most {MAX_TOKENS} are possible"))
}

/// The byte that `<0x0A>` stands for.
pub(super) fn byte_value(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| plain)
}
