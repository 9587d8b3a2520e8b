//! The events of several requests as those of one: choices are counted through.
//!
//! What a client asks with several prompts at once are as many requests. Dropping this drops all of
//! their streams.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::GenerateEvent;

use crate::service::EventStream;

/// One of the requests.
struct One {
    events: EventStream,
    /// Choices that have not ended.
    to_come: u32,
}

/// See the module's documentation.
pub(crate) struct Events {
    /// At least one.
    requests: Vec<One>,
    /// Choices of each request.
    each: u32,
    /// Whether the first has told that it began, which comes before anything else.
    begun: bool,
}

/// The id of a further request under the name that the client gave to the first.
pub(crate) fn further(first: RequestId, number: usize) -> RequestId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(first.0.as_bytes()).update(&(number as u64).to_le_bytes());
    let bytes = hasher.finalize().as_bytes().first_chunk::<16>().copied().unwrap_or_default();
    RequestId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

impl Events {
    /// Of one request.
    pub(crate) fn one(events: EventStream) -> Self {
        Self::several(vec![events], 1)
    }

    /// Of requests with `each` choices.
    pub(crate) fn several(all: Vec<EventStream>, each: u32) -> Self {
        let requests = all.into_iter().map(|events| One { events, to_come: each }).collect();
        Self { requests, each, begun: false }
    }

    /// Requests.
    pub(crate) fn prompts(&self) -> u32 {
        self.requests.len() as u32
    }

    /// The next event; `None` where a request was cut short, and after the last. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        if let [only] = self.requests.as_mut_slice() {
            return only.events.next().await;
        }
        loop {
            let (number, event) = self.any().await?;
            match event {
                // The first one's says it for all.
                Ok(GenerateEvent::Started { .. }) if number > 0 => {}
                event => return Some(event.map(|event| self.renumbered(number, event))),
            }
        }
    }

    /// An event of any of them.
    async fn any(&mut self) -> Option<(usize, Result<GenerateEvent, Status>)> {
        let heard = if self.begun { self.requests.len() } else { 1 };
        let requests = &mut self.requests[..heard];
        let found = poll_fn(|context| {
            let mut going = false;
            for (number, one) in requests.iter_mut().enumerate().filter(|(_, o)| o.to_come > 0) {
                going = true;
                // Nothing is lost where this future is dropped: it is made anew.
                if let Poll::Ready(event) = pin!(one.events.next()).poll(context) {
                    return Poll::Ready(event.map(|event| (number, event)));
                }
            }
            if going { Poll::Pending } else { Poll::Ready(None) }
        })
        .await;
        self.begun = true;
        found
    }

    fn renumbered(&mut self, number: usize, mut event: GenerateEvent) -> GenerateEvent {
        let before = number as u32 * self.each;
        match &mut event {
            GenerateEvent::Started { choices, .. } => *choices *= self.requests.len() as u32,
            GenerateEvent::Token { choice, .. } => *choice += before,
            GenerateEvent::Finished { choice, .. } => {
                *choice += before;
                self.requests[number].to_come = self.requests[number].to_come.saturating_sub(1);
            }
        }
        event
    }
}
