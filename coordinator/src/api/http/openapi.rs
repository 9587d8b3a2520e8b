//! `GET /openapi.json`: what the HTTP API is, for programs: OpenAPI 3.1.
//!
//! Schemas are made from the types of bodies, descriptions from their documentation. What is protected
//! how is the endpoints' own table.

mod asked;
mod operations;
mod told;

use std::sync::OnceLock;

use actix_web::HttpResponse;
use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use self::operations::{Answer, OPERATIONS, Operation};
use super::error::ErrorBody;
use super::{ENDPOINTS, Protection, Verb};

/// `GET /openapi.json`.
pub(crate) async fn openapi() -> HttpResponse {
    static PAGE: OnceLock<String> = OnceLock::new();
    let page = PAGE.get_or_init(|| document().to_string());
    HttpResponse::Ok().content_type("application/json").body(page.as_str())
}

/// Name, where it is, the schema of its values, what it says.
type Parameter = (&'static str, &'static str, fn() -> Value, &'static str);

const PARAMETERS: &[Parameter] = &[
    (
        "X-Request-Id",
        "header",
        || json!({"type": "string", "maxLength": 128}),
        "The client's own name for the request, which the answer, logs and `/admin/requests` repeat.",
    ),
    (
        "X-Millrace-Priority",
        "header",
        || json!({"enum": ["high", "normal", "low"], "default": "normal"}),
        "The class of the request.",
    ),
    (
        "X-Request-Timeout-Ms",
        "header",
        || json!({"type": "integer", "minimum": 1}),
        "Milliseconds after which nobody wants an answer.",
    ),
    (
        "Idempotency-Key",
        "header",
        || json!({"type": "string", "minLength": 1, "maxLength": 256}),
        "Sent again under the same name, the same request runs once, and is attached to.",
    ),
    (
        "X-Millrace-Keep-Alive",
        "header",
        || json!({"type": "integer", "minimum": 0, "maximum": 86400}),
        "Seconds that the request goes on when its connection is gone.",
    ),
    (
        "Last-Event-ID",
        "header",
        || json!({"type": "string", "pattern": "^[0-9]+:[0-9]+(, ?[0-9]+:[0-9]+)*$"}),
        "The id of the last event that came, such as `0:12,1:9`.",
    ),
    (
        "stream",
        "query",
        || json!({"type": "boolean", "default": false}),
        "Whether its events are streamed.",
    ),
    (
        "starting_after",
        "query",
        || json!({"type": "integer", "minimum": 0}),
        "Number of the last event that came.",
    ),
    (
        "after",
        "query",
        || json!({"type": "integer", "minimum": 0, "default": 0}),
        "The `last` of the answer before.",
    ),
    (
        "stuck",
        "query",
        || json!({"type": "boolean", "default": false}),
        "Only those that have not moved for long.",
    ),
];

/// Schemas of what is sent, and of what is answered: what a field may leave out differs.
struct Schemas {
    asked: SchemaGenerator,
    told: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|s| {
                s.definitions_path = "/components/schemas".into();
                s.meta_schema = None;
            })
        };
        Self {
            asked: settings().for_deserialize().into_generator(),
            told: settings().for_serialize().into_generator(),
        }
    }

    /// All that were asked for by name.
    fn definitions(mut self) -> Map<String, Value> {
        let mut all = self.asked.take_definitions(true);
        all.extend(self.told.take_definitions(true));
        all
    }
}

