//! The way out where nodes are too many and too unlike for a search over sets: an order is tried,
//! cut as well as that order allows, and improved by exchanging two nodes at a time (2-opt), until no
//! exchange helps. Pinned nodes come in where their layers begin, whatever the order of the others.
//! No promise but the gap that is reported.

use super::LayerRange;
use super::costs::Problem;
use super::solve::{Objective, Solution, StageCut};

/// Exchanges tried at most.
const MOST_TRIES: usize = 8_000;

/// A cut for each of several numbers of stages, the best of them.
pub(super) fn greedy(
    problem: &Problem<'_>,
    objective: Objective,
    stages: Option<usize>,
) -> Option<Solution> {
    let free = |n: &usize| problem.nodes[*n].pin.is_none();
    let mut order: Vec<usize> = (0..problem.nodes.len()).filter(free).collect();
    let pins = problem.nodes.len() - order.len();
    let speed = |&n: &usize| problem.nodes[n].layer.at(problem.rows);
    order.sort_by(|a, b| speed(a).total_cmp(&speed(b)));
    let most = order.len().min(problem.model.layers() + 1);
    let sizes: Vec<usize> = match stages {
        Some(n) => vec![n.checked_sub(pins)?],
        None if most == 0 => vec![0],
        None => {
            let doubled = (1..).map(|i| 1 << i).take_while(|&n| n < most);
            (usize::from(pins == 0)..most)
                .step_by(most.div_ceil(12))
                .chain(doubled)
                .chain([most])
                .collect()
        }
    };
    let mut tries = MOST_TRIES / sizes.len().max(1);
    sizes
        .into_iter()
        .filter_map(|n| improve(problem, objective, order.clone(), n, &mut tries))
        .min_by(|a, b| a.value.total_cmp(&b.value))
}

fn improve(
    problem: &Problem<'_>,
    objective: Objective,
    mut order: Vec<usize>,
    used: usize,
    tries: &mut usize,
) -> Option<Solution> {
    // The fastest last: it has the head too.
    order.get_mut(..used)?.rotate_left(used.min(1));
    let mut best = cut(problem, objective, &order[..used]);
    let mut improved = true;
    while improved && *tries > 0 {
        improved = false;
        for a in 0..used {
            for b in a + 1..order.len() {
                *tries = tries.saturating_sub(1);
                if *tries == 0 {
                    return best;
                }
                order.swap(a, b);
                let other = cut(problem, objective, &order[..used]);
                let better = match (&other, &best) {
                    (Some(other), Some(best)) => other.value < best.value * (1.0 - 1e-9),
                    (other, best) => other.is_some() && best.is_none(),
                };
                if better {
                    (best, improved) = (other, true);
                } else {
                    order.swap(a, b);
                }
            }
        }
    }
    best
}

/// The least bottleneck for an order: bisection over what each stage reaches.
fn cut(problem: &Problem<'_>, objective: Objective, nodes: &[usize]) -> Option<Solution> {
    let whole = |limit: f64| {
        let found = Solution::of(problem, walk(problem, nodes, limit)?, objective);
        found.value.is_finite().then_some(found)
    };
    let mut best = whole(f64::INFINITY)?;
    let (mut low, mut high) = (0.0, best.bottleneck_seconds);
    for _ in 0..24 {
        if high - low <= high * 1e-4 {
            break;
        }
        let middle = (low + high) / 2.0;
        match whole(middle) {
            Some(found) => {
                high = found.bottleneck_seconds.min(middle);
                if found.value <= best.value {
                    best = found;
                }
            }
            None => low = middle,
        }
    }
    Some(best)
}

/// Every stage as far as it can within `limit`, one layer left for each of the others but the last,
/// which does the rest; pinned nodes where their layers begin.
fn walk(problem: &Problem<'_>, nodes: &[usize], limit: f64) -> Option<Vec<StageCut>> {
    let layers = problem.model.layers();
    let mut pins: Vec<(LayerRange, usize)> =
        (problem.nodes.iter().enumerate()).filter_map(|(n, node)| Some((node.pin?, n))).collect();
    pins.sort_by_key(|(range, _)| std::cmp::Reverse(range.first));
    let mut free_layers = layers - pins.iter().map(|(r, _)| r.len() as usize).sum::<usize>();
    let (mut left, mut stages, mut start) = (nodes.iter(), Vec::new(), 0);
    loop {
        let next_pin = pins.last().map_or(layers, |(range, _)| range.first as usize);
        let (node, least, most) = match pins.pop_if(|(r, _)| r.first as usize == start) {
            Some((range, node)) => (node, range.end as usize, range.end as usize),
            None => {
                let Some(&node) = left.next() else { break };
                let closing = left.len() == 0 && pins.is_empty();
                // The last may have the head alone.
                let others = left.len().saturating_sub(1);
                let most = next_pin.min(start + free_layers.checked_sub(others)?);
                (node, if closing { layers } else { start + 1 }, most)
            }
        };
        let closing = left.len() == 0 && pins.is_empty();
        let end = furthest(problem, (node, start), (start == 0, closing), most, limit)?;
        if end < least {
            return None;
        }
        if problem.nodes[node].pin.is_none() {
            free_layers -= end - start;
        }
        let range = LayerRange { first: start as u32, end: end as u32 };
        stages.push(StageCut { node, range });
        start = end;
    }
    (start == layers && pins.is_empty() && !stages.is_empty()).then_some(stages)
}

/// Where a stage from `start` must end to stay within `limit` and memory, at most at `most`; `None`
/// where not even its ends fit.
fn furthest(
    problem: &Problem<'_>,
    (node, start): (usize, usize),
    (first, closing): (bool, bool),
    most: usize,
    limit: f64,
) -> Option<usize> {
    let (model, costs) = (problem.model, &problem.nodes[node]);
    let layer = costs.layer.at(problem.rows);
    let mut bytes = model.stage_memory(start..start, first, closing);
    let mut seconds = problem.stage_seconds(node, start..start, first, closing);
    let mut end = start;
    while seconds <= limit && bytes <= costs.memory_bytes && end < most {
        seconds += model.layer_share[end] * layer;
        bytes =
            bytes.saturating_add(model.layer_bytes[end]).saturating_add(model.kv_bytes_per_layer);
        end += 1;
    }
    if seconds > limit || bytes > costs.memory_bytes {
        return end.checked_sub(1).filter(|&e| e >= start);
    }
    Some(end)
}
