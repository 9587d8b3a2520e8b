//! The least sum: the time of one micro-batch from the coordinator through all stages and back, no
//! stage above a limit.
//!
//! `g[set][last][end]` is the least time in which the nodes of `set` do layers `0..end`. A stage's
//! time is a difference of sums over layers, so that the best start for each end is the minimum of a
//! window that only moves forward: O(2^N N^2 L) in all. Every start and end is known to it, so that
//! pins only take some of them away: a pinned node has one start and one end, no other node's layers
//! reach into them, and so every cut that covers the layers uses it.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use super::classes::{Classes, Ends, States};
use super::reach::Cut;

/// The cut with the least sum whose stages and transfers take at most `limit`, with exactly
/// `stages` of them if so given. `None` where there is none.
pub(super) fn least_sum(classes: &Classes, limit: f64, stages: Option<usize>) -> Option<Cut> {
    let mut search = Search::new(classes, limit, stages);
    search.run();
    let (_, found) = search.best?;
    Some(match found {
        Found::Alone(class) => vec![(class, (0, classes.layers()))],
        Found::Closed { state, class, start } => search.trace(state, class, start),
    })
}

/// Entries of the table for so many classes.
pub(super) fn entries(classes: &Classes) -> usize {
    classes.states().saturating_mul(classes.len()).saturating_mul(classes.layers() + 1)
}

#[derive(Clone, Copy, Debug)]
enum Found {
    Alone(usize),
    /// `class` does `start..` after the nodes of `state`.
    Closed {
        state: usize,
        class: usize,
        start: usize,
    },
}

struct Search<'a> {
    classes: &'a Classes,
    states: States,
    limit: f64,
    stages: Option<usize>,
    reach: Vec<Vec<usize>>,
    closes_from: Vec<Option<RangeInclusive<usize>>>,
    /// `[set][last class][end]`; infinite where impossible.
    least: Vec<f64>,
    best: Option<(f64, Found)>,
}

impl<'a> Search<'a> {
    fn new(classes: &'a Classes, limit: f64, stages: Option<usize>) -> Self {
        let (layers, kinds) = (classes.layers(), classes.len());
        let reach = |class| (0..=layers).map(|a| classes.reach(class, a, false, limit)).collect();
        Self {
            states: States::new(classes),
            reach: (0..kinds).map(reach).collect(),
            closes_from: (0..kinds).map(|class| classes.closes_from(class, limit)).collect(),
            least: vec![f64::INFINITY; entries(classes)],
            best: None,
            classes,
            limit,
            stages,
        }
    }

    fn row(&self, state: usize, class: usize) -> usize {
        (state * self.classes.len() + class) * (self.classes.layers() + 1)
    }

    fn offer(&mut self, value: f64, found: Found) {
        // A stage more must gain something.
        if value.is_finite() && self.best.is_none_or(|(best, _)| value < best * (1.0 - 1e-12)) {
            self.best = Some((value, found));
        }
    }

    fn run(&mut self) {
        self.begin();
        let (kinds, layers) = (self.classes.len(), self.classes.layers());
        let mut arrive = vec![f64::INFINITY; layers + 1];
        for state in 1..self.classes.states() {
            let rows = self.row(state, 0)..self.row(state + 1, 0);
            if self.least[rows].iter().all(|v| v.is_infinite()) {
                continue;
            }
            let closes = self.stages.is_none_or(|n| n == self.states.size(state) + 1);
            for class in 0..kinds {
                if self.states.has_more(state, class) && self.arrivals(state, class, &mut arrive) {
                    if closes {
                        self.close(state, class, &arrive);
                    }
                    self.extend(state, class, &arrive);
                }
            }
        }
    }

    fn begin(&mut self) {
        let (layers, home) = (self.classes.layers(), self.classes.home());
        for class in 0..self.classes.len() {
            let (out, back) = (self.classes.hop(home, class), self.classes.hop(class, home));
            let whole = Ends { first: true, last: true };
            if self.stages.is_none_or(|n| n == 1)
                && self.classes.allows(class, (0, layers))
                && self.classes.fits(class, (0, layers), whole, self.limit)
            {
                let seconds = self.classes.seconds(class, (0, layers), whole);
                self.offer(out + seconds + back, Found::Alone(class));
            }
            let row = self.row(self.states.stride[class], class);
            let least = self.classes.pin(class).map_or(1, |(_, end)| end);
            for end in least..=self.classes.reach(class, 0, true, self.limit) {
                let ends = Ends { first: true, last: false };
                self.least[row + end] = out + self.classes.seconds(class, (0, end), ends);
            }
        }
    }

