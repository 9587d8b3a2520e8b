//! Reads calls out of an answer as it comes.
//!
//! What belongs to a call is never content, not even half a marker: what may become one is held
//! back. What looked like a call and is none is content after all, as it stands. A function of the
//! text alone, however it is cut; ids follow from the request.

use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::CallPiece;

use super::reader::{Found, Reader};
use super::{CallForm, CallStyle};

/// What became certain of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Content.
    pub(crate) text: String,
    /// Calls.
    pub(crate) calls: Vec<CallPiece>,
}

impl Piece {
    /// Of content alone.
    pub(crate) fn of_text(text: String) -> Self {
        Self { text, calls: Vec::new() }
    }

    /// This, and what comes behind it.
    pub(crate) fn append(&mut self, other: Self) {
        self.text.push_str(&other.text);
        for piece in other.calls {
            self.add(piece);
        }
    }

    /// One more piece of a call; those of one call become one.
    fn add(&mut self, piece: CallPiece) {
        match self.calls.last_mut() {
            Some(last) if last.call == piece.call => last.arguments.push_str(&piece.arguments),
            _ => self.calls.push(piece),
        }
    }
}

#[derive(Clone, Debug)]
enum State {
    /// Nothing but white space so far, where an answer may be a call as a whole.
    Start,
    /// Content, up to a marker.
    Words,
    /// Inside calls; the text since they began, until the first is certain.
    Calls { reader: Box<Reader>, raw: String, certain: bool },
    /// Behind a tagged call, before the end of its tag; also what breaks off a call that was
    /// certain.
    Tail,
    /// Behind the only call: nothing counts any more.
    Deaf,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct CallParser {
    form: CallForm,
    request: RequestId,
    choice: u32,
    state: State,
    /// Text that may belong to a marker.
    held: String,
    /// Calls that began.
    calls: u32,
}

impl CallParser {
    /// Before the first token of a choice.
    pub(crate) fn new(form: &CallForm, request: RequestId, choice: u32) -> Self {
        let state = if form.style == CallStyle::Json { State::Start } else { State::Words };
        Self { form: form.clone(), request, choice, state, held: String::new(), calls: 0 }
    }

    /// Whether a call began.
    pub(crate) fn called(&self) -> bool {
        self.calls > 0
    }

    /// Takes text.
    pub(crate) fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        let mut piece = Piece::default();
        while self.advance(&mut piece) {}
        piece
    }

