//! Who hears a request, who is away because a connection was lost, and who counts for them.

use std::sync::Arc;
use std::time::Duration;

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::GenerateEvent;
use tokio::sync::oneshot;

use super::{EventSender, Replay};
use crate::journal::Journal;
use crate::service::{Departure, EventStream, Meter, Play, Ranked};

/// Most who hear one request at once.
pub(super) const MAX_LISTENERS: usize = 8;

/// Somebody who hears the events.
#[derive(Debug)]
struct Listener {
    events: EventSender,
    /// First token to hear, per choice.
    from: Vec<u32>,
    /// Where choices go that are compared first.
    ranked: Option<oneshot::Sender<Play>>,
    /// How it went, where it did.
    departure: Arc<Departure>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Listeners {
    present: Vec<Listener>,
    /// Who count for clients whose connections were lost.
    meters: Vec<Box<dyn Meter>>,
    /// Clients whose connections were lost, and who have not come back.
    away: u32,
    /// Since when nobody is present.
    alone: Option<Duration>,
    /// How long those who are away are waited for.
    keep: Duration,
}

impl Listeners {
    /// Nobody yet.
    pub(super) fn new(keep: Duration) -> Self {
        Self { present: Vec::new(), meters: Vec::new(), away: 0, alone: None, keep }
    }

    /// Nobody any more: an earlier life had somebody.
    pub(super) fn of_an_earlier_life(keep: Duration) -> Self {
        Self { away: 1, alone: Some(Duration::ZERO), ..Self::new(keep) }
    }

    /// Somebody counts for clients who may come back.
    pub(super) fn count(&mut self, meter: Box<dyn Meter>) {
        self.meters.push(meter);
    }

    /// Whether there are as many as may be.
    pub(super) fn is_full(&mut self) -> bool {
        self.present.retain(|l| !l.events.is_closed() || l.departure.is_lost());
        self.present.iter().filter(|l| !l.events.is_closed()).count() >= MAX_LISTENERS
    }

    /// One more, who hears the tokens from `from` on as they come; of choices that are `ranked`, all
    /// at the end. `returns` says that it may be one who was away.
    pub(super) fn add(
        &mut self,
        (events, mut stream): (EventSender, EventStream),
        from: Vec<u32>,
        (ranked, returns): (bool, bool),
    ) -> EventStream {
        let departure = stream.departure();
        let ranked = ranked.then(|| {
            let (later, comes) = oneshot::channel();
            stream.then_ranked(Ranked(comes));
            later
        });
        self.present.push(Listener { events, from, ranked, departure });
        self.alone = None;
        self.away -= u32::from(returns && self.away > 0);
        stream
    }

    /// Events that the one who lags most has not taken yet.
    pub(super) fn unread(&self) -> u32 {
        let waiting = |l: &Listener| l.events.max_capacity() - l.events.capacity();
        self.present.iter().map(waiting).max().unwrap_or(0) as u32
    }

    /// How long ago the one who lags most took an event.
    pub(super) fn unread_since(&self) -> Duration {
        let waiting = |l: &&Listener| l.events.max_capacity() - l.events.capacity();
        let slowest = self.present.iter().max_by_key(waiting);
        slowest.map_or(Duration::ZERO, |l| l.departure.since_taken())
    }

    /// Whether nobody will want the answer any more, as far as can be known: all have left, and who
    /// was lost has not come back in time.
    pub(super) fn are_gone(&mut self, now: Duration) -> bool {
        self.present.retain(|l| {
            let gone = l.events.is_closed();
            if gone && l.departure.is_lost() {
                self.away += 1;
                self.meters.extend(l.departure.take_meter());
            }
            !gone
        });
        if !self.present.is_empty() {
            return false;
        }
        if self.away == 0 {
            return true;
        }
        let since = *self.alone.get_or_insert(now);
        now.saturating_sub(since) >= self.keep
    }

    /// Hands a token on to those who want it.
    pub(super) fn token(&mut self, event: &GenerateEvent, ranked: bool, journal: &Journal) {
        self.meters.iter_mut().for_each(|meter| meter.see(event));
        let GenerateEvent::Token { choice, index, .. } = event else { return };
        let wants = |l: &&Listener| {
            !ranked && *index >= l.from.get(*choice as usize).copied().unwrap_or_default()
        };
        for listener in self.present.iter().filter(wants) {
            journal.deliver(&listener.events, Ok(event.clone()));
        }
    }

    /// Hands on what all hear.
    pub(super) fn tell(&self, event: &Result<GenerateEvent, Status>, journal: &Journal) {
        for listener in &self.present {
            journal.deliver(&listener.events, event.clone());
        }
    }

    /// All choices have ended and are compared: hands them on, as `replay` gives them from some
    /// tokens on.
    pub(super) fn play(&mut self, replay: impl Fn(Vec<u32>) -> Replay, journal: &Journal) {
        for listener in &mut self.present {
            if let Some(later) = listener.ranked.take() {
                let from = std::mem::take(&mut listener.from);
                // A receiver that is gone needs nothing.
                drop(later.send(Play::new(replay(from), journal.settled())));
            }
        }
    }
}
