//! The cluster as people and clients see it.

use std::path::Path;
use std::sync::Arc;

use millrace_shared::id::{Epoch, NodeId};
use millrace_shared::wire::Edge;
use millrace_shared::wire::control::Assignment;
use millrace_shared::wire::rpc::StageStatus;

use super::Cluster;
use crate::chronicle::Chronicle;
use crate::collect;
use crate::metrics::Metrics;
use crate::plan::cluster::{LiveNode, live, to_text};
use crate::plan::profile_spec;

impl Cluster {
    pub(super) fn stage_statuses(&self) -> Vec<StageStatus> {
        let Some(plan) = &self.plan else { return Vec::new() };
        let (last, now) = (plan.assignments.len().saturating_sub(1), self.now());
        let status = |(i, (node_id, a)): (usize, &(NodeId, Assignment))| {
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
                process_seconds: beat.process_seconds,
                steps: beat.steps,
                threads: member.map_or(0, |m| m.report.threads),
                rows_left_out: beat.rows_left_out,
                credits: a.credits_of(match a.next {
                    Some(_) => Edge::Activations,
                    None => Edge::Results,
                }),
                round_trip: a.next.as_ref().and_then(|next| {
                    self.ways.outcome((*node_id, next.node_id), now)?.as_ref().ok().copied()
                }),
            }
        };
        plan.assignments.iter().enumerate().map(status).collect()
    }

    /// The members that were measured, as a cluster's description.
    pub(super) fn description(&self) -> String {
        let measured = self.members.iter().filter_map(|(id, m)| {
            Some(LiveNode {
                id: *id,
                hello: &m.hello,
                profile: self.refreshed(*id)?,
                rtt: m.connection.rtt(),
            })
        });
        let spec = profile_spec(&self.manifest, 1);
        let file = live(&spec, measured, &self.ways.known(self.now()));
        if file.node.is_empty() { String::new() } else { to_text(&file) }
    }

    /// Notes down who hears what happens.
    pub(crate) fn telling(mut self, chronicle: &Arc<Chronicle>) -> Self {
        self.chronicle = Arc::clone(chronicle);
        self
    }

    /// Saves the last micro-batches in this folder when one does not come back.
    pub(crate) fn saving(mut self, metrics: &Arc<Metrics>, dir: &Path) -> Self {
        self.rings = Some((Arc::clone(metrics), dir.to_owned()));
        self
    }

    /// Saves them.
    pub(super) fn save_rings(&self) {
        let Some((metrics, dir)) = self.rings.clone() else { return };
        drop(tokio::task::spawn_blocking(move || collect::save(metrics.timeline(), &dir)));
    }

    /// Another plan serves.
    pub(super) fn tell_plan(&self, kind: &'static str, epoch: Epoch) {
        let stages = self.stage_statuses();
        let part = |s: &StageStatus| match s.first_layer < s.end_layer {
            true => format!("{} {}-{}", s.node_name, s.first_layer, s.end_layer - 1),
            false => format!("{} no layers", s.node_name),
        };
        let parts: Vec<String> = stages.iter().map(part).collect();
        self.chronicle.note(kind, format!("epoch {epoch}: {}", parts.join(", ")));
        self.chronicle.set_plan(self.plan_table());
    }

    /// The plan for people.
    pub(super) fn plan_table(&self) -> String {
        let Some(plan) = &self.plan else { return String::new() };
        let s = &plan.scheduler;
        let tokens = s.num_blocks * s.block_size;
        format!(
            "{}  allocated: {} KV blocks, {tokens} tokens, {} sequences of {} at once; at most {} \
             micro-batches in flight",
            plan.report,
            s.num_blocks,
            tokens / s.max_model_len.max(1),
            s.max_model_len,
            s.max_in_flight
        )
    }
}
