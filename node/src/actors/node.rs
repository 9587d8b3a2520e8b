//! The node: its link to the coordinator and its one assignment.
//!
//! States by assignment: *idle* → *loading* (tensors, then the engine) → *loaded* (accepts edges)
//! → *started* (edge out connected) → *idle* when the coordinator releases it, assigns anew, or the
//! link is lost. Inbox: `LinkUp`, `LinkDown`, `Control`, `Loaded`, `EdgeOffered`, `EpochLost`.
//! Held by the link task and by accept tasks.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix::prelude::*;
use millrace_engine::stage::StagePlace;
use millrace_engine::thread::{EngineHandle, Job, LoadJob};
use millrace_engine::{Isa, StageSpec};
use millrace_net::pump::{pump_in, pump_out};
use millrace_net::{
    ClientTls, Connection, EdgeReceiver, EdgeSender, Endpoint, FramePool, NetError, PeerName,
    RecvStream, SendStream, timing,
};
use millrace_shared::model::numerics_id;
use millrace_shared::wire::control::{
    Assignment, CoordinatorMessage, Heartbeat, LoadReport, NodeMessage, ProfileSpec,
};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::{Edge, MAX_FRAME_META_BYTES, Plane, node_name};
use tokio::sync::{mpsc, oneshot};

use super::stage::{Inbound, Loss, Stage, Stop};
use crate::config::Config;
use crate::loader::Loader;
use crate::progress::LoadProgress;

/// What never changes while the node runs.
#[derive(Debug)]
pub struct Parts {
    /// Settings.
    pub config: Config,
    /// The node's endpoint: neighbours connect to it, and it connects to neighbours.
    pub endpoint: Endpoint,
    /// For connecting to members.
    pub tls: ClientTls,
    /// The engine's thread.
    pub engine: Arc<EngineHandle>,
    /// Revision of the engine's numerics.
    pub numerics: String,
    /// Compute threads.
    pub threads: usize,
}

struct Link {
    connection: Connection,
    out: mpsc::Sender<NodeMessage>,
}

struct Active {
    assignment: Arc<Assignment>,
    /// Set once loaded.
    stage: Option<Addr<Stage>>,
    /// Frames for the edge out, until that is connected.
    out: Option<mpsc::Receiver<Frame>>,
    losses: mpsc::Sender<Loss>,
    since: Instant,
    busy_before: Duration,
    steps_before: u64,
}

/// See the module's documentation.
pub struct Node {
    parts: Rc<Parts>,
    pool: FramePool,
    link: Option<Link>,
    active: Option<Active>,
    stale: Arc<AtomicU64>,
    echo: u64,
    heartbeat: Option<SpawnHandle>,
    leaving: bool,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

impl Node {
    /// A node without a link.
    pub fn new(parts: Rc<Parts>) -> Self {
        Self {
            parts,
            pool: FramePool::new(16),
            link: None,
            active: None,
            stale: Arc::new(AtomicU64::new(0)),
            echo: 0,
            heartbeat: None,
            leaving: false,
        }
    }

    /// Says something to the coordinator. A full channel means that the link hangs; its deadline
    /// will end it, and every message is repeated in substance after that.
    fn say(&self, message: NodeMessage) {
        if let Some(link) = &self.link
            && link.out.try_send(message).is_err()
        {
            tracing::warn!("the control link is stuck, a message was dropped");
        }
    }

    fn drop_stage(&mut self) {
        if let Some(active) = self.active.take() {
            if let Some(stage) = active.stage {
                let _ = stage.try_send(Stop);
            }
            let _ = self.parts.engine.try_submit(Job::Unload);
        }
    }

