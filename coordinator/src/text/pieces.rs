//! SentencePiece's byte-pair encoding: adjacent pieces are merged, the best score first.
//!
//! After `bpe_model.cc` of SentencePiece (and llama.cpp's `llm_tokenizer_spm`): of all neighbours
//! whose concatenation is a piece, those with the highest score are merged, the leftmost among
//! equals. No list of merges gives the same when scores are equal, so the `tokenizers` crate's BPE
//! would not do. Text has no words here: a prompt is merged as a whole, in `n log n`.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::TextError;
use super::normalize::Normalizer;
use super::tokenizer::Model;

/// What becomes of characters that no piece has.
#[derive(Debug)]
pub(super) struct Fallback {
    /// Ids of the 256 bytes, where the vocabulary has them all.
    pub(super) bytes: Option<Box<[u32; 256]>>,
    /// Else this, one for each run of such characters.
    pub(super) unknown: Option<u32>,
}

impl Fallback {
    /// Appends what stands for `text`; `run` tells whether the text before it was unknown, too.
    pub(super) fn push(&self, text: &str, run: &mut bool, ids: &mut Vec<u32>) {
        if let Some(table) = &self.bytes {
            ids.extend(text.bytes().map(|b| table[usize::from(b)]));
        } else if let Some(id) = self.unknown.filter(|_| !*run) {
            ids.push(id);
            *run = true;
        }
    }
}

/// A vocabulary of scored pieces.
#[derive(Debug)]
pub(super) struct Pieces {
    /// Id and score of each piece.
    pieces: HashMap<Box<str>, (u32, f32)>,
    /// Bytes of the longest.
    longest: usize,
    fallback: Fallback,
    normalizer: Normalizer,
}

impl Pieces {
    /// From the pieces that text can become; of equal ones the last counts.
    pub(super) fn new<'a>(
        pieces: impl Iterator<Item = (&'a str, u32, f32)>,
        fallback: Fallback,
        normalizer: Normalizer,
    ) -> Self {
        // `+ 0.0`: the first piece of a trained model has the score -0.
        let pieces: HashMap<Box<str>, (u32, f32)> =
            pieces.map(|(text, id, score)| (text.into(), (id, score + 0.0))).collect();
        let longest = pieces.keys().map(|p| p.len()).max().unwrap_or(0);
        Self { pieces, longest, fallback, normalizer }
    }
}

/// A part of the text: a character at first, then what it was merged into.
struct Part {
    start: usize,
    /// Zero once it is merged into the one before it.
    length: usize,
    before: Option<usize>,
    after: Option<usize>,
}

/// Two neighbours that may be merged; the greatest is merged first.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

struct Merging<'a> {
    vocabulary: &'a Pieces,
    text: &'a str,
    parts: Vec<Part>,
    candidates: BinaryHeap<Candidate>,
}

impl Merging<'_> {
    fn propose(&mut self, left: Option<usize>, right: Option<usize>) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let start = self.parts[left].start;
        let length = self.parts[left].length + self.parts[right].length;
        if length > self.vocabulary.longest {
            return;
        }
        if let Some(&(_, score)) = self.vocabulary.pieces.get(&self.text[start..start + length]) {
            self.candidates.push(Candidate { score, left, right, length });
        }
    }

    fn run(&mut self) {
        for right in 1..self.parts.len() {
            self.propose(Some(right - 1), Some(right));
        }
        while let Some(Candidate { left, right, length, .. }) = self.candidates.pop() {
            let (l, r) = (&self.parts[left], &self.parts[right]);
            // One of them was merged with another neighbour meanwhile.
            if l.length == 0 || r.length == 0 || l.length + r.length != length {
                continue;
            }
            let after = r.after;
            self.parts[left].length = length;
            self.parts[left].after = after;
            self.parts[right].length = 0;
            if let Some(next) = after {
                self.parts[next].before = Some(left);
            }
            self.propose(self.parts[left].before, Some(left));
            self.propose(Some(left), after);
        }
    }
}

impl Model for Pieces {
    fn encode(&self, text: &str, _: bool, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let text = self.normalizer.apply(text);
        let mut parts: Vec<Part> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Part {
                start,
                length: c.len_utf8(),
                before: i.checked_sub(1),
                after: Some(i + 1),
            })
            .collect();
        if let Some(last) = parts.last_mut() {
            last.after = None;
        }
        let mut merging =
            Merging { vocabulary: self, text: &text, parts, candidates: BinaryHeap::new() };
        merging.run();
        let mut unknown_run = false;
        for part in merging.parts.iter().filter(|p| p.length > 0) {
            let piece = &text[part.start..part.start + part.length];
            match self.pieces.get(piece) {
                Some(&(id, _)) => {
                    ids.push(id);
                    unknown_run = false;
                }
                None => self.fallback.push(piece, &mut unknown_run, ids),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(pieces: &[(&str, f32)], text: &str) -> Vec<u32> {
        let pieces = pieces.iter().zip(1u32..).map(|(&(text, score), id)| (text, id, score));
        let fallback = Fallback { bytes: None, unknown: Some(0) };
        let model = Pieces::new(pieces, fallback, Normalizer::default());
        let mut ids = Vec::new();
        model.encode(text, true, &mut ids).unwrap();
        ids
    }

    #[test]
    fn the_leftmost_of_equal_scores_is_merged_first() {
        let pieces = [("a", 0.0), ("b", 0.0), ("ab", -1.0), ("ba", -1.0)];
        assert_eq!(encode(&pieces, "aba"), [3, 1]);
        assert_eq!(encode(&pieces, "bab"), [4, 2]);
        // Zero and minus zero are equal.
        let pieces = [("a", 0.0), ("b", 0.0), ("ab", -0.0), ("ba", 0.0)];
        assert_eq!(encode(&pieces, "aba"), [3, 1]);
    }

    #[test]
    fn unknown_characters_become_one_token() {
        assert_eq!(encode(&[("a", 0.0)], "axya?"), [1, 0, 1, 0]);
    }
}
