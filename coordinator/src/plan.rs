//! From a model, measured nodes and settings to assignments. Pure: `millrace_shared::partition`
//! chooses nodes, order and cut; this page says what is known and writes the result down.
//!
//! [`costs`] counts bytes and times, [`cluster`] reads descriptions of clusters, [`kinds`] knows
//! nominal figures of machines, [`report`] says what a plan will do, for people and as JSON.

pub mod cluster;
pub mod costs;
mod flow;
pub mod kinds;
pub mod pins;
pub mod report;
mod report_text;

use std::collections::HashSet;
use std::time::Duration;

use millrace_shared::id::{Epoch, NodeId, PipelineId, StageIndex};
use millrace_shared::model::{
    Dtype, ModelConfig, ModelManifest, SparseForms, StageTensors, numerics_id, stage_tensors,
};
use millrace_shared::options::{EngineKind, MicroBatches, Pin, PrefixCache, Replan};
use millrace_shared::partition::{
    Choice, Goal, LayerRange, Link, Network, NodeCosts, PartitionError, Problem, StageCut, Stood,
    Wish, choose, from_cuts, in_order, keep,
};
use millrace_shared::scheduler::cost::StageCost;
use millrace_shared::scheduler::{Policy, SchedulerConfig};
use millrace_shared::wire::MAX_FRAME_PAYLOAD_BYTES;
use millrace_shared::wire::control::{
    Assignment, EngineSettings, Hello, PROFILE_ROWS, Peer, ProfileSpec, StageProfile,
};

use costs::{Kept, ModelParts, node_costs};
use report::{NodeFacts, PlanReport, Question};

/// KV cache, in positions, where nothing else is said: a few long conversations or many short ones.
pub const DEFAULT_KV_TOKENS: u32 = 32_768;
/// Positions per KV block: enough that attention reads long runs of memory.
pub const DEFAULT_BLOCK_SIZE: u32 = 64;
/// Share of a host's memory that plans use: the rest is for scratch, buffers and the system.
pub const MEMORY_SHARE: f64 = 0.9;
/// Taken for the links between members where nothing is measured: an ordinary local network.
pub const LAN: Link = Link { rtt_seconds: 0.000_3, bytes_per_second: 125e6 };

/// Prompt tokens for each token of an answer, when cuts are compared: chats and documents more than
/// stories. Prompts pass through the layers and, but for their last token, not through the head, so
/// that a cut for answers alone would leave the last stage idle. What really comes is measured, and
/// a better cut proposed.
const PROMPTS_PER_ANSWER: f64 = 2.0;
/// Answers in the micro-batch by which stages are compared: between few streams and many.
const COMPARED_ANSWERS: f64 = 16.0;
/// Positions in that micro-batch, those of prompts included.
pub const COMPARED_POSITIONS: f64 = COMPARED_ANSWERS * (1.0 + PROMPTS_PER_ANSWER);

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// Layers at which to cut.
    pub cuts: Option<Vec<u32>>,
    /// Layers that nodes must have, as long as these are there.
    pub pins: Vec<Pin>,
    /// Exactly so many stages; `None` for as many as serve best.
    pub stages: Option<u16>,
    /// Prompt tokens per micro-batch.
    pub prefill_chunk: u32,
    /// Tokens of a micro-batch at most; `None` for a prefill chunk and a decode of every sequence.
    pub max_batch_tokens: Option<u32>,
    /// Micro-batches in flight.
    pub micro_batches: MicroBatches,
    /// Engine that every node must run.
    pub engine: EngineKind,
    /// Whether the cache is searched for the beginnings of prompts.
    pub prefix_cache: PrefixCache,
    /// Whether drafts are checked where the pipeline has time.
    pub speculate: bool,
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
    /// Between heartbeats of a node.
    pub heartbeat: Duration,
    /// Silence after which a node is lost.
    pub lease: Duration,
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

    /// What plans over so many nodes are to be good at.
    fn wish(&self, nodes: usize) -> Wish {
        Wish {
            goal: Goal::Throughput,
            streams: self.max_num_seqs,
            stages: self.stages.map(|n| usize::from(n).min(nodes)),
            micro_batches: match self.micro_batches {
                MicroBatches::Auto => None,
                MicroBatches::Fixed(n) => Some(n),
            },
        }
    }

    /// Prompt tokens per micro-batch: as told, but never more than a sequence or a frame can have.
    fn prefill_chunk(&self, config: &ModelConfig) -> u32 {
        let row_bytes = (config.hidden as usize).max(1) * 4;
        let frame = (MAX_FRAME_PAYLOAD_BYTES / row_bytes) as u32;
        let room = frame.saturating_sub(self.max_num_seqs).max(1);
        let most = self.max_batch_tokens.unwrap_or(u32::MAX);
        self.prefill_chunk.min(self.max_model_len(config)).min(room).min(most).max(1)
    }

    /// Tokens in one micro-batch: a prefill chunk and every decode.
    fn max_batch_tokens(&self, config: &ModelConfig) -> u32 {
        // Scored rows have up to 64 positions whatever the chunk.
        let usual = self.prefill_chunk(config).max(64).saturating_add(self.max_num_seqs);
        self.max_batch_tokens.map_or(usual, |most| most.clamp(1, usual))
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
    /// Round trip between it and the coordinator; `None` where nobody knows.
    pub round_trip: Option<Duration>,
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
    /// What each stage costs by the profile of its node, for the scheduler to begin with.
    pub costs: Vec<StageCost>,
    /// What the plan will do.
    pub report: PlanReport,
}

