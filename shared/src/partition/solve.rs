//! Chooses nodes, their order and the cut for an objective.
//!
//! One objective covers all: with `m` micro-batches in flight the pipeline finishes one every
//! `P(m) = max(slowest stage, sum / m)`; `m = 1` is the latency, many are the throughput. Exact as
//! long as the sets of unlike nodes are few enough to look at all ([`REACH_ENTRIES`],
//! [`PATH_ENTRIES`]: 14 and 9 unlike nodes, far more that are alike); beyond, nodes that differ by
//! little are taken for alike (`approximate`), and the gap to a lower bound is in the answer. Pinned
//! nodes are alike to none, and exact for throughput up to 9 unlike nodes too.

use super::classes::{Classes, MAX_CLASSES};
use super::costs::Problem;
use super::even::even_out;
use super::paths::{self, least_sum};
use super::reach::{self, Cut, TOLERANCE, least_bottleneck};
use super::{LayerRange, PartitionError, bounds, check, greedy};

/// Most `sets x classes` of an exact search for throughput: 14 unlike nodes.
const REACH_ENTRIES: usize = (1 << 14) * 14;
/// Most `sets x classes x layers` of an exact search with sums: 9 unlike nodes with any layers, more
/// where there are few.
const PATH_ENTRIES: usize = (1 << 9) * 9 * 1024;
/// How unlike nodes may be that are taken for alike, one try after the other.
const TOLERANCES: [f64; 6] = [0.0, 0.02, 0.05, 0.1, 0.25, 0.5];

/// What is to be least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// The slowest stage.
    Throughput,
    /// The time of one micro-batch from the coordinator and back.
    Latency,
    /// The time between two micro-batches with so many in flight.
    Period {
        /// In flight; at least 1.
        micro_batches: u32,
    },
}

impl Objective {
    /// From the slowest stage and the sum.
    pub fn value(self, bottleneck: f64, sum: f64) -> f64 {
        match self {
            Self::Throughput => bottleneck,
            Self::Latency => sum,
            Self::Period { micro_batches } => bottleneck.max(sum / f64::from(micro_batches.max(1))),
        }
    }
}

/// A stage of a solution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageCut {
    /// Index of the node.
    pub node: usize,
    /// Its layers.
    pub range: LayerRange,
}

/// A cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// In order.
    pub stages: Vec<StageCut>,
    /// Seconds of the slowest stage or transfer.
    pub bottleneck_seconds: f64,
    /// Seconds from the coordinator through all stages and back.
    pub sum_seconds: f64,
    /// The objective.
    pub value: f64,
    /// No cut has a smaller value than this.
    pub lower_bound: f64,
}

impl Solution {
    /// A cut with its times. Infinite where a link is forbidden.
    pub fn of(problem: &Problem<'_>, stages: Vec<StageCut>, objective: Objective) -> Self {
        let last = stages.len().saturating_sub(1);
        let home = problem.network.coordinator();
        let (mut slowest, mut sum, mut at) = (0.0f64, 0.0, home);
        for (i, stage) in stages.iter().enumerate() {
            let layers = stage.range.first as usize..stage.range.end as usize;
            let seconds = problem.stage_seconds(stage.node, layers, i == 0, i == last);
            sum += problem.hop_seconds(at, stage.node) + seconds;
            if at != home {
                slowest = slowest.max(problem.transfer_seconds(at, stage.node));
            }
            slowest = slowest.max(seconds);
            at = stage.node;
        }
        sum += problem.hop_seconds(at, home);
        let value = objective.value(slowest, sum);
        Self { stages, bottleneck_seconds: slowest, sum_seconds: sum, value, lower_bound: 0.0 }
    }

    /// By how much the value may lie above the best one, as a share of it.
    pub fn gap(&self) -> f64 {
        if self.lower_bound > 0.0 { (self.value / self.lower_bound - 1.0).max(0.0) } else { 0.0 }
    }
}

