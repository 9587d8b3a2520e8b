//! Matrices that files keep without their zeros read, and compute, as with them.

#![allow(clippy::unwrap_used)]

#[path = "cpu_engine/tiny.rs"]
mod tiny;

use std::io::Write;
use std::path::Path;

use millrace_engine::cpu::{CpuEngine, dequantise_row};
use millrace_engine::model::Source;
use millrace_engine::{Engine, Isa, LoadedStage, TensorSource};
use millrace_shared::model::{Places, SparseForm, TensorEntry, TensorType};
use millrace_shared::wire::data::{StepMeta, Want};
use tiny::{Pipeline, Tiny, row, tables};

const TOKENS: [u32; 9] = [1, 5, 9, 2, 7, 80, 3, 3, 41];

/// A model in memory.
struct Model {
    tiny: Tiny,
    tensors: Vec<(TensorEntry, Vec<u8>)>,
}

impl Model {
    /// A random one; of the matrices of its layers, `keep` says which values of a row, 32 or a block
    /// together, are not zero.
    fn new(dtype: TensorType, keep: impl Fn(usize, usize) -> bool) -> Self {
        let tiny = Tiny::new(dtype, TensorType::Q8_0);
        let (_, sources) = tiny.stage(0..4, true, true, 1, Isa::Scalar);
        let read = |source: &TensorSource| {
            let file = std::fs::read(&source.path).unwrap();
            let entry = source.entry.clone();
            let bytes = &file[source.offset as usize..][..entry.bytes as usize];
            let mut bytes = bytes.to_vec();
            if entry.name.starts_with("blk.") && entry.dims.len() == 2 {
                let row_bytes = dtype.bytes_of(entry.dims[0]).unwrap() as usize;
                let unit = dtype.block_bytes() as usize;
                for (i, row) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                    let units = row.chunks_exact_mut(unit).enumerate();
                    units.filter(|(j, _)| !keep(i, *j)).for_each(|(_, unit)| unit.fill(0));
                }
            }
            (entry, bytes)
        };
        let tensors = sources.iter().map(read).collect();
        Self { tiny, tensors }
    }

    /// Written to a file, matrices of layers in that form where it has something for them.
    fn write(&self, form: Option<SparseForm>, folder: &Path) -> Vec<TensorSource> {
        let path = folder.join(form.map_or("dense", SparseForm::as_str));
        let mut file = std::fs::File::create(&path).unwrap();
        let (mut sources, mut offset) = (Vec::new(), 0);
        let mut add = |entry: TensorEntry, data: &[u8]| {
            file.write_all(data).unwrap();
            let bytes = data.len() as u64;
            let entry = TensorEntry { offset, bytes, ..entry };
            sources.push(TensorSource { entry, path: path.clone(), offset });
            offset += bytes;
        };
        for (entry, bytes) in &self.tensors {
            let matrix = entry.name.starts_with("blk.") && entry.dims.len() == 2;
            let Some(places) = form.filter(|_| matrix).map(|form| places(form, entry, bytes))
            else {
                add(entry.clone(), bytes);
                continue;
            };
            let stem = entry.name.strip_suffix("weight").unwrap();
            let [_, index, starts] = places.shapes();
            let data = places.encode(bytes).unwrap();
            assert_eq!(places.bytes(), data.iter().map(|d| d.len() as u64).sum::<u64>());
            add(entry.clone(), &data[0]);
            let parts = form.unwrap().parts().into_iter().zip([index, starts]);
            for ((part, (dtype, dims)), data) in parts.zip(&data[1..]) {
                add(
                    TensorEntry { name: format!("{stem}{part}"), dtype, dims, ..entry.clone() },
                    data,
                );
            }
        }
        sources
    }

    fn logits(&self, sources: &[TensorSource], ends: &[u32], isa: Isa) -> Vec<Vec<u32>> {
        let mut first = 0;
        let stages = ends.iter().map(|&end| {
            let (embed, head) = (first == 0, end == 4);
            let (spec, _) = self.tiny.stage(first..end, embed, head, 2, isa);
            first = end;
            let mut engine = CpuEngine::new();
            engine.load(&spec, sources, &mut |_| {}).unwrap();
            Box::new(engine) as Box<dyn Engine>
        });
        let mut pipeline = Pipeline::of(stages.collect(), self.tiny.config.hidden as usize, 16);
        let mut all = Vec::new();
        for (start, some) in [(0, &TOKENS[..8]), (8, &TOKENS[8..])] {
            let meta = StepMeta {
                rows: vec![row(1, start, some.len(), Want::Score { top_k: 1 })],
                tables: if start == 0 { tables(1, TOKENS.len(), 16, 0) } else { Vec::new() },
                ..StepMeta::default()
            };
            let found = pipeline.step(&meta, some).unwrap();
            all.extend(found.into_iter().map(|(_, _, logits)| logits));
        }
        all
    }

    fn load(&self, sources: &[TensorSource], cache: Option<&Path>) -> LoadedStage {
        let (mut spec, _) = self.tiny.stage(0..4, true, true, 2, Isa::best());
        spec.packed_cache = cache.map(Path::to_owned);
        CpuEngine::new().load(&spec, sources, &mut |_| {}).unwrap()
    }
}

