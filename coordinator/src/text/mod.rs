//! Text in, tokens out, and back: everything that a model file says about text.
//!
//! [`TextModel`] is all of it, from a GGUF file or a model folder: [`Tokenizer`] is built from the
//! file's vocabulary or the folder's `tokenizer.json`; [`Detokenizer`] turns a stream of tokens into
//! text without ever splitting a character; [`ChatTemplate`] renders conversations. Nothing here
//! guesses: an unknown tokenizer model or pre-tokenizer is an error, because a wrong split gives
//! plausible but worse answers.

mod bytes;
mod chat;
mod clock;
mod detokenizer;
mod ends;
mod files;
mod folder;
mod gguf;
mod grammar;
mod info;
mod normalize;
mod patterns;
mod pieces;
mod pretokenizer;
mod python_json;
pub mod renderers;
pub mod rules;
mod settings;
mod table;
mod template;
mod tokenizer;
pub(crate) mod tools;
mod unigram;

pub use chat::ChatTemplate;
pub use detokenizer::Detokenizer;
pub use grammar::{GrammarError, Grammars, Matcher};
pub use info::TokenizerInfo;
pub use millrace_shared::wire::rpc::{ChatMessage, Conversation};
pub use tokenizer::Tokenizer;
pub use tools::{CallForm, CallStyle};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use millrace_shared::model::Description;
use millrace_shared::model::gguf::{Gguf, GgufError};
use millrace_shared::sampling::SamplingParams;

/// The text side of a model.
#[derive(Clone, Debug)]
pub struct TextModel {
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// How conversations become prompts, or why they cannot.
    pub template: Result<ChatTemplate, String>,
    /// How tokens are chosen where a request says nothing.
    pub sampling: SamplingParams,
}

impl TextModel {
    /// Of a model's files.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`] and [`Tokenizer::from_folder`].
    pub fn of(description: &Description) -> Result<Self, TextError> {
        match description {
            Description::Gguf(gguf) => Self::from_gguf(gguf),
            Description::Folder(folder) => Self::from_folder(folder),
        }
    }

    /// Of a GGUF file.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`].
    pub fn from_gguf(file: &Gguf) -> Result<Self, TextError> {
        let tokenizer = Arc::new(Tokenizer::from_gguf(file)?);
        let template = ChatTemplate::from_gguf(file).map_err(|e| e.to_string());
        Ok(Self { tokenizer, template, sampling: SamplingParams::default() })
    }

    /// Of a model folder with a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_folder`], or if `generation_config.json` advises nonsense.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let tokenizer = Arc::new(Tokenizer::from_folder(folder)?);
        let template = ChatTemplate::from_folder(folder).map_err(|e| e.to_string());
        let sampling = settings::sampling(folder, tokenizer.vocab_size())?;
        Ok(Self { tokenizer, template, sampling })
    }
}

/// Why text cannot be handled.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The file lacks a key or has it in a wrong shape.
    #[error(transparent)]
    File(#[from] GgufError),
    /// A kind of vocabulary that is not implemented.
    #[error(
        "tokenizer model '{0}' is not supported (supported in GGUF files: gpt2, gemma4, llama and \
         t5; in tokenizer.json: BPE, Unigram and WordLevel)"
    )]
    Model(String),
    /// A way from tokens to text that is not implemented.
    #[error(
        "the tokenizer's decoder {0} is not supported (supported: ByteLevel, Metaspace, none, and \
         sequences of Replace, ByteFallback, Fuse and Strip of one space at the start)"
    )]
    Decoder(String),
    /// A file of a model folder cannot be used.
    #[error("{}: {why}", path.display())]
    Folder {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The vocabulary is not the model's.
    #[error(
        "the tokenizer has {tokens} tokens and the model an embedding of {rows} rows: it is another \
         model's tokenizer; use the one that came with the model"
    )]
    OtherModel {
        /// One more than the largest id.
        tokens: u32,
        /// Rows of the model's embedding.
        rows: u32,
    },
    /// A way to split text into words that is not implemented.
    #[error("pre-tokenizer '{found}' is not supported (supported: {known})")]
    PreTokenizer {
        /// In the file.
        found: String,
        /// All that are known.
        known: String,
    },
    /// The vocabulary contradicts itself.
    #[error("the vocabulary is not sound: {0}")]
    Vocabulary(String),
    /// Text that cannot be tokenised.
    #[error("cannot tokenise the text: {0}")]
    Encode(String),
    /// There is no chat template.
    #[error(
        "this model has no chat template, so it cannot chat; send plain prompts (completions) instead"
    )]
    NoTemplate,
    /// The chat template is not valid.
    #[error("the model's chat template is not valid: {0}")]
    Template(String),
    /// More messages than are rendered.
    #[error("the conversation has {found} messages, at most {limit} are possible; send fewer")]
    Messages {
        /// In the conversation.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A tool cannot be described.
    #[error("{0}")]
    Tools(String),
    /// The chat template refused the conversation, or failed on it.
    #[error("the model's chat template refused the conversation: {0}")]
    Render(String),
}
