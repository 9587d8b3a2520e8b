//! Members, plan and epochs.
//!
//! Feeds what happens to the machines of `millrace_shared::membership` and carries out what they
//! decide. An epoch serves once every stage has connected its edge out, the coordinator's own edges
//! are open and the results edge has come in. Inbox: `NodeHello`, `FromNode`, `NodeGone`,
//! `EdgeOffered`, `OwnEdgeOpen`, `EdgeFailed`, `GetStatus`. Held by member tasks and the service.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use millrace_net::{Connection, RecvStream, SendStream};
use millrace_shared::id::{Epoch, NodeId, PipelineId};
use millrace_shared::membership::{
    Action, Event, HEARTBEAT, Membership, MembershipConfig, PipelineConfig, PipelineState, Session,
};
use millrace_shared::model::ModelManifest;
use millrace_shared::wire::control::{
    CoordinatorMessage, Heartbeat, Hello, LoadReport, NodeMessage, StageProfile,
};
use millrace_shared::wire::rpc::{ClusterStatus, StageStatus};
use millrace_shared::wire::{Edge, Plane, WIRE_VERSION};
use tokio::sync::{mpsc, watch};

use super::batcher::{Batcher, PipelineDown, PipelineUp};
use super::edges;
use crate::plan::{Deployment, Plan, PlanNode, plan, profile_spec};

/// The one pipeline of a coordinator.
const PIPELINE: PipelineId = PipelineId(1);
/// How often leases and deadlines are looked at: a small part of the lease.
const TICK: Duration = Duration::from_millis(50);
/// Without `--stages`: quiet time after a node joined until the plan is made from those present.
const SETTLE: Duration = Duration::from_secs(2);
/// From the order to start until every edge is connected.
const START_DEADLINE: Duration = Duration::from_secs(15);

/// Whether requests are served, for whoever waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Serving.
    pub ready: bool,
    /// Epochs that served so far.
    pub epochs: u64,
    /// What it waits for, when not serving.
    pub detail: String,
}

struct Member {
    session: Session,
    hello: Hello,
    connection: Connection,
    out: mpsc::Sender<CoordinatorMessage>,
    heartbeat: Heartbeat,
    report: LoadReport,
}

/// Edges that are not connected yet.
struct Starting {
    epoch: Epoch,
    nodes: HashSet<NodeId>,
    own: HashSet<Edge>,
    deadline: Duration,
    up: Option<PipelineUp>,
}

/// See the module's documentation.
pub struct Cluster {
    started: Instant,
    manifest: Arc<ModelManifest>,
    deployment: Deployment,
    batcher: Addr<Batcher>,
    membership: Membership,
    pipeline: Option<PipelineState>,
    members: BTreeMap<NodeId, Member>,
    last_join: Duration,
    plan: Option<Plan>,
    starting: Option<Starting>,
    readiness: watch::Sender<Readiness>,
    stopping: bool,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("members", &self.members.len()).finish_non_exhaustive()
    }
}

