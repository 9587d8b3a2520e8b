//! What each endpoint is for, takes and answers. A test holds this table to that of the endpoints.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Value, json};

use super::super::Verb;
use super::super::embeddings::EmbeddingList;
use super::super::types::{Envelope, ModelBody};
use super::{asked, told};
use crate::text::TokenizerInfo;

/// The schema of a type.
type Typed = fn(&mut SchemaGenerator) -> Schema;

/// The schema of a body, and an example.
type Body = (Typed, fn() -> Value);

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// What is answered where all is well.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    /// JSON.
    Json(Typed),
    /// JSON, or server-sent events of JSON where the client asks for them.
    JsonOrEvents(Typed, Typed),
    /// Server-sent events.
    Events(Typed),
    /// A text of this media type.
    Text(&'static str),
    /// 204.
    Nothing,
}

/// One endpoint.
pub(super) struct Operation {
    pub(super) verb: Verb,
    pub(super) path: &'static str,
    /// Unique.
    pub(super) id: &'static str,
    pub(super) tag: &'static str,
    /// What it is for.
    pub(super) summary: &'static str,
    /// The body that it takes, and an example.
    pub(super) body: Option<Body>,
    /// Names of headers and queries that it reads, of `super::PARAMETERS`.
    pub(super) parameters: &'static [&'static str],
    pub(super) answer: Answer,
}

const fn get(
    path: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    answer: Answer,
) -> Operation {
    Operation { verb: Verb::Get, path, id, tag, summary, body: None, parameters: &[], answer }
}

const fn post(
    path: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    (body, answer): (Option<Body>, Answer),
) -> Operation {
    Operation { verb: Verb::Post, path, id, tag, summary, body, parameters: &[], answer }
}

impl Operation {
    const fn with(self, parameters: &'static [&'static str]) -> Self {
        Self { parameters, ..self }
    }
}

/// Headers of requests that run the model.
const RUNS: &[&str] =
    &["X-Millrace-Priority", "X-Request-Timeout-Ms", "Idempotency-Key", "X-Millrace-Keep-Alive"];

