//! Reference counts and the free list.
//!
//! The free list is a stack: the block freed last is used first, while it is still warm in the
//! stages' caches. A prefix cache will replace the stack by a queue of cached blocks in order of
//! last use, behind the same four methods.

use crate::id::BlockId;

/// Blocks with their reference counts.
#[derive(Clone, Debug)]
pub(super) struct BlockPool {
    references: Vec<u32>,
    free: Vec<BlockId>,
}

impl BlockPool {
    pub(super) fn new(num_blocks: u32) -> Self {
        Self {
            references: vec![0; num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
        }
    }

    pub(super) fn total(&self) -> u32 {
        self.references.len() as u32
    }

    pub(super) fn free_blocks(&self) -> u32 {
        self.free.len() as u32
    }

    pub(super) fn references(&self, block: BlockId) -> u32 {
        self.references[block.0 as usize]
    }

    /// Takes `n` blocks with one reference each, or none at all.
    pub(super) fn take(&mut self, n: usize) -> Option<Vec<BlockId>> {
        let left = self.free.len().checked_sub(n)?;
        let mut taken = self.free.split_off(left);
        taken.reverse();
        for block in &taken {
            self.references[block.0 as usize] = 1;
        }
        Some(taken)
    }

    pub(super) fn share(&mut self, block: BlockId) {
        self.references[block.0 as usize] += 1;
    }

    /// Drops one reference; the last one frees the block.
    pub(super) fn drop_reference(&mut self, block: BlockId) {
        let count = &mut self.references[block.0 as usize];
        *count = count.checked_sub(1).expect("invariant: a block in a table has references");
        if *count == 0 {
            self.free.push(block);
        }
    }
}
