//! The cluster as people and clients see it.

use millrace_shared::id::NodeId;
use millrace_shared::wire::control::Assignment;
use millrace_shared::wire::rpc::StageStatus;

use super::Cluster;

impl Cluster {
    pub(super) fn stage_statuses(&self) -> Vec<StageStatus> {
        let Some(plan) = &self.plan else { return Vec::new() };
        let last = plan.assignments.len().saturating_sub(1);
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
                steps: beat.steps,
                threads: member.map_or(0, |m| m.report.threads),
            }
        };
        plan.assignments.iter().enumerate().map(status).collect()
    }

    /// The plan for people.
    pub(super) fn plan_table(&self) -> String {
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
}
