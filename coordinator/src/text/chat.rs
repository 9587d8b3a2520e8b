//! The chat template of a model: where it comes from, and who renders it.
//!
//! In a program that asked for it ([`super::renderers::enable`]) conversations are rendered by
//! processes of their own, because a template can take more memory than there is; elsewhere (tests,
//! tools) by this one.

use std::path::Path;
use std::sync::Arc;

use millrace_shared::error::Status;
use millrace_shared::model::gguf::Gguf;
use millrace_shared::sampling::Grammar;
use millrace_shared::wire::rpc::MAX_CHAT_MESSAGES;
use serde_json::json;

use super::renderers::{self, Renderers, Source};
use super::settings::Settings;
use super::template::Template;
use super::tools::{self, CallForm, CallStyle, Dialect, Turns};
use super::{Conversation, TextError, Tokenizer};

/// The tool that is in what a template writes, if it knows tools.
const PROBE: &str = "probe_of_tools";

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: Arc<str>,
    eos: String,
    rendering: Rendering,
    dialect: Dialect,
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
        let named = eos.clone();
        let rendering = match renderers::program() {
            None => Rendering::Here(Arc::new(Template::new(source, bos, eos)?)),
            Some(program) => {
                let source = Source { source: source.to_owned(), bos, eos };
                Rendering::Apart(Arc::new(Renderers::start(program, source)?))
            }
        };
        // A template may mention tools and not take them this way.
        let tells = || {
            let function = json!({
                "name": PROBE, "description": PROBE,
                "parameters": {"type": "object", "properties": {}}
            });
            let turns = Turns {
                messages: vec![json!({"role": "user", "content": "?"})],
                tools: vec![json!({"type": "function", "function": function})],
            };
            rendering.render(turns, true).is_ok_and(|text| text.contains(PROBE))
        };
        let dialect = Dialect::of(source, tells);
        Ok(Self { source: source.into(), eos: named, rendering, dialect })
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What its variable `eos_token` is; empty where the model names none.
    pub fn eos(&self) -> &str {
        &self.eos
    }

    /// How calls of tools are written.
    pub fn call_style(&self) -> CallStyle {
        self.dialect.style
    }

    /// What the answer to a conversation is read for, and the grammar that it follows: `asked` is
    /// what the request says of it.
    ///
    /// # Errors
    /// `InvalidArgument` where a tool is wrong, or a form and calls exclude each other.
    pub fn plan_calls(
        &self,
        conversation: &Conversation,
        asked: Option<Grammar>,
        tokenizer: &Tokenizer,
    ) -> Result<(Option<CallForm>, Option<Grammar>), Status> {
        tools::plan(conversation, asked, self.dialect.style, tokenizer)
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the model's answer
    /// begins. The template may add a system message of its own. Takes as long as the template
    /// does: some seconds at most.
    ///
    /// # Errors
    /// If there are more than [`MAX_CHAT_MESSAGES`], or a tool is wrong, or the template refuses the conversation (such as roles out of turn), or takes too much time or memory.
    pub fn render(
        &self,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let found = conversation.messages.len();
        if found > MAX_CHAT_MESSAGES {
            return Err(TextError::Messages { found, limit: MAX_CHAT_MESSAGES });
        }
        let tools = tools::parse(conversation).map_err(|e| {
            TextError::Tools(format!("{}: {}", e.param.unwrap_or_default(), e.message))
        })?;
        let turns = tools::turns(conversation, &tools, self.dialect);
        self.rendering.render(turns, add_generation_prompt)
    }
}

impl Rendering {
    fn render(&self, turns: Turns, add_generation_prompt: bool) -> Result<String, TextError> {
        match self {
            Self::Here(template) => {
                template.render(&turns.messages, &turns.tools, add_generation_prompt)
            }
            Self::Apart(renderers) => renderers.render(turns, add_generation_prompt),
        }
    }
}