    fn on_control(&mut self, message: CoordinatorMessage, ctx: &mut Context<Self>) {
        match message {
            CoordinatorMessage::Welcome { heartbeat_ms, .. } => {
                let every = Duration::from_millis(u64::from(heartbeat_ms.max(10)));
                if let Some(handle) = self.heartbeat.take() {
                    ctx.cancel_future(handle);
                }
                self.heartbeat = Some(ctx.run_interval(every, |node, _| node.beat()));
            }
            CoordinatorMessage::Refused { message } => tracing::error!("{message}"),
            CoordinatorMessage::Profile(spec) => self.profile(*spec),
            CoordinatorMessage::Assign(assignment) => self.assign(Arc::new(*assignment), ctx),
            CoordinatorMessage::Start { pipeline, epoch } => {
                let ours = self.active.as_ref().is_some_and(|a| {
                    a.assignment.pipeline == pipeline && a.assignment.epoch == epoch
                });
                if ours {
                    self.connect(ctx);
                }
            }
            CoordinatorMessage::Release { pipeline, epoch } => {
                let ours = self.active.as_ref().is_some_and(|a| {
                    a.assignment.pipeline == pipeline && a.assignment.epoch <= epoch
                });
                if ours {
                    self.drop_stage();
                }
            }
            CoordinatorMessage::Ping(n) => self.echo = n,
            CoordinatorMessage::Shutdown => {
                tracing::info!("the coordinator is shutting down");
                self.drop_stage();
            }
        }
    }

    fn beat(&self) {
        let mut beat = Heartbeat {
            echo: self.echo,
            stale_dropped: self.stale.load(Ordering::Relaxed),
            ..Heartbeat::default()
        };
        if let Some(active) = &self.active {
            let engine = &self.parts.engine;
            beat.busy_seconds = engine.busy().saturating_sub(active.busy_before).as_secs_f64();
            beat.wall_seconds = active.since.elapsed().as_secs_f64();
            beat.steps = engine.steps().saturating_sub(active.steps_before);
        }
        self.say(NodeMessage::Heartbeat(beat));
    }

    fn profile(&self, spec: ProfileSpec) {
        let Some(link) = &self.link else { return };
        let out = link.out.clone();
        let job = Job::Profile {
            spec: Box::new(spec),
            done: Box::new(move |result| match result {
                Ok(profile) => {
                    let _ = out.try_send(NodeMessage::Profiled { profile });
                }
                // The coordinator's deadline turns silence into the same decision.
                Err(e) => tracing::error!("cannot measure the model: {e}"),
            }),
        };
        if let Err(e) = self.parts.engine.try_submit(job) {
            tracing::error!("cannot measure the model: {e}");
        }
    }

    /// Why this node cannot take the assignment.
    fn objection(&self, assignment: &Assignment) -> Option<String> {
        let settings = &assignment.settings;
        let (kv, activation) = (settings.kv_dtype, settings.activation_dtype);
        let own = numerics_id(&assignment.content_hash, &self.parts.numerics, kv, activation);
        if own != assignment.numerics_id {
            return Some(format!(
                "this node's engine ({}) would not give the plan's results; run the same version \
                 of millrace-node on every machine",
                self.parts.numerics
            ));
        }
        let config = &self.parts.config;
        if config.require_kv_dtype.is_some_and(|d| d != kv) {
            return Some(format!(
                "this node insists on another --kv-cache-dtype than {}",
                kv.as_str()
            ));
        }
        if config.require_activation_dtype.is_some_and(|d| d != activation) {
            return Some(format!(
                "this node insists on another --activation-dtype than {}",
                activation.as_str()
            ));
        }
        None
    }

    fn assign(&mut self, assignment: Arc<Assignment>, ctx: &mut Context<Self>) {
        self.drop_stage();
        let (pipeline, epoch) = (assignment.pipeline, assignment.epoch);
        if let Some(message) = self.objection(&assignment) {
            self.say(NodeMessage::LoadFailed { pipeline, epoch, message });
            return;
        }
        let Some(link) = &self.link else { return };
        let (losses, mut lost) = mpsc::channel::<Loss>(4);
        self.active = Some(Active {
            assignment: Arc::clone(&assignment),
            stage: None,
            out: None,
            losses,
            since: Instant::now(),
            busy_before: self.parts.engine.busy(),
            steps_before: self.parts.engine.steps(),
        });
        let node = ctx.address();
        actix_rt::spawn(async move {
            if let Some(Loss(message)) = lost.recv().await {
                let _ = node.send(EpochLost { assignment, message }).await;
            }
        });
        let Some(active) = &self.active else { return };
        let load =
            load(Rc::clone(&self.parts), Arc::clone(&active.assignment), link.connection.clone());
        let assignment = Arc::clone(&active.assignment);
        let node = ctx.address();
        actix_rt::spawn(async move {
            let result = load.await;
            let _ = node.send(Loaded { assignment, result }).await;
        });
    }

