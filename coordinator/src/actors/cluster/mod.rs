//! Members, plan and epochs.
//!
//! Feeds what happens to the machines of `millrace_shared::membership` and carries out what they
//! decide. An epoch serves once every stage has connected its edge out, the coordinator's own edges
//! are open and the results edge has come in. The next epoch is made ready beside the one that
//! serves: stages, then edges, then the batcher goes over and says `Switched`. Inbox: `NodeHello`,
//! `FromNode`, `NodeGone`, `EdgeOffered`, `OwnEdgeOpen`, `EdgeFailed`, `Switched`, `Uneven`,
//! `Paced`, `RowsVoid`, `GetStatus`, `Admin`. Held by member tasks, the batcher and the service.

mod admin;
mod called;
mod collect;
mod drain;
mod entry;
mod inbox;
mod pace;
mod planning;
mod recut;
mod report;
mod sick;
mod starting;
mod trouble;
mod ways;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use millrace_net::Connection;
use millrace_shared::id::{Epoch, NodeId, PipelineId};
use millrace_shared::membership::{
    Action, Event, LostReason, Membership, MembershipConfig, PipelineConfig, PipelineState, Session,
};
use millrace_shared::model::ModelManifest;
use millrace_shared::partition::LayerRange;
use millrace_shared::wire::control::{
    CoordinatorMessage, Heartbeat, Hello, LoadReport, NodeMessage,
};
use tokio::sync::{mpsc, watch};

use super::batcher::{Batcher, NodeDied, PipelineDown};
use crate::chronicle::Chronicle;
use crate::metrics::Metrics;
use crate::plan::{Deployment, Plan, profile_spec};
pub use admin::Admin;
use admin::Doctor;
use called::Called;
pub use inbox::{
    EdgeFailed, EdgeOffered, FromNode, GetStatus, NodeGone, NodeHello, OwnEdgeOpen, RowsVoid,
    Shutdown, Switched,
};
pub use pace::Paced;
use planning::Draft;
pub use recut::Uneven;
pub use sick::{Fared, StepFailed};
use starting::Starting;
use trouble::{Certainty, Trouble};
pub use trouble::{GetPlaces, Places, Spot, StagePlace, Stalled, whereabouts};
use ways::Ways;

/// How often leases and deadlines are looked at: a small part of the lease.
const TICK: Duration = Duration::from_millis(50);
/// Without `--stages`: quiet time after a node joined until the plan is made from those present.
const SETTLE: Duration = Duration::from_secs(2);

/// Whether requests are served, for whoever waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Serving.
    pub ready: bool,
    /// Epochs that served so far.
    pub epochs: u64,
    /// What it waits for, when not serving.
    pub detail: String,
    /// Why the last attempt to form a pipeline failed: without other nodes the next will fail too.
    pub failed: Option<String>,
}

struct Member {
    session: Session,
    hello: Hello,
    connection: Connection,
    out: mpsc::Sender<CoordinatorMessage>,
    heartbeat: Heartbeat,
    report: LoadReport,
    /// Of the stage that is made ready beside the one that works.
    next_report: Option<LoadReport>,
}

