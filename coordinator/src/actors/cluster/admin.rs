//! What administrators ask of the cluster.

use std::collections::BTreeSet;
use std::time::Duration;

use actix::prelude::*;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::membership::CordonReason;
use millrace_shared::wire::admin::{AdminReply, AdminRequest, EdgeStatus, NodeRole, NodeStatus};
use millrace_shared::wire::control::CoordinatorMessage;
use tokio::sync::oneshot;

use super::Cluster;
use super::ways::Way;

/// A check of all ways that somebody waits for.
pub(super) struct Doctor {
    ways: Vec<Way>,
    answer: oneshot::Sender<Result<AdminReply, Status>>,
}

/// An administrator's call.
#[derive(Debug, Message)]
#[rtype(result = "Result<AdminReply, Status>")]
pub struct Admin {
    /// What.
    pub request: AdminRequest,
    /// KV blocks in use: what they hold a new cut computes again.
    pub blocks_used: u32,
}

fn refused(message: String) -> Status {
    Status::new(ErrorCode::FailedPrecondition, message)
}

impl Handler<Admin> for Cluster {
    type Result = ResponseFuture<Result<AdminReply, Status>>;

    fn handle(&mut self, m: Admin, ctx: &mut Context<Self>) -> Self::Result {
        let block_size = self.plan.as_ref().map_or(0, |p| p.scheduler.block_size);
        let cached = u64::from(m.blocks_used) * u64::from(block_size);
        let answer = match m.request {
            AdminRequest::Nodes => Ok(AdminReply::Nodes(self.node_statuses())),
            AdminRequest::Cordon { node } => self.cordon(&node, cached),
            AdminRequest::Uncordon { node } => self.uncordon(&node),
            AdminRequest::Recut { apply } => self.recut(apply, cached),
            AdminRequest::Drain { node } => self.drain(&node),
            AdminRequest::Describe => Ok(AdminReply::Description(self.description())),
            AdminRequest::RevokeNode { node } => Ok(self.turn_out(&node)),
            AdminRequest::Requests(_) => Err(refused("requests are the batcher's business".into())),
            AdminRequest::Collect { node: Some(node) } => return self.collect(&node),
            AdminRequest::Collect { node: None } => {
                Err(refused("what the coordinator knows is not the cluster's to tell".into()))
            }
            AdminRequest::Keys(_) | AdminRequest::Tokens(_) => {
                Err(refused("who may come in is not the cluster's business".into()))
            }
            AdminRequest::Doctor => {
                let waiting = self.examine();
                self.advance(ctx);
                return Box::pin(async move {
                    waiting.await.unwrap_or_else(|_| {
                        Err(Status::unavailable("the coordinator is shutting down", 5000))
                    })
                });
            }
        };
        self.advance(ctx);
        Box::pin(async move { answer })
    }
}

impl Cluster {
    pub(super) fn find(&self, node: &str) -> Result<NodeId, Status> {
        let named: Vec<NodeId> = (self.members.iter())
            .filter(|(id, m)| m.hello.name == node || id.to_string() == node)
            .map(|(id, _)| *id)
            .collect();
        match named[..] {
            [id] => Ok(id),
            [] => {
                let names: Vec<&str> =
                    self.members.values().map(|m| m.hello.name.as_str()).collect();
                let message =
                    format!("no node is called '{node}'; there are: {}", names.join(", "));
                Err(Status::new(ErrorCode::NotFound, message))
            }
            _ => Err(Status::invalid(
                "node",
                format!("{} nodes are called '{node}': name its id", named.len()),
            )),
        }
    }

    fn node_statuses(&self) -> Vec<NodeStatus> {
        let role = |id: &NodeId| {
            let stage = (self.plan.iter().flat_map(|p| &p.assignments))
                .find(|(node, _)| node == id)
                .filter(|_| self.is_serving());
            let pipeline = self.pipeline.as_ref();
            if let Some((_, a)) = stage {
                let (first_layer, end_layer) = (a.first_layer, a.end_layer);
                return NodeRole::Stage { first_layer, end_layer, head: a.next.is_none() };
            }
            match pipeline {
                Some(p) if p.is_cordoned(*id) => NodeRole::Cordoned,
                Some(p) if p.is_suspect(*id) => NodeRole::Suspect,
                _ => NodeRole::StandBy,
            }
        };
        let status = |(id, m): (&NodeId, &super::Member)| NodeStatus {
            id: *id,
            name: m.hello.name.clone(),
            host: m.hello.host.clone(),
            address: m.hello.advertise.clone(),
            hardware: m.hello.hardware.clone(),
            threads: m.hello.threads,
            memory_bytes: m.hello.memory_bytes,
            role: role(id),
            cordons: self.pipeline.iter().flat_map(|p| p.cordons(*id)).collect(),
        };
        self.members.iter().map(status).collect()
    }

