//! `POST /v1/embeddings`: texts to vectors, made of the model's final hidden states.

use actix_web::{HttpRequest, HttpResponse, web};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use millrace_shared::pooling::Pooling;
use millrace_shared::wire::rpc::{EmbedRequest, Embedded, MAX_EMBED_INPUTS};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::AppState;
use super::completions::take_prompts;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::only_model;
use super::request::{Body, caller, read_body, with_ignored};
use crate::service::Caller;

/// How the numbers of a vector are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    /// A list of numbers.
    #[default]
    Float,
    /// Their little-endian bytes, four each.
    Base64,
}

/// The vectors of all texts.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EmbeddingList {
    object: &'static str,
    /// In the order of the texts.
    data: Vec<EmbeddingBody>,
    model: String,
    usage: EmbeddingUsage,
}

/// The vector of one text.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Embedding")]
struct EmbeddingBody {
    object: &'static str,
    /// Which text.
    index: usize,
    embedding: Numbers,
}

/// A vector with an Euclidean length of 1.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
enum Numbers {
    /// A number for each dimension.
    Float(Vec<f32>),
    /// Base64 of the numbers as little-endian 32-bit floats.
    Base64(String),
}

/// Exact token counts of all texts together.
#[derive(Debug, Serialize, JsonSchema)]
struct EmbeddingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}

struct Asked {
    request: EmbedRequest,
    encoding: Encoding,
    caller: Caller,
    ignored: Vec<String>,
}

/// Answers OpenAI's `{"object": "list", "data", "model", "usage"}`.
pub(crate) async fn embeddings(
    state: web::Data<AppState>,
    request: HttpRequest,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let asked = state.counted(read(&request, body))?;
    state.counted(state.refuse_while_draining().map_err(ApiError::from))?;
    let Asked { request, encoding, caller, ignored } = asked;
    let model = match request.model.as_str() {
        "" => only_model(&state),
        named => named.to_owned(),
    };
    let embeddings = state.service.embed(request, caller).await.map_err(ApiError::of_model)?;
    let embedded = embeddings.all().await.map_err(ApiError::of_model)?;
    let body = EmbeddingList::of(embedded, model, encoding);
    Ok(with_ignored(HttpResponse::Ok().json(body), &ignored))
}

fn read(request: &HttpRequest, body: Body) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(&read_body(body)?)?;
    let caller = caller(request)?;
    let model: String = fields.take("model")?.unwrap_or_default();
    let inputs = take_prompts(&mut fields, "input")?
        .ok_or_else(|| ApiError::invalid("input", "is missing"))?;
    if inputs.len() > MAX_EMBED_INPUTS {
        let why = format!("has {} texts, at most {MAX_EMBED_INPUTS} at once", inputs.len());
        return Err(ApiError::invalid("input", why));
    }
    let encoding = fields.take("encoding_format")?.unwrap_or_default();
    let dimensions = fields.take("dimensions")?;
    let pooling: Pooling = fields.take("pooling")?.unwrap_or_default();
    // Of no meaning here, and named by many clients.
    fields.take_value("user");
    let request = EmbedRequest { model, inputs, pooling, dimensions };
    Ok(Asked { request, encoding, caller, ignored: fields.into_ignored() })
}

impl EmbeddingList {
    fn of(embedded: Vec<Embedded>, model: String, encoding: Encoding) -> Self {
        let tokens = embedded.iter().map(|e| u64::from(e.prompt_tokens)).sum();
        let numbers = |vector: Vec<f32>| match encoding {
            Encoding::Float => Numbers::Float(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                Numbers::Base64(STANDARD.encode(bytes))
            }
        };
        let body = |(index, e): (usize, Embedded)| EmbeddingBody {
            object: "embedding",
            index,
            embedding: numbers(e.vector),
        };
        Self {
            object: "list",
            data: embedded.into_iter().enumerate().map(body).collect(),
            model,
            usage: EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens },
        }
    }
}
