//! The node: its link to the coordinator and its assignment, or two of them for a moment.
//!
//! States by assignment: *idle* → *loading* (tensors, then the engine) → *loaded* (accepts edges)
//! → *started* (edge out connected) → *idle* when the coordinator releases it, assigns anew, or the
//! link is lost. The stage of the next epoch is made ready beside the one that works, with an engine
//! of its own, and takes its place when that one is released. Inbox: `LinkUp`, `LinkDown`, `Control`, `Loaded`, `EdgeOffered`, `EpochLost`.
//! Held by the link task and by accept tasks.

mod inbox;
mod work;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix::prelude::*;
use millrace_engine::mock::MockConfig;
use millrace_engine::thread::{EngineHandle, Job};
use millrace_net::pump::pump_out;
use millrace_net::{ClientTls, Connection, Endpoint, FramePool, PeerName};
use millrace_shared::id::{Epoch, PipelineId};
use millrace_shared::model::numerics_id;
use millrace_shared::wire::control::{
    Assignment, CoordinatorMessage, Heartbeat, NodeMessage, Peer, ProfileSpec,
};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::{Edge, Plane};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::stage::{Loss, Stage, Stop};
use crate::config::Config;
use crate::profiles::KnownProfile;
use crate::ring::Ring;
pub use inbox::{Control, Drain, EdgeOffered, EpochLost, Leave, LinkDown, LinkUp, Loaded};
use work::{edge_out, load, reach};

/// What never changes while the node runs.
#[derive(Debug)]
pub struct Parts {
    /// Settings.
    pub config: Config,
    /// The node's endpoint: neighbours connect to it, and it connects to neighbours.
    pub endpoint: Endpoint,
    /// For connecting to members.
    pub tls: ClientTls,
    /// How the mock engine behaves, where that is the engine.
    pub mock: MockConfig,
    /// Makes an engine's thread.
    pub spawn_engine: fn(&Config, &MockConfig) -> std::io::Result<EngineHandle>,
    /// Revision of the engine's numerics.
    pub numerics: String,
    /// Cores that the process may use.
    pub cores: usize,
    /// What measurements depend on besides the model and the threads.
    pub machine: String,
}

impl Parts {
    fn engine(&self) -> std::io::Result<EngineHandle> {
        (self.spawn_engine)(&self.config, &self.mock)
    }

    /// Processes that share the host's cores, where it has so many nodes or stages.
    fn processes_among(&self, sharing: u32) -> usize {
        sharing.max(1).div_ceil(self.config.nodes_in_process.max(1)) as usize
    }

    /// Compute threads: as told, else this process's share of the cores.
    fn threads_among(&self, sharing: u32) -> usize {
        let share = || self.cores / self.processes_among(sharing);
        self.config.threads.unwrap_or_else(share).max(1)
    }

    /// Why so many, for people.
    fn why_threads(&self, sharing: u32) -> String {
        let (cores, processes) = (self.cores, self.processes_among(sharing));
        match (self.config.threads, processes, sharing) {
            (Some(_), ..) => "as --threads says".to_owned(),
            (None, 1, 0 | 1) => format!("all {cores} cores, the only stage on this host"),
            (None, 1, _) => {
                format!("all {cores} cores, {sharing} stages in this process take turns")
            }
            _ => format!("{cores} cores among {processes} processes with stages on this host"),
        }
    }
}

struct Link {
    connection: Connection,
    out: mpsc::Sender<NodeMessage>,
}

struct Active {
    assignment: Arc<Assignment>,
    engine: Arc<EngineHandle>,
    /// Set once loaded.
    stage: Option<Addr<Stage>>,
    /// Frames for the edge out, until that is connected.
    out: Option<mpsc::Receiver<Frame>>,
    losses: mpsc::Sender<Loss>,
    /// Loading, then connecting: stopped with the assignment, so that neither outlives it.
    work: Option<JoinHandle<()>>,
    since: Instant,
    /// Micro-batches that came in.
    received: Arc<AtomicU64>,
}

impl Active {
    fn is(&self, pipeline: PipelineId, epoch: Epoch) -> bool {
        self.assignment.pipeline == pipeline && self.assignment.epoch == epoch
    }

    /// Lets go of the stage. The engine gives its memory back elsewhere: that takes a moment, and
    /// longer where a step is at work.
    fn end(self) {
        if let Some(work) = self.work {
            work.abort();
        }
        if let Some(stage) = self.stage {
            let _ = stage.try_send(Stop);
        }
        let _ = self.engine.try_submit(Job::Unload);
        drop(tokio::task::spawn_blocking(move || drop(self.engine)));
    }
}

