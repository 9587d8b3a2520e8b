//! Who is next: fairness between clients, and their classes.
//!
//! A *flow* is a client in a priority class. Each carries a virtual counter of the service it got:
//! prompt positions count once, generated tokens twice, both divided by the weight of the class
//! (virtual token counters, Sheng et al., OSDI 2024; start-time fair queueing, Goyal et al., 1997).
//! The flow that got least is next, and within a flow by turns the sequence that came first and the
//! one with the shortest prompt: a chat does not wait for somebody's whole document, and the
//! document gets at least half of what its flow gets. A flow that begins to ask starts at the counter
//! of the flow in service, so that it can neither save up turns nor be punished for the past.
//! Sequences that lost their blocks come before all others.
//!
//! Not here: blocks and budgets. Invariants: a waiting sequence stands in exactly one place; flows
//! in memory are bounded by sequences and [`MAX_IDLE`].

use std::collections::{BTreeMap, BTreeSet};

use super::types::Priority;
use crate::id::SequenceId;

/// A client in a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FlowKey {
    pub(super) priority: Priority,
    pub(super) client: u64,
}

impl FlowKey {
    /// What a prompt token adds to the counter.
    pub(super) fn cost(self) -> u64 {
        Priority::MAX_WEIGHT / self.priority.weight()
    }
}

/// A generated token costs a row of a micro-batch by itself; prompt tokens share theirs.
const PER_GENERATED: u64 = 2;
/// Flows without sequences that are remembered because they are ahead of the others.
const MAX_IDLE: usize = 4096;

/// The shortest is looked for among so many of a flow: bounds the time of a look, and a prompt that
/// came long before is not passed by all that came since.
const LOOK: usize = 64;

/// A sequence that waits.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    id: SequenceId,
    tokens: u32,
    /// How much of a reader it will be, in [`READER`]s.
    reader: u64,
}

/// Readers are counted in whole parts, so that sums come out even.
const READER: f64 = 1024.0;

#[derive(Clone, Debug, Default)]
struct Flow {
    served: u64,
    /// By arrival.
    waiting: BTreeMap<u64, Waiting>,
    /// Sequences of the flow that the scheduler knows, waiting or not.
    live: u32,
}

/// What waits, and in which order it goes.
#[derive(Clone, Debug, Default)]
pub(super) struct FairQueue {
    flows: BTreeMap<FlowKey, Flow>,
    /// Flows with waiting sequences, least served first.
    backlog: BTreeSet<(u64, FlowKey)>,
    /// Lost their blocks; by seniority.
    preempted: BTreeMap<u64, SequenceId>,
    fresh: usize,
    fresh_tokens: u64,
    readers: u64,
    idle: usize,
    /// Virtual time: the counter of the flow that was served last.
    now: u64,
}

/// The waiting sequence that is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Preempted { order: u64, id: SequenceId },
    Fresh { flow: FlowKey, arrival: u64, id: SequenceId },
}

impl Head {
    pub(super) fn id(self) -> SequenceId {
        match self {
            Self::Preempted { id, .. } | Self::Fresh { id, .. } => id,
        }
    }
}

impl FairQueue {
    /// Waiting sequences.
    pub(super) fn len(&self) -> usize {
        self.fresh + self.preempted.len()
    }

    /// Waiting sequences that never ran.
    pub(super) fn fresh(&self) -> usize {
        self.fresh
    }

    /// Their prompt tokens.
    pub(super) fn fresh_tokens(&self) -> u64 {
        self.fresh_tokens
    }

    /// How many readers those who wait will make.
    pub(super) fn readers(&self) -> f64 {
        self.readers as f64 / READER + self.preempted.len() as f64
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A new sequence of the flow, with so many tokens, that will be so much of a reader (0..=1).
    pub(super) fn push(
        &mut self,
        key: FlowKey,
        arrival: u64,
        id: SequenceId,
        tokens: u32,
        reader: f64,
    ) {
        let now = self.now;
        let known = self.flows.contains_key(&key);
        let flow = self.flows.entry(key).or_default();
        if flow.live == 0 {
            self.idle -= usize::from(known);
            flow.served = flow.served.max(now);
        }
        flow.live += 1;
        if flow.waiting.is_empty() {
            self.backlog.insert((flow.served, key));
        }
        let reader = (reader * READER) as u64;
        flow.waiting.insert(arrival, Waiting { id, tokens, reader });
        self.readers += reader;
        self.fresh += 1;
        self.fresh_tokens += u64::from(tokens);
    }

    /// A fresh sequence stops waiting, because it runs or ends. Whether it was there.
    pub(super) fn take(&mut self, key: FlowKey, arrival: u64) -> bool {
        let Some(flow) = self.flows.get_mut(&key) else { return false };
        let Some(Waiting { tokens, reader, .. }) = flow.waiting.remove(&arrival) else {
            return false;
        };
        self.readers -= reader;
        if flow.waiting.is_empty() {
            self.backlog.remove(&(flow.served, key));
        }
        self.fresh -= 1;
        self.fresh_tokens -= u64::from(tokens);
        true
    }

    /// Notes that a sequence of the flow is served now: virtual time goes on.
    pub(super) fn serve(&mut self, key: FlowKey) {
        if let Some(flow) = self.flows.get(&key) {
            self.now = self.now.max(flow.served);
        }
    }

    pub(super) fn push_preempted(&mut self, order: u64, id: SequenceId) {
        self.preempted.insert(order, id);
    }

    pub(super) fn take_preempted(&mut self, order: u64, id: SequenceId) -> bool {
        self.preempted.get(&order) == Some(&id) && self.preempted.remove(&order).is_some()
    }

    /// A sequence of the flow is gone for good; it does not wait.
    pub(super) fn leave(&mut self, key: FlowKey) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        flow.live = flow.live.saturating_sub(1);
        if flow.live > 0 {
            return;
        }
        // One that is not ahead of the others need not be remembered.
        if flow.served <= self.now {
            self.flows.remove(&key);
            return;
        }
        self.idle += 1;
        if self.idle > MAX_IDLE {
            let now = self.now;
            self.flows.retain(|_, f| f.live > 0 || f.served > now);
            self.idle = self.flows.values().filter(|f| f.live == 0).count();
            if self.idle > MAX_IDLE {
                self.flows.remove(&key);
                self.idle -= 1;
            }
        }
    }

