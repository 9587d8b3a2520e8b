//! What requests may say, for the description alone: bodies are read field by field, so that an error
//! can name its field. A test holds these fields to the ones that are read.
#![allow(dead_code, reason = "only their schemas are used")]

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// A text or several.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// A text, token ids, or a list of texts or of lists of ids.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum TextOrIds {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ListsOfIds(Vec<Vec<u32>>),
}

/// How tokens are chosen, and when an answer ends. What is not said is as the model's makers advise.
#[derive(JsonSchema)]
#[schemars(inline)]
struct Sampling {
    /// The served model; it may be left out.
    model: Option<String>,
    /// 0 takes the likeliest token each time.
    #[schemars(range(min = 0.0))]
    temperature: Option<f32>,
    /// Tokens are drawn from the likeliest ones that have this probability together.
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f32>,
    /// Tokens are drawn from so many of the likeliest; 0 or -1 from all.
    top_k: Option<i64>,
    /// Least probability of a token, as a part of the likeliest one's.
    #[schemars(range(min = 0.0, max = 1.0))]
    min_p: Option<f32>,
    /// Divides the logits of tokens that were there before; 1 for none.
    repetition_penalty: Option<f32>,
    /// Taken from the logits of tokens that the answer has.
    presence_penalty: Option<f32>,
    /// Taken from them for each time.
    frequency_penalty: Option<f32>,
    /// Added to the logits of these token ids.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed gives the same answer.
    seed: Option<i64>,
    /// Texts at which the answer ends, without them.
    stop: Option<OneOrMany>,
    /// Token ids at which it ends.
    stop_token_ids: Option<Vec<u32>>,
    /// Goes on after the model's own end.
    ignore_eos: Option<bool>,
    /// Choices to make.
    #[schemars(range(min = 1, max = 16))]
    n: Option<u32>,
    /// Choices to make, of which the `n` best are sent; not in streams.
    #[schemars(range(min = 1, max = 16))]
    best_of: Option<u32>,
    /// Server-sent events instead of one body.
    stream: Option<bool>,
    /// What a stream tells besides.
    stream_options: Option<StreamOptions>,
    /// The form of the answer.
    response_format: Option<ResponseFormat>,
    /// The same, as vLLM has it.
    structured_outputs: Option<StructuredOutputs>,
    /// Of no meaning here.
    user: Option<String>,
}

#[derive(JsonSchema)]
struct StreamOptions {
    /// A last chunk with the counts of tokens.
    include_usage: Option<bool>,
}

/// The form that an answer follows.
#[derive(JsonSchema)]
#[schemars(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    /// Any.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// The schema and its name.
        json_schema: NamedSchema,
    },
}

#[derive(JsonSchema)]
struct NamedSchema {
    /// For people.
    name: Option<String>,
    /// A JSON schema.
    schema: Option<Map<String, Value>>,
    /// Answers always follow the schema.
    strict: Option<bool>,
}

/// One of these.
#[derive(JsonSchema)]
struct StructuredOutputs {
    /// A JSON schema.
    json: Option<Map<String, Value>>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// A regular expression.
    regex: Option<String>,
    /// One of these texts.
    choice: Option<Vec<String>>,
    /// A Lark grammar.
    grammar: Option<String>,
}

/// A conversation to answer.
#[derive(JsonSchema)]
pub(super) struct ChatRequest {
    /// The turns so far.
    #[schemars(length(min = 1))]
    messages: Vec<ChatTurn>,
    #[schemars(flatten)]
    sampling: Sampling,
    /// Longest answer, tokens.
    #[schemars(range(min = 1))]
    max_tokens: Option<u32>,
    /// The same under its newer name, which wins.
    #[schemars(range(min = 1))]
    max_completion_tokens: Option<u32>,
    /// Whether log-probabilities are told.
    logprobs: Option<bool>,
    /// Those of how many rivals.
    #[schemars(range(max = 64))]
    top_logprobs: Option<u8>,
    /// Functions that the model may call.
    #[schemars(length(max = 128))]
    tools: Option<Vec<Tool>>,
    /// `auto`, `none`, `required`, or the function to call.
    tool_choice: Option<ToolChoice>,
    /// Whether an answer may have several calls.
    parallel_tool_calls: Option<bool>,
}

/// One turn.
#[derive(JsonSchema)]
struct ChatTurn {
    /// Who speaks: `system`, `developer`, `user`, `assistant` or `tool`.
    role: String,
    /// What is said; null where there are only calls.
    content: Option<Content>,
    /// Calls of an assistant's turn.
    tool_calls: Option<Vec<TurnCall>>,
    /// Which call a tool answers.
    tool_call_id: Option<String>,
}

