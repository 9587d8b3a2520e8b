//! When a new cut is worth it, and how it is made while requests run.
//!
//! Reasons: the stages are uneven for half a minute, a node joined, an operator took one out of use
//! or asks. A gain below [`WORTH`] is not worth a pause. Where memory holds two stages, the new ones
//! are made ready beside the old; else the pipeline stops, loads and goes on, as after a loss.

use std::time::Duration;

use actix::prelude::*;
use millrace_shared::id::{Epoch, NodeId};
use millrace_shared::options::{Pin, Replan};
use millrace_shared::partition::LayerRange;
use millrace_shared::wire::admin::{CutStage, RecutReport};
use millrace_shared::wire::control::{Assignment, StageProfile};

use super::{Cluster, SETTLE};
use crate::plan::{COMPARED_POSITIONS, Plan, compared_seconds};
use crate::recut::render;

/// A new cut that is predicted to be faster by less than this is left alone.
const WORTH: f64 = 1.05;

/// A cut that could be made.
pub(super) struct Offer {
    nodes: Vec<NodeId>,
    pub(super) report: RecutReport,
}

impl Cluster {
    /// Nodes that a new cut may use: those that serve first, in their order.
    fn candidates(&self, without: Option<NodeId>) -> Vec<(NodeId, StageProfile)> {
        let Some(pipeline) = &self.pipeline else { return Vec::new() };
        let others = self.members.keys().filter(|id| !pipeline.chosen().contains(id));
        let all = pipeline.chosen().iter().chain(others).filter(|id| Some(**id) != without);
        let most = match self.stages {
            Some(n) => usize::from(n),
            None => self.manifest.config.layers as usize + 1,
        };
        let mut all: Vec<_> = all.filter_map(|id| Some((*id, pipeline.profile_of(*id)?))).collect();
        let pins = &self.deployment.pins;
        all.sort_by_key(|(id, _)| !pins.iter().any(|pin| self.is_named(pin, *id)));
        all.truncate(most);
        all
    }

    fn is_named(&self, pin: &Pin, id: NodeId) -> bool {
        let named = |m: &super::Member| pin.node == m.hello.name || pin.node == id.to_string();
        self.members.get(&id).is_some_and(named)
    }

    /// Whether a node that is pinned has other layers than those, or none, and could have them.
    fn is_unpinned(&self) -> bool {
        let (Some(plan), Some(pipeline)) = (&self.plan, &self.pipeline) else { return false };
        let holds = |pin: &Pin| {
            plan.assignments.iter().any(|(id, a)| {
                let layers = LayerRange { first: a.first_layer, end: a.end_layer };
                self.is_named(pin, *id) && layers == pin.layers
            })
        };
        let could = |pin: &Pin| {
            let mut named = self.members.keys().filter(|id| self.is_named(pin, **id));
            named.any(|id| pipeline.profile_of(*id).is_some())
        };
        self.deployment.pins.iter().any(|pin| could(pin) && !holds(pin))
    }

    /// What a new cut would bring. `cached`: positions in the KV cache, which are computed again.
    pub(super) fn offer(
        &self,
        reason: String,
        without: Option<NodeId>,
        cached: u64,
    ) -> Result<Offer, String> {
        let now = self.now();
        let (Some(current), Some(_)) = (&self.plan, &self.pipeline) else {
            return Err(format!("there is no pipeline to cut anew: {}", self.detail()));
        };
        if !self.is_serving() {
            return Err(format!("the pipeline is not serving: {}", self.detail()));
        }
        let nodes = self.candidates(without);
        let need = self.stages.map_or(1, usize::from);
        if nodes.len() < need {
            return Err(format!(
                "{need} nodes are needed and {} would be left: start another one first",
                nodes.len()
            ));
        }
        let plan = self.cut(Epoch(0), &nodes, now)?;
        let (now_stages, new_stages) = (self.cut_stages(current), self.cut_stages(&plan));
        let slowest = |s: &[CutStage]| s.iter().map(|s| s.seconds).fold(0.0, f64::max);
        let report = RecutReport {
            reason,
            gain: slowest(&now_stages) / slowest(&new_stages).max(1e-12),
            bytes_to_move: plan.bytes_beyond(current),
            pause_seconds: slowest(&new_stages) * cached as f64 / COMPARED_POSITIONS,
            beside: self.fits_beside(current, &plan),
            current: now_stages,
            proposed: new_stages,
            applied: false,
        };
        Ok(Offer { nodes: plan.nodes(), report })
    }

    /// Stages with their predicted times, at the pace at which the nodes work.
    fn cut_stages(&self, plan: &Plan) -> Vec<CutStage> {
        let stage = |(id, a): &(NodeId, Assignment)| {
            let profile = self.refreshed(*id);
            let head = a.next.is_none();
            CutStage {
                node: self.name_of(*id),
                first_layer: a.first_layer,
                end_layer: a.end_layer,
                head,
                seconds: profile
                    .map_or(0.0, |p| compared_seconds(&p, a.end_layer - a.first_layer, head)),
            }
        };
        plan.assignments.iter().map(stage).collect()
    }

