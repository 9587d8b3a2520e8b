//! JSON as Python's `json.dumps(value, ensure_ascii=False)` and its other options write it, which is how models have seen
//! it in training: a space behind commas and colons, and nothing escaped for HTML.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// What `json.dumps` is told of how to write.
#[derive(Clone, Debug, Default)]
pub(super) struct Style {
    /// Spaces for each level, on lines of their own; all on one line where nothing is said.
    pub(super) indent: Option<usize>,
    /// Between entries, and behind keys.
    pub(super) separators: Option<(String, String)>,
    /// Nothing but ASCII: other characters are escaped.
    pub(super) ascii: bool,
}

/// Most spaces for a level.
const MAX_INDENT: usize = 16;

struct Python<'s> {
    style: &'s Style,
    level: usize,
    /// Whether the list or object that ends has entries.
    filled: bool,
}

impl Python<'_> {
    fn line<W: ?Sized + io::Write>(&self, w: &mut W) -> io::Result<()> {
        let Some(indent) = self.style.indent else { return Ok(()) };
        w.write_all(b"\n")?;
        (0..self.level).try_for_each(|_| w.write_all(&b" ".repeat(indent.min(MAX_INDENT))))
    }

    fn begin<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level += 1;
        self.filled = false;
        w.write_all(bracket)
    }

    fn entry<W: ?Sized + io::Write>(&self, w: &mut W, first: bool) -> io::Result<()> {
        let between = match (&self.style.separators, self.style.indent) {
            (Some((between, _)), _) => between.as_str(),
            (None, Some(_)) => ",",
            (None, None) => ", ",
        };
        if !first {
            w.write_all(between.as_bytes())?;
        }
        self.line(w)
    }

    fn end<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if self.filled {
            self.line(w)?;
        }
        w.write_all(bracket)
    }
}

impl Formatter for Python<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.begin(w, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.end(w, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.entry(w, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.begin(w, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.end(w, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.entry(w, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        let behind = self.style.separators.as_ref().map_or(": ", |(_, behind)| behind);
        w.write_all(behind.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.style.ascii {
            return w.write_all(fragment.as_bytes());
        }
        let mut units = [0; 2];
        fragment.chars().try_for_each(|c| match c {
            ' '..='~' => w.write_all(&[c as u8]),
            c => c.encode_utf16(&mut units).iter().try_for_each(|unit| write!(w, "\\u{unit:04x}")),
        })
    }
}

/// On one line.
///
/// # Panics
/// If the value is no JSON, such as a map with keys that are no text.
pub(super) fn compact(value: &serde_json::Value) -> String {
    written(value, &Style::default()).expect("invariant: JSON values can be written")
}

/// In this style.
///
/// # Errors
/// If the value is no JSON.
pub(super) fn written(value: &impl Serialize, style: &Style) -> serde_json::Result<String> {
    let mut out = Vec::new();
    let python = Python { style, level: 0, filled: false };
    value.serialize(&mut Serializer::with_formatter(&mut out, python))?;
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
        let indented = Style { indent: Some(2), ..Style::default() };
        assert_eq!(written(&json!({"b": [1], "a": {}}), &indented).unwrap(), lines);
    }

    #[test]
    fn as_its_options_say() {
        // json.dumps(value, separators=(",", ":")), which escapes what is not ASCII
        let separators = Some((",".to_owned(), ":".to_owned()));
        let style = Style { separators, ascii: true, ..Style::default() };
        let value = json!({"é": [1, "𝄞\u{7f}\n"], "a": {}});
        let expected = r#"{"\u00e9":[1,"\ud834\udd1e\u007f\n"],"a":{}}"#;
        assert_eq!(written(&value, &style).unwrap(), expected);
    }
}
