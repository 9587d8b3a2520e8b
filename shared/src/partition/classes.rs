//! Nodes that are alike, as one class with a count: a search over sets of nodes becomes one over
//! counts of each class, which is far smaller where machines were bought by the dozen.
//!
//! Exact where the members of a class are equal in everything; with a tolerance, a class is as slow
//! and as small as its worst member, so that what is found can be carried out by any of them.

use std::ops::RangeInclusive;

use super::costs::Problem;

/// Most classes: a set of them is a number.
pub(super) const MAX_CLASSES: usize = 64;

/// A [`Problem`] at its rows, by classes; sums over layers before each layer.
#[derive(Debug)]
pub(super) struct Classes {
    /// The nodes of each.
    pub(super) members: Vec<Vec<usize>>,
    pub(super) layer: Vec<f64>,
    pub(super) head: Vec<f64>,
    pub(super) embed: Vec<f64>,
    pub(super) memory: Vec<u64>,
    /// `[from][to]`, the coordinator last.
    hop: Vec<f64>,
    transfer: Vec<f64>,
    /// Time of layers `0..i`, in usual layers.
    pub(super) share_before: Vec<f64>,
    /// Bytes of layers `0..i`, with their KV cache.
    pub(super) bytes_before: Vec<u64>,
    /// Bytes of a stage without layers: neither, the first, the last, the only one.
    end_bytes: [u64; 4],
    /// Layers that the node of a class must have; such a node is a class of its own.
    pin: Vec<Option<(usize, usize)>>,
}

