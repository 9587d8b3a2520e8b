//! Block tables: which KV blocks hold which positions of a sequence.
//!
//! The coordinator decides; this only remembers, in room set aside at load. An update that makes no
//! sense (a gap, a table beyond the longest sequence, more sequences than announced) drops the
//! table, so that rows of that sequence fail by name and no other is harmed.

use std::collections::HashMap;

use millrace_shared::id::SequenceId;
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::StepMeta;

/// Tables of the open sequences.
#[derive(Debug)]
pub struct BlockTables {
    slots: HashMap<SequenceId, usize>,
    tables: Vec<Vec<u32>>,
    free: Vec<usize>,
    block_size: usize,
    max_blocks: usize,
}

impl BlockTables {
    /// Room for the most sequences, each of the greatest length.
    pub fn new(settings: &EngineSettings) -> Self {
        let max_blocks = settings.max_model_len.div_ceil(settings.kv_block_size.max(1)) as usize;
        let sequences = settings.max_num_seqs as usize;
        Self {
            slots: HashMap::with_capacity(sequences * 2),
            tables: (0..sequences).map(|_| Vec::with_capacity(max_blocks)).collect(),
            free: (0..sequences).rev().collect(),
            block_size: settings.kv_block_size as usize,
            max_blocks,
        }
    }

    /// Bytes of that room, about.
    pub fn bytes(settings: &EngineSettings) -> u64 {
        let blocks = settings.max_model_len.div_ceil(settings.kv_block_size.max(1));
        let ids = u64::from(blocks) * size_of::<u32>() as u64;
        // A vector, a place in the list of free ones, two to four in the map.
        u64::from(settings.max_num_seqs).saturating_mul(ids + 128)
    }

    /// Applies releases, then updates.
    pub fn apply(&mut self, meta: &StepMeta) {
        for sequence in &meta.released {
            self.release(*sequence);
        }
        for update in &meta.tables {
            if !self.update(update.sequence, update.first as usize, &update.blocks) {
                tracing::warn!(sequence = %update.sequence, first = update.first,
                    blocks = update.blocks.len(), "impossible block table update; table dropped");
                self.release(update.sequence);
            }
        }
    }

    fn release(&mut self, sequence: SequenceId) {
        if let Some(slot) = self.slots.remove(&sequence) {
            self.free.push(slot);
        }
    }

    fn update(&mut self, sequence: SequenceId, first: usize, blocks: &[u32]) -> bool {
        let slot = match self.slots.get(&sequence) {
            Some(&slot) => slot,
            None if first > 0 => return false,
            None => {
                let Some(slot) = self.free.pop() else { return false };
                self.tables[slot].clear();
                self.slots.insert(sequence, slot);
                slot
            }
        };
        let table = &mut self.tables[slot];
        if first > table.len() || blocks.len() > self.max_blocks - first.min(self.max_blocks) {
            return false;
        }
        table.truncate(first);
        table.extend_from_slice(blocks);
        true
    }

    /// The slot of a sequence.
    pub fn slot(&self, sequence: SequenceId) -> Option<usize> {
        self.slots.get(&sequence).copied()
    }

    /// Blocks of a slot, in order of position.
    pub fn blocks(&self, slot: usize) -> &[u32] {
        &self.tables[slot]
    }

    /// Block and offset of a position.
    pub fn place(&self, slot: usize, position: u32) -> (u32, usize) {
        let position = position as usize;
        (self.tables[slot][position / self.block_size], position % self.block_size)
    }
}

#[cfg(test)]
mod tests {
    use millrace_shared::model::Dtype;
    use millrace_shared::wire::data::TableUpdate;

    use super::*;

    fn tables() -> BlockTables {
        BlockTables::new(&EngineSettings {
            kv_blocks: 8,
            kv_block_size: 16,
            kv_dtype: Dtype::F16,
            activation_dtype: Dtype::F32,
            max_batch_tokens: 64,
            max_num_seqs: 2,
            max_model_len: 64,
        })
    }

    fn update(sequence: u64, first: u32, blocks: &[u32]) -> StepMeta {
        let sequence = SequenceId(sequence);
        let tables = vec![TableUpdate { sequence, first, blocks: blocks.to_vec() }];
        StepMeta { tables, ..StepMeta::default() }
    }

    fn blocks(t: &BlockTables, sequence: u64) -> Option<&[u32]> {
        t.slot(SequenceId(sequence)).map(|slot| t.blocks(slot))
    }

    #[test]
    fn updates_append_cut_and_restart() {
        let mut t = tables();
        t.apply(&update(1, 0, &[5, 6]));
        t.apply(&update(1, 2, &[7]));
        assert_eq!(blocks(&t, 1), Some(&[5, 6, 7][..]));
        t.apply(&update(1, 1, &[3]));
        assert_eq!(blocks(&t, 1), Some(&[5, 3][..]));
        t.apply(&update(1, 0, &[2]));
        assert_eq!(blocks(&t, 1), Some(&[2][..]));
        assert_eq!(t.place(0, 15), (2, 15));
    }

    #[test]
    fn releases_come_first_and_free_the_slot() {
        let mut t = tables();
        t.apply(&update(1, 0, &[1]));
        t.apply(&update(2, 0, &[2]));
        let meta = StepMeta { released: vec![SequenceId(1)], ..update(3, 0, &[3]) };
        t.apply(&meta);
        assert_eq!(blocks(&t, 1), None);
        assert_eq!(blocks(&t, 3), Some(&[3][..]));
    }

    #[test]
    fn nonsense_drops_only_its_own_table() {
        let mut t = tables();
        t.apply(&update(1, 0, &[1]));
        t.apply(&update(2, 1, &[1])); // a gap
        assert_eq!(blocks(&t, 2), None);
        t.apply(&update(2, 0, &[0; 5])); // too long
        assert_eq!(blocks(&t, 2), None);
        t.apply(&update(2, 0, &[2]));
        t.apply(&update(3, 0, &[3])); // too many
        assert_eq!(blocks(&t, 3), None);
        t.apply(&update(1, u32::MAX, &[3]));
        assert_eq!(blocks(&t, 1), None);
        assert_eq!(blocks(&t, 2), Some(&[2][..]));
    }
}
