//! The plan for a wish: which nodes, how cut, with how many micro-batches in flight; why each other
//! node was left out, and what would help most.
//!
//! The rows of a micro-batch follow from how many are in flight, and the best cut from the rows: each
//! number in flight is tried, the most promising first, and those whose lower bound cannot win are
//! not looked at. One node alone wins unless a split is better by [`WORTH`].

use std::fmt;

use super::costs::{Curve, Link, ModelCosts, Network, NodeCosts, Problem};
use super::forecast::{Forecast, forecast};
use super::solve::{Objective, Solution, StageCut, solve};
use super::{PartitionError, bounds};

/// What a split must gain over one node alone, as a share.
const WORTH: f64 = 0.01;

/// What a plan is to be good at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Goal {
    /// Tokens a second of all streams.
    #[default]
    Throughput,
    /// Time between tokens of one stream.
    Latency,
}

/// What is wanted of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Good at what.
    pub goal: Goal,
    /// Streams at once.
    pub streams: u32,
    /// Exactly so many stages.
    pub stages: Option<usize>,
    /// Exactly so many micro-batches in flight.
    pub micro_batches: Option<u32>,
}

/// A plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The stages.
    pub stages: Vec<StageCut>,
    /// By how much the bottleneck may lie above the best, as a share; 0 where it is the best.
    pub gap: f64,
    /// For the streams wished for.
    pub forecast: Forecast,
    /// For one stream.
    pub one_stream: Forecast,
    /// The best node alone, if any can hold the model.
    pub alone: Option<(usize, Forecast)>,
}

impl Choice {
    /// A cut that somebody else made, judged.
    pub fn of(problem: &Problem<'_>, wish: &Wish, stages: Vec<StageCut>) -> Self {
        Self {
            forecast: judge(problem, wish, &stages),
            one_stream: forecast(problem, &stages, 1, Some(1)),
            alone: None,
            gap: 0.0,
            stages,
        }
    }

    /// Whether one node does it all though there are others.
    pub fn refused_to_split(&self, problem: &Problem<'_>, wish: &Wish) -> bool {
        self.stages.len() == 1 && problem.nodes.len() > 1 && wish.stages.is_none()
    }
}

fn judge(problem: &Problem<'_>, wish: &Wish, stages: &[StageCut]) -> Forecast {
    forecast(problem, stages, wish.streams, wish.micro_batches)
}

/// How good a forecast is for a goal: more is better.
pub(super) fn worth(wish: &Wish, problem: &Problem<'_>, stages: &[StageCut]) -> f64 {
    match wish.goal {
        Goal::Throughput => judge(problem, wish, stages).tokens_per_second,
        Goal::Latency => forecast(problem, stages, 1, Some(1)).tokens_per_second,
    }
}

/// The best plan. `problem.rows` does not matter.
///
/// # Errors
/// As [`solve`].
pub fn choose(problem: &Problem<'_>, wish: &Wish) -> Result<Choice, PartitionError> {
    let best = best_cut(problem, wish, &in_flight(problem, wish))?;
    let alone = match wish.stages {
        None | Some(1) => best_cut(problem, &Wish { stages: Some(1), ..*wish }, &[1, 2]).ok(),
        Some(_) => None,
    };
    let take_alone = wish.stages.is_none()
        && alone.as_ref().is_some_and(|alone| {
            let split = worth(wish, problem, &best.stages);
            worth(wish, problem, &alone.stages) * (1.0 + WORTH) >= split
        });
    let alone_forecast =
        alone.as_ref().map(|a| (a.stages[0].node, judge(problem, wish, &a.stages)));
    let taken = match alone {
        Some(alone) if take_alone => alone,
        _ => best,
    };
    let gap = taken.gap();
    Ok(Choice { alone: alone_forecast, gap, ..Choice::of(problem, wish, taken.stages) })
}

