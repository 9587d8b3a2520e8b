//! From a model, measured nodes and settings to assignments. Pure: the partitioner decides the cut,
//! this page counts bytes and writes the result down.

use std::collections::HashSet;
use std::time::Duration;

use millrace_shared::id::{Epoch, NodeId, PipelineId, StageIndex};
use millrace_shared::model::{
    Dtype, ModelConfig, ModelManifest, StageTensors, TensorType, head_name, numerics_id,
    stage_tensors,
};
use millrace_shared::options::{EngineKind, MicroBatches, Replan};
use millrace_shared::partition::{
    LayerRange, ModelCost, NodeCapacity, PartitionError, check_memory, from_cuts, partition,
};
use millrace_shared::scheduler::SchedulerConfig;
use millrace_shared::wire::MAX_FRAME_PAYLOAD_BYTES;
use millrace_shared::wire::control::{
    Assignment, EngineSettings, Hello, Peer, ProfileSpec, StageProfile,
};

/// KV cache, in positions, where nothing else is said: a few long conversations or many short ones.
pub const DEFAULT_KV_TOKENS: u32 = 32_768;
/// Positions per KV block: enough that attention reads long runs of memory.
pub const DEFAULT_BLOCK_SIZE: u32 = 64;
/// Rows at which layer and head are measured: between decode and a prefill chunk.
const PROFILE_BATCH: u32 = 16;
/// Share of a host's memory that plans use: the rest is for scratch, buffers and the system.
pub const MEMORY_SHARE: f64 = 0.9;

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// Layers at which to cut.
    pub cuts: Option<Vec<u32>>,
    /// Prompt tokens per micro-batch.
    pub prefill_chunk: u32,
    /// Micro-batches in flight.
    pub micro_batches: MicroBatches,
    /// Engine that every node must run.
    pub engine: EngineKind,
    /// Type of the KV cache.
    pub kv_dtype: Dtype,
    /// Type of activations.
    pub activation_dtype: Dtype,
    /// Longest sequence; `None` for the model's context.
    pub max_model_len: Option<u32>,
    /// Sequences with KV blocks at once.
    pub max_num_seqs: u32,
    /// Requests that may wait.
    pub max_waiting: u32,
    /// Positions of KV cache; `None` for [`DEFAULT_KV_TOKENS`], less where memory is short.
    pub kv_cache_tokens: Option<u32>,
    /// What is done about a better cut.
    pub replan: Replan,
    /// How long requests wait for a pipeline that was lost to form again.
    pub recovery_timeout: Duration,
}

impl Deployment {
    /// Longest sequence served of this model.
    pub fn max_model_len(&self, config: &ModelConfig) -> u32 {
        let own = self.max_model_len.unwrap_or(config.context).min(config.context);
        match self.kv_cache_tokens {
            Some(tokens) => own.min(tokens),
            None => own,
        }
    }

    /// Prompt tokens per micro-batch: as told, but never more than a sequence or a frame can have.
    fn prefill_chunk(&self, config: &ModelConfig) -> u32 {
        let row_bytes = (config.hidden as usize).max(1) * 4;
        let frame = (MAX_FRAME_PAYLOAD_BYTES / row_bytes) as u32;
        let room = frame.saturating_sub(self.max_num_seqs).max(1);
        self.prefill_chunk.min(self.max_model_len(config)).min(room).max(1)
    }

    /// Tokens in one micro-batch: a prefill chunk and every decode.
    fn max_batch_tokens(&self, config: &ModelConfig) -> u32 {
        // Scored rows have up to 64 positions whatever the chunk.
        self.prefill_chunk(config).max(64).saturating_add(self.max_num_seqs)
    }
}

/// A node as plans see it.
#[derive(Clone, Debug)]
pub struct PlanNode {
    /// Which.
    pub id: NodeId,
    /// What it said of itself.
    pub hello: Hello,
    /// What it measured.
    pub profile: StageProfile,
}

/// A cut model.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The epoch it is for.
    pub epoch: Epoch,
    /// In the order of the stages.
    pub assignments: Vec<(NodeId, Assignment)>,
    /// For the scheduler.
    pub scheduler: SchedulerConfig,
    /// What the head costs, in layers.
    pub head_in_layers: f64,
}

impl Plan {
    /// Rows of the micro-batch that measured times are of.
    pub fn planning_rows(&self) -> u32 {
        PROFILE_BATCH
    }

    /// The ways from node to node that it needs.
    pub fn ways(&self) -> Vec<(NodeId, NodeId)> {
        self.assignments.windows(2).map(|pair| (pair[0].0, pair[1].0)).collect()
    }

