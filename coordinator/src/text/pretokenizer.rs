//! How text is split into words before BPE, by the name that the file gives.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::TextError;

/// The splitting rules that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// GPT-2's words.
    Gpt2,
    /// Digits one by one, then GPT-2's words.
    SmolLm,
    /// Llama 3: digits in threes.
    Llama3,
    /// Qwen 2: digits one by one.
    Qwen2,
}

/// Names in files, and what they mean.
const NAMES: [(&str, PreTokenizer); 6] = [
    ("gpt-2", PreTokenizer::Gpt2),
    ("smollm", PreTokenizer::SmolLm),
    ("llama-bpe", PreTokenizer::Llama3),
    ("llama3", PreTokenizer::Llama3),
    ("llama-v3", PreTokenizer::Llama3),
    ("qwen2", PreTokenizer::Qwen2),
];

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    /// By the value of `tokenizer.ggml.pre`.
    pub(super) fn from_name(name: &str) -> Result<Self, TextError> {
        match NAMES.iter().find(|(n, _)| *n == name) {
            Some((_, kind)) => Ok(*kind),
            None => Err(TextError::PreTokenizer {
                found: name.to_owned(),
                known: NAMES.map(|(n, _)| n).join(", "),
            }),
        }
    }

    /// Whether a word that is in the vocabulary is taken whole, past the merges.
    pub(super) fn ignores_merges(self) -> bool {
        self == Self::Llama3
    }

    /// The splitter.
    pub(super) fn build(self) -> Result<PreTokenizerWrapper, TextError> {
        let words = ByteLevel::new(false, false, true);
        let bytes = ByteLevel::new(false, false, false);
        let steps: Vec<PreTokenizerWrapper> = match self {
            Self::Gpt2 => vec![words.into()],
            Self::SmolLm => vec![Digits::new(true).into(), words.into()],
            Self::Llama3 => vec![split(LLAMA3)?, bytes.into()],
            Self::Qwen2 => vec![split(QWEN2)?, bytes.into()],
        };
        Ok(Sequence::new(steps).into())
    }
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper, TextError> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map(Into::into)
        .map_err(|e| TextError::Encode(e.to_string()))
}
