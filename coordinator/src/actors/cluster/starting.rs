//! From loaded stages to an epoch that serves: every edge is connected, then the batcher gets it.

use std::collections::HashSet;
use std::time::Duration;

use actix::prelude::*;
use millrace_shared::id::{Epoch, NodeId};
use millrace_shared::membership::LinkTimes;
use millrace_shared::partition::LayerRange;
use millrace_shared::wire::Edge;
use millrace_shared::wire::control::{Assignment, CoordinatorMessage};
use tokio::sync::mpsc;

use super::{Cluster, Member};
use crate::actors::batcher::PipelineUp;
use crate::actors::edges;
use crate::plan::Plan;

/// From the order to start until every edge is connected.
const START_DEADLINE: Duration = Duration::from_secs(15);

/// Edges that are not connected yet.
pub(super) struct Starting {
    pub(super) epoch: Epoch,
    pub(super) nodes: HashSet<NodeId>,
    pub(super) own: HashSet<Edge>,
    pub(super) deadline: Duration,
    pub(super) up: Option<PipelineUp>,
}

impl Cluster {
    /// Every stage is loaded: connect the edges.
    pub(super) fn start(
        &mut self,
        epoch: Epoch,
        nodes: &[NodeId],
        now: Duration,
        ctx: &mut Context<Self>,
    ) {
        let (Some(plan), Some(first), Some(last)) =
            (self.plan_of(epoch), nodes.first(), nodes.last())
        else {
            return;
        };
        let (Some(first), Some(last)) = (self.members.get(first), self.members.get(last)) else {
            return; // Lost this very moment: the machine hears of it next.
        };
        let held = |(id, a): &(NodeId, Assignment)| {
            (*id, LayerRange { first: a.first_layer, end: a.end_layer })
        };
        let stood = plan.assignments.iter().map(held).collect();
        let credits = plan.assignments.first().map_or(2, |(_, a)| a.own_credits());
        // Every micro-batch in flight, a burst of frames that only carry releases, and masks that
        // come one by one, at most one for each sequence.
        let capacity = credits as usize + 64 + plan.scheduler.max_num_seqs as usize;
        let (steps, step_frames) = mpsc::channel(capacity);
        let (opens, open_frames) = mpsc::channel(capacity);
        let number = self.number;
        let carry = |member: &Member, edge, frames| {
            let connection = member.connection.clone();
            edges::carry_out(ctx.address(), connection, (number, epoch, edge), credits, frames);
        };
        carry(first, Edge::Steps, step_frames);
        carry(last, Edge::Sequences, open_frames);
        self.starting = Some(Starting {
            epoch,
            nodes: nodes.iter().copied().collect(),
            own: HashSet::from([Edge::Steps, Edge::Sequences, Edge::Results]),
            deadline: now + START_DEADLINE,
            up: Some(PipelineUp {
                pipeline: self.number,
                epoch,
                config: plan.scheduler,
                vocabulary: self.manifest.config.vocab,
                hidden: self.manifest.config.hidden,
                costs: plan.costs.clone(),
                nodes: nodes.iter().map(|id| self.name_of(*id)).collect(),
                lease: self.deployment.lease,
                links: self.link_times(plan),
                steps,
                opens,
                cluster: ctx.address(),
            }),
        });
        self.stood = stood;
        for node in nodes {
            self.say(*node, CoordinatorMessage::Start { pipeline: self.number, epoch });
        }
    }

    /// What the ways between the stages of a plan take.
    fn link_times(&self, plan: &Plan) -> LinkTimes {
        let width = self.deployment.activation_dtype.bytes() as u64;
        let bytes = u64::from(self.manifest.config.hidden) * width;
        let mut links = LinkTimes::default();
        for way in plan.ways() {
            let round_trip = self.ways.outcome(way, self.now()).and_then(|o| o.as_ref().ok());
            links.add(self.ways.rate(way), round_trip.copied().unwrap_or_default(), bytes);
        }
        links
    }

    /// Serves once nothing is left to connect.
    pub(super) fn check_started(&mut self) {
        let done = |s: &mut Starting| s.nodes.is_empty() && s.own.is_empty();
        let Some(mut starting) = self.starting.take_if(done) else { return };
        let Some(up) = starting.up.take() else { return };
        if self.batcher.try_send(up).is_err() {
            self.edge_failed(starting.epoch, "the batcher's mailbox is full");
            return;
        }
        if !self.is_next(starting.epoch) {
            tracing::info!("pipeline ready, epoch {}\n{}", starting.epoch, self.plan_table());
            self.tell_plan("ready", starting.epoch);
        }
        self.readiness.send_modify(|r| {
            r.ready = true;
            r.epochs += 1;
            r.failed = None;
            r.detail.clear();
        });
    }
}