impl Plan {
    /// The ways from node to node that it needs.
    pub fn ways(&self) -> Vec<(NodeId, NodeId)> {
        self.assignments.windows(2).map(|pair| (pair[0].0, pair[1].0)).collect()
    }

    /// The nodes in the order of the stages.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.assignments.iter().map(|(node, _)| *node).collect()
    }

    /// Bytes of weights and cache of a stage, on a node that keeps weights so.
    pub fn stage_bytes(&self, stage: usize, kept: Kept) -> u64 {
        let Some((_, a)) = self.assignments.get(stage) else { return 0 };
        let forms = SparseForms::of_tensors(&a.tensors);
        let weights = a.tensors.iter().map(|t| costs::in_memory(t, forms.of(t), kept));
        let weights: u64 = weights.sum();
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

/// What trials have shown of a way from one node to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnownWay {
    /// From.
    pub from: NodeId,
    /// To.
    pub to: NodeId,
    /// The round trip in seconds; `None` where nothing comes through.
    pub round_trip: Option<f64>,
    /// Bytes a second; `None` where that was not measured, and [`LAN`]'s are taken.
    pub bytes_per_second: Option<f64>,
}

/// The network as far as it is known; what nobody tried is taken for [`LAN`].
fn network(nodes: &[PlanNode], ways: &[KnownWay]) -> Network {
    let mut network = Network::uniform(nodes.len(), LAN);
    let place = |id: NodeId| nodes.iter().position(|n| n.id == id);
    for way in ways {
        if let (Some(from), Some(to)) = (place(way.from), place(way.to)) {
            let link = way.round_trip.map(|rtt_seconds| Link {
                rtt_seconds,
                bytes_per_second: way.bytes_per_second.unwrap_or(LAN.bytes_per_second),
            });
            network.set(from, to, link);
        }
    }
    network
}

/// What nodes are asked to measure; `sharing` of them are on the same host.
pub fn profile_spec(manifest: &ModelManifest, sharing: u32) -> ProfileSpec {
    parts(manifest).profile_spec(sharing)
}

fn parts(manifest: &ModelManifest) -> ModelParts<'_> {
    ModelParts { config: &manifest.config, tensors: &manifest.tensors }
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
    pins::check(&deployment.pins, config.layers, deployment)?;
    match &deployment.cuts {
        Some(cuts) => from_cuts(config.layers, cuts).map(|_| ()).map_err(|e| e.to_string()),
        None => Ok(()),
    }
}