/// The best cut; with exactly `stages` stages if so given.
///
/// # Errors
/// If the input makes no sense, or no cut fits memory and links.
pub fn solve(
    problem: &Problem<'_>,
    objective: Objective,
    stages: Option<usize>,
) -> Result<Solution, PartitionError> {
    check::input(problem, stages)?;
    let (mut solution, exact) = match objective {
        Objective::Throughput => throughput(problem, stages)?,
        Objective::Latency => within(problem, objective, stages, f64::INFINITY)?,
        Objective::Period { .. } => period(problem, objective, stages)?,
    };
    solution.lower_bound = if exact {
        solution.value
    } else {
        bounds::lower_bound(problem, objective).min(solution.value)
    };
    Ok(solution)
}

/// Classes that a search with so many entries can take, and whether they are exact.
fn classes_for(problem: &Problem<'_>, most: usize, per_class: usize) -> Option<(Classes, bool)> {
    TOLERANCES.iter().find_map(|&tolerance| {
        let classes = Classes::new(problem, tolerance);
        let entries = classes.states().saturating_mul(classes.len()).saturating_mul(per_class);
        let fits = classes.len() <= MAX_CLASSES && entries <= most;
        fits.then_some((classes, tolerance == 0.0))
    })
}

fn on_nodes(problem: &Problem<'_>, classes: &Classes, cut: &Cut, objective: Objective) -> Solution {
    let nodes = classes.nodes_of(cut.iter().map(|&(class, _)| class));
    let stage = |(&node, &(_, (first, end))): (&usize, &(usize, (usize, usize)))| StageCut {
        node,
        range: LayerRange { first: first as u32, end: end as u32 },
    };
    Solution::of(problem, nodes.iter().zip(cut).map(stage).collect(), objective)
}

/// With pins the furthest reach is no longer the best: the search over sums finds the bottleneck.
fn around_pins(problem: &Problem<'_>, stages: Option<usize>) -> (Option<Solution>, bool) {
    let grouped = classes_for(problem, PATH_ENTRIES / 8, problem.model.layers() + 1);
    let Some((classes, exact)) = grouped else { return (None, false) };
    let cut = refine(&classes, None, stages);
    (cut.map(|cut| on_nodes(problem, &classes, &cut, Objective::Throughput)), exact)
}

fn throughput(
    problem: &Problem<'_>,
    stages: Option<usize>,
) -> Result<(Solution, bool), PartitionError> {
    let objective = Objective::Throughput;
    if problem.nodes.iter().any(|n| n.pin.is_some()) {
        let (mut best, exact) = around_pins(problem, stages);
        if !exact {
            best = better(best, greedy::greedy(problem, objective, stages));
        }
        let best = best.ok_or_else(|| check::does_not_fit(problem, stages))?;
        return Ok((even_out(problem, best, objective), exact));
    }
    let grouped = classes_for(problem, REACH_ENTRIES, 1);
    let mut best: Option<Solution> = None;
    let mut exact = false;
    if let Some((classes, all)) = grouped {
        exact = all;
        let mut cut = least_bottleneck(&classes, stages);
        // The furthest reach can be a dead end: where a node is needed as a bridge between others, or
        // the number of stages is given and a layer is too large for some node. The search over sums
        // knows every start; where it is too large, each number of stages is tried.
        if all && paths::entries(&classes) <= PATH_ENTRIES {
            cut = refine(&classes, cut, stages);
        } else if stages.is_none() && restricted(&classes, cut.as_ref()) {
            cut = by_size(&classes, cut);
        }
        best = cut.map(|cut| on_nodes(problem, &classes, &cut, objective));
    }
    if !exact {
        let other = greedy::greedy(problem, objective, stages);
        best = better(best, other);
    }
    let best = best.ok_or_else(|| check::does_not_fit(problem, stages))?;
    Ok((even_out(problem, best, objective), exact))
}

/// Whether links forbid edges at the bottleneck of a cut.
fn restricted(classes: &Classes, cut: Option<&Cut>) -> bool {
    let limit = cut.map_or(f64::INFINITY, |cut| reach::bottleneck(classes, cut));
    let kinds = 0..classes.len();
    kinds
        .clone()
        .flat_map(|a| kinds.clone().map(move |b| (a, b)))
        .any(|(a, b)| !classes.hop(a, b).is_finite() || classes.transfer(a, b) >= limit)
}

