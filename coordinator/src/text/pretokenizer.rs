//! How text is split into words before BPE, by the name that a GGUF file gives.
//!
//! Each rule is that of the original `tokenizer.json` of the models that bear the name, not
//! llama.cpp's rewriting of it (which differs where its regular expressions know less). A name that
//! is not in the table is an error: a wrong split gives plausible but worse answers.

use tokenizers::normalizers::{NormalizerWrapper, unicode::NFC};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::TextError;
use super::patterns::{self as p};

/// A step of splitting; each splits the pieces of the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Matches of a regular expression, and what lies between them.
    Split(&'static str),
    /// Digits, one by one.
    Digits,
    /// Digits, as many as follow each other.
    Numbers,
    /// Punctuation, as much as follows each other.
    Punctuation,
    /// GPT-2's words, and bytes as characters of its alphabet.
    Words,
}

/// A rule, and what else its models have in common.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre` that mean it.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether a word that is in the vocabulary is taken whole, past the merges.
    pub(super) whole_words: bool,
    /// Whether prompts begin with the beginning-of-text token, unless the file says otherwise.
    pub(super) adds_bos: bool,
    /// Whether text is brought into Unicode's composed form first.
    composed: bool,
}

const fn rule(names: &'static [&'static str], steps: &'static [Step]) -> PreTokenizer {
    PreTokenizer { names, steps, whole_words: false, adds_bos: false, composed: false }
}

const fn composed(names: &'static [&'static str], steps: &'static [Step]) -> PreTokenizer {
    PreTokenizer { composed: true, ..rule(names, steps) }
}

const fn whole_words(names: &'static [&'static str], steps: &'static [Step]) -> PreTokenizer {
    PreTokenizer { whole_words: true, ..rule(names, steps) }
}

use Step::{Digits as Digit, Numbers, Punctuation as Marks, Split as S, Words};

/// Names in files, and what they mean.
const RULES: &[PreTokenizer] = &[
    rule(
        &["gpt-2", "phi-2", "jais", "gigachat", "exaone4", "trillion", "granite-docling", "mellum"],
        &[Words],
    ),
    composed(&["mpt", "olmo"], &[Words]),
    rule(&["smollm", "starcoder", "refact", "codeshell", "exaone", "mellum2"], &[Digit, Words]),
    composed(&["command-r"], &[Digit, Words]),
    PreTokenizer {
        adds_bos: true,
        ..whole_words(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"],
            &[S(p::LLAMA3)],
        )
    },
    rule(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[S(p::LLAMA3)]),
    whole_words(&["glm4", "glm5"], &[S(p::LLAMA3)]),
    composed(&["qwen2", "deepseek-r1-qwen", "megrez"], &[S(p::QWEN2)]),
    rule(&["stablelm2", "hunyuan", "grok-2", "solar-open"], &[S(p::QWEN2)]),
    rule(&["qwen35"], &[S(p::QWEN35)]),
    rule(
        &["deepseek-llm"],
        &[
            S(p::LINE_BREAK),
            S(p::DEEPSEEK_LETTERS),
            S(p::DEEPSEEK_MARKS),
            S(p::TRAILING_SPACE),
            S(p::CJK),
            Digit,
        ],
    ),
    rule(
        &["deepseek-coder"],
        &[S(p::LINE_BREAK), S(p::CODER_LETTERS), S(p::CODER_MARKS), S(p::CJK), Digit],
    ),
    rule(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[S(p::NUMBERS_BY_THREE), S(p::CHINESE_AND_KANA), S(p::DEEPSEEK3)],
    ),
    rule(&["falcon"], &[Marks, Words, Numbers, S(p::THREE_DIGITS)]),
    rule(&["default"], &[S(p::DEFAULT_MARKS), S(p::GPT2), Numbers, S(p::THREE_DIGITS)]),
    rule(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[S(p::GPT4O)]),
    PreTokenizer { adds_bos: true, ..whole_words(&["tekken"], &[S(p::TEKKEN)]) },
    rule(&["seed-coder"], &[S(p::SEED_CODER)]),
    rule(&["bailingmoe", "bailingmoe2", "llada-moe"], &[S(p::BAILING)]),
    whole_words(&["minicpm5"], &[S(p::NUMBERS_BY_THREE), S(p::MINICPM5)]),
];

impl PreTokenizer {
    /// By the value of `tokenizer.ggml.pre`.
    pub(super) fn from_name(name: &str) -> Result<&'static Self, TextError> {
        RULES.iter().find(|rule| rule.names.contains(&name)).ok_or_else(|| {
            TextError::PreTokenizer { found: name.to_owned(), known: Self::names().join(", ") }
        })
    }

    /// All names that are known.
    pub(super) fn names() -> Vec<&'static str> {
        RULES.iter().flat_map(|rule| rule.names).copied().collect()
    }

    /// What is done to the text before.
    pub(super) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.composed.then(|| NFC.into())
    }

    /// The splitter; its pieces are spelled in GPT-2's alphabet.
    pub(super) fn build(&self) -> Result<PreTokenizerWrapper, TextError> {
        let mut steps =
            self.steps.iter().map(|step| step.build()).collect::<Result<Vec<_>, _>>()?;
        if !self.steps.iter().any(|step| matches!(step, Step::Words)) {
            steps.push(ByteLevel::new(false, false, false).into());
        }
        Ok(Sequence::new(steps).into())
    }
}

impl Step {
    fn build(self) -> Result<PreTokenizerWrapper, TextError> {
        Ok(match self {
            Self::Split(pattern) => return split(pattern),
            Self::Digits => Digits::new(true).into(),
            Self::Numbers => Digits::new(false).into(),
            Self::Punctuation => Punctuation::new(SplitDelimiterBehavior::Contiguous).into(),
            Self::Words => ByteLevel::new(false, false, true).into(),
        })
    }
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper, TextError> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map(Into::into)
        .map_err(|e| TextError::Encode(e.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    /// Texts, and their pieces by Python's `tokenizers` (`make.py` beside it).
    const PIECES: &str = include_str!("../../tests/testdata/tokenizers/pieces.json");

    fn pieces(splitter: &PreTokenizerWrapper, text: &str) -> Vec<String> {
        let mut split = PreTokenizedString::from(text);
        splitter.pre_tokenize(&mut split).unwrap();
        let pieces = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces.into_iter().map(|(piece, ..)| piece.to_owned()).collect()
    }

    #[test]
    fn pieces_equal_the_references() {
        let json: Value = serde_json::from_str(PIECES).unwrap();
        let json = json.as_object().unwrap();
        let texts: Vec<&str> =
            json["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        assert!(texts.len() > 50 && json.len() == 16, "texts or rules are missing");
        for (name, want) in json.iter().filter(|(name, _)| *name != "texts") {
            let splitter = PreTokenizer::from_name(name).unwrap().build().unwrap();
            for (text, want) in texts.iter().zip(want.as_array().unwrap()) {
                let want: Vec<&str> =
                    want.as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
                assert_eq!(pieces(&splitter, text), want, "{name}: {text:?}");
            }
        }
    }

    /// Every name has steps that were compared, and stands in one rule only.
    #[test]
    fn every_name_is_compared() {
        let json: Value = serde_json::from_str(PIECES).unwrap();
        let compared: Vec<&[Step]> = json
            .as_object()
            .unwrap()
            .keys()
            .filter_map(|name| PreTokenizer::from_name(name).ok().map(|rule| rule.steps))
            .collect();
        for rule in RULES {
            assert!(compared.contains(&rule.steps), "{:?}", rule.names);
        }
        let mut names = PreTokenizer::names();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
