//! A node in virtual time: two slots for stages, an engine that takes one frame after the other.
//!
//! The engine is a mock without arithmetic: what lies in the KV cache at a position is a hash of
//! everything up to there, read through the block table, and the token is a hash of that. A wrong
//! table, a frame out of order or of another epoch gives a wrong token; stages compare their hashes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use millrace_shared::id::{Epoch, MicroBatchId, SequenceId};
use millrace_shared::wire::data::{Failure, RowOutcome, RowResult, StageTime, StepMeta, Want};

/// A frame between stages, or to the coordinator.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) epoch: Epoch,
    pub(crate) id: MicroBatchId,
    pub(crate) meta: StepMeta,
    /// Of all positions.
    pub(crate) tokens: Vec<u32>,
    /// What the stage before found for each position; empty before the first.
    pub(crate) hashes: Vec<u64>,
    pub(crate) results: Vec<RowResult>,
}

/// What a node is told to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) epoch: Epoch,
    /// In the order of the stages, by number of the node.
    pub(crate) order: Vec<usize>,
    pub(crate) at: usize,
    pub(crate) blocks: u32,
    pub(crate) block_size: u32,
}

impl Assignment {
    pub(crate) fn is_last(&self) -> bool {
        self.at + 1 == self.order.len()
    }
}

/// A loaded stage.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) assignment: Assignment,
    pub(crate) ready: bool,
    pub(crate) started: bool,
    pub(crate) queue: VecDeque<(Duration, Frame)>,
    pub(crate) working: bool,
    last: u64,
    tables: BTreeMap<SequenceId, Vec<u32>>,
    kv: Vec<u64>,
    /// Steps of these failed here or before: what is under way of them holds nothing.
    void: BTreeSet<SequenceId>,
}

/// A node, alive or not.
#[derive(Debug, Default)]
pub(crate) struct Node {
    pub(crate) alive: bool,
    /// Counts its lives: what was sent to an earlier one is lost.
    pub(crate) life: u64,
    /// Counts its connections to the coordinator.
    pub(crate) link: u64,
    pub(crate) linked: bool,
    /// Stopped, as by SIGSTOP, until then.
    pub(crate) frozen_until: Duration,
    /// Times as long for everything.
    pub(crate) slow: u32,
    pub(crate) fail_loads: u32,
    /// Steps take until then, for the engine hangs.
    pub(crate) hung_until: Duration,
    /// So many steps with rows fail.
    pub(crate) sick_steps: u32,
    pub(crate) stages: Vec<Stage>,
}

pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut z = (a ^ b.rotate_left(32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The token that follows a history with this hash.
fn token(hash: u64) -> u32 {
    (mix(hash, 1) % 1000) as u32
}

/// What a request must answer.
pub(crate) fn expected(prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut hash = prompt.iter().fold(0, |h, t| mix(h, u64::from(*t)));
    (0..tokens)
        .map(|_| {
            let next = token(hash);
            hash = mix(hash, u64::from(next));
            next
        })
        .collect()
}

impl Stage {
    pub(crate) fn new(assignment: Assignment) -> Self {
        let positions = assignment.blocks as usize * assignment.block_size as usize;
        Self {
            assignment,
            ready: false,
            started: false,
            queue: VecDeque::new(),
            working: false,
            last: 0,
            tables: BTreeMap::new(),
            kv: vec![0; positions],
            void: BTreeSet::new(),
        }
    }

    /// Computes a frame: the next one.
    pub(crate) fn compute(&mut self, mut frame: Frame, time: StageTime, fails: bool) -> Frame {
        assert_eq!(frame.epoch, self.assignment.epoch, "a stale frame is never computed");
        assert!(frame.id.0 > self.last, "frames run in issue order");
        self.last = frame.id.0;
        for id in &frame.meta.released {
            self.tables.remove(id);
        }
        for update in &frame.meta.tables {
            let table = self.tables.entry(update.sequence).or_default();
            table.truncate(update.first as usize);
            assert_eq!(table.len(), update.first as usize, "a table without a beginning");
            table.extend(&update.blocks);
        }
        if fails && frame.meta.failed.is_none() {
            frame.meta.failed = Some(Failure::of_stage(self.assignment.at as u16, "no".into()));
        }
        if let Some(failure) = frame.meta.failed.clone() {
            frame.hashes.clear();
            self.void.extend(frame.meta.rows.iter().map(|row| row.sequence));
            if self.assignment.is_last() {
                frame.meta.times.clear();
                let failed = || RowOutcome::Failed(failure.clone());
                frame.results = frame.meta.rows.iter().map(|row| row.result(failed())).collect();
            }
            return frame;
        }
        let size = self.assignment.block_size;
        let (mut hashes, mut at) = (Vec::new(), 0);
        for row in &frame.meta.rows {
            let table = &self.tables[&row.sequence];
            let slot = |p: u32| (table[(p / size) as usize] * size + p % size) as usize;
            for position in row.position..row.position + row.count {
                let before = if position == 0 { 0 } else { self.kv[slot(position - 1)] };
                let hash = mix(before, u64::from(frame.tokens[at]));
                self.kv[slot(position)] = hash;
                if let Some(theirs) = frame.hashes.get(at)
                    && !self.void.contains(&row.sequence)
                {
                    assert_eq!(*theirs, hash, "stages hold different things of {}", row.sequence);
                }
                hashes.push(hash);
                at += 1;
            }
            if self.assignment.is_last() {
                let last = hashes.last().copied().unwrap_or_default();
                let outcome = match row.want {
                    Want::Sample => RowOutcome::Token { token: token(last), logprobs: None },
                    _ => RowOutcome::Done,
                };
                frame.results.push(row.result(outcome));
            }
        }
        frame.hashes = hashes;
        frame.meta.times.push(time);
        frame
    }
}

impl Node {
    pub(crate) fn stage(&mut self, epoch: Epoch) -> Option<&mut Stage> {
        self.stages.iter_mut().find(|s| s.assignment.epoch == epoch)
    }

    /// What a restart, or the loss of the link, leaves: nothing.
    pub(crate) fn forget(&mut self) {
        self.stages.clear();
        self.linked = false;
    }
}
