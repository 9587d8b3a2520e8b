//! Lenient reading of a JSON body: one field at a time, so that an error names its field and what
//! nobody asked for can be named too.
//!
//! `null` counts as absent everywhere. A field that would change the answer but is not supported is
//! refused unless it has its default value; any other unknown field is ignored, and its name ends up
//! in the header `x-millrace-ignored`.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// Most names listed in the header; a body may hold thousands.
const MAX_IGNORED_NAMES: usize = 16;
/// Longest name listed in the header.
const MAX_IGNORED_NAME_CHARS: usize = 64;

/// The fields of an object that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
    ignored: Vec<String>,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// If it is not UTF-8, not JSON (the message has line and column), or not an object.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|e| {
            ApiError::bad_body(format!(
                "the request body is not valid UTF-8 at byte {}",
                e.valid_up_to()
            ))
        })?;
        let value: Value = serde_json::from_str(text)
            .map_err(|e| ApiError::bad_body(format!("the request body is not valid JSON: {e}")))?;
        match value {
            Value::Object(map) => Ok(Self { path: String::new(), map, ignored: Vec::new() }),
            other => Err(ApiError::bad_body(format!(
                "the request body must be a JSON object, not {}",
                kind(&other)
            ))),
        }
    }

    /// The fields of the object at `path`.
    ///
    /// # Errors
    /// If it is no object.
    pub(crate) fn nested(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path: format!("{path}."), map, ignored: Vec::new() }),
            other => {
                Err(ApiError::invalid(path, format!("must be an object, not {}", kind(&other))))
            }
        }
    }

    /// The field's full name, for messages.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    /// A field, left where it is; `None` where it is absent or null.
    pub(crate) fn peek(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// Says something under another name.
    pub(crate) fn put(&mut self, field: &str, value: Value) {
        self.map.insert(field.to_owned(), value);
    }

    /// Takes a field as raw JSON; `None` where it is absent or null.
    pub(crate) fn take_value(&mut self, field: &str) -> Option<Value> {
        self.map.remove(field).filter(|v| !v.is_null())
    }

    /// Takes a field; `None` where it is absent or null.
    ///
    /// # Errors
    /// If it has another type, or is out of the type's range.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, field: &str) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take_value(field) else { return Ok(None) };
        serde_json::from_value(value)
            .map(Some)
            .map_err(|e| ApiError::invalid(&self.name(field), e.to_string()))
    }

    /// Takes a field that may only have one of its harmless values.
    ///
    /// # Errors
    /// If it has another value: the field is not supported.
    pub(crate) fn refuse_unless(
        &mut self,
        field: &str,
        harmless: &[Value],
    ) -> Result<(), ApiError> {
        match self.take_value(field) {
            None => Ok(()),
            Some(value) if harmless.contains(&value) => Ok(()),
            Some(_) => {
                let name = self.name(field);
                let message = format!("{name} is not supported yet; leave it out");
                Err(ApiError::invalid(&name, message))
            }
        }
    }

    /// Remembers names ignored in a nested object, as many as the header lists.
    pub(crate) fn note_ignored(&mut self, names: Vec<String>) {
        for name in names {
            if self.ignored.len() >= MAX_IGNORED_NAMES {
                return;
            }
            if !self.ignored.contains(&name) {
                self.ignored.push(name);
            }
        }
    }

    /// Names of the fields nobody took, made safe for a header.
    pub(crate) fn into_ignored(self) -> Vec<String> {
        let own = self.map.iter().filter(|(_, v)| !v.is_null()).map(|(k, _)| {
            let safe =
                |c: char| if c.is_ascii_alphanumeric() || "_-".contains(c) { c } else { '?' };
            let key: String = k.chars().take(MAX_IGNORED_NAME_CHARS).map(safe).collect();
            format!("{}{key}", self.path)
        });
        self.ignored.iter().cloned().chain(own).take(MAX_IGNORED_NAMES).collect()
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).expect("an object")
    }

    #[test]
    fn errors_say_where() {
        let text = |body: &[u8]| Fields::parse(body).expect_err("refused").to_string();
        assert!(
            text(b"{\"a\": \n tru}").contains("line 2 column 5"),
            "{}",
            text(b"{\"a\": \n tru}")
        );
        assert!(text(b"{\"a\": \"\xff\"}").contains("UTF-8 at byte 7"));
        assert!(text(b"[1]").contains("not an array"));
        let error = fields(&json!({"t": "x"})).take::<f32>("t").expect_err("refused");
        assert!(error.to_string().contains("expected f32"), "{error}");
    }

    #[test]
    fn null_is_absent_and_the_rest_is_named() {
        let mut f = fields(&json!({"a": 1, "b": null, "x y": 2, "deep": {"c": 1}}));
        assert_eq!(f.take::<u32>("a").expect("a number"), Some(1));
        assert_eq!(f.take::<u32>("b").expect("null"), None);
        let deep = f.take_value("deep").expect("present");
        let deep = Fields::nested("deep", deep).expect("an object");
        f.note_ignored(deep.into_ignored());
        assert_eq!(f.into_ignored(), ["deep.c", "x?y"]);
    }

    /// Names beyond the cap are neither kept nor compared with.
    #[test]
    fn ignored_names_are_capped() {
        let mut f = fields(&json!({"last": 1}));
        for i in 0..200_000 {
            f.note_ignored(vec![format!("messages.x{i}")]);
        }
        assert_eq!(f.ignored.len(), MAX_IGNORED_NAMES);
        let names = f.into_ignored();
        assert_eq!((names.len(), names[15].as_str()), (MAX_IGNORED_NAMES, "messages.x15"));
    }

    #[test]
    fn unsupported_fields_pass_only_with_harmless_values() {
        let mut f = fields(&json!({"n": 1, "tools": [{}], "echo": null}));
        assert!(f.refuse_unless("n", &[json!(1)]).is_ok());
        assert!(f.refuse_unless("echo", &[json!(false)]).is_ok());
        let error = f.refuse_unless("tools", &[json!([])]).expect_err("refused");
        assert!(error.to_string().contains("tools is not supported"), "{error}");
    }
}