impl Cluster {
    /// A cluster without nodes. `stages`: how many to wait for, else however many come.
    pub fn new(
        manifest: Arc<ModelManifest>,
        deployment: Deployment,
        stages: Option<u16>,
        batcher: Addr<Batcher>,
        readiness: watch::Sender<Readiness>,
    ) -> Self {
        Self {
            started: Instant::now(),
            manifest,
            deployment,
            batcher,
            membership: Membership::new(MembershipConfig::default()),
            pipeline: stages.map(|n| PipelineState::new(PipelineConfig::new(n))),
            members: BTreeMap::new(),
            last_join: Duration::ZERO,
            plan: None,
            starting: None,
            readiness,
            stopping: false,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn say(&self, node: NodeId, message: CoordinatorMessage) {
        if let Some(member) = self.members.get(&node)
            && member.out.try_send(message).is_err()
        {
            tracing::warn!(%node, "the control link is stuck, closing it");
            member.connection.close("the control link is stuck");
        }
    }

    /// Lets the machines see the time, then carries out what they decided.
    fn advance(&mut self, ctx: &mut Context<Self>) {
        if self.stopping {
            return;
        }
        let now = self.now();
        while let Some(event) = self.membership.poll_event(now) {
            self.on_membership(event, now);
        }
        self.settle(now);
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_timeout(now);
        }
        if let Some(starting) = self.starting.take_if(|s| now >= s.deadline) {
            self.edge_failed(starting.epoch, "the stages did not connect in time");
        }
        while let Some(action) = self.pipeline.as_mut().and_then(PipelineState::poll_action) {
            self.carry_out(action, now, ctx);
        }
        self.publish();
    }

    fn on_membership(&mut self, event: Event, now: Duration) {
        match event {
            Event::Joined { node, .. } => {
                self.last_join = now;
                if let Some(pipeline) = &mut self.pipeline {
                    pipeline.handle_joined(node, now);
                }
            }
            Event::Suspect { node } => {
                tracing::warn!(%node, "no heartbeat");
                if let Some(pipeline) = &mut self.pipeline {
                    pipeline.handle_suspect(node, true, now);
                }
            }
            Event::Recovered { node } => {
                if let Some(pipeline) = &mut self.pipeline {
                    pipeline.handle_suspect(node, false, now);
                }
            }
            Event::Lost { node, session, reason } => {
                let name = self.members.get(&node).map(|m| m.hello.name.clone());
                tracing::warn!(%node, name = name.unwrap_or_default(), "node lost: {reason}");
                if let Some(member) = self.members.get(&node).filter(|m| m.session == session) {
                    member.connection.close("lost");
                    self.members.remove(&node);
                }
                if let Some(pipeline) = &mut self.pipeline {
                    pipeline.handle_lost(node, &reason.to_string(), now);
                }
            }
        }
    }

    /// Without `--stages`, the first plan takes whoever is there after a quiet moment.
    fn settle(&mut self, now: Duration) {
        let quiet = now.saturating_sub(self.last_join) >= SETTLE;
        if self.pipeline.is_some() || self.members.is_empty() || !quiet {
            return;
        }
        let layers = self.manifest.config.layers.min(u32::from(u16::MAX)) as usize;
        let stages = self.members.len().min(layers.max(1)) as u16;
        let mut pipeline = PipelineState::new(PipelineConfig::new(stages));
        for node in self.members.keys() {
            pipeline.handle_joined(*node, now);
        }
        self.pipeline = Some(pipeline);
    }

    fn carry_out(&mut self, action: Action, now: Duration, ctx: &mut Context<Self>) {
        match action {
            Action::Profile { node } => {
                let spec = profile_spec(&self.manifest);
                self.say(node, CoordinatorMessage::Profile(Box::new(spec)));
            }
            Action::Plan { epoch, nodes } => self.make_plan(epoch, &nodes, now),
            Action::Assign { epoch, nodes } => {
                let Some(plan) = self.plan.as_ref().filter(|p| p.epoch == epoch) else { return };
                debug_assert_eq!(nodes.len(), plan.assignments.len());
                for (node, assignment) in plan.assignments.clone() {
                    self.say(node, CoordinatorMessage::Assign(Box::new(assignment)));
                }
            }
            Action::Start { epoch, nodes } => self.start(epoch, &nodes, now, ctx),
            Action::Stop { epoch, reason } => {
                tracing::warn!(%epoch, "the pipeline stopped: {reason}");
                self.starting = None;
                // Never full but for a stalled program: state must not get out of step.
                if self.batcher.try_send(PipelineDown { detail: reason }).is_err() {
                    tracing::error!("the batcher's mailbox is full");
                }
            }
            Action::Release { epoch, nodes } => {
                self.starting = None;
                for node in nodes {
                    self.say(node, CoordinatorMessage::Release { pipeline: PIPELINE, epoch });
                }
            }
        }
    }

    fn make_plan(&mut self, epoch: Epoch, nodes: &[(NodeId, StageProfile)], now: Duration) {
        let planned: Vec<PlanNode> = nodes
            .iter()
            .filter_map(|(id, profile)| {
                let hello = self.members.get(id)?.hello.clone();
                Some(PlanNode { id: *id, hello, profile: *profile })
            })
            .collect();
        let result = plan(&self.manifest, &self.deployment, (PIPELINE, epoch), &planned);
        let Some(pipeline) = &mut self.pipeline else { return };
        match result {
            Ok(plan) => {
                let order = plan.assignments.iter().map(|(node, _)| *node).collect();
                self.plan = Some(plan);
                pipeline.handle_planned(epoch, order, now);
            }
            Err(e) => {
                tracing::error!("{e}");
                pipeline.handle_plan_failed(epoch, &e.to_string(), now);
            }
        }
    }

    /// Every stage is loaded: connect the edges.
    fn start(&mut self, epoch: Epoch, nodes: &[NodeId], now: Duration, ctx: &mut Context<Self>) {
        let (Some(plan), Some(first), Some(last)) = (&self.plan, nodes.first(), nodes.last())
        else {
            return;
        };
        let (Some(first), Some(last)) = (self.members.get(first), self.members.get(last)) else {
            return; // Lost this very moment: the machine hears of it next.
        };
        let credits = plan.assignments.first().map_or(2, |(_, a)| a.credits);
        let capacity = credits as usize + 2;
        let (steps, step_frames) = mpsc::channel(capacity);
        let (opens, open_frames) = mpsc::channel(capacity);
        let carry = |member: &Member, edge, frames| {
            let connection = member.connection.clone();
            edges::carry_out(ctx.address(), connection, (PIPELINE, epoch, edge), credits, frames);
        };
        carry(first, Edge::Steps, step_frames);
        carry(last, Edge::Sequences, open_frames);
        self.starting = Some(Starting {
            epoch,
            nodes: nodes.iter().copied().collect(),
            own: HashSet::from([Edge::Steps, Edge::Sequences, Edge::Results]),
            deadline: now + START_DEADLINE,
            up: Some(PipelineUp {
                pipeline: PIPELINE,
                epoch,
                config: plan.scheduler,
                steps,
                opens,
            }),
        });
        for node in nodes {
            self.say(*node, CoordinatorMessage::Start { pipeline: PIPELINE, epoch });
        }
    }

    /// Serves once nothing is left to connect.
    fn check_started(&mut self) {
        let done = |s: &mut Starting| s.nodes.is_empty() && s.own.is_empty();
        let Some(mut starting) = self.starting.take_if(done) else { return };
        let Some(up) = starting.up.take() else { return };
        if self.batcher.try_send(up).is_err() {
            self.edge_failed(starting.epoch, "the batcher's mailbox is full");
            return;
        }
        tracing::info!("pipeline ready, epoch {}\n{}", starting.epoch, self.plan_table());
        self.readiness.send_modify(|r| {
            r.ready = true;
            r.epochs += 1;
            r.detail.clear();
        });
    }

    fn edge_failed(&mut self, epoch: Epoch, message: &str) {
        let now = self.now();
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_edge_lost(epoch, message, now);
        }
    }

