//! One assignment: checks epoch and order of frames and passes them to the engine.
//!
//! States: *loaded* (edges out are not connected: no frame may come), *started*. Inbox: `Inbound`,
//! `Connect`. Held by [`super::Node`], which drops it when the epoch is over; the engine then
//! refuses what is left as stale.
//!
//! Frames run in issue order. At the last stage a frame whose sequences were not announced yet
//! waits for their `SequenceOpen` and masks, which come on another stream, for at most `open_wait`; every
//! later frame waits behind it. Then it runs as it is: the engine fails those rows alone.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix::prelude::*;
use millrace_engine::stage::StageError;
use millrace_engine::thread::{EngineHandle, Job};
use millrace_net::pump::Ticket;
use millrace_shared::id::{MicroBatchId, SequenceId};
use millrace_shared::membership::{LEASE, open_wait};
use millrace_shared::wire::Edge;
use millrace_shared::wire::control::Assignment;
use millrace_shared::wire::data::{FrameKind, MaskMeta, OpenMeta, Row, StepMeta, Want};
use millrace_shared::wire::frame::Frame;
use tokio::sync::mpsc;

use crate::ring::Ring;

/// How often waiting frames are looked at.
const OPEN_SWEEP: Duration = Duration::from_millis(100);

/// Releases that may wait for their announcement; they overtake each other by a moment.
const MAX_EARLY: usize = 4096;

/// Something that ends the epoch: a bad frame or a lost edge.
#[derive(Clone, Debug)]
pub struct Loss(pub String);

/// See the module's documentation.
pub struct Stage {
    assignment: Arc<Assignment>,
    engine: Arc<EngineHandle>,
    /// To the outbound edge.
    out: mpsc::Sender<Frame>,
    /// Ends the epoch.
    losses: mpsc::Sender<Loss>,
    last: MicroBatchId,
    /// Sequences that were announced; with the position after which a mask says what may come,
    /// where they are constrained.
    opened: HashMap<SequenceId, Option<Masked>>,
    /// Released before their announcement came: forgotten when it comes.
    early: HashSet<SequenceId>,
    held: VecDeque<Held>,
    stale: Arc<AtomicU64>,
    open_wait: Duration,
    /// Frames of steps that came in.
    received: Arc<AtomicU64>,
    ring: Arc<Ring>,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stage").field("stage", &self.assignment.stage).finish_non_exhaustive()
    }
}

/// The position of the mask that came last; none came yet where it is `None`.
type Masked = Option<u32>;

/// A frame that waits for announcements.
struct Held {
    frame: Frame,
    ticket: Ticket,
    meta: StepMeta,
    since: Instant,
}

impl Stage {
    /// A stage whose results go to `out`.
    pub fn new(
        assignment: Arc<Assignment>,
        engine: Arc<EngineHandle>,
        out: mpsc::Sender<Frame>,
        losses: mpsc::Sender<Loss>,
        stale: Arc<AtomicU64>,
        (received, ring): (Arc<AtomicU64>, Arc<Ring>),
    ) -> Self {
        Self {
            assignment,
            engine,
            out,
            losses,
            last: MicroBatchId(0),
            opened: HashMap::new(),
            early: HashSet::new(),
            held: VecDeque::new(),
            stale,
            open_wait: open_wait(LEASE),
            received,
            ring,
        }
    }

    /// With this as the longest wait of a frame for the announcement of its sequences.
    #[must_use]
    pub fn waiting(mut self, open_wait: Duration) -> Self {
        self.open_wait = open_wait;
        self
    }

    fn is_last(&self) -> bool {
        self.assignment.next.is_none()
    }

    fn lose(&self, message: String) {
        // One loss ends the epoch; more of them say nothing new.
        let _ = self.losses.try_send(Loss(message));
    }