/// Chooses among the nodes, and cuts the model over them, along no way that is closed; of what `stood`
/// before, as much stays in place as costs next to nothing. Where the operator said where to cut, the
/// nodes are taken in their order, or in another one where ways are closed or memory is short.
///
/// # Errors
/// If it does not fit, or the operator's cuts make no sense.
pub fn plan(
    manifest: &ModelManifest,
    deployment: &Deployment,
    (pipeline, epoch): (PipelineId, Epoch),
    nodes: &[PlanNode],
    ways: &[KnownWay],
    stood: &[(NodeId, LayerRange)],
) -> Result<Plan, PartitionError> {
    let config = &manifest.config;
    let place = |id: &NodeId| nodes.iter().position(|n| n.id == *id);
    let stood: Vec<Stood> = stood.iter().map(|(id, range)| (place(id), *range)).collect();
    let max_model_len = deployment.max_model_len(config);
    let mut capacities = capacities(nodes);
    pins::bind(&deployment.pins, &mut capacities, |n, pin| pins::names(pin, &nodes[n]));
    let network = network(nodes, ways);
    let wish = deployment.wish(nodes.len());
    let kept: Vec<Kept> = nodes.iter().map(|n| n.hello.torch).collect();
    let mut kv_tokens =
        deployment.kv_cache_tokens.unwrap_or_else(|| DEFAULT_KV_TOKENS.max(max_model_len));
    let (choice, blocks, (model, capacities)) = loop {
        let blocks = kv_tokens.div_ceil(DEFAULT_BLOCK_SIZE).max(1);
        let positions = u64::from(blocks) * u64::from(DEFAULT_BLOCK_SIZE);
        let batch = deployment.max_batch_tokens(config);
        let every = (&capacities[..], &kept[..]);
        let (model, nodes) = parts(manifest).mixed(every, positions, deployment.kv_dtype, batch);
        let problem = Problem { model: &model, nodes: &nodes, network: &network, rows: 1.0 };
        let cut = match &deployment.cuts {
            None => best(&problem, &wish, &stood),
            Some(cuts) => given_cut(&problem, &wish, cuts),
        };
        match cut {
            Ok(choice) => break (choice, blocks, (model, nodes)),
            // Less cache than usual is better than no service; one full sequence must fit.
            Err(_) if deployment.kv_cache_tokens.is_none() && kv_tokens / 2 >= max_model_len => {
                kv_tokens /= 2;
            }
            Err(e) => return Err(e),
        }
    };
    let ranges: Vec<LayerRange> = choice.stages.iter().map(|s| s.range).collect();
    let stages: Vec<&PlanNode> = choice.stages.iter().map(|s| &nodes[s.node]).collect();
    let costs = stage_costs(&stages, &ranges);
    let links = links(&network, &choice, &stages);
    let max_in_flight = match deployment.micro_batches {
        MicroBatches::Fixed(n) => n,
        auto => flow::in_flight(auto.limit(stages.len() as u32), &costs, &links),
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
        max_in_flight,
        prefill_chunk: deployment.prefill_chunk(config),
        max_batch_tokens: settings.max_batch_tokens,
        max_model_len,
        policy: Policy {
            prefix_cache: deployment.prefix_cache,
            speculate: deployment.speculate,
            measured_from: deployment.micro_batches.measured_from(stages.len() as u32),
            ..Policy::DEFAULT
        },
    };
    let credits = [max_in_flight, flow::credits(max_in_flight, &costs, &links)];
    let assignments = assign(manifest, (pipeline, epoch), &stages, &ranges, &settings, credits);
    let question = Question {
        model_name: manifest.name.clone(),
        parts: parts(manifest),
        kv_dtype: deployment.kv_dtype,
        context: max_model_len,
        wish,
        promise: None,
    };
    let facts: Vec<NodeFacts> = nodes.iter().map(NodeFacts::of_member).collect();
    let problem = Problem { model: &model, nodes: &capacities, network: &network, rows: 1.0 };
    let report = PlanReport::new(&question, &problem, &facts, &choice, false);
    Ok(Plan { epoch, assignments, scheduler, costs, report })
}

/// The best plan; for throughput one where prompts are computed beside the answers, judged for answers
/// alone, as all reports are.
///
/// # Errors
/// As [`choose`].
pub fn best(problem: &Problem<'_>, wish: &Wish, stood: &[Stood]) -> Result<Choice, PartitionError> {
    if wish.goal == Goal::Latency {
        return choose(problem, wish);
    }
    let nodes: Vec<NodeCosts> = problem.nodes.iter().map(beside_prompts).collect();
    let beside = Problem { nodes: &nodes, ..*problem };
    let mixed = choose(&beside, wish)?;
    let kept = keep(&beside, wish, mixed.stages, stood);
    let judged = Choice::of(problem, wish, kept.stages);
    let alone = mixed.alone.map(|(node, _)| {
        let range = LayerRange { first: 0, end: problem.model.layers() as u32 };
        (node, Choice::of(problem, wish, vec![StageCut { node, range }]).forecast)
    });
    Ok(Choice { gap: mixed.gap + kept.given_up, alone, ..judged })
}

/// A node whose layers compute the prompts that come with each row of an answer.
fn beside_prompts(node: &NodeCosts) -> NodeCosts {
    NodeCosts { layer: node.layer.with_rows(1.0 + PROMPTS_PER_ANSWER), ..node.clone() }
}

