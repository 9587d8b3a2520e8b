//! Nodes for a cut that somebody else made: the first ones in their order where those will do, else
//! the first order that memory and links allow.
//!
//! Orders are tried as words in a dictionary, and one is given up at the first stage that does not
//! fit or cannot be reached; so it is exact for few nodes, and for many ends after [`MOST_TRIES`].

use super::costs::Problem;
use super::{LayerRange, PartitionError, check, check_memory};

/// Stages tried at most: all orders of 7 nodes are fewer.
const MOST_TRIES: usize = 20_000;

/// A node for each range.
///
/// # Errors
/// If there are too few nodes, or no order that was tried fits memory and links.
pub fn in_order(
    problem: &Problem<'_>,
    ranges: &[LayerRange],
) -> Result<Vec<usize>, PartitionError> {
    check::input(problem, Some(ranges.len()))?;
    let mut search = Search { problem, ranges, order: Vec::new(), tries: MOST_TRIES };
    if search.extend() {
        return Ok(search.order);
    }
    // What is wrong with the nodes as they come says most.
    let first: Vec<usize> = (0..ranges.len()).collect();
    check_memory(problem, &first, ranges)?;
    Err(check::does_not_fit(problem, Some(ranges.len())))
}

struct Search<'a> {
    problem: &'a Problem<'a>,
    ranges: &'a [LayerRange],
    order: Vec<usize>,
    tries: usize,
}

impl Search<'_> {
    /// Finds nodes for the stages that have none; where it cannot, leaves the others as they are.
    fn extend(&mut self) -> bool {
        let stage = self.order.len();
        if stage == self.ranges.len() {
            return true;
        }
        for node in 0..self.problem.nodes.len() {
            if self.order.contains(&node) || !self.fits(stage, node) {
                continue;
            }
            self.order.push(node);
            if self.extend() {
                return true;
            }
            self.order.pop();
            self.tries = self.tries.saturating_sub(1);
            if self.tries == 0 {
                return false;
            }
        }
        false
    }

    fn fits(&self, stage: usize, node: usize) -> bool {
        let (problem, home) = (self.problem, self.problem.network.coordinator());
        let last = stage + 1 == self.ranges.len();
        let range = self.ranges[stage].range();
        let layers = range.start as usize..range.end as usize;
        let from = self.order.last().copied().unwrap_or(home);
        problem.model.stage_memory(layers, stage == 0, last) <= problem.nodes[node].memory_bytes
            && problem.network.get(from, node).is_some()
            && (!last || problem.network.get(node, home).is_some())
    }
}
