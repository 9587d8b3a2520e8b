//! Block tables over the pool.

use std::collections::BTreeMap;

use super::BlockHash;
use super::pool::BlockPool;
use crate::id::{BlockId, SequenceId};

/// The blocks of a sequence, in order: position `p` lies in block `p / block_size`.
pub type BlockTable = Vec<BlockId>;

/// A block that must be copied, on every stage, before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Index in the sequence's table.
    pub index: u32,
    /// The shared block.
    pub from: BlockId,
    /// The block that replaces it in the table.
    pub to: BlockId,
}

/// Owns every block; see the module's documentation.
#[derive(Clone, Debug)]
pub struct KvBlockManager {
    block_size: u32,
    pool: BlockPool,
    tables: BTreeMap<SequenceId, BlockTable>,
}

impl KvBlockManager {
    /// `num_blocks` blocks of `block_size` positions each (at least 1).
    pub fn new(num_blocks: u32, block_size: u32) -> Self {
        Self {
            block_size: block_size.max(1),
            pool: BlockPool::new(num_blocks),
            tables: BTreeMap::new(),
        }
    }

    /// Positions per block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.pool.total()
    }

    /// Blocks that belong to at least one table.
    pub fn used(&self) -> u32 {
        self.pool.total() - self.pool.free_blocks()
    }

    /// Blocks that nobody holds, those whose content is still known included.
    pub fn free_blocks(&self) -> u32 {
        self.pool.free_blocks()
    }

    /// How many tables hold `block`.
    pub fn references(&self, block: BlockId) -> u32 {
        self.pool.references(block)
    }

    /// Blocks that `positions` positions take.
    pub fn blocks_for(&self, positions: u32) -> u32 {
        positions.div_ceil(self.block_size)
    }

    /// Whether `n` more blocks can be had.
    pub fn can_allocate(&self, n: u32) -> bool {
        n <= self.pool.free_blocks()
    }

    /// The table of `sequence`; empty where it has none.
    pub fn table(&self, sequence: SequenceId) -> &[BlockId] {
        self.tables.get(&sequence).map_or(&[], Vec::as_slice)
    }

    /// Sequences with a table.
    pub fn sequences(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.tables.keys().copied()
    }

    /// Grows the table of `sequence` so that it covers `positions_total` positions, and returns the
    /// blocks added (none where it did already). `None`, and nothing changed, where they do not
    /// suffice.
    pub fn allocate(&mut self, sequence: SequenceId, positions_total: u32) -> Option<Vec<BlockId>> {
        let needed = self.blocks_for(positions_total) as usize;
        let missing = needed.saturating_sub(self.table(sequence).len());
        if missing == 0 {
            return Some(Vec::new());
        }
        let added = self.pool.take(missing)?;
        self.tables.entry(sequence).or_default().extend_from_slice(&added);
        Some(added)
    }

    /// Gives `to` the blocks of `from`, shared. `false`, and nothing changed, where `from` has no
    /// table or `to` has one. Before either of them writes into a shared block (the last one, where
    /// it is not full) it needs [`Self::prepare_write`].
    pub fn fork(&mut self, from: SequenceId, to: SequenceId) -> bool {
        if self.tables.contains_key(&to) {
            return false;
        }
        let Some(table) = self.tables.get(&from).cloned() else { return false };
        for &block in &table {
            self.pool.share(block);
        }
        self.tables.insert(to, table);
        true
    }

    /// Blocks whose content is known, held or not.
    pub fn cached(&self) -> u32 {
        self.pool.cached()
    }

    /// How many of the contents `prefix` are here, counted from the first up to the first that is
    /// not; and how many of those nobody holds, so that adopting them takes free blocks.
    pub fn cached_prefix(&self, prefix: &[BlockHash]) -> (u32, u32) {
        let found = prefix.iter().map_while(|content| self.pool.find(content));
        found.fold((0, 0), |(blocks, free), block| {
            (blocks + 1, free + u32::from(self.pool.references(block) == 0))
        })
    }

    /// Starts the table of `sequence`, which must have none, with the blocks that hold the contents
    /// `prefix`, as far as they are here. Returns how many.
    pub fn adopt(&mut self, sequence: SequenceId, prefix: &[BlockHash]) -> u32 {
        if self.tables.contains_key(&sequence) {
            return 0;
        }
        let table: BlockTable = prefix.iter().map_while(|c| self.pool.find(c)).collect();
        let adopted = table.len() as u32;
        if adopted > 0 {
            table.iter().for_each(|&block| self.pool.share(block));
            self.tables.insert(sequence, table);
        }
        adopted
    }

    /// Notes that block `index` of `sequence` is full and holds `content`, on every stage.
    pub fn publish(&mut self, sequence: SequenceId, index: u32, content: BlockHash) {
        if let Some(&block) = self.table(sequence).get(index as usize) {
            self.pool.publish(block, content);
        }
    }

    /// Makes the blocks of positions `first..end` of `sequence` its own, as far as it has them, and
    /// returns the copies that stages must execute before the rows (none where nothing was shared).
    /// Blocks that were published leave the cache. `None`, and nothing changed, where blocks do not
    /// suffice.
    pub fn prepare_write(
        &mut self,
        sequence: SequenceId,
        first: u32,
        end: u32,
    ) -> Option<Vec<BlockCopy>> {
        let table = self.tables.get(&sequence).map_or(&[][..], Vec::as_slice);
        let last = (end.div_ceil(self.block_size) as usize).min(table.len());
        let start = ((first / self.block_size) as usize).min(last);
        let shared: Vec<(usize, BlockId)> = (start..last)
            .map(|i| (i, table[i]))
            .filter(|&(_, block)| self.pool.references(block) > 1)
            .collect();
        let fresh = self.pool.take(shared.len())?;
        let copies: Vec<BlockCopy> = shared
            .iter()
            .zip(&fresh)
            .map(|(&(i, from), &to)| BlockCopy { index: i as u32, from, to })
            .collect();
        if let Some(table) = self.tables.get_mut(&sequence) {
            for copy in &copies {
                table[copy.index as usize] = copy.to;
                self.pool.drop_reference(copy.from);
            }
            table[start..last].iter().for_each(|&block| self.pool.withdraw(block));
        }
        Some(copies)
    }

    /// Takes the table of `sequence` away; blocks that nobody else holds become free, those that are
    /// published with their content. Returns how many did.
    pub fn free(&mut self, sequence: SequenceId) -> u32 {
        let before = self.pool.free_blocks();
        if let Some(table) = self.tables.remove(&sequence) {
            // Last block first, so that the next allocation gets them in table order, and the cache
            // loses the end of a prefix before its beginning.
            for block in table.into_iter().rev() {
                self.pool.drop_reference(block);
            }
        }
        self.pool.free_blocks() - before
    }

    /// Frees everything and forgets all contents.
    pub fn reset(&mut self) {
        *self = Self::new(self.pool.total(), self.block_size);
    }
}
