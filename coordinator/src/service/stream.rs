//! Events on their way to whoever listens: those of a request that runs, and before them what is
//! played again from its log.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millrace_shared::error::Status;
use millrace_shared::id::RequestId;
use millrace_shared::wire::rpc::GenerateEvent;
use tokio::sync::{mpsc, oneshot};

use crate::journal::unix_ms;
use crate::request::Replay;

/// Events of one request. Bounded by the request's own token limit, so it never blocks the
/// scheduler. Dropping it cancels the request, unless somebody else listens, or it was said to be
/// [`EventStream::lost`] and the request is to be kept for a while.
#[derive(Debug)]
pub struct EventStream {
    request_id: RequestId,
    /// What comes before the events.
    play: Option<Play>,
    /// Where choices come from that are compared first.
    ranked: Option<Ranked>,
    events: mpsc::Receiver<Result<GenerateEvent, Status>>,
    meter: Option<Box<dyn Meter>>,
    departure: Arc<Departure>,
    origin: Origin,
}

/// Where a request came from.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// [`super::Caller::tag`] of whoever submitted it.
    pub tag: u32,
    /// [`super::Caller::note`] of the same.
    pub note: Arc<[u8]>,
    /// When it was submitted, milliseconds since 1970; 0 where nobody knows.
    pub submitted_ms: u64,
    /// Tokens of the prompt that were left out because it was too long.
    pub left_out: u32,
    /// What the model reads, where that is not what was sent.
    pub read: Option<Vec<u32>>,
}

/// Events that are made again from the log, once all of it is durable.
#[derive(Debug)]
pub(crate) struct Play {
    settled: Option<oneshot::Receiver<()>>,
    replay: Replay,
}

impl Play {
    /// What `replay` gives, from when `settled` completes.
    pub(crate) fn new(replay: Replay, settled: oneshot::Receiver<()>) -> Self {
        Self { settled: Some(settled), replay }
    }

    /// The next event; `None` at the end, and where the journal is gone. Cancel-safe.
    async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        if let Some(settled) = &mut self.settled {
            settled.await.ok()?;
            self.settled = None;
        }
        // A long answer is played in turns with others.
        tokio::task::coop::consume_budget().await;
        self.replay.next()
    }
}

/// Choices to come, when all have ended.
#[derive(Debug)]
pub(crate) struct Ranked(pub(crate) oneshot::Receiver<Play>);

/// Is told of the events that a stream hands out, and dropped with it.
pub trait Meter: fmt::Debug + Send {
    /// One more event.
    fn see(&mut self, event: &GenerateEvent);
}

impl EventStream {
    /// The stream's two ends: the sender goes to whoever produces events.
    pub fn new(
        request_id: RequestId,
        capacity: usize,
    ) -> (mpsc::Sender<Result<GenerateEvent, Status>>, Self) {
        let (sender, events) = mpsc::channel(capacity);
        let stream = Self {
            request_id,
            play: None,
            ranked: None,
            events,
            meter: None,
            departure: Arc::default(),
            origin: Origin::default(),
        };
        (sender, stream)
    }

    /// The same stream, of a request that came from there.
    #[must_use]
    pub fn with_origin(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }

    /// Where the request came from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Says that when this is dropped the client did not go, but its connection was lost.
    pub fn lost(&self) {
        self.departure.lost.store(true, Ordering::Release);
    }

    /// For the other end: how it went.
    pub(crate) fn departure(&self) -> Arc<Departure> {
        Arc::clone(&self.departure)
    }

    /// The same stream, with somebody who counts.
    #[must_use]
    pub fn metered(mut self, meter: Box<dyn Meter>) -> Self {
        self.meter = Some(meter);
        self
    }

    /// Name of the request, for `cancel`.
    pub fn request_id(&self) -> RequestId {
        self.request_id
    }

    /// The same stream after what `play` gives.
    pub(crate) fn begin_with(&mut self, play: Play) {
        self.play = Some(play);
    }

    /// The same stream, whose choices come at the end.
    pub(crate) fn then_ranked(&mut self, ranked: Ranked) {
        self.ranked = Some(ranked);
    }

    /// The next event; after the last `Finished` or an error comes `None`. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<GenerateEvent, Status>> {
        let event = self.event().await;
        self.departure.taken_ms.store(unix_ms(), Ordering::Relaxed);
        if let (Some(meter), Some(Ok(event))) = (&mut self.meter, &event) {
            meter.see(event);
        }
        event
    }

    /// The next event of those that have happened; `None` where there is none yet, or none any more.
    pub async fn next_there(&mut self) -> Option<Result<GenerateEvent, Status>> {
        if let Some(play) = &mut self.play {
            if let Some(event) = play.next().await {
                return Some(event);
            }
            self.play = None;
        }
        self.events.try_recv().ok()
    }

    async fn event(&mut self) -> Option<Result<GenerateEvent, Status>> {
        loop {
            if let Some(play) = &mut self.play {
                if let Some(event) = play.next().await {
                    return Some(event);
                }
                self.play = None;
            }
            let Some(Ranked(ranked)) = &mut self.ranked else { return self.events.recv().await };
            let play = tokio::select! {
                biased;
                play = &mut *ranked => play.ok(),
                event = self.events.recv() => match event {
                    Some(event) => return Some(event),
                    // They may have come between the two looks.
                    None => ranked.try_recv().ok(),
                },
            };
            self.ranked = None;
            self.play = play;
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if self.departure.is_lost() {
            *self.departure.meter() = self.meter.take();
        }
    }
}

/// How the one who heard a stream went.
#[derive(Debug, Default)]
pub(crate) struct Departure {
    lost: AtomicBool,
    /// When the last event was taken, milliseconds since 1970; 0 before the first.
    taken_ms: AtomicU64,
    meter: Mutex<Option<Box<dyn Meter>>>,
}

impl Departure {
    /// Whether it was cut off, rather than having had enough.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// How long ago the last event was taken; none where none was yet.
    pub(crate) fn since_taken(&self) -> Duration {
        match self.taken_ms.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            taken => Duration::from_millis(unix_ms().saturating_sub(taken)),
        }
    }

    /// Who counted its events, and goes on with those of a request that goes on.
    pub(crate) fn take_meter(&self) -> Option<Box<dyn Meter>> {
        self.meter().take()
    }

    fn meter(&self) -> MutexGuard<'_, Option<Box<dyn Meter>>> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