    fn is_serving(&self) -> bool {
        use millrace_shared::membership::PipelinePhase::Running;
        self.starting.is_none() && self.pipeline.as_ref().is_some_and(|p| p.phase() == Running)
    }

    fn detail(&self) -> String {
        match (&self.pipeline, &self.starting) {
            (_, Some(_)) => "the stages connect to each other".into(),
            (Some(pipeline), None) => pipeline.detail(),
            (None, None) if self.members.is_empty() => "no node has joined yet".into(),
            (None, None) => "waiting a moment for more nodes".into(),
        }
    }

    fn publish(&mut self) {
        let (ready, detail) = match self.is_serving() {
            true => (true, String::new()),
            false => (false, self.detail()),
        };
        let changed = self.readiness.send_if_modified(|r| {
            let changed = r.ready != ready || r.detail != detail;
            r.ready = ready;
            r.detail.clone_from(&detail);
            changed
        });
        if changed && !ready {
            tracing::info!("not ready: {detail}");
            let _ = self.batcher.try_send(PipelineDown { detail });
        }
    }

    fn stage_statuses(&self) -> Vec<StageStatus> {
        let Some(plan) = &self.plan else { return Vec::new() };
        let last = plan.assignments.len().saturating_sub(1);
        let status = |(i, (node_id, a)): (usize, &(NodeId, _))| {
            let a: &millrace_shared::wire::control::Assignment = a;
            let member = self.members.get(node_id);
            let beat = member.map(|m| m.heartbeat).unwrap_or_default();
            StageStatus {
                node_id: *node_id,
                node_name: member.map(|m| m.hello.name.clone()).unwrap_or_default(),
                first_layer: a.first_layer,
                end_layer: a.end_layer,
                embed: i == 0,
                head: i == last,
                weight_bytes: member.map_or(0, |m| m.report.weight_bytes),
                busy_seconds: beat.busy_seconds,
                wall_seconds: beat.wall_seconds,
                steps: beat.steps,
                threads: member.map_or(0, |m| m.hello.threads),
            }
        };
        plan.assignments.iter().enumerate().map(status).collect()
    }