impl Classes {
    /// Groups nodes whose times and memory differ by no more than `tolerance` (0: not at all).
    pub(super) fn new(problem: &Problem<'_>, tolerance: f64) -> Self {
        let mut members = group(problem, tolerance);
        if tolerance == 0.0 {
            split_unlike(problem, &mut members);
        }
        let worst = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
            members.iter().map(|m| m.iter().map(|&n| f(n)).fold(0.0, f64::max)).collect()
        };
        let (rows, nodes) = (problem.rows, problem.nodes);
        let memory = |m: &Vec<usize>| m.iter().map(|&n| nodes[n].memory_bytes).min().unwrap_or(0);
        let pin = |m: &Vec<usize>| {
            let pin = m.first().and_then(|&n| nodes[n].pin)?;
            Some((pin.first as usize, pin.end as usize))
        };
        let mut classes = Self {
            pin: members.iter().map(pin).collect(),
            layer: worst(&|n| nodes[n].layer.at(rows)),
            head: worst(&|n| nodes[n].head.at(rows)),
            embed: worst(&|n| nodes[n].embed.at(rows)),
            memory: members.iter().map(memory).collect(),
            hop: Vec::new(),
            transfer: Vec::new(),
            share_before: sums(problem.model.layer_share.iter().copied(), 0.0, |a, b| a + b),
            bytes_before: sums(problem.model.layer_bytes.iter().copied(), 0, |a, b: u64| {
                a.saturating_add(b).saturating_add(problem.model.kv_bytes_per_layer)
            }),
            end_bytes: [(false, false), (true, false), (false, true), (true, true)]
                .map(|(first, last)| problem.model.end_memory(first, last)),
            members,
        };
        (classes.hop, classes.transfer) = classes.links(problem);
        classes
    }

    /// The worst link between members of two classes.
    fn links(&self, problem: &Problem<'_>) -> (Vec<f64>, Vec<f64>) {
        let home = vec![problem.network.coordinator()];
        let places: Vec<&Vec<usize>> = self.members.iter().chain([&home]).collect();
        let (mut hops, mut transfers) = (Vec::new(), Vec::new());
        for from in &places {
            for to in &places {
                let pairs = from.iter().flat_map(|&a| to.iter().map(move |&b| (a, b)));
                let (mut hop, mut transfer) = (0.0f64, 0.0f64);
                for (a, b) in pairs.filter(|(a, b)| a != b) {
                    hop = hop.max(problem.hop_seconds(a, b));
                    transfer = transfer.max(problem.transfer_seconds(a, b));
                }
                hops.push(hop);
                transfers.push(transfer);
            }
        }
        (hops, transfers)
    }

    /// How many classes.
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// The place of the coordinator.
    pub(super) fn home(&self) -> usize {
        self.len()
    }

    /// Layers of the model.
    pub(super) fn layers(&self) -> usize {
        self.share_before.len() - 1
    }

    /// Sets of nodes, those that differ by like nodes counted once; saturates.
    pub(super) fn states(&self) -> usize {
        self.members.iter().fold(1usize, |n, m| n.saturating_mul(m.len() + 1))
    }

    pub(super) fn hop(&self, from: usize, to: usize) -> f64 {
        self.hop[from * (self.len() + 1) + to]
    }

    pub(super) fn transfer(&self, from: usize, to: usize) -> f64 {
        self.transfer[from * (self.len() + 1) + to]
    }

    /// Seconds of a stage.
    pub(super) fn seconds(&self, class: usize, (start, end): (usize, usize), ends: Ends) -> f64 {
        let share = self.share_before[end] - self.share_before[start];
        let embed = if ends.first { self.embed[class] } else { 0.0 };
        let head = if ends.last { self.head[class] } else { 0.0 };
        share * self.layer[class] + embed + head
    }

    /// Whether a stage takes no more than `limit` seconds and fits the memory.
    pub(super) fn fits(&self, class: usize, range: (usize, usize), ends: Ends, limit: f64) -> bool {
        let bytes = self.bytes_before[range.1] - self.bytes_before[range.0];
        let end = self.end_bytes[usize::from(ends.first) + 2 * usize::from(ends.last)];
        bytes.saturating_add(end) <= self.memory[class] && self.seconds(class, range, ends) <= limit
    }

    /// The layers that a class is pinned to.
    pub(super) fn pin(&self, class: usize) -> Option<(usize, usize)> {
        self.pin[class]
    }

    /// The first layer from `start` on that is pinned, or the number of layers.
    fn free_until(&self, start: usize) -> usize {
        let pins = self.pin.iter().flatten().filter(|&&(_, end)| end > start);
        pins.map(|&(first, _)| first.max(start)).min().unwrap_or_else(|| self.layers())
    }

    /// Whether pins allow these layers on a class.
    pub(super) fn allows(&self, class: usize, (start, end): (usize, usize)) -> bool {
        match self.pin[class] {
            Some(pin) => pin == (start, end),
            None => self.free_until(start) >= end,
        }
    }

    /// Furthest end of a stage that begins at layer `start` and is not the last; `start` where not
    /// one layer fits. A pinned class ends where its pin does, or nowhere.
    pub(super) fn reach(&self, class: usize, start: usize, first: bool, limit: f64) -> usize {
        let ends = Ends { first, last: false };
        if let Some((from, end)) = self.pin[class] {
            let whole = start == from && self.fits(class, (from, end), ends, limit);
            return if whole { end } else { start };
        }
        // Cost and memory only grow with the end: bisection.
        let (mut low, mut high) = (start, self.free_until(start));
        while low < high {
            let middle = (low + high).div_ceil(2);
            if self.fits(class, (start, middle), ends, limit) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        low
    }

    /// Layers from which a last stage of this class can do all the rest; `None` where it cannot even
    /// hold the head, or is pinned to other layers.
    pub(super) fn closes_from(&self, class: usize, limit: f64) -> Option<RangeInclusive<usize>> {
        let (ends, layers) = (Ends { first: false, last: true }, self.layers());
        if let Some((from, end)) = self.pin[class] {
            let closes = end == layers && self.fits(class, (from, end), ends, limit);
            return closes.then_some(from..=from);
        }
        if !self.fits(class, (layers, layers), ends, limit) {
            return None;
        }
        let pinned = self.pin.iter().flatten().map(|&(_, end)| end).max();
        let (mut low, mut high) = (pinned.unwrap_or(0), layers);
        while low < high {
            let middle = (low + high) / 2;
            if self.fits(class, (middle, layers), ends, limit) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Some(low..=layers)
    }

    /// A node for each stage: members of a class in their order.
    pub(super) fn nodes_of(&self, stages: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let mut used = vec![0; self.len()];
        let mut node = |class: usize| {
            used[class] += 1;
            self.members[class][used[class] - 1]
        };
        stages.into_iter().map(&mut node).collect()
    }
}

/// Which ends of the pipeline a stage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) first: bool,
    pub(super) last: bool,
}

