//! What an answer has to look like: `response_format` of OpenAI, and the names that vLLM gives it.
//!
//! Only the form is read here; whether a grammar is valid is for the service to say.

use millrace_shared::sampling::Grammar;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// Most texts of a choice.
const MAX_CHOICES: usize = 256;

/// Takes the fields that constrain an answer, of which there may be one.
///
/// # Errors
/// Naming the field that is wrong, or the second one.
pub(crate) fn take(fields: &mut Fields) -> Result<Option<Grammar>, ApiError> {
    let mut found: Option<(String, Grammar)> = None;
    let mut note = |name: String, grammar: Option<Grammar>| match (grammar, &found) {
        (None, _) => Ok(()),
        (Some(_), Some((first, _))) => {
            let message = format!("cannot be combined with {first}: an answer follows one grammar");
            Err(ApiError::invalid(&name, message))
        }
        (Some(grammar), None) => {
            found = Some((name, grammar));
            Ok(())
        }
    };
    if let Some(value) = fields.take_value("response_format") {
        note("response_format".into(), response_format(fields, value)?)?;
    }
    if let Some(value) = fields.take_value("structured_outputs") {
        let mut nested = Fields::nested("structured_outputs", value)?;
        for kind in ["json", "json_object", "regex", "choice", "grammar"] {
            note(nested.name(kind), of_kind(&mut nested, kind, kind)?)?;
        }
        fields.note_ignored(nested.into_ignored());
    }
    for (field, kind) in [
        ("guided_json", "json"),
        ("guided_regex", "regex"),
        ("guided_choice", "choice"),
        ("guided_grammar", "grammar"),
        ("grammar", "grammar"),
        ("json_schema", "json"),
    ] {
        note(field.into(), of_kind(fields, field, kind)?)?;
    }
    Ok(found.map(|(_, grammar)| grammar))
}

fn response_format(fields: &mut Fields, value: Value) -> Result<Option<Grammar>, ApiError> {
    let mut format = Fields::nested("response_format", value)?;
    let kind: String = format.take("type")?.unwrap_or_default();
    let grammar = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => {
            let missing =
                || ApiError::invalid("response_format.json_schema", "is needed beside this type");
            let value = format.take_value("json_schema").ok_or_else(missing)?;
            let mut described = Fields::nested("response_format.json_schema", value)?;
            for name in ["name", "description", "strict"] {
                described.take_value(name);
            }
            // Without one, any object will do.
            let schema = described.take_value("schema").unwrap_or_else(|| json!({}));
            fields.note_ignored(described.into_ignored());
            Some(schema_of("response_format.json_schema.schema", schema)?)
        }
        _ => {
            let message = format!("'{kind}' is not known: use text, json_object or json_schema");
            return Err(ApiError::invalid("response_format.type", message));
        }
    };
    fields.note_ignored(format.into_ignored());
    Ok(grammar)
}

fn of_kind(fields: &mut Fields, field: &str, kind: &str) -> Result<Option<Grammar>, ApiError> {
    let name = fields.name(field);
    let text = |fields: &mut Fields| -> Result<Option<String>, ApiError> {
        Ok(fields.take::<String>(field)?.filter(|text| !text.is_empty()))
    };
    match kind {
        "json" => fields.take_value(field).map(|value| schema_of(&name, value)).transpose(),
        "json_object" => Ok(fields.take(field)?.unwrap_or(false).then_some(Grammar::JsonObject)),
        "regex" => Ok(text(fields)?.map(Grammar::Regex)),
        "grammar" => Ok(text(fields)?.map(Grammar::Lark)),
        _ => match fields.take::<Vec<String>>(field)? {
            None => Ok(None),
            Some(texts) => one_of(&name, &texts).map(Some),
        },
    }
}

/// A schema, as JSON or as a string of JSON.
fn schema_of(name: &str, value: Value) -> Result<Grammar, ApiError> {
    match value {
        Value::Object(_) => Ok(Grammar::JsonSchema(value.to_string())),
        Value::String(text) => Ok(Grammar::JsonSchema(text)),
        _ => Err(ApiError::invalid(name, "must be a JSON schema: an object")),
    }
}

fn one_of(name: &str, texts: &[String]) -> Result<Grammar, ApiError> {
    if texts.is_empty() || texts.len() > MAX_CHOICES || texts.iter().any(String::is_empty) {
        let message = format!("must be 1 to {MAX_CHOICES} texts, none of them empty");
        return Err(ApiError::invalid(name, message));
    }
    // Lark's strings are written as JSON's.
    let quoted: Vec<String> = texts.iter().map(|text| json!(text).to_string()).collect();
    Ok(Grammar::Lark(format!("start: {}", quoted.join(" | "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(body: &Value) -> Result<Option<Grammar>, String> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).expect("an object");
        take(&mut fields).map_err(|e| e.to_string())
    }

    #[test]
    fn all_spellings_are_read() {
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let as_schema = Some(Grammar::JsonSchema(schema.to_string()));
        assert!(schema.to_string().contains(r#"{"b":{},"a":{}}"#), "order is kept");
        for body in [
            json!({"response_format": {"type": "json_schema",
                "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
            json!({"structured_outputs": {"json": schema}}),
            json!({"guided_json": schema.to_string()}),
            json!({"json_schema": schema}),
        ] {
            assert_eq!(taken(&body), Ok(as_schema.clone()), "{body}");
        }
        for (body, grammar) in [
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"grammar": ""}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Grammar::JsonObject)),
            (json!({"guided_regex": "a+"}), Some(Grammar::Regex("a+".into()))),
            (
                json!({"guided_choice": ["yes", "\"no\""]}),
                Some(Grammar::Lark(r#"start: "yes" | "\"no\"""#.into())),
            ),
        ] {
            assert_eq!(taken(&body), Ok(grammar), "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, said) in [
            (json!({"response_format": {"type": "xml"}}), "'xml' is not known"),
            (json!({"response_format": {"type": "json_schema"}}), "is needed"),
            (json!({"guided_json": 3}), "must be a JSON schema"),
            (json!({"guided_choice": []}), "1 to 256 texts"),
            (json!({"guided_regex": "a", "grammar": "start: \"a\""}), "one grammar"),
        ] {
            let error = taken(&body).expect_err("refused");
            assert!(error.contains(said), "{body}: {error}");
        }
    }
}
