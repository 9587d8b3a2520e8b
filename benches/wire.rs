//! What a frame costs besides the wire: building, sealing, checking.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use millrace_shared::id::{Epoch, MicroBatchId, PipelineId, SequenceId};
use millrace_shared::model::Dtype;
use millrace_shared::wire::data::{FrameHeader, FrameKind, Row, StepMeta, Want};
use millrace_shared::wire::frame::{Frame, FrameBuffer};

const HIDDEN: usize = 576;

fn build(rows: u32) -> Frame {
    let header = FrameHeader {
        kind: FrameKind::Activations,
        dtype: Dtype::F32,
        pipeline: PipelineId(1),
        epoch: Epoch(1),
        micro_batch: MicroBatchId(1),
        rows,
        meta_len: 0,
        payload_len: 0,
        crc: 0,
    };
    let row = |i| Row {
        sequence: SequenceId(i),
        sequence_epoch: 0,
        position: 100,
        count: 1,
        want: Want::Sample,
    };
    let meta = StepMeta { rows: (0..u64::from(rows)).map(row).collect(), ..StepMeta::default() };
    Frame::build(header, &meta, rows as usize * HIDDEN * 4).expect("within limits").seal()
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("wire/frame");
    for rows in [1_u32, 8, 64] {
        let bytes = build(rows).into_buffer();
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::new("build_and_seal", rows), |b| {
            b.iter(|| black_box(build(rows)));
        });
        group.bench_function(BenchmarkId::new("check_and_read", rows), |b| {
            b.iter(|| {
                let mut copy = FrameBuffer::with_capacity(bytes.len());
                copy.extend_from_slice(&bytes);
                let frame = Frame::parse(copy).expect("valid");
                black_box(frame.meta::<StepMeta>().expect("valid"))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, frames);
criterion_main!(benches);
