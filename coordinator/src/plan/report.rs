//! What a plan will do, as values: the same facts as a table for people (`report_text`), as JSON, and
//! at the start of a coordinator. Field names are stable.

use millrace_shared::model::{Dtype, StageTensors};
use millrace_shared::partition::{
    Change, Choice, Goal, Problem, Promise, Wish, improvements, left_out, load_within,
};
use serde::Serialize;

use super::PlanNode;
use super::costs::{Kept, ModelParts};

/// Bytes of weights that a node packs a second, and reads where its disk is not known.
const PACK_RATE: f64 = 1e9;
/// Improvements that are told.
const MOST_IMPROVEMENTS: usize = 5;
/// Most streams that are tried for a promise.
const MOST_STREAMS: u32 = 65_536;

/// What a plan was asked for.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// For people.
    pub model_name: String,
    /// The model.
    pub parts: ModelParts<'a>,
    /// Type of the KV cache.
    pub kv_dtype: Dtype,
    /// Tokens of a stream.
    pub context: u32,
    /// Streams, goal, what is given.
    pub wish: Wish,
    /// What users were promised.
    pub promise: Option<Promise>,
}

/// What reports say of a node besides its part in the plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// Name.
    pub name: String,
    /// Memory.
    pub memory_bytes: u64,
    /// How it keeps weights.
    pub kept: Kept,
    /// Free space of its cache folder.
    pub disk_free_bytes: Option<u64>,
    /// How fast that is read.
    pub disk_bytes_per_second: Option<f64>,
    /// What an hour costs.
    pub price_per_hour: Option<f64>,
    /// Whether its times are estimates.
    pub estimated: bool,
}

impl NodeFacts {
    /// Of a member of a running cluster.
    pub fn of_member(node: &PlanNode) -> Self {
        Self {
            name: node.hello.name.clone(),
            memory_bytes: node.hello.memory_bytes,
            kept: node.hello.torch,
            ..Self::default()
        }
    }
}

/// A stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageReport {
    /// Place in the pipeline.
    pub stage: usize,
    /// Its node.
    pub node: String,
    /// Whether its times are estimates.
    pub estimated: bool,
    /// First layer.
    pub first_layer: u32,
    /// One past the last layer.
    pub end_layer: u32,
    /// Whether it holds the embedding.
    pub embed: bool,
    /// Whether it holds the head.
    pub head: bool,
    /// Seconds for one micro-batch.
    pub seconds: f64,
    /// Whether it sets the pace.
    pub slowest: bool,
    /// Whether an operator wants these layers here.
    pub pinned: bool,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Bytes of KV cache.
    pub kv_bytes: u64,
    /// Bytes that are left of what plans may use.
    pub free_bytes: u64,
    /// Bytes to fetch, kept on its disk, and as many again packed.
    pub disk_bytes: u64,
    /// Whether its disk has room for them, where that is known.
    pub disk_fits: Option<bool>,
    /// Seconds to fetch, pack and load.
    pub cold_start_seconds: f64,
    /// Seconds to load what is on its disk.
    pub warm_start_seconds: f64,
}

/// A node without a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LeftOutReport {
    /// Which.
    pub node: String,
    /// Why.
    pub reason: String,
}

/// What a change would bring.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImprovementReport {
    /// What to change.
    pub change: String,
    /// Tokens a second then.
    pub tokens_per_second: f64,
    /// More than now, as a share.
    pub gain: f64,
}

/// How one node alone would do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AloneReport {
    /// The best one.
    pub node: String,
    /// Tokens a second.
    pub tokens_per_second: f64,
}

/// The load that keeps a promise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromiseReport {
    /// Promised seconds to the first token.
    pub ttft_seconds: f64,
    /// Promised seconds between tokens.
    pub itl_seconds: f64,
    /// Tokens of the prompts that were assumed.
    pub prompt_tokens: u32,
    /// The most streams; 0 where not even one keeps it.
    pub streams: u32,
    /// Tokens a second with so many.
    pub tokens_per_second: f64,
    /// Seconds to the first token with so many.
    pub expected_ttft_seconds: f64,
    /// Seconds between tokens with so many.
    pub expected_itl_seconds: f64,
}

