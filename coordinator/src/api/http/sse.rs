//! An answer as server-sent events.
//!
//! Order, within each choice: the opening chunk (chat only) right before the first text, chunks with
//! text, the last of them with the reason of the end; chunks of several choices come mixed, each with
//! its `index`; then the usage chunk where asked for, `[DONE]`. A failure becomes an `error` event, after which the stream closes without `[DONE]`. While nothing happens a comment
//! keeps proxies from giving up. A token whose text is still held back makes no chunk. Each chunk has
//! the id `CHOICE:NEXT,…`, for every choice the index of the token after those that it and the chunks
//! before complete: whoever attaches with it as `Last-Event-ID` gets what follows.

use std::convert::Infallible;
use std::time::Duration;

use actix_web::web::Bytes;
use futures::Stream;
use futures::stream;
use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{FinishReason, GenerateEvent, Usage};

use super::error::ApiError;
use super::generation::{Answer, cancelled, cut_short, no_such_choice};
use super::several::Events;
use crate::text::tools::Piece;

const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// How far a choice is.
#[derive(Debug, Default)]
struct Progress {
    opened: bool,
    ended: bool,
    /// Index of the next token; past the last one, one more.
    next: u32,
    /// Tokens before this one are not sent again.
    from: u32,
}

struct State {
    answer: Answer,
    events: Events,
    first: Option<GenerateEvent>,
    keep_alive: Duration,
    ended: bool,
    /// Where the client is, by choice.
    from: Vec<u32>,
    choices: Vec<Progress>,
    usages: Vec<(u32, Usage)>,
}

/// The body of a streamed answer. `first` is an event already taken from `events`, which begin with
/// the first token; what belongs to tokens before those in `from` is not sent.
pub(crate) fn stream(
    answer: Answer,
    events: Events,
    first: GenerateEvent,
    keep_alive: Duration,
    from: &[u32],
) -> impl Stream<Item = Result<Bytes, Infallible>> + use<> {
    let state = State {
        answer,
        events,
        first: Some(first),
        keep_alive,
        ended: false,
        from: from.to_vec(),
        choices: Vec::new(),
        usages: Vec::new(),
    };
    stream::unfold(state, |mut state| async move {
        let bytes = state.next().await?;
        Some((Ok(bytes), state))
    })
}

impl State {
    /// The next bytes to send; `None` after the end.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.ended {
            let event = match self.first.take() {
                Some(event) => Some(Ok(event)),
                None => match tokio::time::timeout(self.keep_alive, self.events.next()).await {
                    Ok(event) => event,
                    Err(_) => return Some(Bytes::from_static(KEEP_ALIVE)),
                },
            };
            let text = event.unwrap_or_else(|| Err(cut_short())).and_then(|e| self.render(e));
            let text = text.unwrap_or_else(|status| self.fail(status));
            if !text.is_empty() {
                return Some(text.into());
            }
        }
        None
    }

    fn render(&mut self, event: GenerateEvent) -> Result<String, Status> {
        let mut out = String::new();
        match event {
            GenerateEvent::Started { choices, prompt_token_ids, .. } => {
                self.answer.expect(choices, &prompt_token_ids)?;
                let from = |choice| self.from.get(choice).copied().unwrap_or_default();
                let progress = |from| Progress { opened: from > 0, from, ..Progress::default() };
                self.choices = (0..choices as usize).map(from).map(progress).collect();
            }
            GenerateEvent::Token { choice, index, token_id, text, logprobs, calls } => {
                let logprobs =
                    self.answer.logprobs(choice, (token_id, &text), logprobs.as_ref())?;
                let progress = self.progress(choice)?;
                progress.next = index + 1;
                if index < progress.from {
                    return Ok(out);
                }
                self.open(choice, &mut out)?;
                if !text.is_empty() || logprobs.is_some() || !calls.is_empty() {
                    let piece = self.answer.piece(choice, Piece { text, calls }, logprobs, None);
                    self.push(&mut out, &piece);
                }
            }
            GenerateEvent::Finished { reason: FinishReason::Cancelled, .. } => {
                return Err(cancelled());
            }
            GenerateEvent::Finished { choice, reason, text, calls, usage, .. } => {
                self.open(choice, &mut out)?;
                let progress = self.progress(choice)?;
                // Past the last token: it may hold text, which nobody wants twice.
                let news = progress.from <= progress.next;
                progress.next += 1;
                progress.ended = true;
                if news {
                    let piece =
                        self.answer.piece(choice, Piece { text, calls }, None, Some(reason));
                    self.push(&mut out, &piece);
                }
                self.usages.push((choice, usage));
                if self.choices.iter().all(|c| c.ended) {
                    self.end(&mut out);
                }
            }
        }
        Ok(out)
    }

    fn progress(&mut self, choice: u32) -> Result<&mut Progress, Status> {
        self.choices.get_mut(choice as usize).ok_or_else(|| no_such_choice(choice))
    }

    fn open(&mut self, choice: u32, out: &mut String) -> Result<(), Status> {
        if !std::mem::replace(&mut self.progress(choice)?.opened, true)
            && let Some(chunk) = self.answer.opening(choice)
        {
            push_event(out, &chunk);
        }
        Ok(())
    }

    /// An event with the place of all choices after it. Those that are told again are where the
    /// client had been.
    fn push(&self, out: &mut String, data: &str) {
        out.push_str("id: ");
        for (choice, progress) in self.choices.iter().enumerate() {
            let comma = if choice == 0 { "" } else { "," };
            out.push_str(&format!("{comma}{choice}:{}", progress.next.max(progress.from)));
        }
        out.push('\n');
        push_event(out, data);
    }

    fn end(&mut self, out: &mut String) {
        if let Some(chunk) = self.answer.usage(&self.usages) {
            push_event(out, &chunk);
        }
        push_event(out, "[DONE]");
        self.ended = true;
    }

    fn fail(&mut self, status: Status) -> String {
        self.ended = true;
        let mut out = String::new();
        let error = ApiError::from(status);
        let body = serde_json::to_string(&error.body());
        push_event(&mut out, &body.expect("invariant: our own bodies are serialisable"));
        out
    }
}

/// JSON has no raw line breaks, so one `data:` line holds it.
fn push_event(out: &mut String, data: &str) {
    out.push_str("data: ");
    out.push_str(data);
    out.push_str("\n\n");
}
