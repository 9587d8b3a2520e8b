//! The line editor of a chat, on a thread of its own: reading must not hold up a cluster that lives
//! on the caller's thread, nor the end of the program.
//!
//! It reads only when asked. Lines that end in a backslash, and blocks between `\"\"\"`, are one text.

use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Cmd, Config, EventHandler, Helper, KeyCode, KeyEvent, Modifiers};
use tokio::sync::mpsc;

/// Lines that are remembered.
const HISTORY: usize = 1000;
const BLOCK: &str = "\"\"\"";

/// What somebody typed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// A text, perhaps of several lines.
    Text(String),
    /// Ctrl-C.
    Interrupt,
    /// Ctrl-D, or the end of the input.
    End,
}

/// Asks the thread for lines.
pub(crate) struct Editor {
    wanted: mpsc::Sender<()>,
    typed: mpsc::Receiver<anyhow::Result<Typed>>,
}

impl Editor {
    /// Starts the thread; typed lines are kept in `history`.
    ///
    /// # Errors
    /// If there is no thread, or the terminal is unusable.
    pub(crate) fn start(history: Option<PathBuf>) -> anyhow::Result<Self> {
        let (wanted, mut asked) = mpsc::channel(1);
        let (sender, typed) = mpsc::channel(1);
        let config = Config::builder().max_history_size(HISTORY)?.auto_add_history(true).build();
        let mut editor = rustyline::Editor::<Lines, FileHistory>::with_config(config)?;
        editor.set_helper(Some(Lines));
        let newline = KeyEvent(KeyCode::Enter, Modifiers::ALT);
        editor.bind_sequence(newline, EventHandler::Simple(Cmd::Newline));
        if let Some(file) = &history {
            // There may be none yet.
            let _ = editor.load_history(file);
        }
        std::thread::Builder::new().name("editor".to_owned()).spawn(move || {
            while asked.blocking_recv().is_some() {
                let typed = read(&mut editor);
                if let Some(file) = &history {
                    keep(&mut editor, file);
                }
                if sender.blocking_send(typed).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { wanted, typed })
    }

    /// The next text.
    ///
    /// # Errors
    /// If the terminal fails.
    pub(crate) async fn line(&mut self) -> anyhow::Result<Typed> {
        // Where the thread has ended there is nothing more to read.
        let _ = self.wanted.send(()).await;
        self.typed.recv().await.unwrap_or(Ok(Typed::End))
    }
}

fn read(editor: &mut rustyline::Editor<Lines, FileHistory>) -> anyhow::Result<Typed> {
    match editor.readline("> ") {
        Ok(text) => Ok(Typed::Text(joined(&text))),
        Err(ReadlineError::Interrupted) => Ok(Typed::Interrupt),
        Err(ReadlineError::Eof) => Ok(Typed::End),
        Err(e) => Err(e.into()),
    }
}

/// Writes the history to a file of its owner alone; a chat goes on without.
fn keep(editor: &mut rustyline::Editor<Lines, FileHistory>, file: &std::path::Path) {
    if let Some(dir) = file.parent() {
        let _ = millrace_net::private_file::create_dir(dir);
    }
    let _ = editor.append_history(file);
}

/// Knows when a text is complete.
struct Lines;

impl Helper for Lines {}
impl Highlighter for Lines {}
impl Completer for Lines {
    type Candidate = String;
}
impl Hinter for Lines {
    type Hint = String;
}

impl Validator for Lines {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let complete = is_complete(context.input());
        Ok(if complete { ValidationResult::Valid(None) } else { ValidationResult::Incomplete })
    }
}

fn is_complete(text: &str) -> bool {
    match text.trim_start().strip_prefix(BLOCK) {
        Some(block) => block.trim_end().ends_with(BLOCK),
        None => !text.ends_with('\\'),
    }
}

/// The text without the marks that held it together.
fn joined(text: &str) -> String {
    let block = text.trim().strip_prefix(BLOCK).and_then(|t| t.strip_suffix(BLOCK));
    match block {
        Some(block) => block.trim_matches('\n').to_owned(),
        None => text.replace("\\\n", "\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_several_lines() {
        assert!(is_complete("hello") && is_complete("a\nb"));
        assert!(!is_complete("go on \\"));
        assert_eq!(joined("one \\\ntwo"), "one \ntwo");
        assert!(!is_complete("\"\"\"") && !is_complete("\"\"\"\na\nb"));
        assert!(is_complete("\"\"\"\na\nb\n\"\"\""));
        assert_eq!(joined("\"\"\"\na\n  b\n\"\"\""), "a\n  b");
    }
}