/// Numbers of micro-batches in flight that are worth a look.
fn in_flight(problem: &Problem<'_>, wish: &Wish) -> Vec<u32> {
    if wish.goal == Goal::Latency {
        return vec![1];
    }
    if let Some(m) = wish.micro_batches {
        return vec![m.clamp(1, wish.streams.max(1))];
    }
    let nodes = problem.nodes.len().min(256) as u32;
    let most = wish.stages.map_or(nodes, |n| nodes.min(n as u32));
    let wide = [2, 3, 4].map(|k| k * most);
    let all = (1..=most + 2).chain(wide).filter(|&m| m <= wish.streams.max(1));
    let mut all: Vec<u32> = all.collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn best_cut(
    problem: &Problem<'_>,
    wish: &Wish,
    in_flight: &[u32],
) -> Result<Solution, PartitionError> {
    let streams = f64::from(wish.streams.max(1));
    let rows = |m: u32| match wish.goal {
        Goal::Throughput => (streams / f64::from(m)).ceil(),
        Goal::Latency => 1.0,
    };
    let objective = |m: u32| match wish.goal {
        Goal::Throughput => Objective::Period { micro_batches: m },
        Goal::Latency => Objective::Latency,
    };
    // What each could do at best.
    let mut tries: Vec<(f64, u32)> = (in_flight.iter())
        .map(|&m| {
            let problem = Problem { rows: rows(m), ..*problem };
            (streams / f64::from(m) / bounds::lower_bound(&problem, objective(m)).max(1e-12), m)
        })
        .collect();
    tries.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut best: Option<(f64, Solution)> = None;
    let mut error = None;
    for (most, m) in tries {
        if wish.goal == Goal::Throughput && best.as_ref().is_some_and(|(worth, _)| most <= *worth) {
            continue;
        }
        match solve(&Problem { rows: rows(m), ..*problem }, objective(m), wish.stages) {
            Ok(found) => {
                let worth = worth(wish, problem, &found.stages);
                if best.as_ref().is_none_or(|(least, _)| worth > least * 1.001) {
                    best = Some((worth, found));
                }
            }
            Err(e) => error = Some(e),
        }
    }
    best.map(|(_, found)| found).ok_or_else(|| error.unwrap_or(PartitionError::NoStages))
}

/// Why a node has no stage.
#[derive(Clone, Debug, PartialEq)]
pub enum LeftOut {
    /// It cannot reach, or be reached by, any node of the plan and the coordinator.
    NoLink,
    /// Not one layer fits.
    TooSmall {
        /// Bytes for the smallest part.
        needed: u64,
        /// Bytes it has.
        available: u64,
    },
    /// One layer takes longer there than the slowest stage.
    TooSlow {
        /// Seconds of a layer.
        layer_seconds: f64,
        /// Seconds of the slowest stage.
        slowest_seconds: f64,
    },
    /// The plan with it is not faster.
    NoGain {
        /// Tokens a second with it.
        with: f64,
        /// Without.
        without: f64,
    },
    /// As many stages as asked for have better nodes.
    NotNeeded,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |s: &f64| s * 1e3;
        match self {
            Self::NoLink => write!(f, "no open link to the nodes of the plan"),
            Self::TooSmall { needed, available } => write!(
                f,
                "too little memory: one layer with its KV cache needs {}, it has {}",
                super::Gib(*needed),
                super::Gib(*available)
            ),
            Self::TooSlow { layer_seconds, slowest_seconds } => write!(
                f,
                "too slow: one layer takes {:.2} ms there, the slowest stage {:.2} ms",
                ms(layer_seconds),
                ms(slowest_seconds)
            ),
            Self::NoGain { with, without } => {
                write!(f, "no gain: {with:.1} tokens/s with it, {without:.1} without")
            }
            Self::NotNeeded => write!(f, "not needed: the stages asked for have better nodes"),
        }
    }
}

/// Why each node without a stage has none.
pub fn left_out(problem: &Problem<'_>, wish: &Wish, choice: &Choice) -> Vec<(usize, LeftOut)> {
    let used: Vec<usize> = choice.stages.iter().map(|s| s.node).collect();
    let rest = (0..problem.nodes.len()).filter(|n| !used.contains(n));
    rest.map(|node| (node, reason(problem, wish, choice, (&used, node)))).collect()
}

fn reason(
    problem: &Problem<'_>,
    wish: &Wish,
    choice: &Choice,
    (used, node): (&[usize], usize),
) -> LeftOut {
    let places = || used.iter().copied().chain([problem.network.coordinator()]);
    let network = problem.network;
    if places().all(|p| network.get(p, node).is_none())
        || places().all(|p| network.get(node, p).is_none())
    {
        return LeftOut::NoLink;
    }
    let model = problem.model;
    let least = model.layer_bytes.iter().min().copied().unwrap_or(0);
    let needed = least.saturating_add(model.kv_bytes_per_layer).saturating_add(model.stage_bytes);
    let available = problem.nodes[node].memory_bytes;
    if needed > available {
        return LeftOut::TooSmall { needed, available };
    }
    let rows = f64::from(choice.forecast.rows);
    let layer_seconds = problem.nodes[node].layer.at(rows);
    let slowest_seconds = choice.forecast.stage_seconds.iter().copied().fold(0.0, f64::max);
    if layer_seconds > slowest_seconds {
        return LeftOut::TooSlow { layer_seconds, slowest_seconds };
    }
    let without = worth(wish, problem, &choice.stages);
    let nodes: Vec<usize> = used.iter().copied().chain([node]).collect();
    let more = Wish { stages: Some(nodes.len()), ..*wish };
    let with = Part::of(problem, &nodes).worth(&more, &tries(wish, choice)).unwrap_or(0.0);
    if wish.stages.is_some() && with > without {
        return LeftOut::NotNeeded;
    }
    LeftOut::NoGain { with, without }
}