/// The whole page.
fn document() -> Value {
    let mut schemas = Schemas::new();
    let error: Schema = schemas.told.subschema_for::<ErrorBody<'static>>();
    let mut paths: Map<String, Value> = Map::new();
    for operation in OPERATIONS {
        let item = paths.entry(operation.path).or_insert_with(|| json!({}));
        let verb = match operation.verb {
            Verb::Get => "get",
            Verb::Post => "post",
            Verb::Delete => "delete",
        };
        item[verb] = describe(operation, &mut schemas);
    }
    let parameter = |&(name, place, schema, description): &Parameter| {
        let value =
            json!({"name": name, "in": place, "schema": schema(), "description": description});
        (name.to_owned(), value)
    };
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Millrace",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "One language model over many machines.",
            "description": "OpenAI's endpoints, and what operators need. Unknown fields of bodies are \
                            ignored and named in `x-millrace-ignored`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "model", "description": "What the model does."},
            {"name": "operation", "description": "How the cluster fares."},
            {"name": "dashboard", "description": "A page for people."},
        ],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {
                "type": "http",
                "scheme": "bearer",
                "description": "An API key, as `millrace keys create` makes it.",
            }},
            "parameters": PARAMETERS.iter().map(parameter).collect::<Map<String, Value>>(),
            "headers": headers(),
            "responses": {"Error": {
                "description": "What was wrong, and what to do.",
                "headers": {
                    "x-request-id": {"$ref": "#/components/headers/x-request-id"},
                    "retry-after": {"$ref": "#/components/headers/retry-after"},
                },
                "content": {"application/json": {"schema": error}},
            }},
            "schemas": schemas.definitions(),
        },
    })
}

/// Headers of answers.
fn headers() -> Value {
    json!({
        "x-request-id": {
            "description": "What the request is called in logs and by `/admin/requests`.",
            "schema": {"type": "string"},
        },
        "x-millrace-request-id": {
            "description": "The id under which the request can be attached to.",
            "schema": {"type": "string", "format": "uuid"},
        },
        "x-millrace-ignored": {
            "description": "Fields of the body that were ignored.",
            "schema": {"type": "string"},
        },
        "x-millrace-truncated": {
            "description": "Tokens of the prompts that were left out because they were too long.",
            "schema": {"type": "integer", "minimum": 1},
        },
        "retry-after": {
            "description": "Seconds after which to try again, where that makes sense.",
            "schema": {"type": "integer", "minimum": 1},
        },
    })
}

fn describe(operation: &Operation, schemas: &mut Schemas) -> Value {
    let mut described = json!({
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": parameters(operation),
        "responses": responses(operation, schemas),
    });
    if let Some((body, example)) = operation.body {
        described["requestBody"] = json!({
            "required": true,
            "content": {"application/json": {
                "schema": body(&mut schemas.asked),
                "examples": {"simple": {"value": example()}},
            }},
        });
    }
    let here = ENDPOINTS.iter().find(|route| {
        // What is at one place is protected as its first line says.
        path_of(route.path) == operation.path
    });
    if here.is_some_and(|route| route.protection == Protection::Open) {
        described["security"] = json!([]);
    }
    described
}

/// A path of the endpoints' table, without what a parameter may be.
fn path_of(path: &str) -> String {
    path.replace(":.+}", "}")
}

fn parameters(operation: &Operation) -> Vec<Value> {
    let reference = |name: &str| json!({"$ref": format!("#/components/parameters/{name}")});
    let mut all = vec![reference("X-Request-Id")];
    all.extend(operation.parameters.iter().map(|name| reference(name)));
    if operation.path.contains("{id}") {
        all.push(json!({
            "name": "id", "in": "path", "required": true, "schema": {"type": "string"},
            "description": "Which one.",
        }));
    }
    all
}