    /// The plan for people.
    fn plan_table(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let mut table = String::from("  stage  node             layers          weights      KV\n");
        let Some(plan) = &self.plan else { return table };
        for ((node, a), stage) in plan.assignments.iter().zip(self.stage_statuses()) {
            let layers = match (a.first_layer, a.end_layer) {
                (first, end) if first < end => format!("{first}-{}", end - 1),
                _ => "none".to_owned(),
            };
            let extra = if stage.head { " + head" } else { "" };
            let kv = self.members.get(node).map_or(0, |m| m.report.kv_bytes);
            table.push_str(&format!(
                "  {:<5}  {:<15}  {:<14}  {:>7.1} MiB  {:>6.1} MiB\n",
                a.stage,
                stage.node_name,
                format!("{layers}{extra}"),
                mib(stage.weight_bytes),
                mib(kv)
            ));
        }
        let s = &plan.scheduler;
        let tokens = s.num_blocks * s.block_size;
        table.push_str(&format!(
            "  KV cache: {} blocks, {tokens} tokens; {} sequences of {} at once; {} micro-batches in \
             flight; the head counts as {:.1} layers",
            s.num_blocks,
            tokens / s.max_model_len.max(1),
            s.max_model_len,
            s.max_in_flight,
            plan.head_in_layers
        ));
        table
    }

    /// Why a node cannot be a member.
    fn objection(&self, hello: &Hello) -> Option<String> {
        if hello.wire_version != WIRE_VERSION {
            return Some(format!(
                "the node speaks wire version {}, this coordinator {WIRE_VERSION}: run the same \
                 version on every machine (coordinator {}, node {})",
                hello.wire_version,
                env!("CARGO_PKG_VERSION"),
                hello.version
            ));
        }
        let other =
            self.members.values().find(|m| m.hello.numerics_revision != hello.numerics_revision)?;
        Some(format!(
            "the node's engine computes as '{}', this cluster as '{}': results would depend on \
             where a layer runs; run the same version and engine on every machine",
            hello.numerics_revision, other.hello.numerics_revision
        ))
    }