    /// The end of the answer: what was held back.
    pub(crate) fn finish(&mut self) -> Piece {
        let mut piece = Piece::default();
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Tail) {
            State::Start => piece.text = held,
            State::Words => {
                let begun = half_marker(&held, self.form.style.marker());
                // One character may be anything; more of a marker is a call that did not come.
                let kept = if begun > 1 { held.len() - begun } else { held.len() };
                let text = &held[..kept];
                if !(self.called() && text.trim().is_empty()) {
                    piece.text = text.to_owned();
                }
            }
            // An answer in JSON that broke off; a call that did is none.
            State::Calls { raw, certain: false, .. } if self.form.style == CallStyle::Json => {
                piece.text = raw;
            }
            State::Calls { .. } | State::Tail | State::Deaf => {}
        }
        piece
    }

    /// One step; whether there may be another.
    fn advance(&mut self, piece: &mut Piece) -> bool {
        match &self.state {
            State::Start => self.start(),
            State::Words => self.words(piece),
            State::Calls { .. } => self.read(piece),
            State::Tail => self.tail(),
            State::Deaf => {
                self.held.clear();
                false
            }
        }
    }

    fn start(&mut self) -> bool {
        match self.held.trim_start().chars().next() {
            None => false,
            Some('{') => {
                self.begin();
                true
            }
            Some(_) => {
                self.state = State::Words;
                true
            }
        }
    }

    fn begin(&mut self) {
        let bare = self.form.style == CallStyle::Named;
        let reader = Box::new(Reader::new(bare));
        self.state = State::Calls { reader, raw: String::new(), certain: false };
    }

    fn words(&mut self, piece: &mut Piece) -> bool {
        let marker = self.form.style.marker();
        if let Some(at) = self.held.find(marker) {
            let text = self.held[..at].trim_end();
            piece.text.push_str(text);
            self.held.drain(..at + marker.len());
            self.begin();
            return true;
        }
        // White space before a marker belongs to it, and between calls to neither.
        let begun = half_marker(&self.held, marker);
        let text = self.held[..self.held.len() - begun].trim_end().len();
        if text > 0 {
            piece.text.extend(self.held.drain(..text));
        }
        false
    }

    fn read(&mut self, piece: &mut Piece) -> bool {
        let State::Calls { reader, raw, certain } = &mut self.state else { return false };
        let mut found = Vec::new();
        let held = std::mem::take(&mut self.held);
        for (at, c) in held.char_indices() {
            if !*certain {
                raw.push(c);
            }
            let read = reader.push(c, &mut found);
            let unknown =
                |f: &Found| matches!(f, Found::Opened(name) if !self.form.names.contains(name));
            let foreign = self.form.style == CallStyle::Json && found.iter().any(unknown);
            if read.is_err() || foreign {
                let (certain, raw) = (*certain, std::mem::take(raw));
                self.held = held[at + c.len_utf8()..].to_owned();
                self.give_up(certain, &raw, piece);
                return true;
            }
            for found in found.drain(..) {
                match found {
                    Found::Opened(_) if self.form.single && self.calls > 0 => {
                        self.state = State::Deaf;
                        return true;
                    }
                    Found::Opened(name) => {
                        (*certain, self.calls) = (true, self.calls + 1);
                        raw.clear();
                        let call = self.calls - 1;
                        let id = id(self.form.style, self.request, self.choice, call);
                        piece.add(CallPiece { call, id, name, arguments: String::new() });
                    }
                    Found::Arguments(arguments) => {
                        let call = self.calls.saturating_sub(1);
                        piece.add(CallPiece { call, arguments, ..CallPiece::default() });
                    }
                    Found::Over => {
                        let rest = if matches!(c, ']' | '}') { at + c.len_utf8() } else { at };
                        self.held = held[rest..].to_owned();
                        self.state = self.after();
                        return true;
                    }
                }
            }
        }
        false
    }

    /// What comes behind calls.
    fn after(&self) -> State {
        match self.form.style {
            CallStyle::Tagged | CallStyle::Json => State::Tail,
            CallStyle::Listed | CallStyle::Named => State::Words,
        }
    }

    /// It was no call.
    fn give_up(&mut self, certain: bool, raw: &str, piece: &mut Piece) {
        if certain {
            self.state = self.after();
            return;
        }
        if self.form.style != CallStyle::Json {
            piece.text.push_str(self.form.style.marker());
        }
        piece.text.push_str(raw);
        self.state = State::Words;
    }

    fn tail(&mut self) -> bool {
        if self.form.style != CallStyle::Tagged {
            self.held.clear();
            return false;
        }
        let ends = ["</tool_call>", "<tool_call>"];
        let first = ends.iter().filter_map(|end| Some((self.held.find(end)?, *end))).min();
        match first {
            Some((at, end)) => {
                // A tag that was not closed may be followed by another one.
                let closed = if end.starts_with("</") { end.len() } else { 0 };
                self.held.drain(..at + closed);
                self.state = State::Words;
                true
            }
            None => {
                let kept = ends.iter().map(|end| half_marker(&self.held, end)).max();
                let dropped = self.held.len() - kept.unwrap_or_default();
                self.held.drain(..dropped);
                false
            }
        }
    }
}

/// Bytes at the end of `text` with which `marker` may begin.
fn half_marker(text: &str, marker: &str) -> usize {
    let longest = marker.len().saturating_sub(1).min(text.len());
    (1..=longest).rev().find(|&n| text.ends_with(&marker[..n])).unwrap_or_default()
}

