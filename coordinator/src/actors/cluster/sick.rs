//! Nodes whose steps failed: quarantine, by `millrace_shared::membership::Quarantine`.
//!
//! A node in quarantine is cordoned by the cluster itself, and the pipeline forms again without it.
//! Which requests are tried again, and which fail, the batcher is told at once.

use std::time::Duration;

use actix::prelude::*;
use millrace_shared::id::{Epoch, NodeId, SequenceId};
use millrace_shared::membership::{CordonReason, PipelineState, Quarantine, Verdict};

use super::Cluster;
use crate::actors::batcher::StepVerdict;
use crate::plan::Plan;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Sick {
    quarantine: Quarantine,
    /// Cordoned because of it.
    nodes: Vec<NodeId>,
}

/// A step failed at a stage.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct StepFailed {
    /// Of this epoch.
    pub epoch: Epoch,
    /// Its number in the plan.
    pub stage: u16,
    /// Whether it had rows of nobody else, waited for or not.
    pub alone: bool,
    /// Whose rows it had.
    pub sequences: Vec<SequenceId>,
}

impl Handler<StepFailed> for Cluster {
    type Result = ();

    fn handle(&mut self, m: StepFailed, ctx: &mut Context<Self>) {
        let now = self.now();
        // A stage that the plan does not have is a lie of the last one's.
        let named = |p: &Plan| {
            p.assignments
                .get(usize::from(m.stage))
                .or_else(|| p.assignments.last())
                .map(|(id, _)| *id)
        };
        let Some(node) = self.plan_of(m.epoch).and_then(named).filter(|_| self.is_serving()) else {
            // The epoch is over, or about to be: who was in it is computed again anyway.
            let (failed, alone, again) = (Vec::new(), Vec::new(), m.sequences);
            let verdict = StepVerdict { epoch: m.epoch, failed, again, alone, elsewhere: true };
            let _ = self.batcher.try_send(verdict);
            return;
        };
        let name = self.name_of(node);
        // Of several micro-batches that fail, the first has stopped the pipeline already.
        let others = self.sick.quarantine.holds(node, now)
            || self.offer(format!("a step failed on {name}"), Some(node), 0).is_ok();
        let verdicts = self.sick.quarantine.handle_failed(node, &m.sequences, m.alone, others);
        let of = |wanted| {
            let these = verdicts.iter().filter(move |(_, v)| *v == wanted);
            these.map(|(id, _)| *id).collect::<Vec<_>>()
        };
        let held = self.sick.quarantine.holds(node, now);
        let verdict = StepVerdict {
            epoch: m.epoch,
            failed: of(Verdict::Fails),
            again: of(Verdict::Elsewhere),
            alone: of(Verdict::Alone),
            elsewhere: held,
        };
        if self.batcher.try_send(verdict).is_err() {
            tracing::error!("the batcher's mailbox is full");
        }
        if held {
            tracing::warn!(%node, name, "in quarantine: a step failed on it");
            self.chronicle.note("quarantine", format!("{name}: a step failed on it"));
            if !self.sick.nodes.contains(&node) {
                self.sick.nodes.push(node);
            }
            if let Some(pipeline) = &mut self.pipeline {
                pipeline.handle_cordon(node, CordonReason::Quarantine, true, now);
                pipeline.handle_restart(&format!("a step failed on {name}"), now);
            }
        }
        self.check_sick(now);
        self.advance(ctx);
    }
}

/// How a sequence fares whose step had failed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Fared {
    /// Which.
    pub sequence: SequenceId,
    /// It has ended; else it has a token more.
    pub ended: bool,
}

impl Handler<Fared> for Cluster {
    type Result = ();

    fn handle(&mut self, m: Fared, ctx: &mut Context<Self>) {
        let now = self.now();
        let quarantine = &mut self.sick.quarantine;
        match m.ended {
            true => quarantine.handle_ended(m.sequence, now),
            false => quarantine.handle_token(m.sequence, now),
        }
        self.check_sick(now);
        self.advance(ctx);
    }
}

impl Cluster {
    /// Lets nodes be used again that are not in quarantine any more, or that nobody can replace.
    pub(super) fn check_sick(&mut self, now: Duration) {
        let Sick { quarantine, nodes } = &mut self.sick;
        let needed =
            self.pipeline.as_ref().and_then(|p| p.needed_despite(CordonReason::Quarantine, now));
        if let Some(node) = needed {
            tracing::warn!(%node, "used although a step failed on it: no other could serve");
            quarantine.handle_needed(node);
        }
        let free: Vec<NodeId> = nodes.extract_if(.., |n| !quarantine.holds(*n, now)).collect();
        for node in free {
            tracing::info!(%node, "the quarantine is over");
            if let Some(pipeline) = &mut self.pipeline {
                pipeline.handle_cordon(node, CordonReason::Quarantine, false, now);
            }
        }
    }

    /// A node is gone: when it comes back it is another chance.
    pub(super) fn forget_sick(&mut self, node: NodeId, now: Duration) {
        self.sick.quarantine.handle_lost(node);
        self.check_sick(now);
    }

    /// Whether a node that is lost had a stage of the epoch that serves, or served last, and did not
    /// want to leave.
    pub(super) fn dies_serving(&self, node: NodeId) -> bool {
        let leaves = |p: &PipelineState| p.cordons(node).any(|r| r == CordonReason::Drain);
        let served = self.plan.as_ref().is_some_and(|p| p.nodes().contains(&node));
        served && !self.pipeline.as_ref().is_some_and(leaves)
    }
}
