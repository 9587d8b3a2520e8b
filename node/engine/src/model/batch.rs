//! What a step is about, checked: runs of positions, and which of them the head is for.

use millrace_shared::pooling::Pooling;
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{StepMeta, Want};

use super::BlockTables;
use crate::StepError;

/// Consecutive positions of one sequence, in consecutive rows of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The sequence's slot in [`BlockTables`].
    pub slot: usize,
    /// First position.
    pub position: u32,
    /// How many.
    pub count: usize,
    /// First row.
    pub start: usize,
}

/// A position that the head is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Index into `StepMeta::rows`.
    pub row: usize,
    /// Position in the sequence.
    pub position: u32,
}

/// A checked step. Its lists have room for the largest one from the start.
#[derive(Debug)]
pub struct Batch {
    /// All rows.
    pub spans: Vec<Span>,
    /// What the head is for; rows count in the gathered tensor.
    pub wanted: Vec<Span>,
    /// Tensor rows that the head is for, ascending.
    pub keep: Vec<usize>,
    /// One per entry of `keep`.
    pub outputs: Vec<Output>,
    /// Tensor rows in all.
    pub positions: usize,
    kv_blocks: u32,
    max_positions: usize,
    max_len: u32,
    block_size: u32,
}

impl Batch {
    /// Room for the largest step.
    pub fn new(settings: &EngineSettings) -> Self {
        let most = settings.max_batch_tokens as usize;
        Self {
            spans: Vec::with_capacity(most),
            wanted: Vec::with_capacity(most),
            keep: Vec::with_capacity(most),
            outputs: Vec::with_capacity(most),
            positions: 0,
            kv_blocks: settings.kv_blocks,
            max_positions: most,
            max_len: settings.max_model_len,
            block_size: settings.kv_block_size,
        }
    }

    /// Bytes of that room.
    pub fn bytes(settings: &EngineSettings) -> u64 {
        let one = 2 * size_of::<Span>() + size_of::<usize>() + size_of::<Output>();
        u64::from(settings.max_batch_tokens) * one as u64
    }

    /// Checks the rows of a step against tables and limits.
    ///
    /// # Errors
    /// Naming the sequence and what is wrong with it.
    pub fn fill(&mut self, meta: &StepMeta, tables: &BlockTables) -> Result<(), StepError> {
        let invalid = |e: String| Err(StepError::Invalid(e));
        self.spans.clear();
        self.wanted.clear();
        self.keep.clear();
        self.outputs.clear();
        self.positions = 0;
        if let Err(e) = meta.validate(self.max_positions) {
            return invalid(e.to_string());
        }
        for (index, row) in meta.rows.iter().enumerate() {
            let sequence = row.sequence;
            let end = row.position + row.count;
            if end > self.max_len {
                return invalid(format!(
                    "sequence {sequence} reaches position {end}, beyond the limit of {}",
                    self.max_len
                ));
            }
            let Some(slot) = tables.slot(sequence) else {
                return invalid(format!("sequence {sequence} has no block table"));
            };
            let needed = end.div_ceil(self.block_size) as usize;
            let Some(blocks) = tables.blocks(slot).get(..needed) else {
                return invalid(format!(
                    "sequence {sequence} needs {needed} KV blocks for position {}, its table has {}",
                    end - 1,
                    tables.blocks(slot).len()
                ));
            };
            if let Some(bad) = blocks.iter().find(|&&b| b >= self.kv_blocks) {
                return invalid(format!(
                    "sequence {sequence} names KV block {bad}, this stage has {}",
                    self.kv_blocks
                ));
            }
            let (count, start) = (row.count as usize, self.positions);
            self.spans.push(Span { slot, position: row.position, count, start });
            let skip = match row.want {
                Want::None => count,
                Want::Sample | Want::Embed { pooling: Pooling::Last } => count - 1,
                Want::Score { .. } | Want::Verify | Want::Follow | Want::Sum => 0,
                Want::Embed { pooling: Pooling::Mean } => 0,
            };
            if skip < count {
                let position = row.position + skip as u32;
                let gathered = self.keep.len();
                self.wanted.push(Span { slot, position, count: count - skip, start: gathered });
                for i in skip..count {
                    self.keep.push(start + i);
                    self.outputs.push(Output { row: index, position: row.position + i as u32 });
                }
            }
            self.positions += count;
        }
        Ok(())
    }

    /// Index into `StepMeta::rows` and position of a tensor row, before or after gathering.
    pub fn locate(&self, tensor_row: usize, gathered: bool) -> (usize, u32) {
        if gathered {
            return self.outputs.get(tensor_row).map_or((0, 0), |o| (o.row, o.position));
        }
        let found = self
            .spans
            .iter()
            .enumerate()
            .find(|(_, s)| tensor_row >= s.start && tensor_row < s.start + s.count);
        found.map_or((0, 0), |(i, s)| (i, s.position + (tensor_row - s.start) as u32))
    }
}
