//! Layers stay where they lie, where that costs next to nothing.
//!
//! Cuts of nearly the same worth abound: like nodes may change places, and a few percent more or less
//! in a measured time move a layer. Moving weights is not free, so among the cuts near the best one
//! the one is taken that moves the fewest bytes. Looked at are the cut that stood, with other nodes in
//! the places of those that are gone, and the best cut with nodes exchanged.

use super::choose::worth;
use super::{LayerRange, NodeCosts, Problem, StageCut, Wish, check_memory};

/// By how much, as a share, a cut may be worse than the best for the sake of what it leaves in place.
const NEARLY: f64 = 0.05;

/// A stage as it stood before: the index of its node, if that is still there, and its layers.
pub type Stood = (Option<usize>, LayerRange);

/// A cut that leaves in place what it can.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// In order.
    pub stages: Vec<StageCut>,
    /// What was given up for it, as a share of what the best cut is worth.
    pub given_up: f64,
}

/// Of the cuts that are nearly as good as `best`, the one that moves the fewest bytes.
pub fn keep(problem: &Problem<'_>, wish: &Wish, best: Vec<StageCut>, stood: &[Stood]) -> Kept {
    if stood.is_empty() {
        return Kept { stages: best, given_up: 0.0 };
    }
    let most = worth(wish, problem, &best);
    let enough = most / (1.0 + NEARLY);
    let good = |cut: &[StageCut]| {
        let nodes: Vec<usize> = cut.iter().map(|s| s.node).collect();
        let ranges: Vec<LayerRange> = cut.iter().map(|s| s.range).collect();
        let pinned = |(n, node): (usize, &NodeCosts)| {
            node.pin.is_none_or(|pin| cut.contains(&StageCut { node: n, range: pin }))
        };
        problem.nodes.iter().enumerate().all(pinned)
            && check_memory(problem, &nodes, &ranges).is_ok()
            && worth(wish, problem, cut) >= enough
    };
    let mut kept = (moved_bytes(problem, &best, stood), best);
    let offer = |kept: &mut (u64, Vec<StageCut>), cut: Vec<StageCut>| {
        let moved = moved_bytes(problem, &cut, stood);
        let better = moved < kept.0 && good(&cut);
        if better {
            *kept = (moved, cut);
        }
        better
    };
    while exchanges(&kept.1).into_iter().any(|cut| offer(&mut kept, cut)) {}
    if wish.stages.is_none_or(|n| n == stood.len()) {
        for cut in substitutes(problem.nodes.len(), stood) {
            offer(&mut kept, cut);
        }
    }
    let given_up = (1.0 - worth(wish, problem, &kept.1) / most).max(0.0);
    Kept { stages: kept.1, given_up }
}

/// Bytes of weights that a cut has on nodes which did not hold them.
fn moved_bytes(problem: &Problem<'_>, cut: &[StageCut], stood: &[Stood]) -> u64 {
    let model = problem.model;
    let last = |i: usize, n: usize| i + 1 == n;
    let missing = |(i, stage): (usize, &StageCut)| -> u64 {
        let before = stood.iter().enumerate().filter(|(_, (node, _))| *node == Some(stage.node));
        let (mut had, mut embed, mut head) = (0..0, false, false);
        for (j, (_, range)) in before {
            (had, embed, head) = (range.range(), j == 0, last(j, stood.len()));
        }
        let layers = stage.range.range().filter(|l| !had.contains(l));
        let layers: u64 = layers.map(|l| model.layer_bytes[l as usize]).sum();
        let ends = [
            (i == 0 && !embed, model.embed_bytes),
            (last(i, cut.len()) && !head, model.head_bytes),
        ];
        layers + ends.iter().filter(|(needed, _)| *needed).map(|(_, bytes)| bytes).sum::<u64>()
    };
    cut.iter().enumerate().map(missing).sum()
}

/// The cut with the nodes of two stages exchanged.
fn exchanges(cut: &[StageCut]) -> Vec<Vec<StageCut>> {
    let pairs = (0..cut.len()).flat_map(|a| (a + 1..cut.len()).map(move |b| (a, b)));
    let exchanged = |(a, b): (usize, usize)| {
        let mut cut = cut.to_vec();
        (cut[a].node, cut[b].node) = (cut[b].node, cut[a].node);
        cut
    };
    pairs.map(exchanged).collect()
}

/// The cut that stood, with each node that had no stage in the first place of one that is gone; the
/// places after it are filled in the nodes' order.
fn substitutes(nodes: usize, stood: &[Stood]) -> Vec<Vec<StageCut>> {
    let free: Vec<usize> =
        (0..nodes).filter(|n| stood.iter().all(|(node, _)| *node != Some(*n))).collect();
    let gone = stood.iter().filter(|(node, _)| node.is_none()).count();
    if gone > free.len() {
        return Vec::new();
    }
    let filled = |turn: usize| {
        let mut next = (0..free.len()).map(|i| free[(turn + i) % free.len()]);
        let stage =
            |&(node, range): &Stood| Some(StageCut { node: node.or_else(|| next.next())?, range });
        stood.iter().filter_map(stage).collect()
    };
    let turns = if gone == 0 { 1 } else { free.len() };
    (0..turns).map(filled).collect()
}
