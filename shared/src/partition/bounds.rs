//! What no cut can beat, for the gap of an approximate one: order, links and whole layers are
//! forgotten, memory and the place of the head are not.

use super::costs::Problem;
use super::solve::Objective;

/// A value that no cut is below.
pub(super) fn lower_bound(problem: &Problem<'_>, objective: Objective) -> f64 {
    let bottleneck = least_bottleneck(problem);
    let sum = least_sum(problem);
    objective.value(bottleneck, sum)
}

/// Layers, in usual ones, that a node can take in this time.
fn capacity(problem: &Problem<'_>, node: usize, seconds: f64) -> f64 {
    let costs = &problem.nodes[node];
    let layer = costs.layer.at(problem.rows);
    let by_time = if layer > 0.0 { seconds / layer } else { f64::INFINITY };
    by_time.min(by_memory(problem, node))
}

/// Layers, in usual ones, that a node's memory may hold: by the layers with the most work a byte.
fn by_memory(problem: &Problem<'_>, node: usize) -> f64 {
    let model = problem.model;
    let dense = (model.layer_share.iter().zip(&model.layer_bytes))
        .map(|(share, &bytes)| {
            share / (bytes.saturating_add(model.kv_bytes_per_layer)).max(1) as f64
        })
        .fold(0.0, f64::max);
    problem.nodes[node].memory_bytes as f64 * dense
}

fn least_bottleneck(problem: &Problem<'_>) -> f64 {
    let nodes = 0..problem.nodes.len();
    let work: f64 = problem.model.layer_share.iter().sum();
    let head = |n: usize| problem.nodes[n].head.at(problem.rows);
    let possible = |limit: f64| {
        nodes.clone().any(|last| {
            let others = nodes.clone().filter(|&n| n != last);
            let rest: f64 = others.map(|n| capacity(problem, n, limit)).sum();
            head(last) <= limit && rest + capacity(problem, last, limit - head(last)) >= work
        })
    };
    let slowest =
        nodes.clone().map(|n| problem.nodes[n].layer.at(problem.rows)).fold(0.0, f64::max);
    let (mut low, mut high) = (0.0, slowest * work + nodes.clone().map(head).fold(0.0, f64::max));
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if possible(middle) { high = middle } else { low = middle }
    }
    low
}

/// The fastest nodes, each filled, and the fastest head; the coordinator's nearest links.
fn least_sum(problem: &Problem<'_>) -> f64 {
    let layer = |n: usize| problem.nodes[n].layer.at(problem.rows);
    let mut order: Vec<usize> = (0..problem.nodes.len()).collect();
    order.sort_by(|&a, &b| layer(a).total_cmp(&layer(b)));
    let mut left: f64 = problem.model.layer_share.iter().sum();
    let mut seconds = 0.0;
    for &node in &order {
        let part = by_memory(problem, node).min(left);
        seconds += part * layer(node);
        left -= part;
    }
    let least =
        |f: &dyn Fn(usize) -> f64| order.iter().map(|&n| f(n)).fold(f64::INFINITY, f64::min);
    let home = problem.network.coordinator();
    seconds
        + least(&|n| problem.nodes[n].head.at(problem.rows))
        + least(&|n| problem.hop_seconds(home, n))
        + least(&|n| problem.hop_seconds(n, home))
}
