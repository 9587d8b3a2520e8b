//! Text in, tokens out, and back: everything that a model file says about text.
//!
//! [`Tokenizer`] is built from the vocabulary in the GGUF file alone; [`Detokenizer`] turns a stream
//! of tokens into text without ever splitting a character; [`ChatTemplate`] renders conversations.
//! Nothing here guesses: an unknown tokenizer model or pre-tokenizer is an error, because a wrong
//! split gives plausible but worse answers.

mod bytes;
mod chat;
mod clock;
mod detokenizer;
mod pretokenizer;
mod tokenizer;

pub use chat::ChatTemplate;
pub use detokenizer::Detokenizer;
pub use millrace_shared::wire::rpc::ChatMessage;
pub use tokenizer::Tokenizer;

use millrace_shared::model::gguf::GgufError;

/// Why text cannot be handled.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The file lacks a key or has it in a wrong shape.
    #[error(transparent)]
    File(#[from] GgufError),
    /// A kind of vocabulary that is not implemented.
    #[error("tokenizer model '{0}' is not supported (supported: gpt2, that is byte-level BPE)")]
    Model(String),
    /// A way to split text into words that is not implemented.
    #[error("pre-tokenizer '{found}' is not supported (supported: {known})")]
    PreTokenizer {
        /// In the file.
        found: String,
        /// All that are known.
        known: String,
    },
    /// The vocabulary contradicts itself.
    #[error("the vocabulary in the file is not sound: {0}")]
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
    /// The chat template refused the conversation, or failed on it.
    #[error("the model's chat template refused the conversation: {0}")]
    Render(String),
}