/// Sets of nodes as numbers: how many of each class, the first counting fastest.
#[derive(Debug)]
pub(super) struct States {
    /// What one more of a class adds.
    pub(super) stride: Vec<usize>,
    count: Vec<usize>,
}

impl States {
    pub(super) fn new(classes: &Classes) -> Self {
        let count: Vec<usize> = classes.members.iter().map(Vec::len).collect();
        let mut stride = Vec::with_capacity(count.len());
        let mut next = 1;
        for n in &count {
            stride.push(next);
            next *= n + 1;
        }
        Self { stride, count }
    }

    /// How many of a class are in a set.
    pub(super) fn used(&self, state: usize, class: usize) -> usize {
        state / self.stride[class] % (self.count[class] + 1)
    }

    /// Whether one more is left.
    pub(super) fn has_more(&self, state: usize, class: usize) -> bool {
        self.used(state, class) < self.count[class]
    }

    /// Nodes in a set.
    pub(super) fn size(&self, state: usize) -> usize {
        (0..self.count.len()).map(|class| self.used(state, class)).sum()
    }
}

fn sums<T: Copy>(items: impl Iterator<Item = T>, zero: T, add: impl Fn(T, T) -> T) -> Vec<T> {
    let mut sum = zero;
    let mut before = vec![zero];
    for item in items {
        sum = add(sum, item);
        before.push(sum);
    }
    before
}

/// What makes nodes alike, each figure in steps of the tolerance.
fn signature(problem: &Problem<'_>, node: usize, tolerance: f64) -> [i64; 5] {
    let costs = &problem.nodes[node];
    let step = |x: f64| {
        if tolerance == 0.0 {
            x.to_bits() as i64
        } else {
            (x.max(1e-12).ln() / tolerance.ln_1p()).floor() as i64
        }
    };
    [
        step(costs.layer.at(problem.rows)),
        step(costs.head.at(problem.rows)),
        step(costs.embed.at(problem.rows)),
        // Memory matters by whole layers only; a finer look at it would part most nodes.
        if tolerance == 0.0 { costs.memory_bytes as i64 } else { step(costs.memory_bytes as f64) },
        // A pinned node is like no other.
        costs.pin.map_or(-1, |_| node as i64),
    ]
}

fn group(problem: &Problem<'_>, tolerance: f64) -> Vec<Vec<usize>> {
    let mut groups: Vec<([i64; 5], Vec<usize>)> = Vec::new();
    for node in 0..problem.nodes.len() {
        let signature = signature(problem, node, tolerance);
        match groups.iter_mut().find(|(s, _)| *s == signature) {
            Some((_, members)) => members.push(node),
            None => groups.push((signature, vec![node])),
        }
    }
    groups.into_iter().map(|(_, members)| members).collect()
}

/// Takes groups apart whose members have different links.
fn split_unlike(problem: &Problem<'_>, groups: &mut Vec<Vec<usize>>) {
    let all: Vec<usize> = (0..=problem.nodes.len()).collect();
    let alike = |a: usize, b: usize| {
        let others = || all.iter().copied().filter(move |&k| k != a && k != b);
        problem.network.get(a, b) == problem.network.get(b, a)
            && others().all(|k| {
                problem.network.get(a, k) == problem.network.get(b, k)
                    && problem.network.get(k, a) == problem.network.get(k, b)
            })
    };
    let mut parted = Vec::new();
    for members in groups.drain(..) {
        let mut rest = members;
        while let Some(&head) = rest.first() {
            let mut class: Vec<usize> = Vec::new();
            rest.retain(|&n| {
                let joins = n == head || class.iter().all(|&m| alike(m, n));
                if joins {
                    class.push(n);
                }
                !joins
            });
            parted.push(class);
        }
    }
    *groups = parted;
}
