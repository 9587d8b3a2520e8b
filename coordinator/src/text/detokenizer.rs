//! Text from a stream of tokens, never splitting a character.
//!
//! The invariant: all text handed out, one piece after the other, equals the lossy UTF-8 decoding of
//! all bytes at once, that is [`Tokenizer::decode`]. Bytes that may still become a character are held
//! back, at most three. Nothing is tidied up (`clean_up_tokenization_spaces`).

use std::sync::Arc;

use super::Tokenizer;

/// Turns tokens into text as they come.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    show_special: bool,
    /// Markup that is shown all the same.
    shown: Vec<u32>,
    /// The beginning of a character.
    held: Vec<u8>,
    /// A space that comes now is the one with which the vocabulary begins every text.
    strip: bool,
}

impl Detokenizer {
    /// For one answer; markup tokens are not shown.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let strip = tokenizer.strips_space();
        Self { tokenizer, show_special: false, shown: Vec::new(), held: Vec::new(), strip }
    }

    /// The tokens go on with a text (a completion), so a space at their beginning is part of it.
    #[must_use]
    pub fn continuing(mut self) -> Self {
        self.strip = false;
        self
    }

    /// Whether markup tokens are shown.
    #[must_use]
    pub fn with_special(mut self, show: bool) -> Self {
        self.show_special = show;
        self
    }

    /// These markup tokens are shown.
    #[must_use]
    pub fn showing(mut self, ids: Vec<u32>) -> Self {
        self.shown = ids;
        self
    }

    /// The text that a token completes; often empty inside a character of several tokens.
    pub fn push(&mut self, id: u32) -> String {
        let shows = self.show_special || self.shown.contains(&id);
        if !shows && self.tokenizer.is_special(id) {
            return String::new();
        }
        let mut bytes = self.tokenizer.token_bytes(id);
        if self.strip && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strip = false;
        }
        self.held.extend_from_slice(bytes);
        drain(&mut self.held)
    }

    /// Whether the tokens so far end inside a character.
    pub fn is_inside(&self) -> bool {
        !self.held.is_empty()
    }

    /// What was held back at the end of the answer: U+FFFD for the beginning of a character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

/// Takes everything out but an unfinished character at the end.
fn drain(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = held.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(e) => {
                let (valid, after) = rest.split_at(e.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                let Some(bad) = e.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[bad..];
            }
        }
    }
    let kept = held.len() - rest.len();
    held.drain(..kept);
    text
}

#[cfg(test)]
mod tests {
    use super::drain;

    /// Any cut of any bytes gives the same text as decoding at once.
    #[test]
    fn pieces_equal_the_whole() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let alphabet = [
            "a".as_bytes(),
            "é".as_bytes(),
            "世".as_bytes(),
            "🙂".as_bytes(),
            &[0x80],
            &[0xff],
            &[0xe4],
            &[0xf0, 0x9f],
            &[0xed, 0xa0, 0x80],
            &[0xc0],
            &[0xf4, 0x90],
        ];
        for _ in 0..20_000 {
            let mut bytes = Vec::new();
            for _ in 0..random() % 8 {
                bytes.extend_from_slice(alphabet[(random() % alphabet.len() as u64) as usize]);
            }
            let (mut held, mut text, mut rest) = (Vec::new(), String::new(), bytes.as_slice());
            while !rest.is_empty() {
                let n = (1 + random() as usize % 4).min(rest.len());
                held.extend_from_slice(&rest[..n]);
                rest = &rest[n..];
                text.push_str(&drain(&mut held));
                assert!(held.len() <= 3);
            }
            text.push_str(&String::from_utf8_lossy(&held));
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{bytes:x?}");
        }
    }
}