/// Numbers in flight near the one of a plan.
fn tries(wish: &Wish, choice: &Choice) -> Vec<u32> {
    let m = choice.forecast.micro_batches;
    let all = [m.saturating_sub(1), m, m + 1, m + 2];
    let mut all: Vec<u32> = all.map(|m| m.clamp(1, wish.streams.max(1))).to_vec();
    all.dedup();
    all
}

/// Some of the nodes, or changed ones, with a problem of their own.
struct Part {
    model: ModelCosts,
    nodes: Vec<NodeCosts>,
    network: Network,
}

impl Part {
    fn of(problem: &Problem<'_>, nodes: &[usize]) -> Self {
        Self {
            model: problem.model.clone(),
            nodes: nodes.iter().map(|&n| problem.nodes[n].clone()).collect(),
            network: problem.network.select(nodes),
        }
    }

    fn worth(&self, wish: &Wish, in_flight: &[u32]) -> Option<f64> {
        let (model, nodes, network) = (&self.model, &self.nodes[..], &self.network);
        let problem = Problem { model, nodes, network, rows: 1.0 };
        let in_flight = if wish.goal == Goal::Latency { &[1] } else { in_flight };
        let found = best_cut(&problem, wish, in_flight).ok()?;
        Some(worth(wish, &problem, &found.stages))
    }
}

/// A change to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// One more node like this one.
    Add(usize),
    /// The first node replaced by one like the second.
    Replace(usize, usize),
    /// Twice the memory on this node.
    Memory(usize),
    /// Links without delay.
    Links,
    /// The head's matrix cut over all stages by vocabulary.
    ShardHead,
    /// Twice the streams.
    Streams,
}

/// What changes would bring, the best first: the change, and tokens a second with it. Only those
/// that bring something.
pub fn improvements(problem: &Problem<'_>, wish: &Wish, choice: &Choice) -> Vec<(Change, f64)> {
    let now = worth(wish, problem, &choice.stages);
    let slowest = choice.stages[choice.forecast.slowest_stage].node;
    let rows = f64::from(choice.forecast.rows);
    let mut changes = vec![Change::Links, Change::ShardHead];
    if wish.goal == Goal::Throughput {
        changes.push(Change::Streams);
    }
    for like in unlike_nodes(problem) {
        if wish.stages.is_none() {
            changes.push(Change::Add(like));
        }
        if problem.nodes[like].layer.at(rows) < problem.nodes[slowest].layer.at(rows) {
            changes.push(Change::Replace(slowest, like));
        }
    }
    changes.extend((0..problem.nodes.len().min(16)).map(Change::Memory));
    let tries = tries(wish, choice);
    let mut found: Vec<(Change, f64)> = (changes.into_iter())
        .filter_map(|change| {
            let mut wish = *wish;
            if change == Change::Streams {
                wish.streams = wish.streams.saturating_mul(2);
            }
            Some((change, changed(problem, change).worth(&wish, &tries)?))
        })
        .filter(|(_, worth)| *worth > now * (1.0 + WORTH))
        .collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found
}

/// The first of each kind of node.
fn unlike_nodes(problem: &Problem<'_>) -> Vec<usize> {
    let mut kinds: Vec<usize> = Vec::new();
    for (i, node) in problem.nodes.iter().enumerate() {
        let alike = |&k: &usize| {
            let (a, b) = (problem.nodes[k].layer.at(16.0), node.layer.at(16.0));
            (a - b).abs() <= 0.1 * a.max(b)
                && problem.nodes[k].memory_bytes / (1 << 30) == node.memory_bytes / (1 << 30)
        };
        if !kinds.iter().any(alike) {
            kinds.push(i);
        }
    }
    kinds.truncate(8);
    kinds
}

fn changed(problem: &Problem<'_>, change: Change) -> Part {
    let mut all: Vec<usize> = (0..problem.nodes.len()).collect();
    match change {
        Change::Add(like) => all.push(like),
        Change::Replace(old, like) => all[old] = like,
        _ => {}
    }
    let mut part = Part::of(problem, &all);
    // A pin stays in its place: a twin has none.
    match change {
        Change::Add(_) => part.nodes[all.len() - 1].pin = None,
        Change::Replace(old, _) => part.nodes[old].pin = problem.nodes[old].pin,
        _ => {}
    }
    match change {
        Change::Memory(node) => part.nodes[node].memory_bytes *= 2,
        Change::Links => part.network = Network::uniform(all.len(), Link::FREE),
        Change::ShardHead => {
            let work: f64 = problem.model.layer_share.iter().sum();
            for node in &mut part.nodes {
                let spread = |rows: f64| (rows, node.layer.at(rows) + node.head.at(rows) / work);
                node.layer = Curve::new([1.0, 4.0, 16.0, 64.0].map(spread));
                node.head = Curve::flat(0.0);
            }
        }
        _ => {}
    }
    part
}
