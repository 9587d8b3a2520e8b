//! Packed weights are kept, found again whatever the cut, and give the same bits; damaged ones are
//! packed again.

#![allow(clippy::unwrap_used)]

#[path = "cpu_engine/tiny.rs"]
mod tiny;

use std::ops::Range;
use std::path::{Path, PathBuf};

use millrace_engine::cache::{Cache, Rule};
use millrace_engine::cpu::CpuEngine;
use millrace_engine::{Engine, Isa, LoadedStage, StageInput, StageOutput};
use millrace_shared::model::TensorType;
use millrace_shared::wire::data::{StepMeta, Want};
use tiny::{Tiny, row, tables};

/// The model with the hashes of its tensors.
fn hashed() -> Tiny {
    let mut tiny = Tiny::new(TensorType::Q4_1, TensorType::Q8_0);
    for (i, entry) in tiny.entries.iter_mut().enumerate() {
        entry.hash = *blake3_like(i).as_slice().first_chunk().unwrap();
    }
    tiny
}

/// Any name of a content will do: nobody hashes here.
fn blake3_like(i: usize) -> Vec<u8> {
    (0..32).map(|byte| (i * 7 + byte + 1) as u8).collect()
}

/// Loads a stage, and waits until what was packed is kept.
fn load(tiny: &Tiny, layers: Range<u32>, ends: (bool, bool), cache: &Path) -> LoadedStage {
    load_with(tiny, layers, ends, cache, (2, Isa::best())).0
}

fn load_with(
    tiny: &Tiny,
    layers: Range<u32>,
    (embed, head): (bool, bool),
    cache: &Path,
    (threads, isa): (usize, Isa),
) -> (LoadedStage, Vec<u32>) {
    let (mut spec, sources) = tiny.stage(layers, embed, head, threads, isa);
    spec.packed_cache = Some(cache.to_owned());
    let mut engine = CpuEngine::new();
    let mut last = 0;
    let loaded = engine.load(&spec, &sources, &mut |done| {
        assert!(done >= last, "progress goes on");
        last = done;
    });
    let loaded = loaded.unwrap();
    assert!(last > 0);
    let mut bits = Vec::new();
    if embed && head {
        let rows = vec![row(1, 0, 5, Want::Sample)];
        let meta = StepMeta { rows, tables: tables(1, 5, 16, 0), ..StepMeta::default() };
        let mut sink = |l: millrace_engine::LogitsRow<'_>| {
            bits.extend(l.logits.iter().map(|x| x.to_bits()));
        };
        engine
            .step(&meta, StageInput::Tokens(&[1, 5, 9, 2, 7]), StageOutput::Logits(&mut sink))
            .unwrap();
    }
    (loaded, bits)
}

