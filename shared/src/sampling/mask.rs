//! Which tokens a grammar allows next.

use rkyv::{Archive, Deserialize, Serialize};

/// A bit per token of the vocabulary; tokens behind the last word are not allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// From words of 32 tokens each, token 0 in the lowest bit of the first.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// That of the given tokens.
    pub fn of(ids: impl IntoIterator<Item = u32>) -> Self {
        let mut mask = Self::default();
        ids.into_iter().for_each(|id| mask.allow(id));
        mask
    }

    /// Allows one more token.
    pub fn allow(&mut self, id: u32) {
        let word = (id / 32) as usize;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (id % 32);
    }

    /// Whether a token may come.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get((id / 32) as usize).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// The lowest token below `vocab` that is allowed.
    pub fn first(&self, vocab: usize) -> Option<u32> {
        let (index, word) = self.words.iter().enumerate().find(|(_, word)| **word != 0)?;
        let id = index as u32 * 32 + word.trailing_zeros();
        ((id as usize) < vocab).then_some(id)
    }

    /// Bytes that it takes on the wire.
    pub fn bytes(&self) -> usize {
        self.words.len() * 4
    }

    /// Makes the logits of all other tokens the lowest that there are: no draw gives them.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        for (index, chunk) in logits.chunks_mut(32).enumerate() {
            let word = self.words.get(index).copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::MIN;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_tokens() {
        let mask = TokenMask::of([0, 31, 32, 70]);
        let allowed: Vec<u32> = (0..200).filter(|&id| mask.allows(id)).collect();
        assert_eq!(allowed, [0, 31, 32, 70]);
        assert_eq!((mask.first(100), mask.first(0), mask.bytes()), (Some(0), None, 12));
        assert_eq!(TokenMask::of([70]).first(70), None);
        let mut logits: Vec<f32> = (0..100).map(|i| i as f32).collect();
        mask.apply(&mut logits);
        let kept: Vec<usize> = (0..100).filter(|&i| logits[i] != f32::MIN).collect();
        assert_eq!(kept, [0, 31, 32, 70]);
    }
}
