//! What can be wrong with a problem, and why nothing fits.

use super::costs::Problem;
use super::{LayerRange, PartitionError};

/// Whether the figures make sense.
pub(super) fn input(problem: &Problem<'_>, stages: Option<usize>) -> Result<(), PartitionError> {
    let (model, nodes) = (problem.model, problem.nodes);
    let layers = model.layers();
    if stages == Some(0) {
        return Err(PartitionError::NoStages);
    }
    let least = stages.unwrap_or(1);
    if nodes.len() < least {
        return Err(PartitionError::TooFewNodes { stages: least, nodes: nodes.len() });
    }
    if layers == 0 || layers > usize::from(u16::MAX) {
        return Err(PartitionError::BadInput("a model has from 1 to 65535 layers"));
    }
    if least > layers + 1 {
        return Err(PartitionError::TooManyStages { stages: least, layers: layers as u32 });
    }
    if model.layer_share.len() != layers || problem.network.nodes() != nodes.len() {
        return Err(PartitionError::BadInput(
            "the time of every layer and the links of every node must be known",
        ));
    }
    pins(problem)?;
    let cost = |x: f64| x.is_finite() && x >= 0.0;
    let times = |n: &super::NodeCosts| {
        n.layer.is_known()
            && [&n.layer, &n.head, &n.embed].iter().all(|c| cost(c.at(problem.rows)))
            && n.layer.at(problem.rows) > 0.0
    };
    if !cost(problem.rows)
        || !model.layer_share.iter().all(|&x| cost(x))
        || !nodes.iter().all(times)
    {
        return Err(PartitionError::BadInput(
            "times must be finite, and that of a layer above 0; measure the nodes again",
        ));
    }
    Ok(())
}

/// Whether the pins name layers of the model, each once.
fn pins(problem: &Problem<'_>) -> Result<(), PartitionError> {
    let layers = problem.model.layers() as u32;
    let pinned = |n: usize| problem.nodes[n].pin.map(|range| (range, n));
    let mut pins: Vec<(LayerRange, usize)> = (0..problem.nodes.len()).filter_map(pinned).collect();
    pins.sort_by_key(|(range, _)| (range.first, range.end));
    let name = |n: usize| problem.nodes[n].name.clone();
    for &(range, n) in &pins {
        if range.end <= range.first || range.end > layers {
            return Err(PartitionError::PinBeyond { node: name(n), range, layers });
        }
    }
    for pair in pins.windows(2) {
        let [(a, first), (b, second)] = [pair[0], pair[1]];
        if b.first < a.end {
            let nodes = [name(first), name(second)];
            return Err(PartitionError::PinsOverlap { nodes, layer: b.first });
        }
    }
    Ok(())
}

/// What is wrong with pins where nothing fits around them; `None` where there are none.
fn around_pins(problem: &Problem<'_>) -> Option<PartitionError> {
    let model = problem.model;
    let mut pins = Vec::new();
    for node in problem.nodes {
        let Some(range) = node.pin else { continue };
        let layers = range.first as usize..range.end as usize;
        let needed = model.stage_memory(layers, range.first == 0, false);
        let available = node.memory_bytes;
        if needed > available {
            let node = node.name.clone();
            return Some(PartitionError::PinDoesNotFit { node, range, needed, available });
        }
        pins.push(format!("{}={}", node.name, super::Ends(&range)));
    }
    (!pins.is_empty()).then(|| PartitionError::NoCutAroundPins { pins: pins.join(", ") })
}

/// Whether given ranges fit the memory of the nodes, in their order.
///
/// # Errors
/// If a stage does not, or there are fewer nodes than ranges.
pub fn check_memory(
    problem: &Problem<'_>,
    nodes: &[usize],
    ranges: &[LayerRange],
) -> Result<(), PartitionError> {
    input(problem, Some(ranges.len()))?;
    let last = ranges.len() - 1;
    for (stage, (&range, &node)) in ranges.iter().zip(nodes).enumerate() {
        let layers = range.first as usize..range.end as usize;
        let needed = problem.model.stage_memory(layers, stage == 0, stage == last);
        let available = problem.nodes[node].memory_bytes;
        if needed > available {
            let node = problem.nodes[node].name.clone();
            return Err(PartitionError::StageDoesNotFit { stage, range, node, needed, available });
        }
    }
    Ok(())
}

/// Why there is no cut.
pub(super) fn does_not_fit(problem: &Problem<'_>, stages: Option<usize>) -> PartitionError {
    let model = problem.model;
    let alone = problem.nodes.len() == 1 || stages == Some(1);
    let needed = if alone {
        model.stage_memory(0..model.layers(), true, true)
    } else {
        let ends = model.end_memory(true, false).saturating_add(model.end_memory(false, true));
        let layers = model.stage_memory(0..model.layers(), false, false);
        ends.saturating_add(layers).saturating_sub(2 * model.stage_bytes)
    };
    let mut memory: Vec<u64> = problem.nodes.iter().map(|n| n.memory_bytes).collect();
    memory.sort_unstable_by_key(|&b| std::cmp::Reverse(b));
    let usable = stages.unwrap_or(memory.len());
    let available = memory.iter().take(usable).fold(0u64, |a, &b| a.saturating_add(b));
    if needed > available {
        return PartitionError::DoesNotFit { needed, available };
    }
    if let Some(error) = around_pins(problem) {
        return error;
    }
    let home = problem.network.coordinator();
    let all = (0..problem.nodes.len()).flat_map(|a| (0..=home).map(move |b| (a, b)));
    let forbidden = all
        .filter(|(a, b)| a != b)
        .filter(|&(a, b)| {
            problem.network.get(a, b).is_none() || problem.network.get(b, a).is_none()
        })
        .count();
    let layer = |&bytes: &u64| bytes.saturating_add(model.kv_bytes_per_layer);
    let largest_layer = model.layer_bytes.iter().map(layer).max().unwrap_or(0);
    if forbidden > 0 {
        return PartitionError::NoWay { needed, available, forbidden };
    }
    PartitionError::DoesNotFitInOrder { needed, available, largest_layer }
}