    fn on_frame(&mut self, edge: Edge, frame: Frame, ticket: Ticket) -> Result<(), String> {
        let header = frame.header();
        let fits = match edge {
            Edge::Steps => header.kind == FrameKind::Step,
            Edge::Activations => header.kind == FrameKind::Activations,
            Edge::Sequences => matches!(header.kind, FrameKind::Sequences | FrameKind::Masks),
            Edge::Results => false,
        };
        if !fits {
            return Err(format!("a {:?} frame on the {edge:?} edge", header.kind));
        }
        if header.pipeline != self.assignment.pipeline || header.epoch != self.assignment.epoch {
            self.stale.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        match header.kind {
            FrameKind::Sequences => {
                let opens: OpenMeta = frame.meta().map_err(|e| e.to_string())?;
                self.on_opens(opens, ticket)
            }
            FrameKind::Masks => {
                let masks: MaskMeta = frame.meta().map_err(|e| e.to_string())?;
                self.on_masks(masks, ticket)
            }
            FrameKind::Step | FrameKind::Activations => {
                // Releases travel without a row; their number increases all the same.
                if header.micro_batch <= self.last {
                    return Err(format!(
                        "micro-batch {} came after {}",
                        header.micro_batch, self.last
                    ));
                }
                self.last = header.micro_batch;
                self.received.fetch_add(1, Ordering::Relaxed);
                if !self.is_last() {
                    return self.submit(frame, ticket);
                }
                let meta: StepMeta = frame.meta().map_err(|e| e.to_string())?;
                self.held.push_back(Held { frame, ticket, meta, since: Instant::now() });
                self.drain()
            }
            FrameKind::Results => Err("results go to the coordinator".into()),
        }
    }

    fn on_opens(&mut self, opens: OpenMeta, ticket: Ticket) -> Result<(), String> {
        for open in &opens.opens {
            if !self.early.remove(&open.sequence) {
                self.opened.insert(open.sequence, open.constrained.then_some(None));
            }
        }
        let losses = self.losses.clone();
        let job = Job::Open {
            epoch: self.assignment.epoch,
            opens,
            done: Box::new(move |result| {
                drop(ticket);
                report(&losses, result);
            }),
        };
        self.engine.try_submit(job).map_err(|e| e.to_string())?;
        self.drain()
    }

    fn on_masks(&mut self, masks: MaskMeta, ticket: Ticket) -> Result<(), String> {
        for mask in &masks.masks {
            if let Some(Some(masked)) = self.opened.get_mut(&mask.sequence) {
                *masked = Some(mask.position);
            }
        }
        let losses = self.losses.clone();
        let job = Job::Mask {
            epoch: self.assignment.epoch,
            masks,
            done: Box::new(move |result| {
                drop(ticket);
                report(&losses, result);
            }),
        };
        self.engine.try_submit(job).map_err(|e| e.to_string())?;
        self.drain()
    }

    /// Whether everything that a row needs besides its activations has come.
    fn knows(&self, row: &Row) -> bool {
        match (row.want, self.opened.get(&row.sequence)) {
            (Want::None, _) => true,
            (_, None) => false,
            (Want::Sample, Some(Some(masked))) => *masked == Some(row.position + row.count - 1),
            (_, Some(_)) => true,
        }
    }

    /// Submits frames from the front as long as all their sequences are known.
    fn drain(&mut self) -> Result<(), String> {
        while let Some(front) = self.held.front() {
            let known = front.meta.rows.iter().all(|row| self.knows(row));
            if !known && front.since.elapsed() < self.open_wait {
                break;
            }
            let Some(held) = self.held.pop_front() else { break };
            for id in &held.meta.released {
                // Bounded: a release without an announcement to come is a fault of the coordinator.
                if self.opened.remove(id).is_none() && self.early.len() < MAX_EARLY {
                    self.early.insert(*id);
                }
            }
            self.submit(held.frame, held.ticket)?;
        }
        Ok(())
    }

    fn submit(&self, frame: Frame, ticket: Ticket) -> Result<(), String> {
        let (out, losses, ring) = (self.out.clone(), self.losses.clone(), Arc::clone(&self.ring));
        let (epoch, id, rows) = {
            let header = frame.header();
            (header.epoch, header.micro_batch, header.rows)
        };
        self.ring.begin(epoch, id, rows);
        let job = Job::Step {
            frame,
            // On the engine's thread: hands over and returns.
            done: Box::new(move |result| {
                ring.end(epoch, id, result.is_err());
                match result {
                    Ok(frame) => {
                        if out.try_send(frame).is_err() {
                            let _ = losses.try_send(Loss("the outbound edge is lost".into()));
                        }
                    }
                    Err(e) => report(&losses, Err(e)),
                }
                // The next stage waits for the frame, nobody for the credit: that leaves later.
                drop(ticket);
            }),
        };
        self.engine.try_submit(job).map_err(|e| e.to_string())
    }
}

/// Reports what ends the epoch. Of an assignment that is over nobody listens any more.
fn report(losses: &mpsc::Sender<Loss>, result: Result<(), StageError>) {
    if let Err(e) = result {
        let _ = losses.try_send(Loss(e.to_string()));
    }
}

impl Actor for Stage {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(256);
        if self.is_last() {
            ctx.run_interval(OPEN_SWEEP, |stage, _| {
                if let Err(message) = stage.drain() {
                    stage.lose(message);
                }
            });
        }
    }
}

/// A frame of an inbound edge.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Inbound {
    /// The edge it came on.
    pub edge: Edge,
    /// The frame.
    pub frame: Frame,
    /// Its credit.
    pub ticket: Ticket,
}

impl Handler<Inbound> for Stage {
    type Result = ();

    fn handle(&mut self, m: Inbound, _: &mut Context<Self>) {
        if let Err(message) = self.on_frame(m.edge, m.frame, m.ticket) {
            self.lose(message);
        }
    }
}

/// The epoch is over.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Stop;

impl Handler<Stop> for Stage {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}