/// A text, or parts of one.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a text.
#[derive(JsonSchema)]
struct Part {
    /// `text`, `input_text` or `output_text`.
    r#type: String,
    text: String,
}

/// A call that the model made.
#[derive(JsonSchema)]
struct TurnCall {
    id: String,
    r#type: Option<String>,
    function: CalledFunction,
}

/// What was called, and with what.
#[derive(JsonSchema)]
struct CalledFunction {
    name: String,
    /// JSON.
    arguments: String,
}

/// A function that can be called.
#[derive(JsonSchema)]
struct Tool {
    /// `function`.
    r#type: Option<String>,
    function: Function,
}

#[derive(JsonSchema)]
struct Function {
    name: String,
    /// For the model.
    description: Option<String>,
    /// A JSON schema of the arguments.
    parameters: Option<Map<String, Value>>,
    /// Arguments always follow the schema.
    strict: Option<bool>,
}

/// Whether functions are called.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum ToolChoice {
    /// `auto`, `none` or `required`.
    Word(String),
    /// This one is called.
    Named(Map<String, Value>),
}

/// Texts to go on with.
#[derive(JsonSchema)]
pub(super) struct CompletionRequest {
    /// The text, or several.
    prompt: TextOrIds,
    #[schemars(flatten)]
    sampling: Sampling,
    /// Longest answer, tokens; 16 where nothing is said.
    #[schemars(range(min = 0))]
    max_tokens: Option<u32>,
    /// Log-probabilities of so many tokens at each place.
    #[schemars(range(max = 64))]
    logprobs: Option<u8>,
    /// Answers begin with their prompts; with `logprobs` those of their tokens come too, and
    /// `max_tokens` may be 0.
    echo: Option<bool>,
}

/// Texts to make vectors of.
#[derive(JsonSchema)]
pub(super) struct EmbeddingRequest {
    /// The text, or several: at most 2,048, of 300,000 tokens in all.
    input: TextOrIds,
    /// The served model; it may be left out.
    model: Option<String>,
    /// `float` where nothing is said, or `base64` of little-endian 32-bit floats.
    encoding_format: Option<EncodingFormat>,
    /// Only the first so many numbers, made as long as 1 again.
    #[schemars(range(min = 1))]
    dimensions: Option<u32>,
    /// `mean` over all hidden states where nothing is said, or that of the `last` token.
    pooling: Option<Pooling>,
    /// Of no meaning here.
    user: Option<String>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
enum EncodingFormat {
    Float,
    Base64,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
enum Pooling {
    Mean,
    Last,
}

/// A response to make.
#[derive(JsonSchema)]
pub(super) struct ResponseRequest {
    /// A text, or messages, calls and their outputs.
    input: ResponseInput,
    /// The served model; it may be left out.
    model: Option<String>,
    /// What the system says, this time only.
    instructions: Option<String>,
    /// The response that this one goes on from.
    previous_response_id: Option<String>,
    /// Longest answer, tokens.
    #[schemars(range(min = 1))]
    max_output_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// Its form.
    text: Option<ResponseText>,
    /// Functions that the model may call, each with `type`, `name`, `description`, `parameters`.
    tools: Option<Vec<Map<String, Value>>>,
    /// `auto`, `none`, `required`, or the function to call.
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
    /// Kept with it.
    metadata: Option<Map<String, Value>>,
    /// Server-sent events instead of one body.
    stream: Option<bool>,
    /// Goes on without anybody who listens.
    background: Option<bool>,
    /// Whether it can be asked for afterwards.
    store: Option<bool>,
    /// Of no meaning here.
    user: Option<String>,
}

/// A text or items.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum ResponseInput {
    Text(String),
    Items(Vec<Map<String, Value>>),
}

#[derive(JsonSchema)]
struct ResponseText {
    /// `type`: `text`, `json_object`, or `json_schema` with `name` and `schema` beside it.
    format: Option<Map<String, Value>>,
}

/// A text to cut into tokens: `prompt`, `content` or `messages`.
#[derive(JsonSchema)]
pub(super) struct TokenizeRequest {
    prompt: Option<TextOrIds>,
    /// The same under another name.
    content: Option<TextOrIds>,
    /// A conversation, as of chat completions.
    messages: Option<Vec<ChatTurn>>,
    /// Whether the token that begins texts is put before it where the model wants one; if not said,
    /// it is.
    add_special_tokens: Option<bool>,
    model: Option<String>,
}

/// Tokens to put together.
#[derive(JsonSchema)]
pub(super) struct DetokenizeRequest {
    tokens: Vec<u32>,
    model: Option<String>,
}
