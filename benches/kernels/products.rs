//! Matrix products, of every type that is computed with.

use std::path::Path;

use criterion::Criterion;
use millrace_engine::TensorSource;
use millrace_engine::cpu::limits::uncached_bytes;
use millrace_engine::cpu::{CpuBackend, ZERO_TILE};
use millrace_engine::model::{Backend, LoadedPart, Part, Source};
use millrace_shared::model::{Activation, Places, SparseForm, TensorEntry, TensorType};

use crate::{Bench, Tensor, Work, entry, new_backend, tensor, vector};

type Weight = <CpuBackend as Backend>::Weight;

const COLUMNS: [usize; 4] = [1, 4, 16, 64];
/// Of matrices with zeros: an answer, many at once, a prompt.
const ZEROS_COLUMNS: [usize; 3] = [1, 16, MOST_COLUMNS];
const MOST_COLUMNS: usize = 128;
/// The head is applied to as many positions at a time.
const HEAD_ROWS: usize = 16;

/// A product: inputs, and the outputs of the matrices that share them.
struct Shape {
    name: &'static str,
    inputs: usize,
    outputs: &'static [usize],
}

const fn shape(name: &'static str, inputs: usize, outputs: &'static [usize]) -> Shape {
    Shape { name, inputs, outputs }
}

const SHAPES: [Shape; 4] = [
    shape("qkv", 576, &[576, 192, 192]),
    shape("gate_up", 576, &[1536, 1536]),
    shape("down", 1536, &[576]),
    shape("head", 576, &[49152]),
];
const K_SHAPES: [Shape; 3] = [
    shape("gate_up", 512, &[1536, 1536]),
    shape("down", 2048, &[512]),
    shape("head", 512, &[49152]),
];
const TYPES: [TensorType; 8] = [
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q8_0,
    TensorType::Q4_K,
    TensorType::Q6_K,
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
];

/// Types, and parts of tiles that are zeros, of which the engine passes over those from the second on.
const ZEROS: ([TensorType; 3], [f64; 6]) =
    ([TensorType::F16, TensorType::Q8_0, TensorType::Q4_0], [0.0, 0.125, 0.25, 0.5, 0.75, 0.9]);
/// Inputs and outputs of those matrices.
const ZEROS_SIZE: usize = 2048;

/// Weights of one shape, and what they are applied to.
struct Product {
    backend: CpuBackend,
    weights: Vec<Weight>,
    x: Tensor,
    out: Tensor,
    /// Of the gated product.
    act: Tensor,
    next: usize,
}

/// Which operation.
#[derive(Clone, Copy)]
enum What {
    Linear,
    Gated,
    Head { columns: usize },
}

impl Product {
    fn new(mut backend: CpuBackend, sources: &[Source], copies: usize) -> Self {
        let piece = vec![Part::Matrices(sources.iter().collect()); copies];
        let loaded = backend.weights(&[piece], &mut |_| {}).expect("memory");
        let weight = |part| match part {
            LoadedPart::Matrices(weight) => Some(weight),
            LoadedPart::Vector(_) => None,
        };
        let weights = loaded.into_iter().filter_map(weight).collect();
        let (inputs, outputs) =
            (sources[0].entry().dims[0], sources.iter().map(|s| s.entry().dims[1]).sum::<u64>());
        let x = backend.tensor(MOST_COLUMNS, inputs as usize, true).expect("memory");
        let out = backend.tensor(MOST_COLUMNS, outputs as usize, false).expect("memory");
        let act = backend.tensor(MOST_COLUMNS, outputs as usize / 2, true).expect("memory");
        Self { backend, weights, x, out, act, next: 0 }
    }

    /// Makes the input as the model does: by a norm.
    fn set_columns(&mut self, columns: usize, width: usize) {
        let x = tensor(&mut self.backend, columns, width, false);
        let gain = vector(&mut self.backend, width);
        self.backend.rms_norm(&x, &gain, 1e-5, &mut self.x);
    }

    fn turn(&mut self, what: What) {
        self.next = (self.next + 1) % self.weights.len();
        let weight = &self.weights[self.next];
        match what {
            What::Linear => self.backend.linear(&self.x, weight, &mut self.out),
            What::Gated => self.backend.gated(&self.x, weight, Activation::Silu, &mut self.act),
            What::Head { columns } => {
                let logits = self.backend.logits(&self.x, 0..columns, weight, 0.0, &mut self.out);
                std::hint::black_box(logits.first());
            }
        }
    }
}

