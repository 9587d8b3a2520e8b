//! Prompts, before the model reads them.
//!
//! Each text of a prompt goes through the same steps, in this order: control characters, Unicode,
//! white space, its ends, patterns. Of a conversation these are the contents of all messages; what
//! calls of tools say, and the tools, are only looked through for patterns. A prompt of token ids is
//! left as it is unless a pattern matches its text. How long it may be is [`super::overflow`]'s.

use std::str::FromStr;

use icu_normalizer::ComposingNormalizerBorrowed;
use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{Conversation, Prompt};

use super::overflow::Overflow;
use super::patterns::Patterns;

/// One way to write each character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnicodeForm {
    /// Composed.
    Nfc,
    /// Composed, and without differences of looks (ligatures, full width).
    Nfkc,
}

impl FromStr for UnicodeForm {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.to_ascii_lowercase().as_str() {
            "nfc" => Ok(Self::Nfc),
            "nfkc" => Ok(Self::Nfkc),
            _ => Err(format!("unknown form '{s}': use nfc or nfkc")),
        }
    }
}

/// What is done to prompts.
#[derive(Debug, Default)]
pub struct PromptRules {
    /// How characters are written; as they come where `None`.
    pub unicode: Option<UnicodeForm>,
    /// Whether control characters go, but for tabs and line ends.
    pub strip_control: bool,
    /// Whether white space in a row becomes one space, or one line end.
    pub collapse_whitespace: bool,
    /// Whether white space at both ends goes.
    pub trim: bool,
    /// What is looked for.
    pub(super) patterns: Option<Patterns>,
    /// What stands where something was redacted.
    pub(super) instead: String,
    /// Most tokens; what fits beside the answer where `None`.
    pub limit: Option<u32>,
    /// What is done to longer ones.
    pub overflow: Overflow,
}

/// What was done to a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Touched {
    /// It is not what it was.
    pub(crate) changed: bool,
    /// A pattern was replaced.
    pub(crate) redacted: bool,
}

/// A pattern forbids it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocked;

impl PromptRules {
    /// Whether texts stay as they are.
    pub(crate) fn are_none(&self) -> bool {
        let Self { unicode, strip_control, collapse_whitespace, trim, patterns, .. } = self;
        unicode.is_none() && !strip_control && !collapse_whitespace && !trim && patterns.is_none()
    }

    /// Applies them; `text_of` gives the text of ids.
    ///
    /// # Errors
    /// `InvalidArgument` where a pattern blocks the prompt.
    pub(crate) fn apply(
        &self,
        prompt: &mut Prompt,
        text_of: impl Fn(&[u32]) -> String,
    ) -> Result<Touched, Status> {
        let mut touched = Touched::default();
        let done = match prompt {
            Prompt::Text(text) => self.text(text, &mut touched).map(|()| None),
            Prompt::Tokens(ids) => self.of_ids(ids, text_of, &mut touched),
            Prompt::Chat(conversation) => self.conversation(conversation, &mut touched),
        };
        match done {
            Ok(None) => {}
            Ok(Some(text)) => *prompt = Prompt::Text(text),
            Err(Blocked) => {
                let chat = matches!(prompt, Prompt::Chat(_));
                let why = "has what this server does not take (the operator's --prompt-block): \
                           leave that out";
                return Err(Status::invalid(if chat { "messages" } else { "prompt" }, why));
            }
        }
        Ok(touched)
    }

    fn conversation(
        &self,
        conversation: &mut Conversation,
        touched: &mut Touched,
    ) -> Result<Option<String>, Blocked> {
        for message in &mut conversation.messages {
            self.text(&mut message.content, touched)?;
            for call in &mut message.tool_calls {
                self.search(&mut call.arguments, touched)?;
            }
        }
        conversation.tools.iter_mut().try_for_each(|tool| self.search(tool, touched))?;
        Ok(None)
    }

    fn text(&self, text: &mut String, touched: &mut Touched) -> Result<(), Blocked> {
        let normal = self.normal(text);
        if let Some(normal) = normal.filter(|normal| normal != text) {
            *text = normal;
            touched.changed = true;
        }
        self.search(text, touched)
    }

    /// The text in the form that is asked for; `None` where none is.
    fn normal(&self, text: &str) -> Option<String> {
        let mut normal = None;
        if self.strip_control {
            let stays = |c: &char| !c.is_control() || "\t\n\r".contains(*c);
            normal = Some(text.chars().filter(stays).collect::<String>());
        }
        if let Some(form) = self.unicode {
            let form = match form {
                UnicodeForm::Nfc => const { ComposingNormalizerBorrowed::new_nfc() },
                UnicodeForm::Nfkc => const { ComposingNormalizerBorrowed::new_nfkc() },
            };
            normal = Some(form.normalize(normal.as_deref().unwrap_or(text)).into_owned());
        }
        if self.collapse_whitespace {
            normal = Some(collapsed(normal.as_deref().unwrap_or(text)));
        }
        if self.trim {
            normal = Some(normal.as_deref().unwrap_or(text).trim().to_owned());
        }
        normal
    }

    /// Looks for patterns.
    fn search(&self, text: &mut String, touched: &mut Touched) -> Result<(), Blocked> {
        let Some(patterns) = &self.patterns else { return Ok(()) };
        let (mut out, mut from) = (String::new(), 0);
        while let Some(found) = patterns.find(text, from) {
            if found.blocks {
                return Err(Blocked);
            }
            out.push_str(&text[from..found.start]);
            out.push_str(&self.instead);
            from = found.end;
        }
        if from > 0 {
            out.push_str(&text[from..]);
            *text = out;
            *touched = Touched { changed: true, redacted: true };
        }
        Ok(())
    }

    /// What a prompt of ids becomes; `None` where it stays.
    fn of_ids(
        &self,
        ids: &[u32],
        text_of: impl Fn(&[u32]) -> String,
        touched: &mut Touched,
    ) -> Result<Option<String>, Blocked> {
        if self.patterns.is_none() {
            return Ok(None);
        }
        let mut text = text_of(ids);
        self.search(&mut text, touched)?;
        Ok(touched.redacted.then_some(text))
    }
}

/// The text with one space, or one line end, for all white space in a row.
fn collapsed(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut space = None;
    for c in text.chars() {
        match (c.is_whitespace(), space) {
            (true, Some('\n')) => {}
            (true, _) => space = Some(if c == '\n' { '\n' } else { ' ' }),
            (false, _) => {
                out.extend(space.take());
                out.push(c);
            }
        }
    }
    out.extend(space);
    out
}
