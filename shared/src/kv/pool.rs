//! Reference counts, free blocks, and what freed blocks still hold.
//!
//! A block is held by tables (it has references), idle (nobody holds it, but its content is known
//! and may be used again), or blank. Both idle and blank blocks are free. Blank ones are taken
//! first, the one freed last before the others, while it is warm in the stages' caches; then idle
//! ones, the longest unused first.
//!
//! Invariant: a content names one block, a block has at most one content; a block taken has none.

use std::collections::BTreeMap;

use super::BlockHash;
use crate::id::BlockId;

/// One block.
#[derive(Clone, Debug, Default)]
struct Slot {
    references: u32,
    content: Option<BlockHash>,
    /// Its key among the idle ones.
    idle_since: u64,
}

/// Blocks with their reference counts and contents.
#[derive(Clone, Debug)]
pub(super) struct BlockPool {
    slots: Vec<Slot>,
    blank: Vec<BlockId>,
    /// By time of last use.
    idle: BTreeMap<u64, BlockId>,
    by_content: BTreeMap<BlockHash, BlockId>,
    clock: u64,
}

impl BlockPool {
    pub(super) fn new(num_blocks: u32) -> Self {
        Self {
            slots: vec![Slot::default(); num_blocks as usize],
            blank: (0..num_blocks).rev().map(BlockId).collect(),
            idle: BTreeMap::new(),
            by_content: BTreeMap::new(),
            clock: 0,
        }
    }

    pub(super) fn total(&self) -> u32 {
        self.slots.len() as u32
    }

    pub(super) fn free_blocks(&self) -> u32 {
        (self.blank.len() + self.idle.len()) as u32
    }

    /// Blocks whose content is known, held or not.
    pub(super) fn cached(&self) -> u32 {
        self.by_content.len() as u32
    }

    pub(super) fn references(&self, block: BlockId) -> u32 {
        self.slots[block.0 as usize].references
    }

    /// The block that holds this content.
    pub(super) fn find(&self, content: &BlockHash) -> Option<BlockId> {
        self.by_content.get(content).copied()
    }

    /// Takes `n` blocks with one reference each, or none at all. They have no content any more.
    pub(super) fn take(&mut self, n: usize) -> Option<Vec<BlockId>> {
        if n > self.blank.len() + self.idle.len() {
            return None;
        }
        let left = self.blank.len().saturating_sub(n);
        let mut taken = self.blank.split_off(left);
        taken.reverse();
        while taken.len() < n {
            let (_, block) = self.idle.pop_first()?;
            self.withdraw(block);
            taken.push(block);
        }
        for block in &taken {
            self.slots[block.0 as usize].references = 1;
        }
        Some(taken)
    }

    /// Adds a reference; an idle block is idle no more.
    pub(super) fn share(&mut self, block: BlockId) {
        let slot = &mut self.slots[block.0 as usize];
        if slot.references == 0 {
            self.idle.remove(&slot.idle_since);
        }
        slot.references += 1;
    }

    /// Drops one reference; the last one frees the block.
    pub(super) fn drop_reference(&mut self, block: BlockId) {
        let slot = &mut self.slots[block.0 as usize];
        slot.references =
            slot.references.checked_sub(1).expect("invariant: a block in a table has references");
        match (slot.references, slot.content) {
            (0, None) => self.blank.push(block),
            (0, Some(_)) => {
                self.clock += 1;
                slot.idle_since = self.clock;
                self.idle.insert(self.clock, block);
            }
            _ => {}
        }
    }

    /// Notes what a held block holds. Nothing happens where that content is known elsewhere.
    pub(super) fn publish(&mut self, block: BlockId, content: BlockHash) {
        let slot = &mut self.slots[block.0 as usize];
        if slot.references == 0 || slot.content.is_some() || self.by_content.contains_key(&content)
        {
            return;
        }
        slot.content = Some(content);
        self.by_content.insert(content, block);
    }

    /// Forgets what a block holds: it is about to be written.
    pub(super) fn withdraw(&mut self, block: BlockId) {
        if let Some(content) = self.slots[block.0 as usize].content.take() {
            self.by_content.remove(&content);
        }
    }
}
