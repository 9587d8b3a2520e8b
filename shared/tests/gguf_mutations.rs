//! Random damage to a sound GGUF file: no panic, and never more memory than the file explains.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use std::path::Path;

use millrace_shared::model::ModelFiles;
use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::{Gguf, GgufWriter};
use proptest::prelude::*;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// Remembers the largest single allocation of a thread.
struct Watching;

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no counter any more.
        let _ = LARGEST.try_with(|l| l.set(l.get().max(layout.size())));
        // SAFETY: the caller's promise about `layout`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise about `ptr` and `layout`.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = LARGEST.try_with(|l| l.set(l.get().max(size)));
        // SAFETY: the caller's promise about `ptr`, `layout` and `size`.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

fn sound() -> Vec<u8> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama")
        .set("llama.block_count", 2u32)
        .set("llama.embedding_length", 32u32)
        .set("llama.attention.head_count", 2u64)
        .set("llama.feed_forward_length", 64u32)
        .set("llama.context_length", 128u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .set("some.flags", vec![true, false])
        .set("some.numbers", vec![1i64, -1])
        .set("tokenizer.ggml.tokens", (0..32).map(|i| format!("t{i}")).collect::<Vec<_>>());
    w.tensor("token_embd.weight", TensorType::Q4_0, &[32, 32], vec![1u8; 576]).unwrap();
    w.tensor("output_norm.weight", TensorType::F32, &[32], vec![2u8; 128]).unwrap();
    w.to_bytes()
}

/// Parses, and checks that no single allocation was larger than the file explains.
fn parse(bytes: &[u8]) {
    LARGEST.with(|l| l.set(0));
    if let Ok(gguf) = Gguf::read(bytes, bytes.len() as u64) {
        let _ = gguf.config();
        let files = ModelFiles::of_gguf(gguf.clone(), Path::new("mutated.gguf"));
        let _ = files.map(|files| files.check_supported_types());
        for t in &gguf.tensors {
            assert!(t.offset >= gguf.data_offset && t.offset + t.bytes <= gguf.file_len);
        }
    }
    let largest = LARGEST.with(Cell::get);
    assert!(largest <= 16 * bytes.len() + 4096, "{largest} bytes for a file of {}", bytes.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = sound();
        for (at, value) in changes {
            let n = bytes.len();
            bytes[at.index(n)] = value;
        }
        parse(&bytes);
    }

    #[test]
    fn wild_numbers(at in any::<prop::sample::Index>(), number in prop_oneof![
        any::<u64>(), Just(u64::MAX), Just(1 << 63), Just(1 << 32), Just(1 << 31), 0u64..512
    ]) {
        let mut bytes = sound();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        parse(&bytes);
    }

    #[test]
    fn cut_and_spliced(from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>(), end in any::<prop::sample::Index>()) {
        let bytes = sound();
        let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
        let mut spliced = bytes[..from].to_vec();
        spliced.extend(&bytes[to..]);
        spliced.truncate(end.index(spliced.len() + 1));
        parse(&spliced);
    }

    #[test]
    fn noise_after_the_magic(tail in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        parse(&bytes);
    }
}

#[test]
fn the_sound_file_is_sound() {
    let bytes = sound();
    Gguf::read(bytes.as_slice(), bytes.len() as u64).unwrap().config().unwrap();
}