    fn on_node(&mut self, id: NodeId, session: Session, message: NodeMessage) {
        let now = self.now();
        let Some(member) = self.members.get_mut(&id).filter(|m| m.session == session) else {
            return; // An ended session changes nothing.
        };
        // Whatever a node says proves that it lives.
        self.membership.handle_heartbeat(id, session, now);
        let Some(pipeline) = &mut self.pipeline else {
            if let NodeMessage::Heartbeat(beat) = message {
                member.heartbeat = beat;
            }
            return;
        };
        match message {
            NodeMessage::Hello(_) => tracing::warn!(node = %id, "a second hello, ignored"),
            NodeMessage::Heartbeat(beat) => member.heartbeat = beat,
            NodeMessage::Profiled { profile } => pipeline.handle_profiled(id, profile, now),
            NodeMessage::Ready { epoch, report, .. } => {
                member.report = report;
                pipeline.handle_ready(id, epoch, now);
            }
            NodeMessage::Started { epoch, .. } => {
                if let Some(starting) = self.starting.as_mut().filter(|s| s.epoch == epoch) {
                    starting.nodes.remove(&id);
                }
                self.check_started();
            }
            NodeMessage::LoadFailed { epoch, message, .. } => {
                tracing::error!(node = %id, "cannot load its stage: {message}");
                pipeline.handle_load_failed(id, epoch, &message, now);
            }
            NodeMessage::EdgeLost { epoch, message, .. } => {
                pipeline.handle_edge_lost(epoch, &message, now);
            }
            NodeMessage::Leaving => self.membership.handle_leaving(id, session),
        }
    }
}

impl Actor for Cluster {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(256);
        ctx.run_interval(TICK, |cluster, ctx| cluster.advance(ctx));
    }
}

/// A node introduces itself; the answer is its session, or why it is refused.
#[derive(Debug, Message)]
#[rtype(result = "Result<Session, String>")]
pub struct NodeHello {
    /// From its certificate.
    pub id: NodeId,
    /// What it says of itself.
    pub hello: Hello,
    /// To it.
    pub connection: Connection,
    /// Messages to it.
    pub out: mpsc::Sender<CoordinatorMessage>,
}

impl Handler<NodeHello> for Cluster {
    type Result = Result<Session, String>;

    fn handle(&mut self, m: NodeHello, ctx: &mut Context<Self>) -> Self::Result {
        if let Some(message) = self.objection(&m.hello) {
            tracing::warn!(node = %m.id, "refused: {message}");
            return Err(message);
        }
        let session = self.membership.handle_hello(m.id, self.now());
        tracing::info!(
            node = %m.id, name = %m.hello.name, address = %m.hello.advertise,
            threads = m.hello.threads, hardware = %m.hello.hardware, "node joined"
        );
        let welcome = CoordinatorMessage::Welcome {
            node_id: m.id,
            heartbeat_ms: HEARTBEAT.as_millis() as u32,
        };
        let _ = m.out.try_send(welcome);
        let member = Member {
            session,
            hello: m.hello,
            connection: m.connection,
            out: m.out,
            heartbeat: Heartbeat::default(),
            report: LoadReport::default(),
        };
        if let Some(replaced) = self.members.insert(m.id, member) {
            replaced.connection.close("the node connected again");
        }
        self.advance(ctx);
        Ok(session)
    }
}

/// A node says something.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct FromNode {
    /// Who.
    pub id: NodeId,
    /// Its presence.
    pub session: Session,
    /// What.
    pub message: NodeMessage,
}

impl Handler<FromNode> for Cluster {
    type Result = ();

    fn handle(&mut self, m: FromNode, ctx: &mut Context<Self>) {
        self.on_node(m.id, m.session, m.message);
        self.advance(ctx);
    }
}

/// A node's control stream ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct NodeGone {
    /// Who.
    pub id: NodeId,
    /// Its presence.
    pub session: Session,
}

impl Handler<NodeGone> for Cluster {
    type Result = ();

    fn handle(&mut self, m: NodeGone, ctx: &mut Context<Self>) {
        self.membership.handle_disconnect(m.id, m.session);
        self.advance(ctx);
    }
}