/// See the module's documentation.
pub struct Node {
    parts: Rc<Parts>,
    pool: FramePool,
    link: Option<Link>,
    active: Option<Active>,
    /// What takes the place of `active` when that is released.
    next: Option<Active>,
    stale: Arc<AtomicU64>,
    /// Where the last measurement is kept.
    known: Option<KnownProfile>,
    echo: u64,
    /// The last steps.
    ring: Arc<Ring>,
    /// Silence after which the coordinator takes this node for lost.
    lease: Duration,
    heartbeat: Option<SpawnHandle>,
    leaving: bool,
    /// Told when the coordinator wants this process to end.
    drain: Option<oneshot::Sender<()>>,
    /// Told when the node may go, and what stands against it.
    drained: Option<oneshot::Sender<Option<String>>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

impl Node {
    /// A node without a link.
    pub fn new(parts: Rc<Parts>) -> Self {
        let ring = Arc::new(Ring::new(&parts.config.dir));
        Self {
            ring,
            parts,
            pool: FramePool::new(16),
            link: None,
            active: None,
            next: None,
            stale: Arc::new(AtomicU64::new(0)),
            known: None,
            echo: 0,
            lease: millrace_shared::membership::LEASE,
            heartbeat: None,
            leaving: false,
            drain: None,
            drained: None,
        }
    }