fn responses(operation: &Operation, schemas: &mut Schemas) -> Value {
    let told = &mut schemas.told;
    let events = |schema: &Schema| {
        json!({
            "schema": {"type": "string"},
            "x-event-schema": schema,
            "x-event-note": "Server-sent events; the data of each is JSON of this schema.",
        })
    };
    let content = match operation.answer {
        Answer::Json(body) => json!({"application/json": {"schema": body(told)}}),
        Answer::JsonOrEvents(body, event) => json!({
            "application/json": {"schema": body(told)},
            "text/event-stream": events(&event(told)),
        }),
        Answer::Events(event) => json!({"text/event-stream": events(&event(told))}),
        Answer::Text(kind) => json!({kind: {"schema": {"type": "string"}}}),
        Answer::Nothing => Value::Null,
    };
    let header = |name: &str| json!({"$ref": format!("#/components/headers/{name}")});
    let mut headers = json!({"x-request-id": header("x-request-id")});
    if operation.body.is_some() {
        headers["x-millrace-ignored"] = header("x-millrace-ignored");
    }
    if operation.parameters.contains(&"Idempotency-Key") {
        headers["x-millrace-request-id"] = header("x-millrace-request-id");
        headers["x-millrace-truncated"] = header("x-millrace-truncated");
    }
    let mut good = json!({"description": "All is well.", "headers": headers});
    let status = if content.is_null() { "204" } else { "200" };
    if !content.is_null() {
        good["content"] = content;
    }
    json!({status: good, "default": {"$ref": "#/components/responses/Error"}})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use millrace_shared::wire::admin::RequestReport;
    use millrace_shared::wire::rpc::{ClusterStatus, StageStatus};

    use super::*;

    #[test]
    fn every_endpoint_is_described_and_nothing_else() {
        let endpoints: BTreeSet<(String, String)> =
            ENDPOINTS.iter().map(|r| (path_of(r.path), format!("{:?}", r.verb))).collect();
        let described: BTreeSet<(String, String)> =
            OPERATIONS.iter().map(|o| (o.path.to_owned(), format!("{:?}", o.verb))).collect();
        assert_eq!(described, endpoints);
        assert_eq!(OPERATIONS.len(), ENDPOINTS.len(), "each once");
        let ids: BTreeSet<&str> = OPERATIONS.iter().map(|o| o.id).collect();
        assert_eq!(ids.len(), OPERATIONS.len(), "ids are unique");
        let page = document();
        for route in ENDPOINTS {
            let operation =
                &page["paths"][path_of(route.path)][format!("{:?}", route.verb).to_lowercase()];
            let open = operation["security"] == json!([]);
            assert_eq!(open, route.protection == Protection::Open, "{}", route.path);
        }
    }

    /// All references of a value.
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(to)) = fields.get("$ref") {
                    found.insert(to.clone());
                }
                fields.values().for_each(|v| references(v, found));
            }
            Value::Array(items) => items.iter().for_each(|v| references(v, found)),
            _ => {}
        }
    }

    #[test]
    fn references_lead_somewhere_and_every_schema_is_used() {
        let page = document();
        let mut found = BTreeSet::new();
        references(&page, &mut found);
        for to in &found {
            let place = to.strip_prefix('#').unwrap_or_else(|| panic!("{to} leads elsewhere"));
            assert!(page.pointer(place).is_some(), "{to} leads nowhere");
        }
        for kind in ["schemas", "parameters", "headers", "responses"] {
            for name in page["components"][kind].as_object().unwrap().keys() {
                let to = format!("#/components/{kind}/{name}");
                assert!(found.contains(&to), "nothing refers to {to}");
            }
        }
        let chat = &page["components"]["schemas"]["ChatRequest"];
        assert_eq!(chat["required"], json!(["messages"]));
        assert!(chat["properties"]["temperature"]["description"].is_string(), "{chat}");
    }

    /// Names of a schema's fields.
    fn fields(page: &Value, schema: &str) -> BTreeSet<String> {
        let properties = page["components"]["schemas"][schema]["properties"].as_object();
        properties.unwrap_or_else(|| panic!("no schema {schema}")).keys().cloned().collect()
    }

    fn fields_of<T: serde::Serialize>(value: &T) -> BTreeSet<String> {
        serde_json::to_value(value).unwrap().as_object().unwrap().keys().cloned().collect()
    }

    /// Types of the pure core, and what is said of them.
    #[test]
    fn mirrored_types_have_the_same_fields() {
        let page = document();
        assert_eq!(fields(&page, "Cluster"), fields_of(&ClusterStatus::default()));
        let stage = StageStatus {
            node_id: millrace_shared::id::NodeId(uuid::Uuid::nil()),
            node_name: String::new(),
            first_layer: 0,
            end_layer: 1,
            embed: true,
            head: true,
            weight_bytes: 1,
            busy_seconds: 0.0,
            wall_seconds: 0.0,
            process_seconds: 0.0,
            steps: 0,
            threads: 1,
            rows_left_out: 0,
            credits: 1,
            round_trip: None,
        };
        assert_eq!(fields(&page, "Stage"), fields_of(&stage));
        assert_eq!(fields(&page, "Report"), fields_of(&RequestReport::default()));
    }
}