/// A node opened a stage edge to the coordinator.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct EdgeOffered {
    /// Who, by its certificate.
    pub node: NodeId,
    /// What for.
    pub plane: Plane,
    /// Our half.
    pub send: SendStream,
    /// Its half.
    pub recv: RecvStream,
}

impl Handler<EdgeOffered> for Cluster {
    type Result = ();

    fn handle(&mut self, m: EdgeOffered, ctx: &mut Context<Self>) {
        // Dropping the halves refuses the stream and harms nothing else.
        let Plane::Stage { pipeline: PIPELINE, epoch, edge: Edge::Results } = m.plane else {
            tracing::warn!(node = %m.node, plane = ?m.plane, "refused a stream");
            return;
        };
        let last =
            self.plan.as_ref().and_then(|p| p.assignments.last()).filter(|(n, _)| *n == m.node);
        let (Some((_, assignment)), Some(starting)) =
            (last, self.starting.as_mut().filter(|s| s.epoch == epoch))
        else {
            tracing::warn!(node = %m.node, %epoch, "refused a results edge: not the last stage");
            return;
        };
        if !starting.own.remove(&Edge::Results) {
            tracing::warn!(node = %m.node, "refused a second results edge");
            return;
        }
        let halves = (m.send, m.recv);
        edges::carry_in(ctx.address(), self.batcher.clone(), halves, epoch, assignment.credits);
        self.check_started();
    }
}

/// One of the coordinator's edges is open.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct OwnEdgeOpen {
    /// Of this epoch.
    pub epoch: Epoch,
    /// Which.
    pub edge: Edge,
}

impl Handler<OwnEdgeOpen> for Cluster {
    type Result = ();

    fn handle(&mut self, m: OwnEdgeOpen, _: &mut Context<Self>) {
        if let Some(starting) = self.starting.as_mut().filter(|s| s.epoch == m.epoch) {
            starting.own.remove(&m.edge);
        }
        self.check_started();
    }
}

/// One of the coordinator's edges is lost.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct EdgeFailed {
    /// Of this epoch.
    pub epoch: Epoch,
    /// How.
    pub message: String,
}

impl Handler<EdgeFailed> for Cluster {
    type Result = ();

    fn handle(&mut self, m: EdgeFailed, ctx: &mut Context<Self>) {
        self.edge_failed(m.epoch, &m.message);
        self.advance(ctx);
    }
}

/// What the cluster looks like; counters of the scheduler are not filled in.
#[derive(Debug, Message)]
#[rtype(result = "ClusterStatus")]
pub struct GetStatus;

impl Handler<GetStatus> for Cluster {
    type Result = MessageResult<GetStatus>;

    fn handle(&mut self, _: GetStatus, _: &mut Context<Self>) -> Self::Result {
        let ready = self.is_serving();
        let scheduler = self.plan.as_ref().map(|p| p.scheduler);
        MessageResult(ClusterStatus {
            ready,
            detail: if ready { String::new() } else { self.detail() },
            epoch: self.pipeline.as_ref().map_or(0, |p| p.epoch().0),
            stages: self.stage_statuses(),
            nodes: self.members.len() as u32,
            kv_blocks: scheduler.map_or(0, |s| s.num_blocks),
            kv_block_size: scheduler.map_or(0, |s| s.block_size),
            ..ClusterStatus::default()
        })
    }
}

/// The coordinator is shutting down: tell the nodes, end what runs, decide nothing any more.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Shutdown;

impl Handler<Shutdown> for Cluster {
    type Result = ();

    fn handle(&mut self, _: Shutdown, _: &mut Context<Self>) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        for node in self.members.keys() {
            self.say(*node, CoordinatorMessage::Shutdown);
        }
        let detail = "the coordinator is shutting down".to_owned();
        let _ = self.batcher.try_send(PipelineDown { detail });
    }
}
