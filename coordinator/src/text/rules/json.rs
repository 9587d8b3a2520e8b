//! The first JSON in a text: fences and prose around it are left out.
//!
//! JSON is an object or a list here (numbers and quoted words are prose too often), and the first is
//! the one that begins first of those that are complete. It comes out as it stands once it is
//! complete; if none is by the end, the text was as it should be, and comes out whole.

use serde::de::IgnoredAny;

/// Deepest nesting that is read as JSON, as parsers usually have it.
const MAX_DEPTH: usize = 127;

/// What may come next within a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// A value; or the end of a list, where it may be empty.
    Value {
        or_end: bool,
    },
    /// A key; or the end of an object, where it may be empty.
    Key {
        or_end: bool,
    },
    /// Inside a text, which may be a key, and may be behind a backslash.
    Text {
        key: bool,
        escaped: bool,
    },
    Colon,
    /// Behind a value.
    Comma,
    /// Inside a number or a word.
    Word,
}

/// Whether a beginning can be one of JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    GoesOn,
    Complete,
    Broken,
}

/// Reads what may be a value, character by character. Lenient within words and texts.
#[derive(Clone, Debug)]
struct Reader {
    /// Objects, rather than lists, that are open.
    objects: Vec<bool>,
    next: Next,
}

impl Reader {
    fn new() -> Self {
        Self { objects: Vec::new(), next: Next::Value { or_end: false } }
    }

    fn push(&mut self, c: char) -> Verdict {
        let object = self.objects.last().copied().unwrap_or_default();
        self.next = match (self.next, c) {
            (Next::Text { key, escaped: true }, _) => Next::Text { key, escaped: false },
            (Next::Text { key, .. }, '\\') => Next::Text { key, escaped: true },
            (Next::Text { key: true, .. }, '"') => Next::Colon,
            (Next::Text { .. }, '"') => Next::Comma,
            (Next::Text { .. }, '\0'..='\x1f') => return Verdict::Broken,
            (text @ Next::Text { .. }, _) => text,
            (Next::Word, _) if c.is_ascii_alphanumeric() || "+-.".contains(c) => Next::Word,
            (Next::Word, ' ' | '\t' | '\n' | '\r') => Next::Comma,
            (next, ' ' | '\t' | '\n' | '\r') => next,
            (Next::Value { .. }, '{') => return self.open(true),
            (Next::Value { .. }, '[') => return self.open(false),
            (Next::Value { or_end: true }, ']') => return self.close(),
            (Next::Value { .. }, '"') => Next::Text { key: false, escaped: false },
            (Next::Value { .. }, '-' | '0'..='9' | 't' | 'f' | 'n') => Next::Word,
            (Next::Key { .. }, '"') => Next::Text { key: true, escaped: false },
            (Next::Key { or_end: true }, '}') => return self.close(),
            (Next::Colon, ':') => Next::Value { or_end: false },
            (Next::Comma | Next::Word, ',') if object => Next::Key { or_end: false },
            (Next::Comma | Next::Word, ',') => Next::Value { or_end: false },
            (Next::Comma | Next::Word, '}') if object => return self.close(),
            (Next::Comma | Next::Word, ']') if !object => return self.close(),
            _ => return Verdict::Broken,
        };
        Verdict::GoesOn
    }

    fn open(&mut self, object: bool) -> Verdict {
        self.objects.push(object);
        if self.objects.len() > MAX_DEPTH {
            return Verdict::Broken;
        }
        self.next = if object { Next::Key { or_end: true } } else { Next::Value { or_end: true } };
        Verdict::GoesOn
    }

    fn close(&mut self) -> Verdict {
        self.objects.pop();
        self.next = Next::Comma;
        if self.objects.is_empty() { Verdict::Complete } else { Verdict::GoesOn }
    }
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub(crate) struct JsonFinder {
    text: String,
    /// Where the value may begin, and how it reads so far.
    value: Option<(usize, Reader)>,
    /// Bytes that were read.
    read: usize,
    found: bool,
}

impl JsonFinder {
    /// Whether the JSON is complete: nothing more counts.
    pub(crate) fn found(&self) -> bool {
        self.found
    }

    /// Takes text; returns the JSON when it is complete.
    pub(crate) fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.text.push_str(text);
        while let Some(c) = self.text[self.read..].chars().next() {
            let at = self.read;
            self.read += c.len_utf8();
            let (start, verdict) = match &mut self.value {
                Some((start, reader)) => (*start, reader.push(c)),
                None if c == '{' || c == '[' => {
                    let mut reader = Reader::new();
                    let verdict = reader.push(c);
                    self.value = Some((at, reader));
                    (at, verdict)
                }
                None => continue,
            };
            let value = &self.text[start..self.read];
            match verdict {
                Verdict::GoesOn => {}
                Verdict::Complete if serde_json::from_str::<IgnoredAny>(value).is_ok() => {
                    self.found = true;
                    let value = value.to_owned();
                    self.text.clear();
                    return value;
                }
                Verdict::Complete | Verdict::Broken => self.give_up(start),
            }
        }
        String::new()
    }

    /// What begins there is no JSON; something behind it may be.
    fn give_up(&mut self, start: usize) {
        self.value = None;
        self.read = start + 1;
    }

    /// The end of the text: the JSON that waited behind a beginning that was not completed, or all.
    pub(crate) fn finish(&mut self) -> String {
        while let Some((start, _)) = self.value.take() {
            self.give_up(start);
            let value = self.push("");
            if self.found {
                return value;
            }
        }
        std::mem::take(&mut self.text)
    }
}
