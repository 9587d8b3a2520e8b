//! Frames as stages exchange them, for benchmarks.

use millrace_shared::id::{Epoch, MicroBatchId, PipelineId, SequenceId};
use millrace_shared::model::Dtype;
use millrace_shared::wire::data::{FrameHeader, FrameKind, Row, StepMeta, Want};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::stamp::Stamp;

/// SmolLM2-135M's width.
pub const HIDDEN: usize = 576;

/// A sealed activation frame of so many decodes, [`HIDDEN`] floats (zeroes) each.
pub fn activations(rows: usize, micro_batch: u64) -> Frame {
    let header = FrameHeader {
        kind: FrameKind::Activations,
        dtype: Dtype::F32,
        pipeline: PipelineId(1),
        epoch: Epoch(1),
        micro_batch: MicroBatchId(micro_batch),
        rows: rows as u32,
        meta_len: 0,
        payload_len: 0,
        crc: 0,
        ready: Stamp::NONE,
    };
    let row = |i| Row {
        sequence: SequenceId(i),
        sequence_epoch: 0,
        position: 100,
        count: 1,
        want: Want::Sample,
    };
    let meta = StepMeta { rows: (0..rows as u64).map(row).collect(), ..StepMeta::default() };
    Frame::build(header, &meta, rows * HIDDEN * 4).expect("within limits").seal()
}