    pub(super) fn name_of(&self, id: NodeId) -> String {
        self.called.of(id).map_or_else(|| id.to_string(), str::to_owned)
    }

    /// Whether every node has memory for its old stage and its new one.
    fn fits_beside(&self, current: &Plan, next: &Plan) -> bool {
        next.assignments.iter().all(|(id, _)| {
            let Some(member) = self.members.get(id) else { return false };
            let (own, host) = (member.hello.has_own_memory(), member.hello.host.as_str());
            // In the same memory: of a GPU nobody else's stages.
            let on_host = |plan: &Plan| -> u64 {
                let bytes = |(i, (other, _)): (usize, &(NodeId, Assignment))| {
                    let m = self.members.get(other)?;
                    let shared = !own && !m.hello.has_own_memory() && m.hello.host == host;
                    (other == id || shared).then(|| plan.stage_bytes(i, m.hello.torch))
                };
                plan.assignments.iter().enumerate().filter_map(bytes).sum()
            };
            let usable = member.hello.memory_bytes as f64 * crate::plan::MEMORY_SHARE;
            on_host(current) + on_host(next) <= usable as u64
        })
    }

    /// Makes the cut that was offered; the report says that it is being done.
    pub(super) fn apply_offer(&mut self, mut offer: Offer) -> RecutReport {
        let now = self.now();
        let Some(pipeline) = &mut self.pipeline else { return offer.report };
        offer.report.applied = if offer.report.beside {
            pipeline.handle_recut(&offer.nodes, now)
        } else {
            pipeline.handle_restart("the model is cut anew", now)
        };
        offer.report
    }

    /// The stages took these times in an epoch, for half a minute and unevenly.
    pub(super) fn on_uneven(&mut self, epoch: Epoch, seconds: &[f64]) {
        let Some(plan) = self.plan.as_ref().filter(|p| p.epoch == epoch) else { return };
        if plan.assignments.len() != seconds.len() {
            return;
        }
        // Against what was predicted, relative to the others: loads differ from the planning one.
        let ratios: Vec<(NodeId, f64)> = (self.cut_stages(plan).iter())
            .zip(&plan.assignments)
            .zip(seconds)
            .filter(|((stage, _), _)| stage.seconds > 0.0)
            .map(|((stage, (id, _)), seconds)| (*id, seconds / stage.seconds))
            .collect();
        let mean = ratios.iter().map(|r| r.1).sum::<f64>() / ratios.len().max(1) as f64;
        for (id, ratio) in ratios {
            let base = self.pace_of(id);
            let pace = self.pace.entry(id).or_insert(base);
            *pace = (*pace * ratio / mean).clamp(0.01, 100.0);
        }
        self.consider("the stages are uneven".to_owned(), false);
    }

    /// Looks at a new cut, and makes or proposes it where it is worth it. `restoring`: it mends
    /// what a loss left behind, which needs nobody's leave.
    fn consider(&mut self, reason: String, restoring: bool) {
        let mode = self.deployment.replan;
        if mode == Replan::Off {
            return;
        }
        let offer = match self.offer(reason, None, 0) {
            // What an operator wants need not be faster.
            Ok(offer) if offer.report.gain >= WORTH || self.is_unpinned() => offer,
            Ok(offer) => {
                return tracing::debug!(gain = offer.report.gain, "no better cut");
            }
            Err(e) => return tracing::debug!("no new cut: {e}"),
        };
        if mode == Replan::Auto || restoring {
            let report = self.apply_offer(offer);
            tracing::info!("cutting anew\n{}", render(&report));
            self.chronicle.note("cut", format!("cutting anew: {}", report.reason));
        } else {
            self.chronicle.note("cut", format!("a better cut is there: {}", offer.report.reason));
            tracing::info!(
                "a better cut is there; to make it: millrace nodes recut --apply\n{}",
                render(&offer.report)
            );
        }
    }

    /// Nodes that joined an epoch that serves are looked at when no more come.
    pub(super) fn consider_joined(&mut self, now: Duration) {
        let quiet = |at: &mut Duration| now.saturating_sub(*at) >= SETTLE;
        let Some(pipeline) = self.pipeline.as_ref().filter(|_| self.is_serving()) else { return };
        let measured = |id: &NodeId| {
            let idle = pipeline.is_cordoned(*id) || pipeline.is_suspect(*id);
            idle || pipeline.profile_of(*id).is_some()
        };
        if !self.members.keys().all(measured) || self.joined.take_if(quiet).is_none() {
            return;
        }
        let restoring = std::mem::take(&mut self.shrunk);
        self.consider("a node joined".to_owned(), restoring);
    }
}

/// The stages of an epoch are uneven, and have been for a while.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Uneven {
    /// Of this epoch.
    pub epoch: Epoch,
    /// Mean seconds of a micro-batch in each stage.
    pub seconds: Vec<f64>,
}

impl Handler<Uneven> for Cluster {
    type Result = ();

    fn handle(&mut self, m: Uneven, ctx: &mut Context<Self>) {
        self.on_uneven(m.epoch, &m.seconds);
        self.advance(ctx);
    }
}
