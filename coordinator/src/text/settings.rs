//! What a model folder says about its tokenizer besides `tokenizer.json`.
//!
//! `tokenizer_config.json` names the tokens that begin and end texts and may hold the chat template,
//! which newer folders have in `chat_template.jinja`; `generation_config.json`, and before it
//! `config.json`, has the ids that end answers, and it may advise how to choose tokens.

use std::collections::BTreeSet;
use std::path::Path;

use millrace_shared::sampling::SamplingParams;
use serde::Deserialize;

use super::{TextError, files};

/// A token in a configuration: its text, or an object with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Object { content: String },
}

/// An id, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

/// A chat template, or several with names.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    add_bos_token: Option<bool>,
    chat_template: Option<Templates>,
}

/// `generation_config.json` and `config.json`.
#[derive(Debug, Default, Deserialize)]
struct IdConfig {
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
}

/// How `generation_config.json` advises to choose tokens.
#[derive(Debug, Default, Deserialize)]
struct Advice {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

/// What a folder advises where a request says nothing.
///
/// # Errors
/// If the file is not as expected, or a value out of range.
pub(super) fn sampling(folder: &Path, vocabulary: u32) -> Result<SamplingParams, TextError> {
    let path = folder.join("generation_config.json");
    let advice = files::json::<Advice>(&path)?.unwrap_or_default();
    let usual = SamplingParams::default();
    let params = SamplingParams {
        temperature: advice.temperature.unwrap_or(usual.temperature),
        top_p: advice.top_p.unwrap_or(usual.top_p),
        top_k: advice.top_k.unwrap_or(usual.top_k),
        min_p: advice.min_p.unwrap_or(usual.min_p),
        repetition_penalty: advice.repetition_penalty.unwrap_or(usual.repetition_penalty),
        ..usual
    };
    match params.validate(vocabulary) {
        Ok(()) => Ok(params),
        Err(why) => Err(TextError::Folder { path, why: why.to_string() }),
    }
}

/// All of it.
#[derive(Debug)]
pub(super) struct Settings {
    bos: Option<String>,
    eos: Option<String>,
    bos_id: Option<u32>,
    eos_ids: Vec<u32>,
    /// Whether prompts begin with the beginning-of-text token, if it is said.
    pub(super) adds_bos: Option<bool>,
    template: Option<Templates>,
}

impl Ids {
    fn list(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

impl Settings {
    /// Reads the files of a folder that are there.
    ///
    /// # Errors
    /// If one is too large, or not as expected.
    pub(super) fn read(folder: &Path) -> Result<Self, TextError> {
        let config: Option<TokenizerConfig> = files::json(&folder.join("tokenizer_config.json"))?;
        let config = config.unwrap_or_default();
        let generation: Option<IdConfig> = files::json(&folder.join("generation_config.json"))?;
        let model: Option<IdConfig> = files::json(&folder.join("config.json"))?;
        let (generation, model) = (generation.unwrap_or_default(), model.unwrap_or_default());
        let text = |token: Option<Token>| match token? {
            Token::Text(text) | Token::Object { content: text } => Some(text),
        };
        let bos_id = generation.bos_token_id.or(model.bos_token_id);
        Ok(Self {
            bos: text(config.bos_token),
            eos: text(config.eos_token),
            bos_id: bos_id.and_then(|ids| ids.list().first().copied()),
            eos_ids: generation.eos_token_id.or(model.eos_token_id).map_or(Vec::new(), Ids::list),
            adds_bos: config.add_bos_token,
            template: config.chat_template,
        })
    }

    /// Ids that end answers, of `tokens` in the vocabulary.
    ///
    /// # Errors
    /// If one is not in the vocabulary.
    pub(super) fn end_ids(
        &self,
        id_of: impl Fn(&str) -> Option<u32>,
        tokens: u32,
    ) -> Result<BTreeSet<u32>, TextError> {
        let mut ids = BTreeSet::new();
        for &id in &self.eos_ids {
            ids.insert(checked("eos_token_id", id, tokens)?);
        }
        if let Some(text) = &self.eos {
            ids.insert(known("eos_token", text, id_of)?);
        }
        Ok(ids)
    }

    /// The id that begins texts: that of the tokenizer's configuration, else that of the model's.
    ///
    /// # Errors
    /// If it is not in the vocabulary.
    pub(super) fn bos_id(
        &self,
        id_of: impl Fn(&str) -> Option<u32>,
        tokens: u32,
    ) -> Result<Option<u32>, TextError> {
        match (&self.bos, self.bos_id) {
            (Some(text), _) => known("bos_token", text, id_of).map(Some),
            (None, Some(id)) => checked("bos_token_id", id, tokens).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// The chat template of a folder with these settings, and the tokens that it may name as
    /// beginning and end of texts.
    ///
    /// # Errors
    /// If there is none, or several with none of them the default.
    pub(super) fn template(self, folder: &Path) -> Result<(String, String, String), TextError> {
        let file = files::text(&folder.join("chat_template.jinja"))?;
        let source = match (file, self.template) {
            (Some(source), _) | (None, Some(Templates::One(source))) => source,
            (None, Some(Templates::Named(list))) => default_of(list)?,
            (None, None) => return Err(TextError::NoTemplate),
        };
        Ok((source, self.bos.unwrap_or_default(), self.eos.unwrap_or_default()))
    }
}

fn default_of(list: Vec<NamedTemplate>) -> Result<String, TextError> {
    let names: Vec<String> = list.iter().map(|t| t.name.clone()).collect();
    let only = list.len() == 1;
    let found = list.into_iter().find(|t| only || t.name == "default");
    found.map(|t| t.template).ok_or_else(|| {
        TextError::Template(format!(
            "there are several ({}), but none is called 'default'",
            names.join(", ")
        ))
    })
}

fn checked(key: &str, id: u32, tokens: u32) -> Result<u32, TextError> {
    if id < tokens {
        return Ok(id);
    }
    Err(TextError::Vocabulary(format!("{key} is {id}, but the largest id is {}", tokens - 1)))
}

fn known(key: &str, text: &str, id_of: impl Fn(&str) -> Option<u32>) -> Result<u32, TextError> {
    id_of(text).ok_or_else(|| {
        TextError::Vocabulary(format!("{key} is '{text}', which is not in the vocabulary"))
    })
}
