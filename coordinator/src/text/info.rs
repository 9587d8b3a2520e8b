//! What clients are told of a tokenizer, so that they render and count as the server does.

use schemars::JsonSchema;
use serde::Serialize;

use super::{TextModel, Tokenizer};

/// A tokenizer in the words of Hugging Face's `tokenizer_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct TokenizerInfo {
    /// Begins texts.
    pub bos_token: Option<String>,
    /// Ends texts.
    pub eos_token: Option<String>,
    /// Markup that answers do not show.
    pub additional_special_tokens: Vec<String>,
    /// Whether prompts begin with `bos_token`.
    pub add_bos_token: bool,
    /// Longest sequence, tokens.
    pub model_max_length: Option<u32>,
    /// Jinja; null where the model has none that can be used.
    pub chat_template: Option<String>,
}

impl TokenizerInfo {
    /// Of a model's text side.
    pub fn of(text: &TextModel) -> Self {
        let TextModel { tokenizer, template, .. } = text;
        let template = template.as_ref().ok();
        let named = template.map(|t| t.eos().to_owned()).filter(|eos| !eos.is_empty());
        let first = tokenizer.eos_ids().first().map(|&id| text_of(tokenizer, id));
        Self {
            bos_token: tokenizer.bos_id().map(|id| text_of(tokenizer, id)),
            eos_token: named.or(first),
            additional_special_tokens: tokenizer
                .special_ids()
                .map(|id| text_of(tokenizer, id))
                .collect(),
            add_bos_token: tokenizer.adds_bos(),
            model_max_length: None,
            chat_template: template.map(|t| t.source().to_owned()),
        }
    }
}

fn text_of(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}
