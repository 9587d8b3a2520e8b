//! The exact cut for a given order of nodes, by dynamic programming over (stage, layers placed).
//!
//! Two passes: the first finds the least possible bottleneck, the second the least sum of squares
//! of stage times among the cuts that reach it. O(stages x layers^2), milliseconds at 64 x 200.

use super::{LayerRange, ModelCost, NodeCapacity, PartitionError};

/// Stage times this close count as equal, relative: sums of the same costs in another order.
const TOLERANCE: f64 = 1e-9;

/// Cuts `model` into `stages` ranges for the first `stages` of `nodes`, in their order, so that the
/// largest stage time (layers, and the head on the last, over the node's speed) is the least that
/// memory allows.
///
/// # Errors
/// If there are too few nodes or layers for so many stages, or memory does not suffice.
pub fn partition(
    model: &ModelCost,
    nodes: &[NodeCapacity],
    stages: usize,
) -> Result<Vec<LayerRange>, PartitionError> {
    check_input(model, nodes, stages)?;
    let problem = Problem::new(model, &nodes[..stages]);
    let Some(bottleneck) = problem.least_bottleneck() else {
        return Err(does_not_fit(model, &nodes[..stages]));
    };
    let even = problem
        .solve(|a, b| a + b, |time| time * time, bottleneck * (1.0 + TOLERANCE))
        .expect("invariant: the bottleneck found is feasible");
    Ok(even.1)
}

/// Whether given ranges fit the memory of `nodes`.
///
/// # Errors
/// If a stage does not, or there are fewer nodes than ranges.
pub fn check_memory(
    model: &ModelCost,
    nodes: &[NodeCapacity],
    ranges: &[LayerRange],
) -> Result<(), PartitionError> {
    check_input(model, nodes, ranges.len())?;
    let problem = Problem::new(model, &nodes[..ranges.len()]);
    for (stage, (&range, node)) in ranges.iter().zip(nodes).enumerate() {
        let needed = problem.bytes(stage, range.first as usize, range.end as usize);
        if needed > node.memory_bytes {
            return Err(PartitionError::StageDoesNotFit {
                stage,
                range,
                node: node.node,
                needed,
                available: node.memory_bytes,
            });
        }
    }
    Ok(())
}

fn check_input(
    model: &ModelCost,
    nodes: &[NodeCapacity],
    stages: usize,
) -> Result<(), PartitionError> {
    if stages == 0 {
        return Err(PartitionError::NoStages);
    }
    if nodes.len() < stages {
        return Err(PartitionError::TooFewNodes { stages, nodes: nodes.len() });
    }
    if stages > model.layers as usize + 1 {
        return Err(PartitionError::TooManyStages { stages, layers: model.layers });
    }
    if model.layer_bytes.len() != model.layers as usize {
        return Err(PartitionError::BadInput("the bytes of every layer must be known"));
    }
    let cost = |x: f64| x.is_finite() && x >= 0.0;
    if !cost(model.layer_cost) || !cost(model.head_cost_in_layers) {
        return Err(PartitionError::BadInput("costs must be finite and not negative"));
    }
    if nodes.iter().any(|n| !n.speed.is_finite() || n.speed <= 0.0) {
        return Err(PartitionError::BadInput("the speed of every node must be above 0"));
    }
    Ok(())
}

fn does_not_fit(model: &ModelCost, nodes: &[NodeCapacity]) -> PartitionError {
    let shared = if model.tied_head && nodes.len() == 1 { model.embed_bytes } else { 0 };
    let layer = |&bytes: &u64| bytes.saturating_add(model.kv_bytes_per_layer);
    let layers = model.layer_bytes.iter().map(layer).fold(0, u64::saturating_add);
    let ends = model.embed_bytes.saturating_add(model.head_bytes).saturating_sub(shared);
    let needed = layers.saturating_add(ends);
    let available = nodes.iter().map(|n| n.memory_bytes).fold(0, u64::saturating_add);
    if needed > available {
        return PartitionError::DoesNotFit { needed, available };
    }
    let largest_layer = model.layer_bytes.iter().map(layer).max().unwrap_or(0);
    PartitionError::DoesNotFitInOrder { needed, available, largest_layer }
}

struct Problem<'a> {
    model: &'a ModelCost,
    nodes: &'a [NodeCapacity],
    /// Bytes of layers `0..i` with their KV cache.
    bytes_before: Vec<u64>,
}

impl<'a> Problem<'a> {
    fn new(model: &'a ModelCost, nodes: &'a [NodeCapacity]) -> Self {
        let mut bytes_before = vec![0u64];
        let mut sum = 0u64;
        for &bytes in &model.layer_bytes {
            sum = sum.saturating_add(bytes).saturating_add(model.kv_bytes_per_layer);
            bytes_before.push(sum);
        }
        Self { model, nodes, bytes_before }
    }

    fn is_last(&self, stage: usize) -> bool {
        stage + 1 == self.nodes.len()
    }

    fn bytes(&self, stage: usize, first: usize, end: usize) -> u64 {
        let mut bytes = self.bytes_before[end] - self.bytes_before[first];
        let (is_first, is_last) = (stage == 0, self.is_last(stage));
        if is_first {
            bytes = bytes.saturating_add(self.model.embed_bytes);
        }
        if is_last {
            bytes = bytes.saturating_add(self.model.head_bytes);
        }
        if is_first && is_last && self.model.tied_head {
            bytes = bytes.saturating_sub(self.model.embed_bytes);
        }
        bytes
    }

    fn time(&self, stage: usize, layers: usize) -> f64 {
        let head = if self.is_last(stage) { self.model.head_cost_in_layers } else { 0.0 };
        (layers as f64 + head) * self.model.layer_cost / self.nodes[stage].speed
    }

    fn least_bottleneck(&self) -> Option<f64> {
        self.solve(f64::max, |time| time, f64::INFINITY).map(|(value, _)| value)
    }

    /// The cut with the least `fold` of `cost(stage time)`, no stage time above `limit`.
    fn solve(
        &self,
        fold: impl Fn(f64, f64) -> f64,
        cost: impl Fn(f64) -> f64,
        limit: f64,
    ) -> Option<(f64, Vec<LayerRange>)> {
        let layers = self.model.layer_bytes.len();
        // best[end]: the least value with the stages so far on layers 0..end.
        let mut best = vec![None; layers + 1];
        best[0] = Some(0.0f64);
        let mut starts: Vec<Vec<usize>> = Vec::with_capacity(self.nodes.len());
        for stage in 0..self.nodes.len() {
            let least = usize::from(!self.is_last(stage));
            let mut next: Vec<Option<f64>> = vec![None; layers + 1];
            let mut start = vec![0; layers + 1];
            for (first, value) in best.iter().enumerate() {
                let Some(value) = *value else { continue };
                for end in first + least..=layers {
                    let time = self.time(stage, end - first);
                    if time > limit
                        || self.bytes(stage, first, end) > self.nodes[stage].memory_bytes
                    {
                        break;
                    }
                    let value = fold(value, cost(time));
                    if next[end].is_none_or(|old| value < old) {
                        next[end] = Some(value);
                        start[end] = first;
                    }
                }
            }
            best = next;
            starts.push(start);
        }
        let value = best[layers]?;
        let mut end = layers;
        let mut ranges = Vec::with_capacity(starts.len());
        for start in starts.iter().rev() {
            ranges.push(LayerRange { first: start[end] as u32, end: end as u32 });
            end = start[end];
        }
        ranges.reverse();
        Some((value, ranges))
    }
}
