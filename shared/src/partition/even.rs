//! Evens a cut out: where several cuts share the slowest stage, the one whose other stages are the
//! most even is taken, so that a later change of speed finds room everywhere.
//!
//! Order and nodes are given. Dynamic programming over (stage, layer): the least sum of squares of
//! stage times, none above the slowest of the cut. O(stages x layers^2).

use super::LayerRange;
use super::costs::Problem;
use super::solve::{Objective, Solution, StageCut};

/// The same nodes in the same order with more even stages; as it was where that is not as good.
pub(super) fn even_out(
    problem: &Problem<'_>,
    solution: Solution,
    objective: Objective,
) -> Solution {
    let nodes: Vec<usize> = solution.stages.iter().map(|s| s.node).collect();
    let limit = solution.bottleneck_seconds * (1.0 + 1e-9);
    let Some(ranges) = most_even(problem, &nodes, limit) else { return solution };
    let stages = nodes.iter().zip(ranges).map(|(&node, range)| StageCut { node, range }).collect();
    let even = Solution::of(problem, stages, objective);
    if even.value <= solution.value * (1.0 + 1e-9) { even } else { solution }
}

/// The most even cut over nodes in their order, no stage above `limit`. `None` if there is none.
pub(super) fn most_even(
    problem: &Problem<'_>,
    nodes: &[usize],
    limit: f64,
) -> Option<Vec<LayerRange>> {
    let (layers, last) = (problem.model.layers(), nodes.len().checked_sub(1)?);
    let mut best = vec![None; layers + 1];
    best[0] = Some(0.0f64);
    let mut starts: Vec<Vec<usize>> = Vec::with_capacity(nodes.len());
    for (stage, &node) in nodes.iter().enumerate() {
        let (first, closing) = (stage == 0, stage == last);
        let mut next: Vec<Option<f64>> = vec![None; layers + 1];
        let mut start = vec![0; layers + 1];
        let memory = problem.nodes[node].memory_bytes;
        let pin = problem.nodes[node].pin.map(|p| (p.first as usize, p.end as usize));
        for (from, value) in best.iter().enumerate() {
            let Some(value) = *value else { continue };
            if pin.is_some_and(|(first, _)| first != from) {
                continue;
            }
            let least = if closing { layers } else { from + 1 };
            let mut bytes = problem.model.stage_memory(from..from, first, closing);
            let mut seconds = problem.stage_seconds(node, from..from, first, closing);
            for end in from..=layers {
                if end > from {
                    bytes = bytes
                        .saturating_add(problem.model.layer_bytes[end - 1])
                        .saturating_add(problem.model.kv_bytes_per_layer);
                    seconds += problem.model.layer_share[end - 1]
                        * problem.nodes[node].layer.at(problem.rows);
                }
                if seconds > limit || bytes > memory {
                    break;
                }
                let value = value + seconds * seconds;
                let here = end >= least && pin.is_none_or(|(_, pinned)| pinned == end);
                if here && next[end].is_none_or(|old| value < old) {
                    next[end] = Some(value);
                    start[end] = from;
                }
            }
        }
        best = next;
        starts.push(start);
    }
    best[layers]?;
    let mut end = layers;
    let mut ranges = Vec::with_capacity(nodes.len());
    for start in starts.iter().rev() {
        ranges.push(LayerRange { first: start[end] as u32, end: end as u32 });
        end = start[end];
    }
    ranges.reverse();
    Some(ranges)
}