    /// Tells `drain` when the coordinator wants this process to end.
    #[must_use]
    pub fn telling(mut self, drain: oneshot::Sender<()>) -> Self {
        self.drain = Some(drain);
        self
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

    /// Lets go of every stage.
    fn drop_stages(&mut self) {
        self.drop_if(|_| true);
    }

    fn drop_if(&mut self, which: impl Fn(&Active) -> bool) {
        for slot in [&mut self.active, &mut self.next] {
            if let Some(active) = slot.take_if(|a| which(a)) {
                active.end();
            }
        }
        if self.active.is_none() {
            self.active = self.next.take();
        }
    }

    fn slot(&mut self, which: impl Fn(&Active) -> bool) -> Option<&mut Active> {
        self.active.iter_mut().chain(&mut self.next).find(|a| which(a))
    }

    fn on_control(&mut self, message: CoordinatorMessage, ctx: &mut Context<Self>) {
        match message {
            CoordinatorMessage::Welcome { heartbeat_ms, lease_ms, .. } => {
                self.lease = Duration::from_millis(lease_ms.into());
                let every = Duration::from_millis(u64::from(heartbeat_ms.max(10)));
                if let Some(handle) = self.heartbeat.take() {
                    ctx.cancel_future(handle);
                }
                self.heartbeat = Some(ctx.run_interval(every, |node, _| node.beat()));
            }
            CoordinatorMessage::Refused { message } => tracing::error!("{message}"),
            CoordinatorMessage::Profile(spec) => self.profile(*spec),
            CoordinatorMessage::Assign { assignment, beside } => {
                self.assign(Arc::new(*assignment), beside, ctx);
            }
            CoordinatorMessage::Start { pipeline, epoch } => self.connect(pipeline, epoch),
            CoordinatorMessage::Abandon { pipeline, epoch } => {
                self.drop_if(|a| a.is(pipeline, epoch));
            }
            CoordinatorMessage::Release { pipeline, epoch } => {
                self.drop_if(|a| a.assignment.pipeline == pipeline && a.assignment.epoch <= epoch);
            }
            CoordinatorMessage::Paced { profile } => {
                if let Some(known) = &self.known {
                    known.refresh(&profile);
                }
            }
            CoordinatorMessage::Void { pipeline, epoch, rows } => {
                if let Some(active) = self.slot(|a| a.is(pipeline, epoch)) {
                    active.engine.void(epoch, &rows);
                }
            }
            CoordinatorMessage::TryEdge { peer, burst } => self.try_edge(peer, burst),
            CoordinatorMessage::Ping(n) => self.echo = n,
            CoordinatorMessage::Drain => {
                if let Some(drain) = self.drain.take() {
                    let _ = drain.send(());
                }
            }
            CoordinatorMessage::Drained { trouble } => {
                if let Some(drained) = self.drained.take() {
                    let _ = drained.send(trouble);
                }
            }
            CoordinatorMessage::Collect { ticket } => {
                let files = self.ring.collected(self.parts.about(self.lease));
                self.say(NodeMessage::Collected { ticket, files });
            }
            CoordinatorMessage::Shutdown => {
                tracing::info!("the coordinator is shutting down");
                self.drop_stages();
            }
        }
    }

    fn beat(&self) {
        let mut beat = Heartbeat {
            echo: self.echo,
            stale_dropped: self.stale.load(Ordering::Relaxed),
            process_seconds: millrace_net::cpu_time::process_seconds(),
            ..Heartbeat::default()
        };
        if let Some(active) = &self.active {
            beat.busy_seconds = active.engine.busy().as_secs_f64();
            beat.wall_seconds = active.since.elapsed().as_secs_f64();
            beat.received = active.received.load(Ordering::Relaxed);
            beat.steps = active.engine.steps();
            beat.rows_left_out = active.engine.rows_left_out();
        }
        self.say(NodeMessage::Heartbeat(beat));
        if self.ring.is_late(self.lease) {
            self.ring.save();
        }
    }

    fn profile(&mut self, mut spec: ProfileSpec) {
        let Some(link) = &self.link else { return };
        let threads = self.parts.threads_among(spec.sharing);
        // Nodes of this process take turns.
        spec.sharing = self.parts.processes_among(spec.sharing) as u32;
        let known =
            KnownProfile::new(&self.parts.config.cache, &spec, threads, &self.parts.machine);
        self.known = Some(known.clone());
        if let Some(profile) = known.get() {
            return self.say(NodeMessage::Profiled { profile });
        }
        let engine = match self.parts.engine() {
            Ok(engine) => engine,
            Err(e) => return tracing::error!("cannot measure the model: no thread: {e}"),
        };
        let (out, (finish, finished)) = (link.out.clone(), oneshot::channel::<()>());
        let job = Job::Profile {
            threads,
            spec: Box::new(spec),
            done: Box::new(move |result| {
                match result {
                    Ok(profile) => {
                        let _ = out.try_send(NodeMessage::Profiled { profile });
                        known.put(&profile);
                    }
                    // The coordinator's deadline turns silence into the same decision.
                    Err(e) => tracing::error!("cannot measure the model: {e}"),
                }
                drop(finish);
            }),
        };
        if let Err(e) = engine.try_submit(job) {
            tracing::error!("cannot measure the model: {e}");
        }
        // This engine is for the measurement alone.
        actix_rt::spawn(async move {
            let _ = finished.await;
            drop(tokio::task::spawn_blocking(move || drop(engine)));
        });
    }

    /// A handshake with another member, for its own sake.
    fn try_edge(&self, peer: Peer, burst: bool) {
        let Some(link) = &self.link else { return };
        let (parts, out) = (Rc::clone(&self.parts), link.out.clone());
        actix_rt::spawn(async move {
            let outcome = reach(&parts, &peer, burst).await.map_err(|e| e.to_string());
            let _ = out.try_send(NodeMessage::EdgeTried { to: peer.node_id, outcome });
        });
    }

    /// Why this node cannot take the assignment.
    fn objection(&self, assignment: &Assignment) -> Option<String> {
        let settings = &assignment.settings;
        let (kv, activation) = (settings.kv_dtype, settings.activation_dtype);
        let (hash, scaling) = (&assignment.content_hash, assignment.config.rope.scaling);
        let own = numerics_id(hash, &self.parts.numerics, scaling, settings);
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

    fn assign(&mut self, assignment: Arc<Assignment>, beside: bool, ctx: &mut Context<Self>) {
        if beside {
            if let Some(next) = self.next.take() {
                next.end();
            }
        } else {
            self.drop_stages();
        }
        let (pipeline, epoch) = (assignment.pipeline, assignment.epoch);
        let engine = match self.objection(&assignment) {
            Some(message) => Err(message),
            None => self.parts.engine().map_err(|e| format!("no thread for the engine: {e}")),
        };
        let engine = match engine {
            Ok(engine) => Arc::new(engine),
            Err(message) => {
                return self.say(NodeMessage::LoadFailed { pipeline, epoch, message });
            }
        };
        let Some(link) = &self.link else { return };
        let (losses, mut lost) = mpsc::channel::<Loss>(4);
        let node = ctx.address();
        let ended = Arc::clone(&assignment);
        actix_rt::spawn(async move {
            if let Some(Loss(message)) = lost.recv().await {
                let _ = node.send(EpochLost { assignment: ended, message }).await;
            }
        });
        let parts = Rc::clone(&self.parts);
        let load =
            load(parts, Arc::clone(&engine), Arc::clone(&assignment), link.connection.clone());
        let (node, loaded) = (ctx.address(), Arc::clone(&assignment));
        let work = actix_rt::spawn(async move {
            let result = load.await;
            let _ = node.send(Loaded { assignment: loaded, result }).await;
        });
        let active = Active {
            assignment,
            engine,
            stage: None,
            out: None,
            losses,
            work: Some(work),
            since: Instant::now(),
            received: Arc::default(),
        };
        let slot = if self.active.is_some() { &mut self.next } else { &mut self.active };
        *slot = Some(active);
    }

    /// Connects the edge out, then tells the coordinator.
    fn connect(&mut self, pipeline: PipelineId, epoch: Epoch) {
        let (parts, pool) = (Rc::clone(&self.parts), self.pool.clone());
        let slots = self.active.iter_mut().chain(&mut self.next);
        let active = slots.into_iter().find(|a| a.is(pipeline, epoch));
        let (Some(link), Some(active)) = (&self.link, active) else { return };
        let Some(frames) = active.out.take() else { return };
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
        active.work = Some(actix_rt::spawn(connecting));
    }

    /// Whether the plan gives this peer this edge, now.
    fn accepts(&self, peer: PeerName, plane: &Plane) -> Result<(), String> {
        let Plane::Stage { pipeline, epoch, edge } = plane else {
            return Err("members open stage edges to nodes, nothing else".into());
        };
        let mut loaded = self.active.iter().chain(&self.next).filter(|a| a.stage.is_some());
        let Some(active) = loaded.find(|a| a.is(*pipeline, *epoch)) else {
            return Err(format!("no stage of pipeline {pipeline} epoch {epoch} is loaded here"));
        };
        let a = &active.assignment;
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

impl Actor for Node {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(64);
    }
}
