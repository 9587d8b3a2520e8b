//! Arguments as a call writes them: those that the tool's schema names.
//!
//! A schema that says nothing of `additionalProperties` allows any. A function takes none that it does
//! not know, and small models that may write more go on until their tokens are used up. What is
//! allowed here is always allowed by the tool's schema too.

use serde_json::{Map, Value};

/// What says itself which properties there may be besides.
const SAID: [&str; 3] = ["additionalProperties", "unevaluatedProperties", "patternProperties"];
/// What may add properties to those of the schema that it stands in.
const ADDS: [&str; 7] =
    ["allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "dependentSchemas", "if"];

/// The schema, whose objects have the properties that they name and no others, where it does not say
/// itself what else there may be. One that is put together of several objects stays as it is: each
/// part of it would forbid what the others name.
pub(super) fn closed(mut schema: Value) -> Value {
    if !merges(&mut schema) {
        close(&mut schema);
    }
    schema
}

/// Whether some object of it takes its properties from several places.
fn merges(schema: &mut Value) -> bool {
    let Value::Object(object) = schema else { return false };
    let has = |key: &str| object.contains_key(key);
    has("allOf")
        || has("not")
        || (has("properties") && ADDS.iter().any(|key| has(key)))
        || parts(object).into_iter().any(merges)
}

fn close(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    if object.contains_key("properties") && SAID.iter().all(|key| !object.contains_key(*key)) {
        object.insert("additionalProperties".into(), Value::Bool(false));
    }
    parts(object).into_iter().for_each(close);
}

/// The schemas that one is made of.
fn parts(object: &mut Map<String, Value>) -> Vec<&mut Value> {
    let mut found = Vec::new();
    for (key, value) in object {
        match (key.as_str(), value) {
            ("properties" | "$defs" | "definitions", Value::Object(named)) => {
                found.extend(named.values_mut());
            }
            ("anyOf" | "oneOf" | "prefixItems", Value::Array(list)) => found.extend(list),
            ("items" | "additionalProperties", value) => found.push(value),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_have_what_they_name() {
        let given = json!({"$defs": {"at": {"type": "object", "properties": {"x": {"type": "number"}}}},
            "type": "object", "properties": {
                "at": {"anyOf": [{"$ref": "#/$defs/at"}, {"type": "null"}]},
                "all": {"type": "array", "items": {"type": "object", "properties": {}}},
                "free": {"type": "object"},
                "more": {"type": "object", "properties": {}, "additionalProperties": true}}});
        let mut wanted = given.clone();
        for place in ["", "/$defs/at", "/properties/all/items"] {
            let object = wanted.pointer_mut(place).and_then(Value::as_object_mut).expect("object");
            object.insert("additionalProperties".into(), json!(false));
        }
        assert_eq!(closed(given), wanted);
    }

    #[test]
    fn objects_of_several_parts_stay_open() {
        let part = json!({"type": "object", "properties": {"a": {"type": "string"}}});
        for whole in [
            json!({"allOf": [part, {"type": "object", "properties": {"b": {}}}]}),
            json!({"type": "object", "properties": {"b": {}}, "anyOf": [part]}),
            json!({"type": "array", "items": {"$ref": "#/$defs/a", "properties": {"b": {}}},
                "$defs": {"a": part}}),
            json!(true),
        ] {
            assert_eq!(closed(whole.clone()), whole);
        }
    }
}
