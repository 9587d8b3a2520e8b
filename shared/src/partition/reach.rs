//! The least bottleneck: the slowest stage, with the choice and the order of the nodes.
//!
//! For a given limit on every stage's time, `f[set][last]` is the furthest layer that the nodes of
//! `set` can reach, `last` being the latest; going further is never worse, because the time and the
//! memory of a stage only grow with its layers, and the width of what goes over a link is the same
//! at every cut. A limit is feasible if some node can do all the rest, with the head. The least
//! feasible limit is found by bisection, each feasible probe stepping down to the slowest stage it
//! really has, until the next smaller limit is infeasible: exact, O(2^N N^2) a probe. The propagation
//! delay of links costs micro-batches in flight, not throughput; a link forbids an edge only where a
//! micro-batch occupies it longer than the limit.

use std::ops::RangeInclusive;

use super::classes::{Classes, Ends, States};

/// Stages by class, each with its layers.
pub(super) type Cut = Vec<(usize, (usize, usize))>;

/// Relative distance at which two times count as equal.
pub(super) const TOLERANCE: f64 = 1e-9;

/// Seconds of the slowest stage.
pub(super) fn bottleneck(classes: &Classes, cut: &[(usize, (usize, usize))]) -> f64 {
    let last = cut.len().saturating_sub(1);
    let stage = |(i, &(class, range)): (usize, &(usize, (usize, usize)))| {
        classes.seconds(class, range, Ends { first: i == 0, last: i == last })
    };
    let slowest = cut.iter().enumerate().map(stage).fold(0.0, f64::max);
    cut.windows(2).map(|w| classes.transfer(w[0].0, w[1].0)).fold(slowest, f64::max)
}

/// A cut with the least bottleneck; of those the one with the fewest stages, or with exactly
/// `stages`. `None` where memory or links allow none.
pub(super) fn least_bottleneck(classes: &Classes, stages: Option<usize>) -> Option<Cut> {
    let mut best = feasible(classes, f64::INFINITY, stages, false)?;
    let mut high = bottleneck(classes, &best);
    let mut low = 0.0;
    while high > 0.0 {
        let near = high - low <= high * 1e-6;
        let probe = if near { high * (1.0 - TOLERANCE) } else { (low + high) / 2.0 };
        match feasible(classes, probe, stages, false) {
            Some(cut) => {
                high = bottleneck(classes, &cut).min(probe);
                best = cut;
            }
            None if near => break,
            None => low = probe,
        }
    }
    Some(feasible(classes, high * (1.0 + TOLERANCE), stages, true).unwrap_or(best))
}

/// The state of one probe.
struct Probe<'a> {
    classes: &'a Classes,
    states: States,
    limit: f64,
    stages: Option<usize>,
    /// `[class][start]`: furthest end.
    reach: Vec<Vec<u16>>,
    closes_from: Vec<Option<RangeInclusive<usize>>>,
    /// `[set][last class]`: furthest layer; 0 where there is no such order.
    furthest: Vec<u16>,
}

/// A cut whose every stage takes at most `limit`; any, or one with the fewest stages.
pub(super) fn feasible(
    classes: &Classes,
    limit: f64,
    stages: Option<usize>,
    fewest: bool,
) -> Option<Cut> {
    if stages.is_none_or(|n| n == 1)
        && let Some(cut) = alone(classes, limit)
    {
        return Some(cut);
    }
    let layers = classes.layers();
    let reach = |class| (0..=layers).map(move |a| classes.reach(class, a, false, limit) as u16);
    let states = States::new(classes);
    let mut probe = Probe {
        reach: (0..classes.len()).map(|class| reach(class).collect()).collect(),
        closes_from: (0..classes.len()).map(|class| classes.closes_from(class, limit)).collect(),
        furthest: vec![0; classes.states() * classes.len()],
        classes,
        states,
        limit,
        stages,
    };
    probe.begin();
    let (state, last, closing) = probe.search(fewest)?;
    Some(probe.trace(state, last, closing))
}

