//! SentencePiece's unigram model: of all ways to cut a text into pieces, the most probable one.
//!
//! Scores are log-probabilities; the best sum is found by dynamic programming over positions (after
//! `unigram_model.cc` of SentencePiece, with sums in f64 as llama.cpp and `tokenizers` have them). The
//! crate's model would find control tokens in ordinary text, so this is our own.

use super::TextError;
use super::normalize::Normalizer;
use super::pieces::Fallback;
use super::tokenizer::Model;

/// What an unknown character costs beyond the worst piece.
const UNKNOWN_PENALTY: f64 = 10.0;

/// A vocabulary of pieces with log-probabilities.
#[derive(Debug)]
pub(super) struct Unigram {
    /// Sorted by their bytes.
    pieces: Vec<(Box<str>, u32, f32)>,
    unknown_score: f64,
    fallback: Fallback,
    normalizer: Normalizer,
}

/// The best way to a position.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    start: usize,
    /// Nothing for an unknown character.
    id: Option<u32>,
}

impl Unigram {
    /// From the pieces that text can become; of equal ones the first counts. `worst` is the lowest
    /// score of ordinary pieces.
    pub(super) fn new<'a>(
        pieces: impl Iterator<Item = (&'a str, u32, f32)>,
        worst: f32,
        fallback: Fallback,
        normalizer: Normalizer,
    ) -> Self {
        let pieces = pieces.filter(|(text, ..)| !text.is_empty());
        let mut pieces: Vec<_> = pieces.map(|(text, id, score)| (text.into(), id, score)).collect();
        pieces.sort_by(|a: &(Box<str>, u32, f32), b| a.0.cmp(&b.0));
        pieces.dedup_by(|b, a| a.0 == b.0);
        Self { pieces, unknown_score: f64::from(worst) - UNKNOWN_PENALTY, fallback, normalizer }
    }

    /// Calls `found` with length, id and score of each piece that `text` begins with.
    fn prefixes(&self, text: &[u8], mut found: impl FnMut(usize, u32, f32)) {
        let mut range = self.pieces.as_slice();
        for (i, byte) in text.iter().enumerate() {
            // All in `range` agree with `text` in the first `i` bytes.
            let at = |piece: &(Box<str>, u32, f32)| piece.0.as_bytes().get(i).copied();
            let low = range.partition_point(|p| at(p) < Some(*byte));
            let high = range.partition_point(|p| at(p) <= Some(*byte));
            range = &range[low..high];
            let Some((piece, id, score)) = range.first() else { break };
            if piece.len() == i + 1 {
                found(i + 1, *id, *score);
            }
        }
    }

    /// The best way to every position of `text`.
    fn best(&self, text: &str) -> Vec<Best> {
        let nowhere = Best { score: f64::NEG_INFINITY, start: 0, id: None };
        let mut best = vec![nowhere; text.len() + 1];
        best[0].score = 0.0;
        for (start, c) in text.char_indices() {
            let here = best[start].score;
            let mut whole_character = false;
            let mut offer = |length: usize, id: Option<u32>, score: f64| {
                let end = &mut best[start + length];
                if here + score > end.score {
                    *end = Best { score: here + score, start, id };
                }
            };
            self.prefixes(&text.as_bytes()[start..], |length, id, score| {
                whole_character |= length == c.len_utf8();
                offer(length, Some(id), f64::from(score));
            });
            if !whole_character {
                offer(c.len_utf8(), None, self.unknown_score);
            }
        }
        best
    }
}

impl Model for Unigram {
    fn encode(&self, text: &str, _: bool, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let text = self.normalizer.apply(text);
        let best = self.best(&text);
        let mut steps = Vec::new();
        let mut end = text.len();
        while end > 0 {
            let Best { start, id, .. } = best[end];
            steps.push((start, end, id));
            end = start;
        }
        let mut unknown_run = false;
        for (start, end, id) in steps.into_iter().rev() {
            match id {
                Some(id) => {
                    ids.push(id);
                    unknown_run = false;
                }
                None => self.fallback.push(&text[start..end], &mut unknown_run, ids),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_sum_wins() {
        let pieces = [("a", 1, -1.0), ("b", 2, -1.0), ("ab", 3, -3.0), ("abc", 4, -9.0)];
        let fallback = Fallback { bytes: None, unknown: Some(0) };
        let model = Unigram::new(pieces.into_iter(), -9.0, fallback, Normalizer::default());
        let encode = |text| {
            let mut ids = Vec::new();
            model.encode(text, true, &mut ids).unwrap();
            ids
        };
        assert_eq!(encode("ab"), [1, 2]);
        assert_eq!(encode("abc"), [4], "an unknown character costs 19");
        assert_eq!(encode("xya?"), [0, 1, 0]);
        assert!(encode("").is_empty());
    }
}