    /// Connects the edge out, then tells the coordinator.
    fn connect(&mut self, ctx: &mut Context<Self>) {
        let (Some(link), Some(active)) = (&self.link, &mut self.active) else { return };
        let Some(frames) = active.out.take() else { return };
        let (parts, pool) = (Rc::clone(&self.parts), self.pool.clone());
        let (assignment, losses) = (Arc::clone(&active.assignment), active.losses.clone());
        let (coordinator, out) = (link.connection.clone(), link.out.clone());
        let connecting = async move {
            let what = match &assignment.next {
                Some(peer) => format!("to the next stage ({} at {})", peer.node_id, peer.address),
                None => "to the coordinator".to_owned(),
            };
            let result = match edge_out(&parts, &assignment, &coordinator, pool).await {
                Ok(edge) => {
                    let started = NodeMessage::Started {
                        pipeline: assignment.pipeline,
                        epoch: assignment.epoch,
                    };
                    let _ = out.try_send(started);
                    pump_out(edge, frames).await
                }
                Err(e) => Err(e),
            };
            if let Err(e) = result {
                let _ = losses.try_send(Loss(format!("the edge {what}: {e}")));
            }
        };
        ctx.spawn(connecting.into_actor(self));
    }

    /// Whether the plan gives this peer this edge, now.
    fn accepts(&self, peer: PeerName, plane: &Plane) -> Result<(), String> {
        let Plane::Stage { pipeline, epoch, edge } = plane else {
            return Err("members open stage edges to nodes, nothing else".into());
        };
        let Some(active) = self.active.as_ref().filter(|a| a.stage.is_some()) else {
            return Err("no stage is loaded here".into());
        };
        let a = &active.assignment;
        if a.pipeline != *pipeline || a.epoch != *epoch {
            return Err(format!(
                "the edge is of pipeline {pipeline} epoch {epoch}, the stage of {} and {}",
                a.pipeline, a.epoch
            ));
        }
        let (expected, fits) = match edge {
            Edge::Steps => (PeerName::Coordinator, a.previous.is_none()),
            Edge::Sequences => (PeerName::Coordinator, a.next.is_none()),
            Edge::Activations => {
                let previous = a.previous.ok_or("the first stage has no neighbour before it")?;
                (PeerName::Node(previous), true)
            }
            Edge::Results => return Err("results go to the coordinator".into()),
        };
        if peer != expected || !fits {
            return Err(format!("{peer:?} is not who the plan names for this edge"));
        }
        Ok(())
    }
}

/// Fetches the tensors, then loads the engine.
async fn load(
    parts: Rc<Parts>,
    assignment: Arc<Assignment>,
    connection: Connection,
) -> Result<LoadReport, String> {
    let started = Instant::now();
    let total: u64 = assignment.tensors.iter().map(|t| t.bytes).sum();
    let fetching = LoadProgress::new(parts.config.show_progress, "fetching", total);
    let loader = Loader::new(parts.config.weights.clone(), &parts.config.cache, connection);
    // The mock engine computes from its configuration alone.
    let wanted = match parts.config.engine {
        millrace_shared::options::EngineKind::Mock => &[][..],
        millrace_shared::options::EngineKind::Cpu => &assignment.tensors[..],
    };
    let (tensors, mut report) =
        loader.fetch(wanted, |done| fetching.set(done)).await.map_err(|e| e.to_string())?;
    fetching.finish(&report);
    let spec = StageSpec {
        config: assignment.config.clone(),
        layers: assignment.first_layer..assignment.end_layer,
        embed: assignment.previous.is_none(),
        head: assignment.next.is_none(),
        settings: assignment.settings.clone(),
        threads: parts.threads,
        isa: Isa::detect(),
    };
    let place = StagePlace {
        pipeline: assignment.pipeline,
        epoch: assignment.epoch,
        stage: assignment.stage,
    };
    let loading = LoadProgress::new(parts.config.show_progress, "loading", total);
    let (sender, receiver) = oneshot::channel();
    let job = LoadJob {
        spec,
        place,
        tensors,
        progress: Box::new(move |done| loading.set(done)),
        done: Box::new(move |result| {
            let _ = sender.send(result);
        }),
    };
    parts.engine.try_submit(Job::Load(Box::new(job))).map_err(|e| e.to_string())?;
    let stage =
        receiver.await.map_err(|_| "the engine stopped".to_owned())?.map_err(|e| e.to_string())?;
    report.weight_bytes = stage.weight_bytes;
    report.kv_bytes = stage.kv_bytes;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

async fn edge_out(
    parts: &Parts,
    assignment: &Assignment,
    coordinator: &Connection,
    pool: FramePool,
) -> Result<EdgeSender, NetError> {
    let (pipeline, epoch) = (assignment.pipeline, assignment.epoch);
    match &assignment.next {
        None => {
            let plane = (pipeline, epoch, Edge::Results);
            EdgeSender::open(coordinator, plane, assignment.credits, Some(pool)).await
        }
        Some(peer) => {
            let name = node_name(peer.node_id);
            let connection = parts
                .endpoint
                .connect_host(&peer.address, &name, &parts.tls, timing::HANDSHAKE)
                .await?;
            let plane = (pipeline, epoch, Edge::Activations);
            EdgeSender::open(&connection, plane, assignment.credits, Some(pool)).await
        }
    }
}

impl Actor for Node {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(64);
    }
}

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
        self.drop_stage();
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
        if let Some(handle) = self.heartbeat.take() {
            ctx.cancel_future(handle);
        }
        self.drop_stage();
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
    assignment: Arc<Assignment>,
    result: Result<LoadReport, String>,
}