/// One node with the whole model.
pub(super) fn alone(classes: &Classes, limit: f64) -> Option<Cut> {
    let whole = (0, classes.layers());
    let ends = Ends { first: true, last: true };
    let home = classes.home();
    let fits = |&class: &usize| {
        classes.hop(home, class).is_finite()
            && classes.hop(class, home).is_finite()
            && classes.allows(class, whole)
            && classes.fits(class, whole, ends, limit)
    };
    let time = |&class: &usize| classes.seconds(class, whole, ends);
    let best = (0..classes.len()).filter(fits).min_by(|a, b| time(a).total_cmp(&time(b)))?;
    Some(vec![(best, whole)])
}

impl Probe<'_> {
    /// Most layers that a set of `size` nodes may have where the number of stages is given: one is
    /// left for each of the others but the last.
    fn cap(&self, size: usize) -> usize {
        let layers = self.classes.layers();
        match self.stages {
            Some(stages) => (layers + size + 1).saturating_sub(stages).min(layers),
            None => layers,
        }
    }

    fn begin(&mut self) {
        let cap = self.cap(1);
        for class in 0..self.classes.len() {
            if self.classes.hop(self.classes.home(), class).is_finite() {
                let reach = self.classes.reach(class, 0, true, self.limit).min(cap);
                let state = self.states.stride[class];
                self.furthest[state * self.classes.len() + class] = reach as u16;
            }
        }
    }

    fn edge(&self, from: usize, to: usize) -> bool {
        self.classes.hop(from, to).is_finite() && self.classes.transfer(from, to) <= self.limit
    }

    /// Whether a stage of this class can be the last, from this layer on.
    fn closes(&self, class: usize, from: usize) -> bool {
        self.closes_from[class].as_ref().is_some_and(|starts| starts.contains(&from))
            && self.classes.hop(class, self.classes.home()).is_finite()
    }

    /// The set, its last class and the class that does the rest.
    fn search(&mut self, fewest: bool) -> Option<(usize, usize, usize)> {
        let kinds = self.classes.len();
        let mut best: Option<(usize, (usize, usize, usize))> = None;
        for state in 1..self.classes.states() {
            let row = state * kinds;
            if self.furthest[row..row + kinds].iter().all(|&f| f == 0) {
                continue;
            }
            let size = self.states.size(state);
            let cap = self.cap(size + 1);
            let may_close = self.stages.is_none_or(|stages| stages == size + 1)
                && best.is_none_or(|(least, _)| size + 1 < least);
            for to in (0..kinds).filter(|&to| self.states.has_more(state, to)) {
                let next = (state + self.states.stride[to]) * kinds + to;
                for from in 0..kinds {
                    let at = usize::from(self.furthest[row + from]);
                    if at == 0 || !self.edge(from, to) {
                        continue;
                    }
                    if may_close && self.closes(to, at) {
                        if !fewest {
                            return Some((state, from, to));
                        }
                        if best.is_none_or(|(least, _)| size + 1 < least) {
                            best = Some((size + 1, (state, from, to)));
                        }
                    }
                    let reach = usize::from(self.reach[to][at]).min(cap);
                    if reach > at && reach > usize::from(self.furthest[next]) {
                        self.furthest[next] = reach as u16;
                    }
                }
            }
        }
        best.map(|(_, found)| found)
    }

    /// The cut that ends with `closing` after `last`.
    fn trace(&self, mut state: usize, mut last: usize, closing: usize) -> Cut {
        let kinds = self.classes.len();
        let mut end = usize::from(self.furthest[state * kinds + last]);
        let mut cut = vec![(closing, (end, self.classes.layers()))];
        loop {
            let size = self.states.size(state);
            if size == 1 {
                cut.push((last, (0, end)));
                break;
            }
            let cap = self.cap(size);
            let before = state - self.states.stride[last];
            let from = (0..kinds).find(|&from| {
                let at = usize::from(self.furthest[before * kinds + from]);
                at > 0 && self.edge(from, last) && usize::from(self.reach[last][at]).min(cap) == end
            });
            let from = from.expect("invariant: the value came from one of these");
            let start = usize::from(self.furthest[before * kinds + from]);
            cut.push((last, (start, end)));
            (state, last, end) = (before, from, start);
        }
        cut.reverse();
        cut
    }
}
