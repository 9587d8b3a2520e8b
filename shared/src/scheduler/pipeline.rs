//! Micro-batches in flight.

use std::collections::BTreeMap;
use std::time::Duration;

use super::cost::Load;
use crate::id::{MicroBatchId, SequenceId};
use crate::wire::data::{Row, RowResult, Want};

/// A row that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IssuedRow {
    pub(super) sequence: SequenceId,
    pub(super) epoch: u32,
    pub(super) position: u32,
    pub(super) count: u32,
    pub(super) want: Want,
}

impl IssuedRow {
    /// One past the last position.
    pub(super) fn end(&self) -> u32 {
        self.position + self.count
    }

    pub(super) fn is_answered_by(&self, result: &RowResult) -> bool {
        self.sequence == result.sequence
            && self.epoch == result.sequence_epoch
            && self.position == result.position
            && self.count == result.count
    }
}

impl From<&Row> for IssuedRow {
    fn from(row: &Row) -> Self {
        Self {
            sequence: row.sequence,
            epoch: row.sequence_epoch,
            position: row.position,
            count: row.count,
            want: row.want,
        }
    }
}

#[derive(Debug)]
struct MicroBatch {
    issued: Duration,
    rows: Vec<IssuedRow>,
    load: Load,
}

/// The window of micro-batches that were issued and not answered. Bounded by the scheduler.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    batches: BTreeMap<MicroBatchId, MicroBatch>,
    last_id: u64,
}

impl InFlight {
    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    /// Those of them that hold more than guesses.
    pub(super) fn certain(&self) -> usize {
        let certain = |b: &&MicroBatch| b.rows.iter().any(|row| row.want != Want::Follow);
        self.batches.values().filter(certain).count()
    }

    /// A fresh id, without an entry.
    pub(super) fn next_id(&mut self) -> MicroBatchId {
        self.last_id += 1;
        MicroBatchId(self.last_id)
    }

    /// The number given out last.
    pub(super) fn last_id(&self) -> u64 {
        self.last_id
    }

    pub(super) fn insert(&mut self, id: MicroBatchId, issued: Duration, rows: &[Row], load: Load) {
        let rows = rows.iter().map(IssuedRow::from).collect();
        self.batches.insert(id, MicroBatch { issued, rows, load });
    }

    /// When it was issued, and its rows.
    pub(super) fn take(&mut self, id: MicroBatchId) -> Option<(Duration, Vec<IssuedRow>)> {
        self.batches.remove(&id).map(|b| (b.issued, b.rows))
    }

    /// When it was issued, and what it asks of the stages.
    pub(super) fn load(&self, id: MicroBatchId) -> Option<(Duration, Load)> {
        self.batches.get(&id).map(|b| (b.issued, b.load))
    }

    /// Its rows.
    pub(super) fn rows(&self, id: MicroBatchId) -> &[IssuedRow] {
        self.batches.get(&id).map_or(&[], |b| &b.rows)
    }

    /// All rows of all of them.
    pub(super) fn all_rows(&self) -> impl Iterator<Item = &IssuedRow> {
        self.batches.values().flat_map(|b| &b.rows)
    }

    pub(super) fn oldest(&self) -> Option<(MicroBatchId, Duration)> {
        self.batches.first_key_value().map(|(&id, b)| (id, b.issued))
    }

    /// The oldest one with a row of the sequence.
    pub(super) fn of(&self, sequence: SequenceId) -> Option<(MicroBatchId, Duration)> {
        let holds = |b: &MicroBatch| b.rows.iter().any(|row| row.sequence == sequence);
        self.batches.iter().find(|(_, b)| holds(b)).map(|(&id, b)| (id, b.issued))
    }

    /// Forgets all; ids go on, so that answers to the forgotten stay unknown.
    pub(super) fn clear(&mut self) {
        self.batches.clear();
    }
}