    /// Bytes of weights and cache of a stage.
    pub fn stage_bytes(&self, stage: usize) -> u64 {
        let Some((_, a)) = self.assignments.get(stage) else { return 0 };
        let weights: u64 = a.tensors.iter().map(|t| t.bytes).sum();
        let positions = u64::from(a.settings.kv_blocks) * u64::from(a.settings.kv_block_size);
        let layers = u64::from(a.end_layer - a.first_layer);
        weights + layers * positions * a.config.kv_bytes_per_position(a.settings.kv_dtype)
    }

    /// Bytes of tensors that nodes have here and not in `other`.
    pub fn bytes_beyond(&self, other: &Plan) -> u64 {
        let held = |node: NodeId| -> HashSet<&str> {
            let there = other.assignments.iter().filter(|(id, _)| *id == node);
            there.flat_map(|(_, a)| a.tensors.iter().map(|t| t.name.as_str())).collect()
        };
        let missing = |(node, a): &(NodeId, Assignment)| -> u64 {
            let held = held(*node);
            a.tensors.iter().filter(|t| !held.contains(t.name.as_str())).map(|t| t.bytes).sum()
        };
        self.assignments.iter().map(missing).sum()
    }
}

/// The nodes in an order in which no neighbours have a closed way from one to the next: as given
/// where that will do, else the first that does.
pub fn order_without(nodes: &[PlanNode], closed: &[(NodeId, NodeId)]) -> Option<Vec<PlanNode>> {
    fn extend(order: &mut Vec<usize>, nodes: &[PlanNode], closed: &[(NodeId, NodeId)]) -> bool {
        if order.len() == nodes.len() {
            return true;
        }
        for next in 0..nodes.len() {
            let shut = |&last: &usize| closed.contains(&(nodes[last].id, nodes[next].id));
            if order.contains(&next) || order.last().is_some_and(shut) {
                continue;
            }
            order.push(next);
            if extend(order, nodes, closed) {
                return true;
            }
            order.pop();
        }
        false
    }
    let mut order = Vec::with_capacity(nodes.len());
    extend(&mut order, nodes, closed).then(|| order.into_iter().map(|i| nodes[i].clone()).collect())
}

/// What nodes are asked to measure; `sharing` of them are on the same host.
pub fn profile_spec(manifest: &ModelManifest, sharing: u32) -> ProfileSpec {
    let dtype = |name: &str| manifest.tensor(name).map_or(TensorType::F32, |t| t.dtype);
    ProfileSpec {
        config: manifest.config.clone(),
        layer_type: dtype("blk.0.ffn_down.weight"),
        head_type: dtype(head_name(&manifest.config)),
        batch: PROFILE_BATCH,
        sharing,
    }
}

/// Checks what can be checked before any node is there.
///
/// # Errors
/// If the model cannot be cut into so many stages, or not where the operator said.
pub fn check_stages(
    config: &ModelConfig,
    deployment: &Deployment,
    stages: Option<u16>,
) -> Result<(), String> {
    // The last stage may hold the head alone.
    let most = config.layers + 1;
    if let Some(stages) = stages.filter(|&n| u32::from(n) > most) {
        return Err(format!(
            "--stages {stages} is too many: the model has {} layers, which makes at most {most} \
             stages (the last with the head alone)",
            config.layers
        ));
    }
    match &deployment.cuts {
        Some(cuts) => from_cuts(config.layers, cuts).map(|_| ()).map_err(|e| e.to_string()),
        None => Ok(()),
    }
}

/// Cuts the model over the nodes, in their order.
///
/// # Errors
/// If it does not fit, or the operator's cuts make no sense.
pub fn plan(
    manifest: &ModelManifest,
    deployment: &Deployment,
    (pipeline, epoch): (PipelineId, Epoch),
    nodes: &[PlanNode],
) -> Result<Plan, PartitionError> {
    let config = &manifest.config;
    let max_model_len = deployment.max_model_len(config);
    let head_in_layers = head_in_layers(nodes);
    let capacities = capacities(nodes);
    let mut kv_tokens =
        deployment.kv_cache_tokens.unwrap_or_else(|| DEFAULT_KV_TOKENS.max(max_model_len));
    let (ranges, blocks) = loop {
        let blocks = kv_tokens.div_ceil(DEFAULT_BLOCK_SIZE).max(1);
        let cost = model_cost(manifest, deployment, blocks, head_in_layers);
        let cut = match &deployment.cuts {
            None => partition(&cost, &capacities, nodes.len()),
            Some(cuts) => from_cuts(config.layers, cuts)
                .and_then(|ranges| check_memory(&cost, &capacities, &ranges).map(|()| ranges)),
        };
        match cut {
            Ok(ranges) => break (ranges, blocks),
            // Less cache than usual is better than no service; one full sequence must fit.
            Err(_) if deployment.kv_cache_tokens.is_none() && kv_tokens / 2 >= max_model_len => {
                kv_tokens /= 2;
            }
            Err(e) => return Err(e),
        }
    };
    let settings = EngineSettings {
        kv_blocks: blocks,
        kv_block_size: DEFAULT_BLOCK_SIZE,
        kv_dtype: deployment.kv_dtype,
        activation_dtype: deployment.activation_dtype,
        max_batch_tokens: deployment.max_batch_tokens(config),
        max_num_seqs: deployment.max_num_seqs,
        max_model_len,
    };
    let scheduler = SchedulerConfig {
        num_blocks: blocks,
        block_size: DEFAULT_BLOCK_SIZE,
        max_num_seqs: deployment.max_num_seqs,
        max_waiting: deployment.max_waiting,
        max_in_flight: deployment.micro_batches.for_stages(nodes.len() as u32),
        prefill_chunk: deployment.prefill_chunk(config),
        max_batch_tokens: settings.max_batch_tokens,
        max_model_len,
    };
    // One more than micro-batches, for frames that only carry releases.
    let credits = scheduler.max_in_flight + 1;
    let assignments = assign(manifest, (pipeline, epoch), nodes, &ranges, &settings, credits);
    Ok(Plan { epoch, assignments, scheduler, head_in_layers })
}