/// What a plan will do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanReport {
    /// Model.
    pub model: String,
    /// Its layers.
    pub layers: u32,
    /// Bytes of weights in memory, the whole model once.
    pub weight_bytes: u64,
    /// `throughput` or `latency`.
    pub objective: &'static str,
    /// Streams at once that it is made for.
    pub streams: u32,
    /// Tokens of a stream.
    pub context: u32,
    /// Whether some times are estimates from nominal figures.
    pub estimated: bool,
    /// Whether one node does it all though others are there.
    pub refused_to_split: bool,
    /// By how much the bottleneck may lie above the best possible, as a share; 0: it is the best.
    pub gap: f64,
    /// In order.
    pub stages: Vec<StageReport>,
    /// Micro-batches in flight.
    pub micro_batches: u32,
    /// Rows of each.
    pub rows: u32,
    /// Tokens a second of all streams.
    pub tokens_per_second: f64,
    /// Seconds between two tokens of a stream.
    pub inter_token_seconds: f64,
    /// Tokens a second of a stream that is alone.
    pub one_stream_tokens_per_second: f64,
    /// Share of their time that stages compute.
    pub efficiency: f64,
    /// How one node alone would do.
    pub alone: Option<AloneReport>,
    /// KV positions that fit.
    pub kv_tokens: u64,
    /// Streams of the context that fit.
    pub kv_streams: u64,
    /// Seconds until it serves, nothing fetched yet.
    pub cold_start_seconds: f64,
    /// Seconds until it serves again.
    pub warm_start_seconds: f64,
    /// The load that keeps what was promised.
    pub promise: Option<PromiseReport>,
    /// What the nodes of the plan cost an hour, where all say so.
    pub price_per_hour: Option<f64>,
    /// What a million tokens cost then.
    pub price_per_million_tokens: Option<f64>,
    /// Nodes without a stage.
    pub left_out: Vec<LeftOutReport>,
    /// What would help, the best first.
    pub improvements: Vec<ImprovementReport>,
}

impl PlanReport {
    /// Of a choice; `advice`: also what would help, which takes further planning.
    pub fn new(
        question: &Question<'_>,
        problem: &Problem<'_>,
        facts: &[NodeFacts],
        choice: &Choice,
        advice: bool,
    ) -> Self {
        let wish = &question.wish;
        let stages = stages(question, problem, facts, choice);
        let f = &choice.forecast;
        let busy: f64 = f.stage_seconds.iter().sum();
        let price = price(facts, choice);
        let (kv_tokens, cold, warm) =
            (kv_tokens(question, problem, choice), start(&stages, true), start(&stages, false));
        let whole =
            StageTensors { layers: 0..question.parts.config.layers, embed: true, head: true };
        Self {
            model: question.model_name.clone(),
            layers: question.parts.config.layers,
            weight_bytes: question.parts.memory_bytes(&whole, first_kept(facts, choice)),
            objective: match wish.goal {
                Goal::Throughput => "throughput",
                Goal::Latency => "latency",
            },
            streams: f.streams,
            context: question.context,
            estimated: stages.iter().any(|s| s.estimated),
            refused_to_split: choice.refused_to_split(problem, wish),
            gap: choice.gap,
            micro_batches: f.micro_batches,
            rows: f.rows,
            tokens_per_second: f.tokens_per_second,
            inter_token_seconds: f.inter_token_seconds,
            one_stream_tokens_per_second: choice.one_stream.tokens_per_second,
            efficiency: busy / (stages.len().max(1) as f64 * f.period_seconds),
            alone: choice.alone.as_ref().map(|(node, forecast)| AloneReport {
                node: facts[*node].name.clone(),
                tokens_per_second: forecast.tokens_per_second,
            }),
            kv_tokens,
            kv_streams: kv_tokens / u64::from(question.context.max(1)),
            cold_start_seconds: cold,
            warm_start_seconds: warm,
            promise: question.promise.as_ref().map(|p| promise(problem, choice, p)),
            price_per_hour: price,
            price_per_million_tokens: price.map(|p| p / 3600.0 / f.tokens_per_second * 1e6),
            left_out: without_stage(problem, wish, facts, choice),
            improvements: if advice { helps(problem, wish, facts, choice) } else { Vec::new() },
            stages,
        }
    }
}

/// How the first stage keeps weights: what the whole model would take there.
fn first_kept(facts: &[NodeFacts], choice: &Choice) -> Kept {
    choice.stages.first().and_then(|stage| facts[stage.node].kept)
}

