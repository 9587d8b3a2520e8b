//! What a frame costs besides the wire: building, sealing, checking.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use harness::frames::activations;
use millrace_shared::wire::data::StepMeta;
use millrace_shared::wire::frame::{Frame, FrameBuffer};

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("wire/frame");
    for rows in [1, 8, 64] {
        let bytes = activations(rows, 1).into_buffer();
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::new("build_and_seal", rows), |b| {
            b.iter(|| black_box(activations(rows, 1)));
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
