//! A step of the CPU engine allocates nothing.
//!
//! A program of its own, without the test harness: the count is of the whole process, and the
//! harness's threads allocate whenever they like.

#![allow(clippy::unwrap_used)]

#[path = "cpu_engine/tiny.rs"]
mod tiny;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, HeadWant, Isa, StageInput, StageOutput};
use millrace_shared::model::TensorType;
use millrace_shared::wire::data::{StepMeta, Want};
use tiny::{Tiny, row, tables};

static COUNTING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    let plain = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    for (tiny, what) in [(plain.with_experts(), "of experts"), (plain, "of one part")] {
        check(&tiny, what);
    }
}

fn check(tiny: &Tiny, what: &str) {
    let (spec, sources) = tiny.stage(0..4, true, true, 2, Isa::best());
    let mut engine = CpuEngine::new();
    engine.load(&spec, &sources, &mut |_| {}).unwrap();
    let mut rows = Vec::new();
    let mut metas = Vec::new();
    for turn in 0..8u64 {
        for sequence in 0..7 {
            rows.push(row(turn * 7 + sequence, 0, 4, Want::Sample));
        }
        let updates: Vec<_> = (0..7).flat_map(|s| tables(turn * 7 + s, 4, 16, s as u32)).collect();
        let released =
            (0..7).filter(|_| turn > 0).map(|s| tables((turn - 1) * 7 + s, 1, 16, 0)[0].sequence);
        metas.push(StepMeta {
            rows: std::mem::take(&mut rows),
            tables: updates,
            released: released.collect(),
            ..StepMeta::default()
        });
    }
    let tokens: Vec<u32> = (0..28).collect();
    let mut seen = 0;
    COUNTING.store(true, Ordering::Relaxed);
    for meta in &metas {
        let mut sink = |_: millrace_engine::LogitsRow<'_>| seen += 1;
        let output = StageOutput::Logits(&mut sink);
        engine.step(meta, StageInput::Tokens(&tokens), output).unwrap();
        for want in [&[][..], &[HeadWant::Top(64); 7], &[HeadWant::Top(40)]] {
            let mut sink = |_: millrace_engine::HeadRow<'_>| seen += 1;
            let output = StageOutput::Head { want, sink: &mut sink };
            engine.step(meta, StageInput::Tokens(&tokens), output).unwrap();
        }
    }
    COUNTING.store(false, Ordering::Relaxed);
    assert_eq!(seen, 4 * 56);
    assert_eq!(COUNT.load(Ordering::Relaxed), 0, "allocations in a step {what}");
    eprintln!("a step {what} allocates nothing: ok, {} steps", metas.len());
}