fn stages(
    question: &Question<'_>,
    problem: &Problem<'_>,
    facts: &[NodeFacts],
    choice: &Choice,
) -> Vec<StageReport> {
    let last = choice.stages.len().saturating_sub(1);
    let home = problem.network.coordinator();
    let file = |i: usize| {
        let range = choice.stages[i].range.range();
        question.parts.file_bytes(&StageTensors { layers: range, embed: i == 0, head: i == last })
    };
    let all: u64 = (0..choice.stages.len()).map(file).sum();
    let link = |node| problem.network.get(home, node).map_or(f64::INFINITY, |l| l.bytes_per_second);
    // The coordinator sends to all at once, through a link as fast as its fastest.
    let uplink = choice.stages.iter().map(|s| link(s.node)).fold(0.0, f64::max);
    let one = |i: usize| {
        let (cut, fact) = (choice.stages[i], &facts[choice.stages[i].node]);
        let (embed, head) = (i == 0, i == last);
        let range = cut.range.range();
        let layers = range.start as usize..range.end as usize;
        let stage = StageTensors { layers: range, embed, head };
        let weight_bytes = question.parts.memory_bytes(&stage, fact.kept);
        let used = problem.model.stage_memory(layers.clone(), embed, head);
        let disk_bytes = file(i);
        let fetch = (disk_bytes as f64 / link(cut.node)).max(all as f64 / uplink);
        let warm = weight_bytes as f64 / fact.disk_bytes_per_second.unwrap_or(PACK_RATE);
        StageReport {
            stage: i,
            node: fact.name.clone(),
            estimated: fact.estimated,
            first_layer: cut.range.first,
            end_layer: cut.range.end,
            embed,
            head,
            seconds: choice.forecast.stage_seconds[i],
            slowest: i == choice.forecast.slowest_stage,
            pinned: problem.nodes[cut.node].pin.is_some(),
            weight_bytes,
            kv_bytes: problem.model.kv_bytes_per_layer * layers.len() as u64,
            free_bytes: problem.nodes[cut.node].memory_bytes.saturating_sub(used),
            disk_bytes,
            disk_fits: fact.disk_free_bytes.map(|free| free >= disk_bytes + weight_bytes),
            cold_start_seconds: fetch + weight_bytes as f64 / PACK_RATE,
            warm_start_seconds: warm,
        }
    };
    (0..choice.stages.len()).map(one).collect()
}

fn start(stages: &[StageReport], cold: bool) -> f64 {
    let seconds = |s: &StageReport| if cold { s.cold_start_seconds } else { s.warm_start_seconds };
    stages.iter().map(seconds).fold(0.0, f64::max)
}

/// Positions for which every stage has memory.
fn kv_tokens(question: &Question<'_>, problem: &Problem<'_>, choice: &Choice) -> u64 {
    let a_position = question.parts.config.kv_bytes_per_position(question.kv_dtype).max(1);
    let model = problem.model;
    let last = choice.stages.len().saturating_sub(1);
    let room = |(i, s): (usize, &millrace_shared::partition::StageCut)| {
        let layers = s.range.first as usize..s.range.end as usize;
        let count = layers.len() as u64;
        let used = model.stage_memory(layers, i == 0, i == last);
        let weights = used.saturating_sub(model.kv_bytes_per_layer * count);
        let free = problem.nodes[s.node].memory_bytes.saturating_sub(weights);
        (count > 0).then(|| free / (count * a_position))
    };
    choice.stages.iter().enumerate().filter_map(room).min().unwrap_or(0)
}

fn price(facts: &[NodeFacts], choice: &Choice) -> Option<f64> {
    choice.stages.iter().map(|s| facts[s.node].price_per_hour).sum()
}

fn promise(problem: &Problem<'_>, choice: &Choice, promise: &Promise) -> PromiseReport {
    let found = load_within(problem, &choice.stages, promise, MOST_STREAMS);
    let report = PromiseReport {
        ttft_seconds: promise.first_token_seconds,
        itl_seconds: promise.inter_token_seconds,
        prompt_tokens: promise.prompt_tokens,
        streams: 0,
        tokens_per_second: 0.0,
        expected_ttft_seconds: 0.0,
        expected_itl_seconds: 0.0,
    };
    match found {
        None => report,
        Some((load, first)) => PromiseReport {
            streams: load.streams,
            tokens_per_second: load.tokens_per_second,
            expected_ttft_seconds: first,
            expected_itl_seconds: load.inter_token_seconds,
            ..report
        },
    }
}

fn without_stage(
    problem: &Problem<'_>,
    wish: &Wish,
    facts: &[NodeFacts],
    choice: &Choice,
) -> Vec<LeftOutReport> {
    let report = |(node, reason): (usize, millrace_shared::partition::LeftOut)| LeftOutReport {
        node: facts[node].name.clone(),
        reason: reason.to_string(),
    };
    left_out(problem, wish, choice).into_iter().map(report).collect()
}

fn helps(
    problem: &Problem<'_>,
    wish: &Wish,
    facts: &[NodeFacts],
    choice: &Choice,
) -> Vec<ImprovementReport> {
    let now = match wish.goal {
        Goal::Throughput => choice.forecast.tokens_per_second,
        Goal::Latency => choice.one_stream.tokens_per_second,
    };
    let name = |node: usize| facts[node].name.as_str();
    let say = |change| match change {
        Change::Add(like) => format!("one more node like {}", name(like)),
        Change::Replace(old, like) => {
            format!("a node like {} instead of {}", name(like), name(old))
        }
        Change::Memory(node) => format!("twice the memory on {}", name(node)),
        Change::Links => "links without delay".to_owned(),
        Change::ShardHead => "the head cut over all stages (not built yet)".to_owned(),
        Change::Streams => "twice the streams".to_owned(),
    };
    let report = |(change, tokens_per_second): (Change, f64)| ImprovementReport {
        change: say(change),
        tokens_per_second,
        gain: tokens_per_second / now - 1.0,
    };
    improvements(problem, wish, choice).into_iter().take(MOST_IMPROVEMENTS).map(report).collect()
}
