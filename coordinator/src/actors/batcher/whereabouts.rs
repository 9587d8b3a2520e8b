//! Where requests are and what they wait for, for people who ask. Reads; decides nothing.

use std::time::Duration;

use actix::prelude::*;
use millrace_shared::id::{RequestId, SequenceId};
use millrace_shared::scheduler::{Place, Whereabouts};
use millrace_shared::wire::admin::RequestReport;

use super::Batcher;
use crate::journal::{End, Entry};
use crate::request::{Request, Work};

/// A request that has not moved for this long is stuck: the longest usual pause, a prompt's chunk on
/// slow machines, is shorter.
pub(super) const STUCK: Duration = Duration::from_secs(1);
/// Events that a client may leave unread before it counts as one that does not read: more than
/// buffers on the way hold up at any moment.
const UNREAD: u32 = 256;
/// The same where it has taken none for [`STUCK`]: more than one step brings.
const UNREAD_LONG: u32 = 8;

/// Where requests are: all that run or wait, oldest first, or one, also where it has ended.
#[derive(Debug, Message)]
#[rtype(result = "Vec<Seen>")]
pub struct Look {
    /// Which; all where none is named.
    pub id: Option<RequestId>,
}

/// A request, and its micro-batch in flight, whose stage the asker has to find out.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Without the stage.
    pub report: RequestReport,
    /// Its oldest micro-batch in flight.
    pub flight: Option<Flight>,
    /// It waits for a pipeline.
    pub suspended: bool,
    /// It waits for KV blocks.
    pub starved: bool,
}

/// A micro-batch that has not come back.
#[derive(Clone, Debug, PartialEq)]
pub struct Flight {
    /// Its number.
    pub micro_batch: u64,
    /// Its place among those of the epoch, from 1.
    pub nth: u64,
    /// Seconds since it was issued.
    pub seconds: f64,
    /// Usual seconds of each stage's step; empty until something was measured.
    pub usual: Vec<f64>,
}

impl Handler<Look> for Batcher {
    type Result = MessageResult<Look>;

    fn handle(&mut self, m: Look, _: &mut Context<Self>) -> Self::Result {
        let now = self.now();
        MessageResult(match m.id {
            Some(id) => match self.requests.named(id) {
                Some(request) => vec![self.seen(request, now)],
                None => {
                    let ended = |e| ended(e, self.metrics.names().label(id));
                    let mut seen = self.seen_early(Some(id), now);
                    if seen.is_empty() {
                        seen.extend(self.retained.get(id).map(ended));
                    }
                    seen
                }
            },
            None => {
                let mut requests: Vec<&Request> = self.requests.iter().collect();
                requests.sort_by_key(|r| r.id);
                let seen = requests.into_iter().map(|r| self.seen(r, now));
                seen.chain(self.seen_early(None, now)).collect()
            }
        })
    }
}

/// The choice of a request that has not moved for longest.
#[derive(Clone, Copy, Debug)]
struct Slowest {
    /// As the pipeline names it; `None` where all have ended.
    sequence: Option<SequenceId>,
    /// Which it is.
    choice: Option<u32>,
    /// Time in the queue, once it is over.
    queue: Option<Duration>,
    /// When its first token came, counted from submission.
    first: Option<Duration>,
    /// When its last token came, counted from submission.
    last: Option<Duration>,
}

impl Slowest {
    fn of(request: &Request) -> Self {
        let choice = |sequence, choice| match &request.work {
            Work::Generate(g) => Self {
                sequence,
                choice: Some(choice),
                queue: g.queue_time(choice),
                first: g.first_token(choice),
                last: g.last_token(choice),
            },
            Work::Score(_) | Work::Embed(_) => {
                Self { sequence, choice: Some(choice), queue: None, first: None, last: None }
            }
        };
        let open = request.sequences.iter().map(|&(sequence, n)| choice(Some(sequence), n));
        open.min_by_key(|c| (c.last, c.queue)).unwrap_or_else(|| choice(None, 0))
    }

    /// When its last token came, or it left the queue, or it was submitted.
    fn moved(&self, request: &Request) -> Duration {
        let after = self.last.or(self.queue).unwrap_or_default();
        (request.submitted + after).saturating_sub(request.before)
    }

    /// Seconds in each state.
    fn spent(&self, age: Duration) -> Vec<(String, f64)> {
        let queued = self.queue.unwrap_or(age);
        let first = self.first.unwrap_or(age);
        let parts = [
            ("in the queue", queued),
            ("on the prompt", first.saturating_sub(queued)),
            ("on the answer", age.saturating_sub(first.max(queued))),
        ];
        let parts = parts.into_iter().filter(|(_, time)| !time.is_zero());
        parts.map(|(name, time)| (name.to_owned(), time.as_secs_f64())).collect()
    }
}