/// The least bottleneck over each number of stages.
fn by_size(classes: &Classes, cut: Option<Cut>) -> Option<Cut> {
    let most = classes.members.iter().map(Vec::len).sum::<usize>().min(classes.layers() + 1);
    let sizes = (2..=most).filter_map(|n| least_bottleneck(classes, Some(n)));
    let value = |cut: &Cut| reach::bottleneck(classes, cut);
    cut.into_iter().chain(sizes).min_by(|a, b| value(a).total_cmp(&value(b)))
}

/// The least bottleneck by probes of the search that knows every start.
fn refine(classes: &Classes, cut: Option<Cut>, stages: Option<usize>) -> Option<Cut> {
    let mut best = match cut {
        Some(cut) => cut,
        None => least_sum(classes, f64::INFINITY, stages)?,
    };
    let mut low = 0.0;
    loop {
        let high = reach::bottleneck(classes, &best);
        let below = high * (1.0 - TOLERANCE);
        match least_sum(classes, below, stages) {
            Some(cut) => best = cut,
            None => return Some(best),
        }
        // It was a dead end: halve what is left.
        let middle = (low + reach::bottleneck(classes, &best)) / 2.0;
        match least_sum(classes, middle, stages) {
            Some(cut) => best = cut,
            None => low = middle,
        }
    }
}

fn better(a: Option<Solution>, b: Option<Solution>) -> Option<Solution> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.value < a.value { b } else { a }),
        (a, b) => a.or(b),
    }
}

/// The least sum with no stage above `limit`.
fn within(
    problem: &Problem<'_>,
    objective: Objective,
    stages: Option<usize>,
    limit: f64,
) -> Result<(Solution, bool), PartitionError> {
    let grouped = classes_for(problem, PATH_ENTRIES, problem.model.layers() + 1);
    let exact = grouped.as_ref().is_some_and(|(_, exact)| *exact);
    let mut best = grouped.and_then(|(classes, _)| {
        let cut = least_sum(&classes, limit, stages)?;
        Some(on_nodes(problem, &classes, &cut, objective))
    });
    if !exact {
        let greedy = greedy::greedy(problem, objective, stages);
        best = better(best, greedy.filter(|g| g.bottleneck_seconds <= limit));
    }
    Ok((best.ok_or_else(|| check::does_not_fit(problem, stages))?, exact))
}

/// The least `max(slowest, sum / m)`. The least sum under a limit only falls when the limit rises,
/// so that the best limit is where both meet: found by bisection.
fn period(
    problem: &Problem<'_>,
    objective: Objective,
    stages: Option<usize>,
) -> Result<(Solution, bool), PartitionError> {
    let (quick, exact) = throughput(problem, stages)?;
    let quick = Solution::of(problem, quick.stages, objective);
    let least = quick.bottleneck_seconds;
    // Nothing is below the least bottleneck.
    if quick.value <= least * (1.0 + TOLERANCE) {
        return Ok((quick, exact));
    }
    let (short, exact_sums) = within(problem, objective, stages, f64::INFINITY)?;
    let exact = exact && exact_sums;
    if short.value > short.bottleneck_seconds * (1.0 + TOLERANCE) {
        // The least sum rules: nothing is below it.
        return Ok((short, exact));
    }
    let (mut low, mut high) = (least, short.bottleneck_seconds);
    let mut best = if short.value < quick.value { short } else { quick };
    for _ in 0..60 {
        if high - low <= high * TOLERANCE {
            break;
        }
        let middle = (low + high) / 2.0;
        let Ok((found, _)) = within(problem, objective, stages, middle) else {
            low = middle;
            continue;
        };
        if found.value <= found.bottleneck_seconds * (1.0 + TOLERANCE) {
            // The slowest stage rules: a smaller limit may be better, a larger one is not.
            high = found.bottleneck_seconds.min(middle);
        } else if found.value <= middle {
            // Less time in sum takes a slower stage than this value allows: nothing is below it.
            return Ok((found, exact));
        } else {
            low = middle;
        }
        if found.value < best.value {
            best = found;
        }
    }
    Ok((best, exact))
}