    /// The least time at which `class` can begin at each layer, after the nodes of `state`.
    fn arrivals(&self, state: usize, class: usize, arrive: &mut [f64]) -> bool {
        arrive.fill(f64::INFINITY);
        let mut any = false;
        for from in 0..self.classes.len() {
            let hop = self.classes.hop(from, class);
            if !hop.is_finite() || self.classes.transfer(from, class) > self.limit {
                continue;
            }
            let row = self.row(state, from);
            for (arrive, &least) in arrive.iter_mut().zip(&self.least[row..]) {
                *arrive = arrive.min(least + hop);
                any |= least.is_finite();
            }
        }
        any
    }

    fn close(&mut self, state: usize, class: usize, arrive: &[f64]) {
        let layers = self.classes.layers();
        let Some(starts) = self.closes_from[class].clone() else { return };
        let back = self.classes.hop(class, self.classes.home());
        for start in starts {
            let arrive = arrive[start];
            let ends = Ends { first: false, last: true };
            let value = arrive + self.classes.seconds(class, (start, layers), ends) + back;
            self.offer(value, Found::Closed { state, class, start });
        }
    }

    fn extend(&mut self, state: usize, class: usize, arrive: &[f64]) {
        let share = &self.classes.share_before;
        let (layer, reach) = (self.classes.layer[class], &self.reach[class]);
        let row = self.row(state + self.states.stride[class], class);
        if let Some((start, end)) = self.classes.pin(class) {
            if reach[start] == end {
                let value = arrive[start] + (share[end] - share[start]) * layer;
                self.least[row + end] = self.least[row + end].min(value);
            }
            return;
        }
        // Starts whose stage can end at `end`, the best first.
        let mut window: VecDeque<(usize, f64)> = VecDeque::new();
        for end in 1..arrive.len() {
            let start = end - 1;
            if arrive[start].is_finite() {
                let value = arrive[start] - share[start] * layer;
                while window.back().is_some_and(|&(_, v)| v >= value) {
                    window.pop_back();
                }
                window.push_back((start, value));
            }
            while window.front().is_some_and(|&(start, _)| reach[start] < end) {
                window.pop_front();
            }
            if let Some(&(_, value)) = window.front() {
                let value = value + share[end] * layer;
                let least = &mut self.least[row + end];
                *least = least.min(value);
            }
        }
    }

    /// The stages before, from the table.
    fn trace(&self, mut state: usize, closing: usize, start: usize) -> Cut {
        let (mut next, mut end) = (closing, start);
        let mut cut = vec![(closing, (start, self.classes.layers()))];
        while end > 0 {
            // Who came before `next`, ending at `end`.
            let kinds = 0..self.classes.len();
            let from = kinds.filter(|&from| {
                self.classes.transfer(from, next) <= self.limit
                    && self.least_at(state, from, end).is_finite()
            });
            let value =
                |from: &usize| self.least_at(state, *from, end) + self.classes.hop(*from, next);
            let last = from.min_by(|a, b| value(a).total_cmp(&value(b)));
            let last = last.expect("invariant: the value came from one of these");
            let before = state - self.states.stride[last];
            let start = if before == 0 { 0 } else { self.start_of(before, last, end) };
            cut.push((last, (start, end)));
            (state, next, end) = (before, last, start);
        }
        cut.reverse();
        cut
    }

    fn least_at(&self, state: usize, class: usize, end: usize) -> f64 {
        if self.states.used(state, class) == 0 {
            return f64::INFINITY;
        }
        self.least[self.row(state, class) + end]
    }

    /// The best start of a stage that ends at `end`.
    fn start_of(&self, before: usize, class: usize, end: usize) -> usize {
        let mut arrive = vec![f64::INFINITY; self.classes.layers() + 1];
        self.arrivals(before, class, &mut arrive);
        let share = &self.classes.share_before;
        let value =
            |start: usize| arrive[start] + (share[end] - share[start]) * self.classes.layer[class];
        let starts = (0..end).filter(|&start| self.reach[class][start] >= end);
        let best = starts.min_by(|&a, &b| value(a).total_cmp(&value(b)));
        best.expect("invariant: the value came from one of these")
    }
}