    /// Takes a node out of use; where it has a stage, only if others can take over.
    fn cordon(&mut self, node: &str, cached: u64) -> Result<AdminReply, Status> {
        let (id, now) = (self.find(node)?, self.now());
        let serves = self.pipeline.as_ref().is_some_and(|p| p.chosen().contains(&id));
        let offer = match serves {
            true => {
                Some(self.offer(format!("{node} is cordoned"), Some(id), cached).map_err(refused)?)
            }
            false => None,
        };
        let Some(pipeline) = &mut self.pipeline else {
            return Err(refused("there is no pipeline yet: wait until one has formed".into()));
        };
        pipeline.handle_cordon(id, CordonReason::Operator, true, now);
        Ok(match offer {
            None => AdminReply::Nodes(self.node_statuses()),
            Some(offer) => AdminReply::Recut(Box::new(self.apply_offer(offer))),
        })
    }

    /// Closes the connection of a node that was revoked; one that is not there has none.
    fn turn_out(&mut self, node: &str) -> AdminReply {
        if let Some(member) = self.find(node).ok().and_then(|id| self.members.get(&id)) {
            member.connection.close("this node's certificate was revoked");
        }
        AdminReply::Nodes(self.node_statuses())
    }

    /// Tells a node to hand its layers over and to end, as SIGTERM would.
    fn drain(&mut self, node: &str) -> Result<AdminReply, Status> {
        let id = self.find(node)?;
        if self.members.get(&id).is_some_and(|m| !m.hello.drains) {
            return Err(refused(format!(
                "{node} shares its process with others, so it cannot end alone: to take its layers \
                 away, cordon it; to end it, end that process"
            )));
        }
        self.say(id, CoordinatorMessage::Drain);
        Ok(AdminReply::Nodes(self.node_statuses()))
    }

    fn uncordon(&mut self, node: &str) -> Result<AdminReply, Status> {
        let (id, now) = (self.find(node)?, self.now());
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.handle_cordon(id, CordonReason::Operator, false, now);
        }
        Ok(AdminReply::Nodes(self.node_statuses()))
    }

    fn recut(&mut self, apply: bool, cached: u64) -> Result<AdminReply, Status> {
        let offer = self.offer("an operator asks".into(), None, cached).map_err(refused)?;
        let report = if apply { self.apply_offer(offer) } else { offer.report };
        Ok(AdminReply::Recut(Box::new(report)))
    }

    /// Tries all ways anew; the answer comes when the last is known.
    fn examine(&mut self) -> oneshot::Receiver<Result<AdminReply, Status>> {
        let (answer, waiting) = oneshot::channel();
        let now = self.now();
        let ids: Vec<NodeId> = self.members.keys().copied().collect();
        let ways: Vec<Way> = (ids.iter())
            .flat_map(|a| ids.iter().map(move |b| (*a, *b)))
            .filter(|(a, b)| a != b)
            .collect();
        for way in &ways {
            self.try_way(*way, now);
        }
        self.doctors.push(Doctor { ways, answer });
        self.answer_doctors(now);
        waiting
    }

    /// Answers those whose ways are all known.
    pub(super) fn answer_doctors(&mut self, now: Duration) {
        if self.doctors.is_empty() {
            return;
        }
        self.ways.expire(now);
        let used: BTreeSet<Way> = self.plan.iter().flat_map(|p| p.ways()).collect();
        if self.ways.is_measuring() {
            return;
        }
        for doctor in std::mem::take(&mut self.doctors) {
            let there =
                |way: &&Way| self.members.contains_key(&way.0) && self.members.contains_key(&way.1);
            let ways: Vec<Way> = doctor.ways.iter().filter(there).copied().collect();
            let known: Option<Vec<EdgeStatus>> = (ways.iter())
                .map(|way| {
                    let outcome = self.ways.outcome(*way, now)?.clone();
                    Some(EdgeStatus {
                        from: self.name_of(way.0),
                        to: self.name_of(way.1),
                        address: self.members.get(&way.1)?.hello.advertise.clone(),
                        used: used.contains(way),
                        outcome: outcome.map_err(|e| self.closed_way(*way, &e)),
                        bytes_per_second: self.ways.rate(*way),
                    })
                })
                .collect();
            match known {
                Some(edges) => {
                    let _ = doctor.answer.send(Ok(AdminReply::Edges(edges)));
                }
                None => self.doctors.push(doctor),
            }
        }
    }
}