impl Batcher {
    fn seen(&self, request: &Request, now: Duration) -> Seen {
        let (age, slowest) = (request.age(now), Slowest::of(request));
        let at = slowest.sequence.and_then(|s| self.scheduler.as_ref()?.whereabouts(s));
        let (state, since, flight) = self.state((request, slowest), at.as_ref(), now);
        let (unread, since_taken) = match &request.work {
            Work::Generate(g) => (g.unread(), g.unread_since()),
            Work::Score(_) | Work::Embed(_) => (0, Duration::ZERO),
        };
        let resting = now.saturating_sub(since).min(age);
        let reading = unread < UNREAD && (unread < UNREAD_LONG || since_taken < STUCK);
        let report = RequestReport {
            id: self.metrics.names().label(request.id),
            request: Some(request.id),
            state: match reading {
                true => state,
                false => {
                    let seconds = since_taken.as_secs_f64();
                    format!(
                        "client not reading: it took nothing for {seconds:.1} s, {unread} events \
                         wait for it; {state}"
                    )
                }
            },
            node: (!reading).then(|| "the client".to_owned()),
            for_seconds: resting.as_secs_f64(),
            age_seconds: age.as_secs_f64(),
            spent: slowest.spent(age),
            prompt_tokens: at.map_or(0, |w| w.prompt),
            generated_tokens: at.map_or(0, |w| w.generated),
            unread,
            restarts: at.map_or(0, |w| w.restarts),
            stuck: resting >= STUCK || !reading,
        };
        let starved = at.is_some_and(|w| matches!(w.place, Place::NoBlocks { .. }));
        Seen { report, flight, suspended: self.active.is_none(), starved }
    }

    /// What it waits for, since when it has not moved, and what is in flight.
    fn state(
        &self,
        (request, slowest): (&Request, Slowest),
        place: Option<&Whereabouts>,
        now: Duration,
    ) -> (String, Duration, Option<Flight>) {
        if let Some(since) = self.suspended {
            let began = since.max(request.submitted);
            return (format!("waiting for a node: {}", self.detail), began, None);
        }
        if request.sequences.is_empty() {
            // Texts to embed that are yet to come.
            return ("waiting for room in the queue".to_owned(), request.submitted, None);
        }
        let Some(place) = place else {
            return (format!("waiting for a node: {}", self.detail), request.submitted, None);
        };
        let waits = match place.place {
            Place::Queued { ahead: 0 } => "first in the queue".to_owned(),
            Place::Queued { ahead } => format!("queued behind {ahead}"),
            Place::NoBlocks { needed, free } => {
                format!("waiting for {needed} KV blocks, {free} are free")
            }
            Place::Prefill => {
                let (done, all) = (place.issued.min(place.prompt), place.prompt);
                match slowest.choice.and_then(|choice| request.chunks(choice)) {
                    Some(chunks) => {
                        let (sent, of) = chunks.of(all);
                        format!(
                            "prefill chunk {sent} of {of}: {done} of {all} tokens are on their way or done"
                        )
                    }
                    None => format!("prefill: {done} of {all} tokens are on their way or done"),
                }
            }
            Place::Decode => format!("computing token {}", place.generated + 1),
        };
        // A chunk that comes back is a step forward.
        let moved = slowest.moved(request);
        let since = place.micro_batch.map_or(moved, |(_, issued)| moved.max(issued));
        let flight = place.micro_batch.map(|(id, issued)| Flight {
            micro_batch: id.0,
            nth: id.0.saturating_sub(self.active.as_ref().and_then(|a| a.first).unwrap_or(id.0))
                + 1,
            seconds: now.saturating_sub(issued).as_secs_f64(),
            usual: self.scheduler.as_ref().map(|s| s.stage_seconds()).unwrap_or_default(),
        });
        (waits, since, flight)
    }
}

/// A request that is kept.
fn ended(entry: &Entry, name: String) -> Seen {
    let end = entry.ends.first().and_then(|e| e.as_ref()).map(|(_, end)| end);
    let (state, spent) = match end {
        Some(End::Finished { reason, timings, .. }) => {
            let parts = [
                ("in the queue", timings.queue_ms),
                ("on the prompt", timings.ttft_ms - timings.queue_ms),
                ("on the answer", timings.decode_ms),
            ];
            let parts = parts.map(|(name, ms)| (name.to_owned(), ms / 1e3));
            (format!("ended: {}", reason.as_str()), parts.to_vec())
        }
        Some(End::Failed(status)) => (format!("failed: {status}"), Vec::new()),
        None => ("ended".to_owned(), Vec::new()),
    };
    let tokens: usize = entry.tokens.iter().map(|log| log.len()).sum();
    let report = RequestReport {
        id: name,
        request: Some(entry.head.id),
        state,
        age_seconds: spent.iter().map(|(_, s)| s).sum(),
        spent,
        prompt_tokens: entry.head.prompt.len() as u32,
        generated_tokens: tokens as u32,
        ..RequestReport::default()
    };
    Seen { report, flight: None, suspended: false, starved: false }
}