/// See the module's documentation.
pub struct Cluster {
    started: Instant,
    manifest: Arc<ModelManifest>,
    deployment: Deployment,
    /// As told; `None` for however many come.
    stages: Option<u16>,
    batcher: Addr<Batcher>,
    /// Of the one pipeline: which life of the coordinator this is.
    number: PipelineId,
    membership: Membership,
    pipeline: Option<PipelineState>,
    members: BTreeMap<NodeId, Member>,
    called: Called,
    last_join: Duration,
    plan: Option<Plan>,
    /// Of the epoch that is made ready while another serves.
    next_plan: Option<Plan>,
    draft: Option<Draft>,
    /// The cut that was last loaded: what its nodes have at hand.
    stood: Vec<(NodeId, LayerRange)>,
    starting: Option<Starting>,
    ways: Ways,
    doctors: Vec<Doctor>,
    collecting: collect::Collecting,
    drains: drain::Drains,
    sick: sick::Sick,
    /// How many times as long as measured alone a node takes while it serves.
    pace: BTreeMap<NodeId, f64>,
    /// When a node joined an epoch that serves.
    joined: Option<Duration>,
    /// A loss has left fewer stages than there were.
    shrunk: bool,
    readiness: watch::Sender<Readiness>,
    last_tick: Duration,
    stopping: bool,
    /// What is saved where when micro-batches do not come back.
    rings: Option<(Arc<Metrics>, PathBuf)>,
    /// What is recovered from.
    trouble: Option<Trouble>,
    chronicle: Arc<Chronicle>,
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
        let membership = Membership::new(MembershipConfig::of_lease(deployment.lease));
        Self {
            started: Instant::now(),
            manifest,
            deployment,
            stages,
            batcher,
            number: PipelineId(1),
            membership,
            pipeline: stages.map(|n| PipelineState::new(PipelineConfig::new(n))),
            members: BTreeMap::new(),
            called: Called::default(),
            last_join: Duration::ZERO,
            plan: None,
            next_plan: None,
            draft: None,
            stood: Vec::new(),
            starting: None,
            ways: Ways::default(),
            doctors: Vec::new(),
            collecting: collect::Collecting::default(),
            drains: drain::Drains::default(),
            sick: sick::Sick::default(),
            pace: BTreeMap::new(),
            joined: None,
            shrunk: false,
            readiness,
            last_tick: Duration::ZERO,
            stopping: false,
            rings: None,
            trouble: None,
            chronicle: Arc::default(),
        }
    }

    /// The same, in this life of the coordinator: no two lives have a pipeline of the same number,
    /// so that nothing that was meant for one is taken for something of the other.
    #[must_use]
    pub fn in_life(mut self, life: u32) -> Self {
        self.number = PipelineId(life);
        self
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
        while let Some(event) = self.membership.poll_handled() {
            self.on_membership(event, now);
        }
        self.settle(now);
        self.check_ways(now);
        self.consider_joined(now);
        self.check_drains(now);
        self.check_sick(now);
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

    /// Looks at leases. Only here: while messages wait, silence means nothing. A tick that comes
    /// late says that this program was held up, and that heartbeats may wait in its queues.
    fn tick(&mut self, ctx: &mut Context<Self>) {
        if self.stopping {
            return;
        }
        let now = self.now();
        if now.saturating_sub(self.last_tick) > 5 * TICK {
            self.membership.handle_own_delay(now);
        }
        self.last_tick = now;
        self.answer_doctors(now);
        while let Some(event) = self.membership.poll_event(now) {
            self.on_membership(event, now);
        }
        self.advance(ctx);
    }

    fn on_membership(&mut self, event: Event, now: Duration) {
        match event {
            Event::Joined { node, .. } => {
                self.last_join = now;
                self.joined = self.is_serving().then_some(now);
                self.ways.forget(node);
                self.pace.remove(&node);
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
                let name = name.unwrap_or_default();
                tracing::warn!(%node, name, "node lost: {reason}");
                self.chronicle.note("lost", format!("{name}: {reason}"));
                if self.plan.as_ref().is_some_and(|p| p.nodes().contains(&node)) {
                    let what = format!("node {name} was lost ({reason})");
                    self.note_trouble(Certainty::Node, Some(name.clone()), what);
                }
                if let Some(member) = self.members.get(&node).filter(|m| m.session == session) {
                    member.connection.close("lost");
                    self.members.remove(&node);
                }
                self.ways.forget(node);
                if reason != LostReason::Left && self.dies_serving(node) {
                    let _ = self.batcher.try_send(NodeDied);
                }
                if let Some(pipeline) = &mut self.pipeline {
                    self.shrunk |= pipeline.chosen().contains(&node);
                    pipeline.handle_lost(node, &reason.to_string(), now);
                }
                self.end_drain(node, now);
                self.forget_sick(node, now);
            }
        }
    }

    /// Without `--stages`, the first plan takes whoever is there after a quiet moment.
    fn settle(&mut self, now: Duration) {
        let quiet = now.saturating_sub(self.last_join) >= SETTLE;
        if self.pipeline.is_some() || self.members.is_empty() || !quiet {
            return;
        }
        let most = self.manifest.config.layers.clamp(1, u32::from(u16::MAX)) as u16;
        let config = PipelineConfig { flexible: true, ..PipelineConfig::new(most) };
        let mut pipeline = PipelineState::new(config);
        for node in self.members.keys() {
            pipeline.handle_joined(*node, now);
        }
        self.pipeline = Some(pipeline);
    }

    fn carry_out(&mut self, action: Action, now: Duration, ctx: &mut Context<Self>) {
        match action {
            Action::Profile { node } => {
                let host = self.members.get(&node).map(|m| m.hello.host.as_str());
                let sharing = self.members.values().filter(|m| Some(m.hello.host.as_str()) == host);
                let spec = profile_spec(&self.manifest, sharing.count() as u32);
                self.say(node, CoordinatorMessage::Profile(Box::new(spec)));
            }
            Action::Plan { epoch, nodes } => self.make_plan(epoch, nodes, now),
            Action::Assign { epoch, nodes } => {
                let beside = self.is_next(epoch);
                let Some(plan) = self.plan_of(epoch) else { return };
                debug_assert_eq!(nodes.len(), plan.assignments.len());
                for (node, assignment) in plan.assignments.clone() {
                    let assignment = Box::new(assignment);
                    self.say(node, CoordinatorMessage::Assign { assignment, beside });
                }
            }
            Action::Start { epoch, nodes } => self.start(epoch, &nodes, now, ctx),
            Action::Stop { epoch, reason } => {
                let reason = self.called.in_names(&reason);
                tracing::warn!(%epoch, "the pipeline stopped: {reason}");
                self.chronicle.note("stopped", format!("epoch {epoch}: {reason}"));
                self.starting = None;
                self.next_plan = None;
                self.draft = None;
                // Never full but for a stalled program: state must not get out of step.
                let down = PipelineDown { detail: reason, forever: false };
                if self.batcher.try_send(down).is_err() {
                    tracing::error!("the batcher's mailbox is full");
                }
            }
            Action::Abandon { epoch, nodes } => {
                let why = self.pipeline.as_ref().and_then(|p| p.trouble()).unwrap_or_default();
                let why = self.called.in_names(why);
                tracing::warn!(%epoch, "{why}");
                self.next_plan = None;
                self.starting = self.starting.take().filter(|s| s.epoch != epoch);
                for node in nodes {
                    self.say(node, CoordinatorMessage::Abandon { pipeline: self.number, epoch });
                }
            }
            Action::Release { epoch, nodes } => {
                self.starting = self.starting.take().filter(|s| s.epoch > epoch);
                for node in nodes {
                    self.say(node, CoordinatorMessage::Release { pipeline: self.number, epoch });
                }
            }
        }
    }

    fn is_next(&self, epoch: Epoch) -> bool {
        self.pipeline.as_ref().is_some_and(|p| p.next_epoch() == Some(epoch))
    }

    fn plan_of(&self, epoch: Epoch) -> Option<&Plan> {
        [&self.plan, &self.next_plan].into_iter().flatten().find(|p| p.epoch == epoch)
    }

    fn edge_failed(&mut self, epoch: Epoch, message: &str) {
        let now = self.now();
        // One of them may be closed for good: it is tried anew before the next plan.
        for way in self.plan_of(epoch).map(Plan::ways).unwrap_or_default() {
            self.ways.doubt(way);
        }
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_edge_lost(epoch, message, now);
        }
    }

    fn is_serving(&self) -> bool {
        use millrace_shared::membership::PipelinePhase::Running;
        let starts = |epoch| self.starting.as_ref().is_some_and(|s| s.epoch == epoch);
        self.pipeline.as_ref().is_some_and(|p| p.phase() == Running && !starts(p.epoch()))
    }

    fn detail(&self) -> String {
        match (&self.pipeline, &self.starting) {
            (_, Some(_)) => "the stages connect to each other".into(),
            (Some(pipeline), None) => self.called.in_names(&pipeline.detail()),
            (None, None) if self.members.is_empty() => "no node has joined yet".into(),
            (None, None) => "waiting a moment for more nodes".into(),
        }
    }

    fn publish(&mut self) {
        let (ready, detail) = match self.is_serving() {
            true => (true, String::new()),
            false => (false, self.detail()),
        };
        self.trouble = self.trouble.take().filter(|_| !ready);
        let changed = self.readiness.send_if_modified(|r| {
            let changed = r.ready != ready || r.detail != detail;
            r.ready = ready;
            r.detail.clone_from(&detail);
            changed
        });
        if changed && !ready {
            tracing::info!("not ready: {detail}");
            let _ = self.batcher.try_send(PipelineDown { detail, forever: false });
        }
    }

    fn on_node(&mut self, id: NodeId, session: Session, message: NodeMessage) {
        let now = self.now();
        let Some(member) = self.members.get_mut(&id).filter(|m| m.session == session) else {
            return; // An ended session changes nothing.
        };
        // Whatever a node says proves that it lives.
        self.membership.handle_heartbeat(id, session, now);
        let Some(pipeline) = &mut self.pipeline else {
            match message {
                NodeMessage::Heartbeat(beat) => member.heartbeat = beat,
                NodeMessage::Draining => self.begin_drain(id, now),
                NodeMessage::Collected { ticket, files } => self.collected(id, ticket, files),
                _ => {}
            }
            return;
        };
        match message {
            NodeMessage::Hello(_) => tracing::warn!(node = %id, "a second hello, ignored"),
            NodeMessage::Heartbeat(beat) => member.heartbeat = beat,
            NodeMessage::Profiled { profile } => {
                if profile.sound() != profile {
                    tracing::warn!(node = %id, "what it measured makes no sense: {profile:?}");
                }
                pipeline.handle_profiled(id, profile.sound(), now);
            }
            NodeMessage::Ready { epoch, report, .. } => {
                if pipeline.next_epoch() == Some(epoch) {
                    member.next_report = Some(report);
                } else {
                    member.report = report;
                }
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
                let name = member.hello.name.clone();
                let trouble = format!("node {name} could not load its stage ({message})");
                let beside = pipeline.next_epoch() == Some(epoch);
                pipeline.handle_load_failed(id, epoch, &message, now);
                if !beside {
                    self.note_trouble(Certainty::Node, Some(name), trouble);
                    self.failed(format!("a node could not load its stage: {message}"));
                }
            }
            NodeMessage::EdgeLost { epoch, message, .. } => {
                // Nobody but the epoch's own stages can end it.
                if self.plan_of(epoch).is_some_and(|p| p.nodes().contains(&id)) {
                    self.note_lost_edge(id, &message);
                    self.edge_failed(epoch, &message);
                }
            }
            NodeMessage::EdgeTried { to, outcome } => self.on_way_tried((id, to), outcome, now),
            NodeMessage::Leaving => self.membership.handle_leaving(id, session),
            NodeMessage::Draining => self.begin_drain(id, now),
            NodeMessage::Collected { ticket, files } => self.collected(id, ticket, files),
        }
    }
}

impl Actor for Cluster {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(256);
        ctx.run_interval(TICK, |cluster, ctx| cluster.tick(ctx));
    }
}
