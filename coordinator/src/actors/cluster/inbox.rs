//! What others say to [`Cluster`].

use actix::prelude::*;
use millrace_net::{Connection, RecvStream, SendStream};
use millrace_shared::id::{Epoch, NodeId};
use millrace_shared::membership::Session;
use millrace_shared::wire::control::{
    CoordinatorMessage, Heartbeat, Hello, LoadReport, NodeMessage, VoidRows,
};
use millrace_shared::wire::rpc::ClusterStatus;
use millrace_shared::wire::{Edge, Plane};
use tokio::sync::mpsc;

use super::{Cluster, Member};
use crate::actors::batcher::PipelineDown;
use crate::actors::edges;
use crate::plan::Plan;

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
        if let Some(message) = self.objection(m.id, &m.hello) {
            tracing::warn!(node = %m.id, "refused: {message}");
            return Err(message);
        }
        let session = self.membership.handle_hello(m.id, self.now());
        tracing::info!(
            node = %m.id, name = %m.hello.name, address = %m.hello.advertise,
            threads = m.hello.threads, hardware = %m.hello.hardware, "node joined"
        );
        self.chronicle.note("joined", format!("{} at {}", m.hello.name, m.hello.advertise));
        self.called.note(m.id, &m.hello.name);
        let welcome = CoordinatorMessage::Welcome {
            node_id: m.id,
            heartbeat_ms: self.deployment.heartbeat.as_millis() as u32,
            lease_ms: self.deployment.lease.as_millis() as u32,
        };
        let _ = m.out.try_send(welcome);
        let member = Member {
            session,
            hello: m.hello,
            connection: m.connection,
            out: m.out,
            heartbeat: Heartbeat::default(),
            report: LoadReport::default(),
            next_report: None,
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
        let ours = |plane: &Plane| match plane {
            Plane::Stage { pipeline, epoch, edge: Edge::Results } if *pipeline == self.number => {
                Some(*epoch)
            }
            _ => None,
        };
        let Some(epoch) = ours(&m.plane) else {
            tracing::warn!(node = %m.node, plane = ?m.plane, "refused a stream");
            return;
        };
        let last = self.plan_of(epoch).and_then(|p| p.assignments.last());
        let credits = last.filter(|(n, _)| *n == m.node).map(|(_, a)| a.own_credits());
        let (Some(credits), Some(starting)) =
            (credits, self.starting.as_mut().filter(|s| s.epoch == epoch))
        else {
            tracing::warn!(node = %m.node, %epoch, "refused a results edge: not the last stage");
            return;
        };
        if !starting.own.remove(&Edge::Results) {
            tracing::warn!(node = %m.node, "refused a second results edge");
            return;
        }
        let halves = (m.send, m.recv);
        edges::carry_in(ctx.address(), self.batcher.clone(), halves, epoch, credits);
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

/// The batcher has begun an epoch.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Switched {
    /// This one.
    pub epoch: Epoch,
}

impl Handler<Switched> for Cluster {
    type Result = ();

    fn handle(&mut self, m: Switched, ctx: &mut Context<Self>) {
        if !self.is_next(m.epoch) {
            return;
        }
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_switched(m.epoch);
        }
        self.plan = self.next_plan.take();
        for member in self.members.values_mut() {
            if let Some(report) = member.next_report.take() {
                member.report = report;
            }
        }
        tracing::info!("switched to a new cut, epoch {}\n{}", m.epoch, self.plan_table());
        self.tell_plan("cut", m.epoch);
        self.advance(ctx);
    }
}

/// Rows under way that nobody wants any more.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct RowsVoid {
    /// Of this epoch.
    pub epoch: Epoch,
    /// Which.
    pub rows: Vec<VoidRows>,
}

impl Handler<RowsVoid> for Cluster {
    type Result = ();

    fn handle(&mut self, RowsVoid { epoch, rows }: RowsVoid, _: &mut Context<Self>) {
        let pipeline = self.number;
        for node in self.plan_of(epoch).map(Plan::nodes).unwrap_or_default() {
            let message = CoordinatorMessage::Void { pipeline, epoch, rows: rows.clone() };
            // It saves work; a link that is busy has more important things to carry.
            let _ = self.members.get(&node).map(|m| m.out.try_send(message));
        }
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
            process_seconds: millrace_net::cpu_time::process_seconds(),
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
        let _ = self.batcher.try_send(PipelineDown { detail, forever: true });
    }
}
