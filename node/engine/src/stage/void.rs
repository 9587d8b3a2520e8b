//! Rows that nobody wants any more are left out of frames.
//!
//! What a sequence had under way when it was cancelled or preempted is told on the control plane,
//! which overtakes the frames. A frame then loses those rows, with their positions of the payload
//! and their drafts; its block tables and releases stay, so that all stages keep the same tables.
//! Later stages see a smaller frame, and the coordinator misses nothing.

use std::collections::{HashMap, VecDeque};

use millrace_shared::id::SequenceId;
use millrace_shared::wire::MAX_VOID_ROWS;
use millrace_shared::wire::control::VoidRows;
use millrace_shared::wire::data::{FrameError, FrameHeader, Row, StepMeta};
use millrace_shared::wire::frame::Frame;

/// See the module's documentation. Remembers at most [`MAX_VOID_ROWS`] sequences: of one that is
/// forgotten rows are computed in vain, no more.
#[derive(Debug, Default)]
pub(super) struct Void {
    epochs: HashMap<SequenceId, u32>,
    order: VecDeque<SequenceId>,
    /// Rows that were left out so far.
    pub(super) left_out: u64,
}

impl Void {
    pub(super) fn note(&mut self, rows: VoidRows) {
        let epoch = self.epochs.entry(rows.sequence).or_insert_with(|| {
            self.order.push_back(rows.sequence);
            rows.epoch
        });
        *epoch = rows.epoch.max(*epoch);
        if self.order.len() > MAX_VOID_ROWS
            && let Some(oldest) = self.order.pop_front()
        {
            self.epochs.remove(&oldest);
        }
    }

    /// A sequence has ended: no row of it comes any more.
    pub(super) fn forget(&mut self, sequence: SequenceId) {
        if self.epochs.remove(&sequence).is_some() {
            self.order.retain(|id| *id != sequence);
        }
    }

    fn is_void(&self, row: &Row) -> bool {
        self.epochs.get(&row.sequence).is_some_and(|&epoch| row.sequence_epoch <= epoch)
    }

    /// The frame without void rows; `None` where it has none of them. The payload is that of all
    /// rows of `meta`, as was checked.
    ///
    /// # Errors
    /// If the frame cannot be built.
    pub(super) fn leave_out(
        &mut self,
        frame: &Frame,
        meta: &StepMeta,
    ) -> Result<Option<(Frame, StepMeta)>, FrameError> {
        if self.epochs.is_empty() || !meta.rows.iter().any(|row| self.is_void(row)) {
            return Ok(None);
        }
        let width = frame.payload().len() / meta.positions().max(1);
        let mut kept = StepMeta { rows: Vec::new(), drafts: Vec::new(), ..meta.clone() };
        let mut payload = Vec::with_capacity(frame.payload().len());
        let mut rest = frame.payload();
        for (index, row) in meta.rows.iter().enumerate() {
            let (own, after) = rest.split_at(row.count as usize * width);
            rest = after;
            if self.is_void(row) {
                self.left_out += 1;
                continue;
            }
            kept.rows.push(*row);
            kept.drafts.extend(meta.drafts_of(index));
            payload.extend_from_slice(own);
        }
        let header = FrameHeader { rows: kept.positions() as u32, ..*frame.header() };
        let mut smaller = Frame::build(header, &kept, payload.len())?;
        smaller.payload_mut().copy_from_slice(&payload);
        Ok(Some((smaller, kept)))
    }
}