/// The id of a call: that of the request, the choice and the call, hashed. Mistral's have nine
/// characters.
fn id(style: CallStyle, request: RequestId, choice: u32, call: u32) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(request.0.as_bytes()).update(&choice.to_le_bytes()).update(&call.to_le_bytes());
    let hex = hasher.finalize().to_hex();
    match style {
        CallStyle::Listed | CallStyle::Named => hex[..9].to_owned(),
        CallStyle::Tagged | CallStyle::Json => format!("call_{}", &hex[..24]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn parser(style: CallStyle) -> CallParser {
        let form = CallForm { style, names: vec!["get".into(), "put".into()], single: false };
        CallParser::new(&form, RequestId(Uuid::from_u128(7)), 0)
    }

    /// The content and the calls, however the text is cut, and no piece of a call before its name.
    fn read(style: CallStyle, text: &str) -> (String, Vec<(String, String)>) {
        let mut results = Vec::new();
        let chars: Vec<char> = text.chars().collect();
        for size in [1, 2, 3, 7, chars.len().max(1)] {
            let mut parser = parser(style);
            let (mut content, mut calls) = (String::new(), Vec::<(String, String)>::new());
            let mut pieces: Vec<Piece> =
                chars.chunks(size).map(|c| parser.push(&c.iter().collect::<String>())).collect();
            pieces.push(parser.finish());
            for piece in pieces {
                content.push_str(&piece.text);
                for call in piece.calls {
                    assert_eq!(call.id.is_empty(), call.name.is_empty());
                    if !call.name.is_empty() {
                        assert_eq!(call.call as usize, calls.len());
                        calls.push((call.name, String::new()));
                    }
                    assert_eq!(call.call as usize + 1, calls.len());
                    calls.last_mut().unwrap().1.push_str(&call.arguments);
                }
            }
            assert_eq!(parser.called(), !calls.is_empty());
            results.push((content, calls));
        }
        assert!(results.windows(2).all(|w| w[0] == w[1]), "{text}: {results:?}");
        results.swap_remove(0)
    }

    fn calls(found: &[(&str, &str)]) -> Vec<(String, String)> {
        found.iter().map(|(n, a)| ((*n).to_owned(), (*a).to_owned())).collect()
    }

    #[test]
    fn tagged_calls() {
        use CallStyle::Tagged;
        let one = r#"<tool_call>
{"name": "get", "arguments": {"a": [1, {"b": "}\"]"}]}}
</tool_call>"#;
        let got = calls(&[("get", r#"{"a": [1, {"b": "}\"]"}]}"#)]);
        assert_eq!(read(Tagged, one), (String::new(), got.clone()));
        assert_eq!(read(Tagged, &format!("Let me see.\n\n{one}\n")), ("Let me see.".into(), got));
        let two = r#"<tool_call>{"arguments":{},"name":"put"}</tool_call>
<tool_call>[{"name":"get","arguments":"{\"x\":1}"},{"name":"new"}]</tool_call> Done."#;
        let got = calls(&[("put", "{}"), ("get", r#"{"x":1}"#), ("new", "{}")]);
        assert_eq!(read(Tagged, two), (" Done.".into(), got));
        // A tag that is not closed.
        let open = "<tool_call>{\"name\":\"get\",\"arguments\":{}}<tool_call>{\"name\":\"put\"}";
        assert_eq!(read(Tagged, open).1, calls(&[("get", "{}"), ("put", "{}")]));
    }

    #[test]
    fn what_is_no_call_is_content() {
        use CallStyle::{Json, Listed, Tagged};
        for text in ["", "hello", "a < b <t", "<tool_call>none</tool_call>", "x <", "1\n\n2 \n"] {
            let shown = text.strip_suffix("<t").unwrap_or(text);
            assert_eq!(read(Tagged, text), (shown.into(), Vec::new()), "{text}");
        }
        for text in ["{\"a\": 1}", "{\"name\": \"Bob\", \"parameters\": 3}", "{\"name\": ", "[1]"] {
            assert_eq!(read(Json, text), (text.into(), Vec::new()), "{text}");
        }
        assert_eq!(read(Listed, "[TOOL] x").0, "[TOOL] x");
    }

    /// What breaks off shows no half marker and no half call.
    #[test]
    fn cut_off() {
        use CallStyle::{Listed, Tagged};
        let whole =
            "Well.\n<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        for end in (8..whole.len()).filter(|end| whole.is_char_boundary(*end)) {
            let (content, calls) = read(Tagged, &whole[..end]);
            assert_eq!(content.trim_end(), "Well.", "{}", &whole[..end]);
            assert!(calls.len() <= 1);
        }
        assert_eq!(read(Listed, "[TOOL_CALLS][{\"name\": \"g").0, "");
    }

    #[test]
    fn other_styles() {
        use CallStyle::{Json, Listed, Named};
        let one = calls(&[("get", r#"{"a": 1}"#)]);
        for text in [
            r#"{"name": "get", "parameters": {"a": 1}}"#,
            r#" {"type": "function", "name": "get", "parameters": {"a": 1}}"#,
            r#"<|python_tag|>{"name": "get", "parameters": {"a": 1}}"#,
        ] {
            assert_eq!(read(Json, text), (String::new(), one.clone()), "{text}");
        }
        let two = r#"{"name": "get", "parameters": {}}; {"name": "put", "parameters": {}}"#;
        assert_eq!(read(Json, two).1, calls(&[("get", "{}"), ("put", "{}")]));
        let listed = r#"[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}}, {"name": "put"}]"#;
        assert_eq!(read(Listed, listed).1, calls(&[("get", r#"{"a": 1}"#), ("put", "{}")]));
        for text in [
            r#"[TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]put[CALL_ID]x[ARGS]{}"#,
            r#"[TOOL_CALLS]get{"a": 1}[TOOL_CALLS]put{}"#,
        ] {
            let got = calls(&[("get", r#"{"a": 1}"#), ("put", "{}")]);
            assert_eq!(read(Named, text), (String::new(), got), "{text}");
        }
    }

    #[test]
    fn one_call_is_enough() {
        let mut parser = parser(CallStyle::Tagged);
        parser.form.single = true;
        let two = r#"<tool_call>{"name":"get","arguments":{}}</tool_call>
<tool_call>{"name":"put","arguments":{}}</tool_call>"#;
        let mut piece = parser.push(two);
        piece.append(parser.finish());
        assert_eq!((piece.calls.len(), piece.text.as_str()), (1, ""));
    }

    #[test]
    fn ids_follow_from_the_request() {
        let of = |style, choice| id(style, RequestId(Uuid::from_u128(7)), choice, 0);
        assert_eq!(of(CallStyle::Tagged, 1), of(CallStyle::Tagged, 1));
        assert_ne!(of(CallStyle::Tagged, 1), of(CallStyle::Tagged, 2));
        assert_eq!(of(CallStyle::Listed, 1).len(), 9);
    }
}