fn files(cache: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// What a loaded stage uses is not removed, whatever the limit; what no stage uses is.
#[test]
fn a_stage_keeps_its_files() {
    let (tiny, dir) = (hashed(), tempfile::tempdir().unwrap());
    let packed = dir.path().join("packed");
    load(&tiny, 0..4, (true, true), &packed);
    let all = files(&packed);
    let (mut spec, sources) = tiny.stage(1..3, false, false, 2, Isa::best());
    spec.packed_cache = Some(packed.clone());
    let mut engine = CpuEngine::new();
    engine.load(&spec, &sources, &mut |_| ()).unwrap();
    let nothing = Rule { limit: Some(0), ..Rule::default() };
    let cache = Cache::new(dir.path());
    assert_eq!(cache.prune(&nothing, false).len(), all.len() - 2);
    let kept = files(&packed);
    assert_eq!(kept.len(), 2);
    assert!(kept.iter().all(|file| all.contains(file)));
    drop(engine);
    assert_eq!(cache.prune(&nothing, false).len(), 2);
    assert!(files(&packed).is_empty());
}

#[test]
fn a_second_load_packs_nothing_and_gives_the_same_bits() {
    let (tiny, dir) = (hashed(), tempfile::tempdir().unwrap());
    let cache = dir.path().join("packed");
    let once = (2, Isa::best());
    let (first, expected) = load_with(&tiny, 0..4, (true, true), &cache, once);
    assert_eq!(first.packing.cached_bytes, 0);
    assert_eq!(first.packing.packed_bytes, first.weight_bytes);
    for threads in [1, 3] {
        let (second, got) = load_with(&tiny, 0..4, (true, true), &cache, (threads, Isa::best()));
        assert!(got == expected);
        assert_eq!(second.weight_bytes, first.weight_bytes);
        assert!(second.packing.packed_bytes < 2048, "only the last norm: {:?}", second.packing);
        assert_eq!(second.packing.cached_bytes + second.packing.packed_bytes, first.weight_bytes);
        assert!(second.packing.saved_seconds > 0.0);
    }
}

#[test]
fn another_cut_finds_its_layers() {
    let (tiny, dir) = (hashed(), tempfile::tempdir().unwrap());
    let cache = dir.path();
    load(&tiny, 0..3, (true, false), cache);
    assert_eq!(files(cache).len(), 4);
    let second = load(&tiny, 1..4, (false, true), cache).packing;
    assert!(second.cached_bytes > 0 && second.packed_bytes > 0, "{second:?}");
    let third = load(&tiny, 0..2, (true, false), cache).packing;
    assert_eq!(third.packed_bytes, 0, "{third:?}");
    let fourth = load(&tiny, 2..4, (false, false), cache).packing;
    assert_eq!(fourth.packed_bytes, 0, "{fourth:?}");
}

#[test]
fn groups_of_other_rows_are_other_files() {
    if Isa::best() < Isa::Avx512 {
        return; // There is one number of rows per group.
    }
    let (tiny, dir) = (hashed(), tempfile::tempdir().unwrap());
    let whole = |isa| load_with(&tiny, 0..4, (true, true), dir.path(), (1, isa));
    let (_, expected) = whole(Isa::Avx512);
    for isa in [Isa::Avx2, Isa::Scalar, Isa::Avx512] {
        let (loaded, got) = whole(isa);
        assert!(got == expected, "{isa}");
        assert_eq!(loaded.packing.cached_bytes == 0, isa == Isa::Avx2, "{isa}");
    }
}

#[test]
fn damaged_files_are_packed_again() {
    let (tiny, dir) = (hashed(), tempfile::tempdir().unwrap());
    let whole = || load_with(&tiny, 0..4, (true, true), dir.path(), (2, Isa::best()));
    let (first, expected) = whole();
    let all = files(dir.path());
    let damage: [fn(&Path); 3] = [
        // Torn: the first half only.
        |path| {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            let len = file.metadata().unwrap().len();
            file.set_len(len / 2).unwrap();
        },
        // Another bit, deep in the content.
        |path| {
            let mut bytes = std::fs::read(path).unwrap();
            let at = bytes.len() - 100;
            bytes[at] ^= 4;
            std::fs::write(path, bytes).unwrap();
        },
        |path| std::fs::write(path, b"something else").unwrap(),
    ];
    for (i, damage) in damage.iter().enumerate() {
        damage(&all[i]);
        let (loaded, got) = whole();
        assert!(got == expected, "damage {i}");
        let packing = loaded.packing;
        assert!(packing.packed_bytes > 2048 && packing.cached_bytes > 0, "{i}: {packing:?}");
        let (after, got) = whole();
        assert!(got == expected);
        assert!(after.packing.packed_bytes < 2048, "{i}: the file was replaced");
    }
    assert_eq!(files(dir.path()), all);
    assert_eq!(first.packing.cached_bytes, 0);
}

#[test]
fn a_cache_that_cannot_be_written_harms_nobody() {
    let (tiny, dir) = (hashed(), tempfile::tempdir().unwrap());
    let file = dir.path().join("file");
    std::fs::write(&file, b"no folder").unwrap();
    let packing = load(&tiny, 0..4, (true, true), &file.join("packed")).packing;
    assert!(packing.packed_bytes > 0 && packing.cached_bytes == 0);
}

#[test]
fn unknown_content_is_not_kept() {
    let (tiny, dir) = (Tiny::new(TensorType::Q4_0, TensorType::Q8_0), tempfile::tempdir().unwrap());
    load(&tiny, 0..4, (true, true), dir.path());
    assert!(files(dir.path()).is_empty());
}