/// The head's time in layers, averaged over the nodes.
fn head_in_layers(nodes: &[PlanNode]) -> f64 {
    let ratios = nodes.iter().map(|n| n.profile.head_seconds / n.profile.layer_seconds.max(1e-9));
    ratios.sum::<f64>() / nodes.len().max(1) as f64
}

/// Nodes of the plan on one host.
fn sharing(nodes: &[PlanNode], host: &str) -> usize {
    nodes.iter().filter(|n| n.hello.host == host).count().max(1)
}

/// Nodes of one host share its memory.
fn capacities(nodes: &[PlanNode]) -> Vec<NodeCapacity> {
    nodes
        .iter()
        .map(|n| NodeCapacity {
            node: n.id,
            memory_bytes: (n.hello.memory_bytes as f64 * MEMORY_SHARE) as u64
                / sharing(nodes, &n.hello.host) as u64,
            speed: 1.0 / n.profile.layer_seconds.max(1e-9),
        })
        .collect()
}

fn model_cost(
    manifest: &ModelManifest,
    deployment: &Deployment,
    blocks: u32,
    head_cost_in_layers: f64,
) -> ModelCost {
    let config = &manifest.config;
    let bytes = |stage: StageTensors| -> u64 {
        stage_tensors(config, &manifest.tensors, &stage).iter().map(|t| t.bytes).sum()
    };
    let positions = u64::from(blocks) * u64::from(DEFAULT_BLOCK_SIZE);
    ModelCost {
        layers: config.layers,
        layer_bytes: (0..config.layers)
            .map(|l| bytes(StageTensors { layers: l..l + 1, embed: false, head: false }))
            .collect(),
        embed_bytes: bytes(StageTensors { layers: 0..0, embed: true, head: false }),
        head_bytes: bytes(StageTensors { layers: 0..0, embed: false, head: true }),
        tied_head: config.tied_head,
        kv_bytes_per_layer: positions * config.kv_bytes_per_position(deployment.kv_dtype),
        layer_cost: 1.0,
        head_cost_in_layers,
    }
}

fn assign(
    manifest: &ModelManifest,
    (pipeline, epoch): (PipelineId, Epoch),
    nodes: &[PlanNode],
    ranges: &[LayerRange],
    settings: &EngineSettings,
    credits: u32,
) -> Vec<(NodeId, Assignment)> {
    let last = ranges.len().saturating_sub(1);
    let stages = nodes.iter().zip(ranges).enumerate();
    let one = |(i, (node, range)): (usize, (&PlanNode, &LayerRange))| {
        let stage = StageTensors { layers: range.range(), embed: i == 0, head: i == last };
        let tensors = stage_tensors(&manifest.config, &manifest.tensors, &stage);
        let assignment = Assignment {
            pipeline,
            epoch,
            stage: StageIndex(i as u16),
            stages: ranges.len() as u16,
            first_layer: range.first,
            end_layer: range.end,
            config: manifest.config.clone(),
            tensors: tensors.into_iter().cloned().collect(),
            previous: i.checked_sub(1).map(|p| nodes[p].id),
            next: nodes
                .get(i + 1)
                .filter(|_| i < last)
                .map(|n| Peer { node_id: n.id, address: n.hello.advertise.clone() }),
            settings: settings.clone(),
            content_hash: manifest.content_hash,
            numerics_id: numerics_id(
                &manifest.content_hash,
                &node.hello.numerics_revision,
                settings.kv_dtype,
                settings.activation_dtype,
            ),
            credits,
            host_stages: sharing(nodes, &node.hello.host) as u32,
        };
        (node.id, assignment)
    };
    stages.map(one).collect()
}