fn places(form: SparseForm, entry: &TensorEntry, bytes: &[u8]) -> Places {
    let dtype = entry.dtype;
    let zero = |line: &[u8]| {
        let n = line.len() as u64 / dtype.block_bytes() * dtype.block_elements();
        let mut values = vec![1f32; n as usize];
        assert!(dequantise_row(dtype, line, &mut values));
        values.iter().all(|x| *x == 0.0)
    };
    Places::find(form, dtype, [entry.dims[0], entry.dims[1]], bytes, zero).unwrap()
}

/// Single weights (or blocks) that are zero in no order.
fn scattered(row: usize, unit: usize) -> bool {
    (row * 31 + unit * 17) % 5 < 2
}

/// Tiles of 16 rows that are zero, a whole row of them among them.
fn tiled(units: usize) -> impl Fn(usize, usize) -> bool {
    move |row, unit| row / 16 != 1 && (row / 16 * 7 + unit / units * 5).is_multiple_of(3)
}

#[test]
fn logits_are_the_same_bits_in_every_form_at_one_stage_and_at_three() {
    use TensorType::{BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0};
    let home = tempfile::tempdir().unwrap();
    let mut tried = 0;
    for dtype in [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K] {
        let single = dtype.block_elements() == 1;
        let units = if single { 32 } else { 1 };
        let models = [Model::new(dtype, scattered), Model::new(dtype, tiled(units))];
        for model in &models[usize::from(!single)..] {
            let dense = model.write(None, home.path());
            let expected = model.logits(&dense, &[4], Isa::best());
            assert_eq!(expected.len(), TOKENS.len());
            for form in SparseForm::ALL.into_iter().filter(|f| single || *f == SparseForm::Tiles) {
                let sparse = model.write(Some(form), home.path());
                for (ends, isa) in
                    [(&[4][..], Isa::Avx512), (&[1, 2, 4], Isa::Avx2), (&[1, 2, 4], Isa::Scalar)]
                {
                    // What this machine does not run is another's to try.
                    let found = model.logits(&sparse, ends, isa.min(Isa::best()));
                    let (dtype, form) = (dtype.as_str(), form.as_str());
                    assert!(found == expected, "{dtype} as {form} at {ends:?}, {isa}");
                    tried += 1;
                }
            }
        }
    }
    assert_eq!(tried, 3 * (3 * 2 * 3 + 5));
}

#[test]
fn every_row_reads_as_with_its_zeros() {
    let home = tempfile::tempdir().unwrap();
    for (dtype, model) in [
        (TensorType::F16, Model::new(TensorType::F16, scattered)),
        (TensorType::F32, Model::new(TensorType::F32, |_, _| false)),
        (TensorType::Q4_0, Model::new(TensorType::Q4_0, tiled(1))),
    ] {
        let forms = SparseForm::ALL.into_iter();
        for form in forms.filter(|f| dtype.block_elements() == 1 || *f == SparseForm::Tiles) {
            let sources = Source::of_tensors(&model.write(Some(form), home.path())).unwrap();
            assert_eq!(sources.len(), model.tensors.len());
            for (source, (entry, bytes)) in sources.iter().zip(&model.tensors) {
                assert_eq!(source.entry().dims, entry.dims);
                if entry.dims.len() < 2 || !entry.name.starts_with("blk.") {
                    continue;
                }
                assert_eq!(source.tensors().unwrap().len(), 3);
                let row_bytes = dtype.bytes_of(entry.dims[0]).unwrap() as usize;
                for rows in [1, 5, 24, entry.dims[1] as usize] {
                    let mut found = Vec::new();
                    for (i, some) in bytes.chunks(rows * row_bytes).enumerate() {
                        let mut part = vec![9; some.len()];
                        let offset = (i * rows * row_bytes) as u64;
                        source.open().unwrap().read(offset, &mut part).unwrap();
                        found.extend(part);
                    }
                    assert!(found == *bytes, "{} as {} by {rows}", entry.name, form.as_str());
                }
            }
        }
    }
}

