//! The chat template of a model: where it comes from, and who renders it.
//!
//! In a program that asked for it ([`super::renderers::enable`]) conversations are rendered by
//! processes of their own, because a template can take more memory than there is; elsewhere (tests,
//! tools) by this one.

use std::path::Path;
use std::sync::Arc;

use millrace_shared::model::gguf::Gguf;

use super::renderers::{self, Renderers, Source};
use super::settings::Settings;
use super::template::Template;
use super::{ChatMessage, TextError};

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    rendering: Rendering,
}

#[derive(Clone, Debug)]
enum Rendering {
    Here(Arc<Template>),
    Apart(Arc<Renderers>),
}

impl ChatTemplate {
    /// Compiles the template in a model file.
    ///
    /// # Errors
    /// If the file has none, or one that is not valid.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let source = gguf.opt_str("tokenizer.chat_template")?.ok_or(TextError::NoTemplate)?;
        let tokens = gguf.opt_strings("tokenizer.ggml.tokens")?.unwrap_or_default();
        let token = |key: &str| -> Result<String, TextError> {
            let id = gguf.opt_u32(key)?;
            let text = id.and_then(|id| tokens.get(id as usize));
            Ok(text.cloned().unwrap_or_default())
        };
        let bos = token("tokenizer.ggml.bos_token_id")?;
        let eos = token("tokenizer.ggml.eos_token_id")?;
        Self::new(source, bos, eos)
    }

    /// Compiles the template of a model folder: `chat_template.jinja`, or else what
    /// `tokenizer_config.json` has (of several the one called `default`).
    ///
    /// # Errors
    /// If the folder has none, or one that is not valid, or its files cannot be read.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let (source, bos, eos) = Settings::read(folder)?.template(folder)?;
        Self::new(&source, bos, eos)
    }

    /// Compiles a template; `bos` and `eos` are what its variables `bos_token` and `eos_token` are.
    ///
    /// # Errors
    /// If it is not valid.
    pub fn new(source: &str, bos: String, eos: String) -> Result<Self, TextError> {
        let rendering = match renderers::program() {
            None => Rendering::Here(Arc::new(Template::new(source, bos, eos)?)),
            Some(program) => {
                let source = Source { source: source.to_owned(), bos, eos };
                Rendering::Apart(Arc::new(Renderers::start(program, source)?))
            }
        };
        Ok(Self { rendering })
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the model's answer
    /// begins. The template may add a system message of its own. Takes as long as the template
    /// does: some seconds at most.
    ///
    /// # Errors
    /// If there are more than [`millrace_shared::wire::rpc::MAX_CHAT_MESSAGES`], or the template
    /// refuses the conversation (such as roles out of turn), or takes too much time or memory.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        match &self.rendering {
            Rendering::Here(template) => template.render(messages, add_generation_prompt),
            Rendering::Apart(renderers) => renderers.render(messages, add_generation_prompt),
        }
    }
}
