//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, which is how models have seen
//! it in training: a space behind commas and colons, and nothing escaped for HTML.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// On one line.
///
/// # Panics
/// If the value is no JSON, such as a map with keys that are no text.
pub(super) fn compact(value: &serde_json::Value) -> String {
    written(value, None).expect("invariant: JSON values can be written")
}

/// With `indent` spaces for each level, or on one line.
///
/// # Errors
/// If the value is no JSON.
pub(super) fn written(value: &impl Serialize, indent: Option<usize>) -> serde_json::Result<String> {
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced))?,
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            let formatter = PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn as_python_writes_it() {
        let value = json!({"b": [1, 2.5, "é<&'\""], "a": {}, "n": null, "e": []});
        // json.dumps(value, ensure_ascii=False) and with indent=2
        assert_eq!(compact(&value), r#"{"b": [1, 2.5, "é<&'\""], "a": {}, "n": null, "e": []}"#);
        let lines = "{\n  \"b\": [\n    1\n  ],\n  \"a\": {}\n}";
        assert_eq!(written(&json!({"b": [1], "a": {}}), Some(2)).unwrap(), lines);
    }
}