#[test]
fn only_tiles_that_are_kept_are_in_memory_and_in_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let mut model = Model::new(TensorType::Q8_0, tiled(1));
    for (i, (entry, _)) in model.tensors.iter_mut().enumerate() {
        entry.hash = [i as u8 + 1; 32];
    }
    let layers = |sources: &[TensorSource]| -> u64 {
        let of_layer = |s: &&TensorSource| s.entry.name.starts_with("blk.") && !s.entry.is_part();
        sources.iter().filter(of_layer).map(|s| s.entry.bytes).sum()
    };
    let (dense, tiles) =
        (model.write(None, home.path()), model.write(Some(SparseForm::Tiles), home.path()));
    let part = layers(&tiles) as f64 / layers(&dense) as f64;
    assert!(part < 0.4, "{part}");
    let cache = home.path().join("packed");
    let before = model.load(&dense, None);
    let loaded = model.load(&tiles, Some(&cache));
    // What is left is the tiles, and what is no matrix of a layer.
    let saved = before.weight_bytes - loaded.weight_bytes;
    assert!(saved as f64 > 0.9 * (1.0 - part) * layers(&dense) as f64, "{saved}");
    assert_eq!(loaded.packing.cached_bytes, 0);
    // The saver is done when the engine is dropped.
    let again = model.load(&tiles, Some(&cache));
    assert_eq!(again.weight_bytes, loaded.weight_bytes);
    // The last norm has no file.
    assert_eq!(again.packing.packed_bytes, 4 * 64, "all matrices were kept");
    let expected = model.logits(&dense, &[4], Isa::best());
    let (mut spec, _) = model.tiny.stage(0..4, true, true, 2, Isa::best());
    spec.packed_cache = Some(cache);
    let mut engine = CpuEngine::new();
    engine.load(&spec, &tiles, &mut |_| {}).unwrap();
    let mut pipeline = Pipeline::of(vec![Box::new(engine)], 64, 16);
    let rows = vec![row(1, 0, 8, Want::Score { top_k: 1 })];
    let meta = StepMeta { rows, tables: tables(1, 9, 16, 0), ..StepMeta::default() };
    let found = pipeline.step(&meta, &TOKENS[..8]).unwrap();
    let found: Vec<_> = found.into_iter().map(|(_, _, logits)| logits).collect();
    assert!(found == expected[..8], "from the cache");
}

/// Who sends places that cannot be gets an error that names the tensor.
#[test]
fn places_that_cannot_be_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let model = Model::new(TensorType::F16, scattered);
    let name = "blk.0.ffn_up.weight";
    for form in SparseForm::ALL {
        let sources = model.write(Some(form), home.path());
        let path = home.path().join(form.as_str());
        let good = std::fs::read(&path).unwrap();
        let part = |part: &str| {
            let full = format!("blk.0.ffn_up.{part}");
            sources.iter().find(|s| s.entry.name == full).unwrap()
        };
        let [index, starts] = form.parts().map(part);
        let cases: [(&TensorSource, u64, &[u8]); 5] = [
            // Rows that go back, or begin later, or end beyond all.
            (starts, 4, &[0xff, 0xff, 0xff, 0x7f]),
            (starts, 0, &[1, 0, 0, 0]),
            (starts, starts.entry.bytes - 4, &[0xff, 0xff, 0xff, 0x7f]),
            // A column beyond the width, or twice; too many bits, or too few.
            (index, 0, &[0xff, 0x7f]),
            (index, 0, &[0, 0, 0, 0]),
        ];
        for (i, (source, at, bytes)) in cases.into_iter().enumerate() {
            let mut bad = good.clone();
            let at = (source.offset + at) as usize;
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            std::fs::write(&path, bad).unwrap();
            let all = Source::of_tensors(&sources).unwrap();
            let one = all.iter().find(|s| s.entry().name == name).unwrap();
            let mut out = vec![0; (one.entry().dims[0] * one.entry().dims[1] * 2) as usize];
            let message = one.open().unwrap().read(0, &mut out).unwrap_err().to_string();
            assert!(message.contains("blk.0.ffn_up"), "{} {i}: {message}", form.as_str());
            if form == SparseForm::Tiles && i < 4 {
                one.tiles().unwrap_err();
            }
        }
        std::fs::write(&path, good).unwrap();
        // A part that is missing, one that is too short, and a matrix that is read by columns.
        let missing: Vec<TensorSource> =
            sources.iter().filter(|s| s.entry.name != starts.entry.name).cloned().collect();
        let message = Source::of_tensors(&missing).unwrap_err().to_string();
        assert!(message.contains(&starts.entry.name), "{message}");
        let mut short = sources.clone();
        let at = short.iter().position(|s| s.entry.name == index.entry.name).unwrap();
        short[at].entry.bytes = 2;
        let all = Source::of_tensors(&short).unwrap();
        let one = all.iter().find(|s| s.entry().name == name).unwrap();
        let mut out = vec![0; (one.entry().dims[0] * one.entry().dims[1] * 2) as usize];
        let message = one.open().unwrap().read(0, &mut out).unwrap_err().to_string();
        assert!(message.contains("too small"), "{message}");
        let message = one.open().unwrap().read_columns((0, 96), 64, &mut out[..256]).unwrap_err();
        assert!(message.to_string().contains("by columns"), "{message}");
    }
}
