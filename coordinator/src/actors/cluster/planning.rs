//! From measured nodes to a plan whose ways are open.
//!
//! A plan is drafted, the ways it needs are tried, and it is adopted when all are open. A closed way
//! is one line for the operator, and the plan is drafted again without it; so it is with the
//! bandwidths of the ways once they are measured.

use std::time::Duration;

use millrace_shared::id::{Epoch, NodeId};
use millrace_shared::wire::control::{CoordinatorMessage, Peer, StageProfile, WayMeasured};

use super::Cluster;
use super::ways::Way;
use crate::plan::{Plan, PlanNode, pins, plan};

/// Among so many nodes every way is tried before the first plan.
const TRY_ALL: usize = 8;

/// A plan waits for no bandwidth longer than this: on slow or bad ways bursts take seconds each.
const MEASURING: Duration = Duration::from_secs(3);

/// A plan whose ways are being tried.
pub(super) struct Draft {
    nodes: Vec<(NodeId, StageProfile)>,
    plan: Plan,
    /// Ways whose bandwidth it reckons with.
    measured: usize,
    /// When it was drafted.
    at: Duration,
}

impl Cluster {
    /// Why the last attempt to form a pipeline failed, for whoever waits for it.
    pub(super) fn failed(&self, message: String) {
        self.readiness.send_modify(|r| r.failed = Some(message));
    }

    /// The nodes as plans see them, at the pace they were last seen to work.
    pub(super) fn plan_nodes(&self, nodes: &[(NodeId, StageProfile)]) -> Vec<PlanNode> {
        let known = |(id, profile): &(NodeId, StageProfile)| {
            let member = self.members.get(id)?;
            let (hello, round_trip) = (member.hello.clone(), Some(member.connection.rtt()));
            let profile = profile.slower(self.pace_of(*id));
            Some(PlanNode { id: *id, hello, profile, round_trip })
        };
        nodes.iter().filter_map(known).collect()
    }

    /// Cuts the model over these nodes, along no way that is closed.
    pub(super) fn cut(
        &self,
        epoch: Epoch,
        nodes: &[(NodeId, StageProfile)],
        now: Duration,
    ) -> Result<Plan, String> {
        let (planned, ways) = (self.plan_nodes(nodes), self.ways.known(now));
        plan(&self.manifest, &self.deployment, (self.number, epoch), &planned, &ways, &self.stood)
            .map_err(|e| e.to_string())
    }

    pub(super) fn make_plan(
        &mut self,
        epoch: Epoch,
        nodes: Vec<(NodeId, StageProfile)>,
        now: Duration,
    ) {
        self.draft = None;
        for remark in pins::remarks(&self.deployment.pins, &self.plan_nodes(&nodes)) {
            tracing::warn!("{remark}");
        }
        if nodes.len() <= TRY_ALL {
            // So that a closed way costs one wait, whatever the plan turns to next.
            for &(from, _) in &nodes {
                for &(to, _) in nodes.iter().filter(|(to, _)| *to != from) {
                    if self.ways.outcome((from, to), now).is_none() {
                        self.try_way((from, to), now);
                    }
                }
            }
        }
        match self.cut(epoch, &nodes, now) {
            Ok(plan) => {
                let measured = self.ways.measured();
                self.draft = Some(Draft { nodes, plan, measured, at: now });
                self.check_ways(now);
            }
            Err(message) => {
                tracing::error!("{message}");
                let beside = self.is_next(epoch);
                let postponed = self.ways.known(now).iter().any(|way| way.round_trip.is_none());
                if let Some(pipeline) = &mut self.pipeline {
                    match postponed {
                        true => pipeline.handle_plan_postponed(epoch, &message, now),
                        false => pipeline.handle_plan_failed(epoch, &message, now),
                    }
                }
                if !beside {
                    self.failed(message);
                }
            }
        }
    }

    /// Adopts the draft when all its ways are open, or drafts anew.
    pub(super) fn check_ways(&mut self, now: Duration) {
        self.ways.expire(now);
        if let Some((from, to)) = self.ways.next_to_measure(now) {
            self.say_try((from, to), true);
        }
        let Some(draft) = &self.draft else { return };
        let (mut waiting, mut closed) = (Vec::new(), false);
        for way in draft.plan.ways() {
            match self.ways.outcome(way, now) {
                Some(Ok(_)) => {}
                Some(Err(_)) => closed = true,
                None => waiting.push(way),
            }
        }
        let late = now.saturating_sub(draft.at) >= MEASURING;
        let known = waiting.is_empty() && (late || !self.ways.is_measuring());
        let Some(draft) = self.draft.take_if(|_| closed || known) else {
            return waiting.into_iter().for_each(|way| self.try_way(way, now));
        };
        let epoch = draft.plan.epoch;
        // Where not all ways were tried, others would look better for being unknown.
        let more = draft.measured != self.ways.measured();
        let better_known = more && !late && draft.nodes.len() <= TRY_ALL;
        if closed || better_known {
            return self.make_plan(epoch, draft.nodes, now);
        }
        let beside = self.is_next(epoch);
        let order = draft.plan.nodes();
        *(if beside { &mut self.next_plan } else { &mut self.plan }) = Some(draft.plan);
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_planned(epoch, order, now);
        }
    }

    pub(super) fn try_way(&mut self, way: Way, now: Duration) {
        if self.members.contains_key(&way.1) && self.ways.begin(way, now) {
            self.say_try(way, false);
        }
    }

    fn say_try(&self, (from, to): Way, burst: bool) {
        let Some(member) = self.members.get(&to) else { return };
        let peer = Peer { node_id: to, address: member.hello.advertise.clone() };
        self.say(from, CoordinatorMessage::TryEdge { peer, burst });
    }

    pub(super) fn on_way_tried(
        &mut self,
        way: Way,
        outcome: Result<WayMeasured, String>,
        now: Duration,
    ) {
        if let Err(message) = &outcome {
            tracing::error!("{}", self.closed_way(way, message));
        }
        self.ways.end(way, outcome, now);
        self.check_ways(now);
        self.answer_doctors(now);
    }

    /// The line that says what to do about a closed way.
    pub(super) fn closed_way(&self, (from, to): Way, message: &str) -> String {
        let port = (self.members.get(&to))
            .and_then(|m| m.hello.advertise.rsplit_once(':'))
            .map_or("the node's port", |(_, port)| port);
        let (from, to) = (self.name_of(from), self.name_of(to));
        format!("{from} -> {to}: {message}; open UDP {port} inbound on {to}")
    }
}