pub(crate) fn products(c: &mut Criterion, bench: &mut Bench) {
    let (isa, threads) = (bench.limits.isa, bench.limits.threads);
    for dtype in TYPES {
        let kernel = dtype.as_str();
        let mut group = c.benchmark_group(kernel);
        let shapes = if dtype.block_elements() == 256 { &K_SHAPES[..] } else { &SHAPES[..] };
        for shape in shapes {
            let matrix = |&rows: &usize| entry(shape.name, dtype, &[shape.inputs, rows]);
            let sources: Vec<Source> = shape.outputs.iter().map(matrix).collect();
            let bytes: usize = sources.iter().map(|s| s.entry().bytes as usize).sum();
            let copies = uncached_bytes().div_ceil(bytes).max(2);
            let elements: usize = shape.outputs.iter().map(|rows| rows * shape.inputs).sum();
            let head = shape.name == "head";
            let mut loaded: Option<Product> = None;
            for columns in COLUMNS.into_iter().filter(|&n| !head || n <= HEAD_ROWS) {
                let macs = elements * columns;
                let float = dtype.is_float();
                let (int8_macs, float_macs) = if float { (0, macs) } else { (macs, 0) };
                let work = Work { int8_macs, float_macs, bytes, set: bytes * copies };
                let name = format!("{} x{columns}", shape.name);
                let make = |loaded: Option<Product>| {
                    let new = || Product::new(new_backend(isa, threads), &sources, copies);
                    let mut product = loaded.unwrap_or_else(new);
                    product.set_columns(columns, shape.inputs);
                    product
                };
                let what = match shape.name {
                    "gate_up" => What::Gated,
                    "head" => What::Head { columns },
                    _ => What::Linear,
                };
                bench.measure(&mut group, (kernel, &name), &work, &mut loaded, make, |p| {
                    p.turn(what);
                });
            }
        }
        group.finish();
    }
}

/// A matrix in a file, of which tiles of 16 rows and 32 inputs are zeros, in no pattern: with these, and
/// without.
fn with_zeros(dtype: TensorType, part: f64, path: &Path) -> [(&'static str, Source); 2] {
    let Source::Synthetic(entry) = entry("zeros", dtype, &[ZEROS_SIZE, ZEROS_SIZE]) else {
        unreachable!("entries of benches are made up")
    };
    let mut bytes = vec![0; entry.bytes as usize];
    let made_up = Source::Synthetic(entry.clone());
    made_up.open().and_then(|mut r| r.read(0, &mut bytes)).expect("made up");
    let [rows, inputs] = ZERO_TILE;
    let (row, tile) = (bytes.len() / ZEROS_SIZE, bytes.len() / ZEROS_SIZE / (ZEROS_SIZE / inputs));
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for group in (0..ZEROS_SIZE).step_by(rows) {
        for at in (0..row).step_by(tile) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if (state >> 11) as f64 / ((1u64 << 53) as f64) < part {
                (group..group + rows).for_each(|i| bytes[i * row + at..][..tile].fill(0));
            }
        }
    }
    let size = ZEROS_SIZE as u64;
    // Of these types whatever is zero is nothing but zeros.
    let zero = |line: &[u8]| line.iter().all(|byte| *byte == 0);
    let places = Places::find(SparseForm::Tiles, dtype, [size, size], &bytes, zero);
    let places = places.expect("whole tiles");
    let data = places.encode(&bytes).expect("few tiles");
    let mut file = bytes;
    let mut tensors = vec![TensorSource { entry: entry.clone(), path: path.to_owned(), offset: 0 }];
    let names = ["weight", SparseForm::Tiles.parts()[0], SparseForm::Tiles.parts()[1]];
    for ((name, (dtype, dims)), data) in names.into_iter().zip(places.shapes()).zip(data) {
        let (offset, bytes) = (file.len() as u64, data.len() as u64);
        // What is kept has the shape that it has with its zeros.
        let dims = if name == "weight" { vec![size, size] } else { dims };
        let name = format!("blk.0.tiles.{name}");
        let entry = TensorEntry { name, dtype, dims, offset, bytes, ..entry.clone() };
        tensors.push(TensorSource { entry, path: path.to_owned(), offset });
        file.extend(data);
    }
    std::fs::write(path, file).expect("a file for a measurement");
    let mut sources = Source::of_tensors(&tensors).expect("all parts").into_iter();
    ["zeros", "tiles"].map(|name| (name, sources.next().expect("both")))
}

/// Products with matrices that have tiles of zeros, or that are kept without, in bytes of all of the matrix: more than its share
/// of memory's limit is what passing over them brings.
pub(crate) fn zeros(c: &mut Criterion, bench: &mut Bench) {
    let (isa, threads) = (bench.limits.isa, bench.limits.threads);
    let folder = tempfile::tempdir().expect("a folder for a measurement");
    for dtype in ZEROS.0 {
        let mut group = c.benchmark_group(format!("{} with zeros", dtype.as_str()));
        for part in ZEROS.1 {
            for (how, source) in with_zeros(dtype, part, &folder.path().join("matrix")) {
                let all = dtype.bytes_of((ZEROS_SIZE * ZEROS_SIZE) as u64).unwrap_or(0) as usize;
                let bytes = source.entry().bytes as usize;
                let copies = uncached_bytes().div_ceil(bytes).max(2);
                let mut loaded: Option<Product> = None;
                for columns in ZEROS_COLUMNS {
                    let macs = ZEROS_SIZE * ZEROS_SIZE * columns;
                    let (int8_macs, float_macs) =
                        if dtype == TensorType::F16 { (0, macs) } else { (macs, 0) };
                    let work = Work { int8_macs, float_macs, bytes: all, set: bytes * copies };
                    let name = format!("{how} {:.1} % x{columns}", part * 100.0);
                    let make = |loaded: Option<Product>| {
                        let sources = std::slice::from_ref(&source);
                        let new = || Product::new(new_backend(isa, threads), sources, copies);
                        let mut product = loaded.unwrap_or_else(new);
                        product.set_columns(columns, ZEROS_SIZE);
                        product
                    };
                    let name = (dtype.as_str(), &*name);
                    bench.measure(&mut group, name, &work, &mut loaded, make, |p| {
                        p.turn(What::Linear);
                    });
                }
            }
        }
        group.finish();
    }
}
