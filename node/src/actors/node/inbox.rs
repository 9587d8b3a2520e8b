//! What others say to [`Node`].

use std::sync::Arc;
use std::time::Instant;

use actix::prelude::*;
use millrace_net::pump::pump_in;
use millrace_net::{Connection, EdgeReceiver, PeerName, RecvStream, SendStream};
use millrace_shared::membership::open_wait;
use millrace_shared::wire::control::{Assignment, CoordinatorMessage, LoadReport, NodeMessage};
use millrace_shared::wire::{MAX_FRAME_META_BYTES, Plane};
use tokio::sync::{mpsc, oneshot};

use super::{Active, Link, Node};
use crate::actors::stage::{Inbound, Loss, Stage};

/// The link is up.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct LinkUp {
    /// To the coordinator.
    pub connection: Connection,
    /// Messages to it.
    pub out: mpsc::Sender<NodeMessage>,
}

impl Handler<LinkUp> for Node {
    type Result = ();

    fn handle(&mut self, m: LinkUp, _: &mut Context<Self>) {
        self.drop_stages();
        self.link = Some(Link { connection: m.connection, out: m.out });
    }
}

/// The link is gone.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct LinkDown;

impl Handler<LinkDown> for Node {
    type Result = ();

    fn handle(&mut self, _: LinkDown, ctx: &mut Context<Self>) {
        self.link = None;
        self.drained = None;
        if let Some(handle) = self.heartbeat.take() {
            ctx.cancel_future(handle);
        }
        self.drop_stages();
        if self.leaving {
            ctx.stop();
        }
    }
}

/// The coordinator says something.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Control(pub CoordinatorMessage);

impl Handler<Control> for Node {
    type Result = ();

    fn handle(&mut self, Control(message): Control, ctx: &mut Context<Self>) {
        self.on_control(message, ctx);
    }
}

/// What became of a load.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Loaded {
    pub(super) assignment: Arc<Assignment>,
    pub(super) result: Result<LoadReport, String>,
}

impl Handler<Loaded> for Node {
    type Result = ();

    fn handle(&mut self, m: Loaded, _: &mut Context<Self>) {
        let (stale, lease) = (Arc::clone(&self.stale), self.lease);
        let ring = Arc::clone(&self.ring);
        let (pipeline, epoch) = (m.assignment.pipeline, m.assignment.epoch);
        let assignment = Arc::clone(&m.assignment);
        let Some(active) = self.slot(|a| Arc::ptr_eq(&a.assignment, &m.assignment)) else {
            return;
        };
        match m.result {
            Ok(report) => {
                // Room for everything that can be under way, so that the engine never waits here.
                let (out, frames) = mpsc::channel(m.assignment.own_credits() as usize + 1);
                let stage = Stage::new(
                    assignment,
                    Arc::clone(&active.engine),
                    out,
                    active.losses.clone(),
                    stale,
                    (Arc::clone(&active.received), ring),
                )
                .waiting(open_wait(lease));
                active.stage = Some(stage.start());
                active.out = Some(frames);
                active.since = Instant::now();
                self.say(NodeMessage::Ready { pipeline, epoch, report });
            }
            Err(message) => {
                tracing::error!("cannot load the stage: {message}");
                self.drop_if(|a| Arc::ptr_eq(&a.assignment, &assignment));
                self.say(NodeMessage::LoadFailed { pipeline, epoch, message });
            }
        }
    }
}

/// A peer opened a stream.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct EdgeOffered {
    /// Who, by its certificate.
    pub peer: PeerName,
    /// What for.
    pub plane: Plane,
    /// Our half.
    pub send: SendStream,
    /// Its half.
    pub recv: RecvStream,
}

impl Handler<EdgeOffered> for Node {
    type Result = ();

    fn handle(&mut self, m: EdgeOffered, _: &mut Context<Self>) {
        // Dropping the halves refuses the stream and harms nothing else.
        if let Err(message) = self.accepts(m.peer, &m.plane) {
            tracing::warn!(peer = ?m.peer, "refused an edge: {message}");
            return;
        }
        let Plane::Stage { edge: kind, pipeline, epoch } = m.plane else { return };
        let pool = self.pool.clone();
        let Some(active) = self.slot(|a| a.is(pipeline, epoch)) else { return };
        let Some(stage) = active.stage.clone() else { return };
        let a = &active.assignment;
        let row_bytes = (a.config.hidden as usize).max(1) * 4;
        let limit = MAX_FRAME_META_BYTES + a.settings.max_batch_tokens as usize * row_bytes + 4096;
        let credits = a.credits_of(kind);
        let edge = EdgeReceiver::new(m.send, m.recv, credits, pool, limit);
        let (losses, peer) = (active.losses.clone(), m.peer);
        actix_rt::spawn(async move {
            let deliver = |frame, ticket| {
                let stage = stage.clone();
                async move { stage.send(Inbound { edge: kind, frame, ticket }).await.is_ok() }
            };
            // Also an end in order ends the epoch, if that still lives.
            let end = match pump_in(edge, credits, deliver).await {
                Ok(()) => "it let go of the edge".to_owned(),
                Err(e) => e.to_string(),
            };
            let _ = losses.try_send(Loss(format!("the edge from {peer:?}: {end}")));
        });
    }
}

/// Something ended the epoch of an assignment.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct EpochLost {
    pub(super) assignment: Arc<Assignment>,
    pub(super) message: String,
}

impl Handler<EpochLost> for Node {
    type Result = ();

    fn handle(&mut self, m: EpochLost, _: &mut Context<Self>) {
        let ours = |a: &Active| Arc::ptr_eq(&a.assignment, &m.assignment);
        if self.slot(ours).is_some() {
            tracing::warn!("the epoch is over: {}", m.message);
            self.drop_if(ours);
            self.say(NodeMessage::EdgeLost {
                pipeline: m.assignment.pipeline,
                epoch: m.assignment.epoch,
                message: m.message,
            });
        }
    }
}

/// The process wants to end: asks the coordinator to hand the layers over. The answer says when it
/// may, and what stands against it; it is dropped where there is nobody to ask.
#[derive(Debug, Message)]
#[rtype(result = "oneshot::Receiver<Option<String>>")]
pub struct Drain;

impl Handler<Drain> for Node {
    type Result = MessageResult<Drain>;

    fn handle(&mut self, _: Drain, _: &mut Context<Self>) -> Self::Result {
        let (sender, receiver) = oneshot::channel();
        self.drained = self.link.is_some().then_some(sender);
        self.say(NodeMessage::Draining);
        MessageResult(receiver)
    }
}

/// The process is about to end.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Leave;

impl Handler<Leave> for Node {
    type Result = ();

    fn handle(&mut self, _: Leave, _: &mut Context<Self>) {
        self.say(NodeMessage::Leaving);
        self.drop_stages();
        self.leaving = true;
    }
}
