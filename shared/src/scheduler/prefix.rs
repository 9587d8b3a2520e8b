//! Automatic prefix caching: which blocks a sequence need not compute.
//!
//! Before its first row a sequence looks for its own beginning among the published blocks, at most
//! up to the block before its last token (which is always computed, for its logits) and never beyond
//! the first position that it scores; a mean of hidden states needs all of them. Blocks are published when the last stage has confirmed the
//! step that filled them. Where another running sequence is computing the very block that comes
//! next, the newcomer waits for it instead of computing it too: many requests with one beginning,
//! sent at once, compute it once.
//!
//! Clients need not share: with [`PrefixCache::PerKey`] the chains of each begin with its own number,
//! so that nobody finds, or waits for, what others computed.
//!
//! Such a wait ends: the other one's blocks are no longer announced once it is preempted, fails or
//! ends; one that has had no row for [`PATIENCE`] micro-batches is not waited for; and where nothing
//! else can run, nobody waits. Invariant: a block that is announced here is not published, and its
//! announcer runs.

use std::collections::BTreeMap;

use super::Scheduler;
use super::sequence::{Phase, Sequence};
use super::types::Kind;
use crate::id::SequenceId;
use crate::kv::BlockHash;
use crate::options::PrefixCache;
use crate::pooling::Pooling;

/// Micro-batches without a row of the other after which one no longer waits for it: far above what
/// a fair share of the pipeline takes, far below what a client would notice as a stall.
const PATIENCE: u64 = 64;

/// Blocks that running sequences are about to fill, and how the cache did.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    filling: BTreeMap<BlockHash, SequenceId>,
    /// Positions of sequences that began, so far.
    pub(super) queried: u64,
    /// Those of them that were found, so far.
    pub(super) hits: u64,
}

impl Prefixes {
    fn announce(&mut self, seq: &Sequence) {
        for &content in &seq.contents[seq.published as usize..] {
            self.filling.entry(content).or_insert(seq.id);
        }
    }

    /// Takes back what `seq` announced.
    pub(super) fn take_back(&mut self, seq: &Sequence) {
        for content in seq.contents.iter().skip(seq.published as usize) {
            if self.filling.get(content) == Some(&seq.id) {
                self.filling.remove(content);
            }
        }
    }

    /// An epoch ended: nobody fills anything.
    pub(super) fn clear(&mut self) {
        self.filling.clear();
    }
}

impl Scheduler {
    /// The contents that a sequence may take from the cache.
    fn wanted<'a>(&self, seq: &'a Sequence) -> &'a [BlockHash] {
        if !self.caches_prefixes() {
            return &[];
        }
        let most = match seq.kind {
            Kind::Embed { pooling: Pooling::Mean } => 0,
            Kind::Generate | Kind::Constrained | Kind::Embed { .. } => seq.len() - 1,
            Kind::Score { .. } => seq.scored.min(seq.len() - 1),
        };
        let blocks = (most / self.config.block_size) as usize;
        &seq.contents[..blocks.min(seq.contents.len())]
    }

    /// Blocks that must be free for a sequence to be computed to its end so far.
    pub(super) fn blocks_to_come(&self, seq: &Sequence) -> u32 {
        let blocks = self.kv.blocks_for(seq.len());
        if seq.begun {
            return blocks.saturating_sub(self.kv.table(seq.id).len() as u32);
        }
        // What it will find and somebody else holds is no longer free anyway.
        let (found, free) = self.kv.cached_prefix(self.wanted(seq));
        blocks - found + free
    }

    /// Names the blocks that the tokens of a sequence fill.
    pub(super) fn name_blocks(&mut self, id: SequenceId) {
        let caches = self.caches_prefixes();
        if let Some(seq) = self.sequences.get_mut(&id).filter(|_| caches) {
            seq.name_blocks(self.config.policy.prefix_cache, self.config.block_size);
        }
    }

    fn caches_prefixes(&self) -> bool {
        self.config.policy.prefix_cache != PrefixCache::Off
    }

    /// Gives a sequence that has no table yet what the cache holds of it. `false` where it should
    /// wait, which only the `patient` do, because another one computes its next block right now.
    pub(super) fn begin(&mut self, id: SequenceId, patient: bool) -> bool {
        let Some(seq) = self.sequences.get(&id) else { return false };
        if seq.begun || !self.caches_prefixes() {
            return true;
        }
        let wanted = self.wanted(seq);
        let (found, _) = self.kv.cached_prefix(wanted);
        let next = wanted.get(found as usize).and_then(|c| self.prefixes.filling.get(c));
        if patient && next.is_some_and(|other| self.advances(*other)) {
            return false;
        }
        let adopted = self.kv.adopt(id, wanted);
        let Some(seq) = self.sequences.get_mut(&id) else { return false };
        let positions = adopted * self.config.block_size;
        seq.begin_at(positions, adopted);
        self.prefixes.queried += u64::from(seq.len());
        self.prefixes.hits += u64::from(positions);
        self.prefixes.announce(seq);
        true
    }

    /// Whether a sequence still computes what it announced.
    fn advances(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|s| {
            s.phase != Phase::Waiting
                && (s.rows_in_flight > 0 || s.last_row + PATIENCE > self.in_flight.last_id())
        })
    }

    /// Publishes the blocks of a running sequence that are confirmed up to position `end`, counted
    /// from `start`; what lies before must have been confirmed already.
    pub(super) fn confirm(&mut self, id: SequenceId, start: u32, end: u32) {
        let caches = self.caches_prefixes();
        let Some(seq) = self.sequences.get_mut(&id).filter(|_| caches) else { return };
        if start > seq.computed || end <= seq.computed {
            return;
        }
        seq.computed = end;
        let full = end / self.config.block_size;
        if full <= seq.published {
            return;
        }
        seq.name_blocks(self.config.policy.prefix_cache, self.config.block_size);
        for index in seq.published..full {
            let Some(&content) = seq.contents.get(index as usize) else { break };
            self.kv.publish(id, index, content);
            if self.prefixes.filling.get(&content) == Some(&id) {
                self.prefixes.filling.remove(&content);
            }
            seq.published = index + 1;
        }
    }

    /// Tokens of a sequence that were in the cache when it was first computed.
    pub fn cached_tokens(&self, id: SequenceId) -> u32 {
        self.sequences.get(&id).and_then(|s| s.first_hit).unwrap_or(0)
    }
}
