//! Profiles follow what is seen while requests run: plans, offers and descriptions of the cluster
//! reckon with it, and nodes keep it for their next start.

use actix::prelude::*;
use millrace_shared::id::{Epoch, NodeId};
use millrace_shared::membership::Pace;
use millrace_shared::wire::control::{CoordinatorMessage, StageProfile};

use super::Cluster;
use crate::plan::decode_seconds;

/// What a node may keep for later: a bad day should not be the rule.
const KEPT: (f64, f64) = (0.67, 1.5);
/// A report counts for this much beside those before it.
const NEWS: f64 = 0.5;

/// What the stages of an epoch took for a while.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Paced {
    /// Of this epoch.
    pub epoch: Epoch,
    /// On average.
    pub pace: Pace,
}

impl Handler<Paced> for Cluster {
    type Result = ();

    fn handle(&mut self, m: Paced, _: &mut Context<Self>) {
        self.on_paced(m.epoch, &m.pace);
    }
}

impl Cluster {
    /// How many times as long as measured alone a node takes; of one that has not served yet, as
    /// most of the others.
    pub(super) fn pace_of(&self, id: NodeId) -> f64 {
        self.pace.get(&id).copied().unwrap_or_else(|| {
            let mut others: Vec<f64> = self.pace.values().copied().collect();
            others.sort_by(f64::total_cmp);
            others.get(others.len() / 2).copied().unwrap_or(1.0)
        })
    }

    /// What a node's layers and head take, as last seen.
    pub(super) fn refreshed(&self, id: NodeId) -> Option<StageProfile> {
        Some(self.pipeline.as_ref()?.measured(id)?.slower(self.pace_of(id)))
    }

    fn on_paced(&mut self, epoch: Epoch, pace: &Pace) {
        let (Some(plan), Some(pipeline)) = (&self.plan, &self.pipeline) else { return };
        if plan.epoch != epoch || plan.assignments.len() != pace.seconds.len() {
            return;
        }
        for ((id, a), seconds) in plan.assignments.iter().zip(&pace.seconds) {
            let Some(profile) = pipeline.measured(*id) else { continue };
            let layers = a.end_layer - a.first_layer;
            let alone = decode_seconds(&profile, layers, a.next.is_none(), pace.rows);
            let sound = |s: f64| s.is_finite() && s > 0.0;
            if !sound(alone) || !sound(*seconds) {
                continue;
            }
            let seen = (seconds / alone).clamp(0.01, 100.0);
            let pace = self.pace.entry(*id).or_insert(seen);
            *pace += NEWS * (seen - *pace);
            let profile = profile.slower(pace.clamp(KEPT.0, KEPT.1));
            tracing::debug!(node = %id, pace, "the pace of a node");
            self.say(*id, CoordinatorMessage::Paced { profile });
        }
    }
}
