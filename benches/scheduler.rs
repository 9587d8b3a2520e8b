//! What the coordinator spends per micro-batch: building a step and taking its result, with every
//! sequence decoding.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use millrace_shared::id::SequenceId;
use millrace_shared::scheduler::{
    Kind, NewSequence, Policy, Priority, Scheduler, SchedulerConfig, Step,
};
use millrace_shared::wire::data::{RowOutcome, RowResult, Want};

const CONFIG: SchedulerConfig = SchedulerConfig {
    num_blocks: 8192,
    block_size: 64,
    max_num_seqs: 256,
    max_waiting: 256,
    max_in_flight: 3,
    prefill_chunk: 64,
    max_batch_tokens: 512,
    max_model_len: 1 << 20,
    policy: Policy::DEFAULT,
};

fn answer(step: &Step) -> Vec<RowResult> {
    let outcome = |want| match want {
        Want::Sample => RowOutcome::Token { token: 7, logprobs: None },
        _ => RowOutcome::Done,
    };
    step.meta.rows.iter().map(|row| row.result(outcome(row.want))).collect()
}

fn decoding(sequences: u64) -> Scheduler {
    let mut scheduler = Scheduler::new(CONFIG);
    for id in 1..=sequences {
        let new = NewSequence {
            id: SequenceId(id),
            prompt: vec![1; 32],
            max_new_tokens: 1 << 19,
            kind: Kind::Generate,
            submitted: Duration::ZERO,
            deadline: None,
            client: 0,
            priority: Priority::Normal,
        };
        scheduler.handle_submit(new).expect("room for all");
    }
    for _ in 0..4 * sequences {
        turn(&mut scheduler);
    }
    scheduler
}

fn turn(scheduler: &mut Scheduler) {
    while let Some(step) = scheduler.poll_step(Duration::ZERO) {
        let results = answer(&step);
        black_box(scheduler.handle_result(step.id, &results, Duration::ZERO));
    }
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("scheduler/decode_step");
    for sequences in [1_u64, 16, 128] {
        let mut scheduler = decoding(sequences);
        group.throughput(Throughput::Elements(sequences));
        group.bench_function(BenchmarkId::from_parameter(sequences), |b| {
            b.iter(|| {
                let step = scheduler.poll_step(Duration::ZERO).expect("always something to decode");
                let results = answer(&step);
                black_box(scheduler.handle_result(step.id, &results, Duration::ZERO))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