    /// Counts service: positions of a prompt, generated tokens.
    pub(super) fn charge(&mut self, key: FlowKey, prompt: u32, generated: u32) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let cost = u64::from(prompt) + PER_GENERATED * u64::from(generated);
        let before = flow.served;
        flow.served += cost * key.cost();
        if !flow.waiting.is_empty() {
            self.backlog.remove(&(before, key));
            self.backlog.insert((flow.served, key));
        }
    }

    /// Where the flow stands, or would if it began to ask now.
    pub(super) fn start(&self, key: FlowKey) -> u64 {
        match self.flows.get(&key) {
            Some(flow) if flow.live > 0 => flow.served,
            flow => flow.map_or(0, |f| f.served).max(self.now),
        }
    }

    /// Service that the flow got.
    pub(super) fn served(&self, key: FlowKey) -> u64 {
        self.flows.get(&key).map_or(0, |f| f.served)
    }

    /// Who is next: of the flow whose turn it is the one that came first, or the shortest of its
    /// first [`LOOK`] where short ones have their turn.
    pub(super) fn head(&self, short: bool) -> Option<Head> {
        if let Some((&order, &id)) = self.preempted.first_key_value() {
            return Some(Head::Preempted { order, id });
        }
        let &(_, flow) = self.backlog.first()?;
        let first = self.flows.get(&flow)?.waiting.iter().take(if short { LOOK } else { 1 });
        let (&arrival, &Waiting { id, .. }) = first.min_by_key(|(_, w)| w.tokens)?;
        Some(Head::Fresh { flow, arrival, id })
    }

    /// Flows with waiting sequences, each with those in order: id and tokens.
    pub(super) fn backlog(
        &self,
    ) -> impl Iterator<Item = (FlowKey, impl Iterator<Item = (SequenceId, u32)> + '_)> + '_ {
        self.backlog.iter().filter_map(|&(_, key)| {
            let flow = self.flows.get(&key)?;
            Some((key, flow.waiting.values().map(|w| (w.id, w.tokens))))
        })
    }

    /// Waiting sequences that never ran, in no order that means anything.
    pub(super) fn ids(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.flows.values().flat_map(|f| f.waiting.values().map(|w| w.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(client: u64, priority: Priority) -> FlowKey {
        FlowKey { priority, client }
    }

    /// Serves `turns` sequences of `cost` tokens each; how many each client got.
    fn serve(queue: &mut FairQueue, turns: usize, cost: u32) -> BTreeMap<u64, usize> {
        let mut got = BTreeMap::new();
        for _ in 0..turns {
            let Some(Head::Fresh { flow, arrival, .. }) = queue.head(false) else { break };
            queue.serve(flow);
            assert!(queue.take(flow, arrival));
            queue.charge(flow, cost, 0);
            queue.leave(flow);
            *got.entry(flow.client).or_default() += 1;
        }
        got
    }

    #[test]
    fn a_flood_does_not_drown_the_others() {
        let mut queue = FairQueue::default();
        for n in 0..1000 {
            queue.push(key(1, Priority::Normal), n, SequenceId(n), 10, 1.0);
        }
        for n in 1000..1020 {
            queue.push(key(2, Priority::Normal), n, SequenceId(n), 10, 1.0);
        }
        let got = serve(&mut queue, 40, 10);
        assert_eq!((got[&1], got[&2]), (20, 20));
    }

    #[test]
    fn classes_share_by_weight_and_none_starves() {
        let mut queue = FairQueue::default();
        for n in 0..300 {
            queue.push(key(1, Priority::High), 3 * n, SequenceId(3 * n), 10, 1.0);
            queue.push(key(2, Priority::Normal), 3 * n + 1, SequenceId(3 * n + 1), 10, 1.0);
            queue.push(key(3, Priority::Low), 3 * n + 2, SequenceId(3 * n + 2), 10, 1.0);
        }
        let got = serve(&mut queue, 210, 10);
        assert_eq!((got[&1], got[&2], got[&3]), (160, 40, 10));
    }

    #[test]
    fn turns_cannot_be_saved_up() {
        let mut queue = FairQueue::default();
        for n in 0..200 {
            queue.push(key(1, Priority::Normal), n, SequenceId(n), 10, 1.0);
        }
        serve(&mut queue, 100, 10);
        // Comes late: gets its share from now on, not what it missed.
        for n in 200..300 {
            queue.push(key(2, Priority::Normal), n, SequenceId(n), 10, 1.0);
        }
        let got = serve(&mut queue, 100, 10);
        assert!(got[&2].abs_diff(50) <= 1, "{got:?}");
    }

    #[test]
    fn nothing_is_kept_of_those_who_are_gone() {
        let mut queue = FairQueue::default();
        for n in 0..20_000 {
            queue.push(key(n, Priority::Normal), n, SequenceId(n), 1, 1.0);
            serve(&mut queue, 1, 1 + (n % 7) as u32);
        }
        assert!(queue.is_empty() && queue.backlog.is_empty());
        assert!(queue.flows.len() <= MAX_IDLE + 1, "{}", queue.flows.len());
        assert_eq!((queue.fresh, queue.fresh_tokens), (0, 0));
    }
}
