//! An answer as server-sent events.
//!
//! Order: the opening chunk (chat only) right before the first text, chunks with text, the last of
//! them with the reason of the end, the usage chunk where asked for, `[DONE]`. A failure becomes an
//! `error` event, after which the stream closes without `[DONE]`. While nothing happens a comment
//! keeps proxies from giving up. A token whose text is still held back makes no chunk. Each chunk has
//! the id `CHOICE:NEXT`, the index of the token after those that it completes: whoever attaches with
//! it as `Last-Event-ID` gets what follows.

use std::convert::Infallible;
use std::time::Duration;

use actix_web::web::Bytes;
use futures::Stream;
use futures::stream;
use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{FinishReason, GenerateEvent};

use super::error::ApiError;
use super::generation::{Answer, cancelled, cut_short};
use crate::service::EventStream;

const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

struct State {
    answer: Answer,
    events: EventStream,
    first: Option<GenerateEvent>,
    keep_alive: Duration,
    opened: bool,
    ended: bool,
    /// Index of the next token.
    next: u32,
    /// Tokens before this one are not sent again.
    from: u32,
}

/// The body of a streamed answer. `first` is an event already taken from `events`, which begin with
/// the first token; what belongs to tokens before `from` is not sent.
pub(crate) fn stream(
    answer: Answer,
    events: EventStream,
    first: GenerateEvent,
    keep_alive: Duration,
    from: u32,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    let state = State {
        answer,
        events,
        first: Some(first),
        keep_alive,
        opened: from > 0,
        ended: false,
        next: 0,
        from,
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
            GenerateEvent::Started { .. } => {}
            GenerateEvent::Token { index, token_id, text, logprobs } => {
                let logprobs = self.answer.logprobs(token_id, logprobs.as_ref())?;
                self.next = index + 1;
                if index < self.from {
                    return Ok(out);
                }
                self.open(&mut out);
                if !text.is_empty() || logprobs.is_some() {
                    let piece = self.answer.piece(text, logprobs, None);
                    push_event_at(&mut out, self.next, &piece);
                }
            }
            GenerateEvent::Finished { reason: FinishReason::Cancelled, .. } => {
                return Err(cancelled());
            }
            GenerateEvent::Finished { reason, text, usage, .. } => {
                self.open(&mut out);
                // Past the last token: it may hold text, which nobody wants twice.
                if self.from <= self.next {
                    let piece = self.answer.piece(text, None, Some(reason));
                    push_event_at(&mut out, self.next + 1, &piece);
                }
                if let Some(chunk) = self.answer.usage(usage) {
                    push_event(&mut out, &chunk);
                }
                push_event(&mut out, "[DONE]");
                self.ended = true;
            }
        }
        Ok(out)
    }

    fn open(&mut self, out: &mut String) {
        if !self.opened {
            self.opened = true;
            if let Some(chunk) = self.answer.opening() {
                push_event(out, &chunk);
            }
        }
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

/// An event after which token `next` of the one choice follows.
fn push_event_at(out: &mut String, next: u32, data: &str) {
    out.push_str(&format!("id: 0:{next}\n"));
    push_event(out, data);
}

/// JSON has no raw line breaks, so one `data:` line holds it.
fn push_event(out: &mut String, data: &str) {
    out.push_str("data: ");
    out.push_str(data);
    out.push_str("\n\n");
}