impl Handler<Loaded> for Node {
    type Result = ();

    fn handle(&mut self, m: Loaded, _: &mut Context<Self>) {
        let Some(active) =
            self.active.as_mut().filter(|a| Arc::ptr_eq(&a.assignment, &m.assignment))
        else {
            return;
        };
        let (pipeline, epoch) = (m.assignment.pipeline, m.assignment.epoch);
        match m.result {
            Ok(report) => {
                // Room for everything the credits allow, so that the engine never waits here.
                let (out, frames) = mpsc::channel(m.assignment.credits as usize + 2);
                let stage = Stage::new(
                    m.assignment,
                    Arc::clone(&self.parts.engine),
                    out,
                    active.losses.clone(),
                    Arc::clone(&self.stale),
                );
                active.stage = Some(stage.start());
                active.out = Some(frames);
                active.since = Instant::now();
                self.say(NodeMessage::Ready { pipeline, epoch, report });
            }
            Err(message) => {
                tracing::error!("cannot load the stage: {message}");
                self.drop_stage();
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
        let Some(active) = &self.active else { return };
        let Some(stage) = active.stage.clone() else { return };
        let a = &active.assignment;
        let row_bytes = (a.config.hidden as usize).max(1) * 4;
        let limit = MAX_FRAME_META_BYTES + a.settings.max_batch_tokens as usize * row_bytes + 4096;
        let edge = EdgeReceiver::new(m.send, m.recv, a.credits, self.pool.clone(), limit);
        let (credits, losses, peer) = (a.credits, active.losses.clone(), m.peer);
        actix_rt::spawn(async move {
            let deliver = |frame, ticket| {
                let stage = stage.clone();
                async move { stage.send(Inbound { frame, ticket }).await.is_ok() }
            };
            if let Err(e) = pump_in(edge, credits, deliver).await {
                let _ = losses.try_send(Loss(format!("the edge from {peer:?}: {e}")));
            }
        });
    }
}

/// Something ended the epoch of an assignment.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct EpochLost {
    assignment: Arc<Assignment>,
    message: String,
}

impl Handler<EpochLost> for Node {
    type Result = ();

    fn handle(&mut self, m: EpochLost, _: &mut Context<Self>) {
        let ours = self.active.as_ref().is_some_and(|a| Arc::ptr_eq(&a.assignment, &m.assignment));
        if ours {
            tracing::warn!("the epoch is over: {}", m.message);
            self.drop_stage();
            self.say(NodeMessage::EdgeLost {
                pipeline: m.assignment.pipeline,
                epoch: m.assignment.epoch,
                message: m.message,
            });
        }
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
        self.drop_stage();
        self.leaving = true;
    }
}
