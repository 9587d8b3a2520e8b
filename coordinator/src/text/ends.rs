//! Tokens that end an answer by their name, as llama.cpp knows them.

use std::collections::BTreeMap;

/// Tokens that end an answer wherever they occur in a vocabulary, besides those the file names.
const NAMES: [&str; 21] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|tool_response>",
    "<turn|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

/// Of all tokens, those whose name says that they end an answer.
pub(super) fn by_name<'a>(tokens: impl Iterator<Item = (u32, &'a str)>) -> BTreeMap<&'a str, u32> {
    let mut found: BTreeMap<&str, u32> =
        tokens.filter(|(_, text)| NAMES.contains(text)).map(|(id, text)| (text, id)).collect();
    let has = |name: &str| found.contains_key(name);
    // Answers of these models have several parts, each of which ends so.
    let parts = has("<|call|>") && has("<|return|>") || has("<|calls|>") && has("<|flush|>");
    // Gemma 4 has this one as ordinary text (HTML).
    let html = has("<|tool_response>");
    if parts {
        found.remove("<|end|>");
    }
    if html {
        found.remove("</s>");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::by_name;

    #[test]
    fn names_depend_on_each_other() {
        let names = |tokens: &[&'static str]| -> Vec<u32> {
            by_name((0..).zip(tokens.iter().copied())).into_values().collect()
        };
        assert_eq!(names(&["a", "</s>", "<|end|>"]), [1, 2]);
        assert_eq!(names(&["<|end|>", "<|call|>", "<|return|>"]), [1, 2]);
        assert_eq!(names(&["</s>", "<|tool_response>"]), [1]);
    }
}