/// Seconds of a stage for a micro-batch of [`COMPARED_POSITIONS`]: what cuts that serve are compared
/// by, with the mix of prompts and answers for which [`best`] makes them.
pub fn compared_seconds(profile: &StageProfile, layers: u32, head: bool) -> f64 {
    let costs = beside_prompts(&node_costs("", profile, 0));
    stage_seconds(&costs, layers, head, COMPARED_ANSWERS)
}

/// Seconds of a stage for a micro-batch of so many answers.
pub fn decode_seconds(profile: &StageProfile, layers: u32, head: bool, rows: f64) -> f64 {
    stage_seconds(&node_costs("", profile, 0), layers, head, rows)
}

fn stage_seconds(costs: &NodeCosts, layers: u32, head: bool, rows: f64) -> f64 {
    let head = if head { costs.head.at(rows) } else { 0.0 };
    f64::from(layers) * costs.layer.at(rows) + head
}

/// The operator's own cut, over the first nodes that can have it.
fn given_cut(problem: &Problem<'_>, wish: &Wish, cuts: &[u32]) -> Result<Choice, PartitionError> {
    let ranges = from_cuts(problem.model.layers() as u32, cuts)?;
    let nodes = in_order(problem, &ranges)?;
    let stage = |(node, range)| StageCut { node, range };
    Ok(Choice::of(problem, wish, nodes.into_iter().zip(ranges).map(stage).collect()))
}

/// The links that a choice uses.
fn links(network: &Network, choice: &Choice, stages: &[&PlanNode]) -> flow::Links {
    let rtt = |from: &StageCut, to: &StageCut| {
        network.get(from.node, to.node).map_or(LAN.rtt_seconds, |link| link.rtt_seconds)
    };
    let end = |node: Option<&&PlanNode>| {
        let measured = node.and_then(|n| n.round_trip);
        measured.map_or(LAN.rtt_seconds, |rtt| rtt.as_secs_f64())
    };
    flow::Links {
        between: choice.stages.windows(2).map(|pair| rtt(&pair[0], &pair[1])).collect(),
        ends: [end(stages.first()), end(stages.last())],
    }
}

/// What the profiles say of each stage.
fn stage_costs(stages: &[&PlanNode], ranges: &[LayerRange]) -> Vec<StageCost> {
    let last = ranges.len().saturating_sub(1);
    let one = |(i, (node, range)): (usize, (&&PlanNode, &LayerRange))| {
        let StageProfile { layer_seconds, head_seconds } = &node.profile;
        StageCost::from_profile(&PROFILE_ROWS, layer_seconds, head_seconds, range.len(), i == last)
    };
    stages.iter().zip(ranges).enumerate().map(one).collect()
}

/// Nodes of the plan on one host.
fn sharing<'a>(nodes: impl IntoIterator<Item = &'a PlanNode>, host: &str) -> usize {
    nodes.into_iter().filter(|n| n.hello.host == host).count().max(1)
}

/// Nodes of one host share its memory; a GPU has its own.
fn capacities(nodes: &[PlanNode]) -> Vec<NodeCosts> {
    let node = |n: &PlanNode| {
        let memory = (n.hello.memory_bytes as f64 * MEMORY_SHARE) as u64;
        let of_host = nodes.iter().filter(|other| !other.hello.has_own_memory());
        let share = if n.hello.has_own_memory() { 1 } else { sharing(of_host, &n.hello.host) };
        node_costs(&n.hello.name, &n.profile, memory / share as u64)
    };
    nodes.iter().map(node).collect()
}

fn assign(
    manifest: &ModelManifest,
    (pipeline, epoch): (PipelineId, Epoch),
    nodes: &[&PlanNode],
    ranges: &[LayerRange],
    settings: &EngineSettings,
    [in_flight, credits]: [u32; 2],
) -> Vec<(NodeId, Assignment)> {
    let last = ranges.len().saturating_sub(1);
    let stages = nodes.iter().zip(ranges).enumerate();
    let one = |(i, (node, range)): (usize, (&&PlanNode, &LayerRange))| {
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
                manifest.config.rope.scaling,
                settings,
            ),
            in_flight,
            credits,
            host_stages: sharing(nodes.iter().copied(), &node.hello.host) as u32,
        };
        (node.id, assignment)
    };
    stages.map(one).collect()
}
