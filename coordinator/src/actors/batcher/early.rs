//! Requests that come before the first pipeline of a life, where an earlier one has served.
//!
//! Nodes come back by themselves, in some seconds. Until then there is no scheduler to queue in, so
//! new requests wait here, as those do that the journal kept, and as long.

use std::time::Duration;

use actix::prelude::*;
use futures::future::ready;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::wire::admin::RequestReport;
use tokio::sync::oneshot;

use super::whereabouts::{STUCK, Seen};
use super::{Batcher, Cancel, RETRY_QUEUE_MS};
use crate::config::DEFAULT_MAX_WAITING;
use crate::metrics::Shed;

/// May a request be submitted? Answered at once but for those that have to wait; what is in the way is
/// said by the submission itself.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), Status>")]
pub struct Enter {
    /// Its name.
    pub id: RequestId,
    /// Who asks: [`crate::service::Caller::client`].
    pub client: u64,
}

/// One that waits.
#[derive(Debug)]
pub(super) struct Early {
    id: RequestId,
    client: u64,
    since: Duration,
    go: oneshot::Sender<Result<(), Status>>,
}

impl Handler<Enter> for Batcher {
    type Result = ResponseFuture<Result<(), Status>>;

    fn handle(&mut self, Enter { id, client }: Enter, _: &mut Context<Self>) -> Self::Result {
        let waits = self.scheduler.is_none() && self.suspended.is_some();
        if !waits || self.head_of_known(id).is_some() {
            return Box::pin(ready(Ok(())));
        }
        self.early.retain(|e| !e.go.is_closed());
        if self.early.len() >= DEFAULT_MAX_WAITING as usize {
            self.metrics.on_shed(Shed::QueueFull);
            let message = format!(
                "{DEFAULT_MAX_WAITING} requests wait for the pipeline to form again: try again later"
            );
            return Box::pin(ready(Err(Status::exhausted(message, RETRY_QUEUE_MS))));
        }
        let (go, answer) = oneshot::channel();
        self.early.push(Early { id, client, since: self.now(), go });
        let stops =
            || Status::unavailable("the coordinator stops: try again when it is back", 1000);
        Box::pin(async move { answer.await.unwrap_or_else(|_| Err(stops())) })
    }
}

impl Batcher {
    /// This coordinator has served before, in a life that ended: its nodes come back, so requests
    /// wait for them, from the start on.
    #[must_use]
    pub fn after_a_life(mut self) -> Self {
        self.suspended = Some(Duration::ZERO);
        self
    }

    /// There is somewhere to queue.
    pub(super) fn let_early_in(&mut self) {
        self.early.drain(..).for_each(|early| drop(early.go.send(Ok(()))));
    }

    /// Nothing came up in time.
    pub(super) fn refuse_early(&mut self) {
        let why = self.unavailable();
        self.early.drain(..).for_each(|early| drop(early.go.send(Err(why.clone()))));
    }

    /// Stops one that waits; whether there was one.
    pub(super) fn cancel_early(&mut self, m: &Cancel) -> bool {
        let meant = |e: &Early| e.id == m.request_id && m.caller.owns(e.client);
        let Some(at) = self.early.iter().position(meant) else { return false };
        let status = Status::new(ErrorCode::Cancelled, "the request was cancelled");
        let _ = self.early.swap_remove(at).go.send(Err(status));
        true
    }

    /// Those that wait; of one name alone where one is given.
    pub(super) fn seen_early(&self, id: Option<RequestId>, now: Duration) -> Vec<Seen> {
        let those =
            self.early.iter().filter(|e| !e.go.is_closed() && id.is_none_or(|id| e.id == id));
        let seen = |early: &Early| {
            let waited = now.saturating_sub(early.since);
            let report = RequestReport {
                id: self.metrics.names().label(early.id),
                request: Some(early.id),
                state: format!("waiting for a node: {}", self.detail),
                for_seconds: waited.as_secs_f64(),
                age_seconds: waited.as_secs_f64(),
                spent: vec![("in the queue".to_owned(), waited.as_secs_f64())],
                stuck: waited >= STUCK,
                ..RequestReport::default()
            };
            Seen { report, flight: None, suspended: true, starved: false }
        };
        those.map(seen).collect()
    }
}