/// In the order of the page.
pub(super) const OPERATIONS: &[Operation] = &[
    post(
        "/v1/chat/completions",
        "createChatCompletion",
        "model",
        "Answers a conversation.",
        (
            Some((of::<asked::ChatRequest>, || {
                json!({"messages": [{"role": "user", "content": "Why is the sky blue?"}],
                    "max_tokens": 64})
            })),
            Answer::JsonOrEvents(of::<Envelope<'static>>, of::<Envelope<'static>>),
        ),
    )
    .with(RUNS),
    post(
        "/v1/completions",
        "createCompletion",
        "model",
        "Goes on with one text or several.",
        (
            Some((
                of::<asked::CompletionRequest>,
                || json!({"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}),
            )),
            Answer::JsonOrEvents(of::<Envelope<'static>>, of::<Envelope<'static>>),
        ),
    )
    .with(RUNS),
    post(
        "/v1/embeddings",
        "createEmbedding",
        "model",
        "Makes vectors of texts.",
        (
            Some((
                of::<asked::EmbeddingRequest>,
                || json!({"input": ["The sky is blue.", "Grass is green."]}),
            )),
            Answer::Json(of::<EmbeddingList>),
        ),
    )
    .with(&["X-Millrace-Priority", "X-Request-Timeout-Ms"]),
    post(
        "/v1/responses",
        "createResponse",
        "model",
        "Makes a response, which can be asked for again and gone on from.",
        (
            Some((
                of::<asked::ResponseRequest>,
                || json!({"input": "Why is the sky blue?", "max_output_tokens": 64}),
            )),
            Answer::JsonOrEvents(of::<told::Response>, of::<told::ResponseEvent>),
        ),
    )
    .with(RUNS),
    get(
        "/v1/responses/{id}",
        "getResponse",
        "model",
        "Tells how a response stands, or streams its events.",
        Answer::JsonOrEvents(of::<told::Response>, of::<told::ResponseEvent>),
    )
    .with(&["stream", "starting_after"]),
    Operation {
        verb: Verb::Delete,
        path: "/v1/responses/{id}",
        id: "deleteResponse",
        tag: "model",
        summary: "Forgets a response, and ends it where it goes on.",
        body: None,
        parameters: &[],
        answer: Answer::Json(of::<told::Deleted>),
    },
    post(
        "/v1/responses/{id}/cancel",
        "cancelResponse",
        "model",
        "Ends a response; one that has ended stays as it is.",
        (None, Answer::Json(of::<told::Response>)),
    ),
    get(
        "/v1/requests/{id}/events",
        "getRequestEvents",
        "model",
        "Streams the rest of an answer whose connection was lost.",
        Answer::Events(of::<Envelope<'static>>),
    )
    .with(&["Last-Event-ID"]),
    post(
        "/v1/requests/{id}/cancel",
        "cancelRequest",
        "model",
        "Ends a request.",
        (None, Answer::Nothing),
    ),
    get(
        "/v1/models",
        "listModels",
        "model",
        "Which models are served.",
        Answer::Json(of::<told::ModelList>),
    ),
    get(
        "/v1/models/{id}",
        "getModel",
        "model",
        "One served model; its name may hold slashes.",
        Answer::Json(of::<ModelBody>),
    ),
    post(
        "/tokenize",
        "tokenize",
        "model",
        "Cuts a text or a conversation into tokens.",
        (
            Some((of::<asked::TokenizeRequest>, || json!({"prompt": "The sky is blue."}))),
            Answer::Json(of::<told::Tokens>),
        ),
    ),
    post(
        "/detokenize",
        "detokenize",
        "model",
        "Puts tokens together.",
        (
            Some((of::<asked::DetokenizeRequest>, || json!({"tokens": [1, 2, 3]}))),
            Answer::Json(of::<told::Text>),
        ),
    ),
    get(
        "/tokenizer_info",
        "tokenizerInfo",
        "model",
        "The tokenizer's markup and the template of conversations, for clients that render themselves.",
        Answer::Json(of::<TokenizerInfo>),
    ),
    get(
        "/health",
        "health",
        "operation",
        "200 when requests are served, else 503.",
        Answer::Json(of::<told::Health>),
    ),
    get("/ready", "ready", "operation", "The same.", Answer::Json(of::<told::Health>)),
    get(
        "/live",
        "live",
        "operation",
        "200 as long as the process answers.",
        Answer::Json(of::<told::Health>),
    ),
    get(
        "/metrics",
        "metrics",
        "operation",
        "Metrics for Prometheus.",
        Answer::Text("application/openmetrics-text"),
    ),
    get(
        "/version",
        "version",
        "operation",
        "Which program this is.",
        Answer::Json(of::<told::Version>),
    ),
    get(
        "/openapi.json",
        "openapi",
        "operation",
        "This page.",
        Answer::Json(|_| Schema::from(true)),
    ),
    get(
        "/v1/cluster",
        "cluster",
        "operation",
        "Stages, nodes and counters.",
        Answer::Json(of::<told::Cluster>),
    ),
    get(
        "/v1/cluster/timeline",
        "clusterTimeline",
        "operation",
        "Micro-batches that came back.",
        Answer::Json(of::<told::Timeline>),
    )
    .with(&["after"]),
    get(
        "/v1/cluster/events",
        "clusterEvents",
        "operation",
        "What happened, and the plan that serves.",
        Answer::Json(of::<told::Events>),
    )
    .with(&["after"]),
    get(
        "/admin/requests",
        "listRequests",
        "operation",
        "Where requests are. Needs an administrator's key.",
        Answer::Json(of::<told::ReportList>),
    )
    .with(&["stuck"]),
    get(
        "/admin/requests/{id}",
        "getRequest",
        "operation",
        "Where one is, also where it has ended. Needs an administrator's key.",
        Answer::Json(of::<told::Report>),
    ),
    get("/", "dashboard", "dashboard", "The dashboard's page.", Answer::Text("text/html")),
    get(
        "/dashboard/style.css",
        "dashboardStyle",
        "dashboard",
        "Its style.",
        Answer::Text("text/css"),
    ),
    get(
        "/dashboard/app.js",
        "dashboardScript",
        "dashboard",
        "Its script.",
        Answer::Text("text/javascript"),
    ),
];
