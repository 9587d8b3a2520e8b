//! Every kernel of the CPU engine, through the seam that products use, on the shapes of a small model
//! (K-quants: the nearest that they fit). Beside each speed stands the share of its limit: reading at
//! the bandwidth of where its data lies, or multiplying at the peak of the instruction set, whichever
//! takes longer; both measured in the same run.
//!
//! Weights and KV are cycled through as a decode does, in sets that no cache holds. Quantising of
//! activations is a part of what produces them: `rms_norm`, `gated`, `attention`. `MILLRACE_THREADS`
//! and `MILLRACE_CPU_PATH` choose threads (1) and instruction set (the best).

mod context;
mod products;

use std::io::Write;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use millrace_engine::Isa;
use millrace_engine::cpu::CpuBackend;
use millrace_engine::cpu::limits::{Peak, peak, read_bandwidth, uncached_bytes};
use millrace_engine::model::{Backend, LoadedPart, Part, Source};
use millrace_shared::model::{TensorEntry, TensorType};

type Tensor = <CpuBackend as Backend>::Tensor;

const L2_BYTES: usize = 512 << 10;
const L3_BYTES: usize = 8 << 20;

/// What a call costs at least.
struct Work {
    int8_macs: usize,
    float_macs: usize,
    bytes: usize,
    /// Bytes that are cycled through: where they lie follows from it.
    set: usize,
}

/// What this machine can do.
struct Limits {
    threads: usize,
    isa: Isa,
    l2: f64,
    l3: f64,
    memory: f64,
    peak: Option<Peak>,
}

impl Limits {
    fn measure(isa: Isa, threads: usize) -> Self {
        let read = |bytes| read_bandwidth(threads, bytes).expect("memory for a measurement");
        let times =
            |p: Peak| Peak { int8: p.int8 * threads as f64, float: p.float * threads as f64 };
        let peak = peak(isa).map(times);
        let (l2, l3, memory) = (read(L2_BYTES), read(L3_BYTES / threads), read(uncached_bytes()));
        Self { threads, isa, l2, l3, memory, peak }
    }

    /// Least seconds of a call, and the name of the limit.
    fn bound(&self, work: &Work) -> (f64, &'static str) {
        let (rate, name) = match work.set {
            bytes if bytes <= L2_BYTES => (self.l2, "L2"),
            bytes if bytes <= L3_BYTES => (self.l3, "L3"),
            _ => (self.memory, "memory"),
        };
        let reading = work.bytes as f64 / rate;
        let multiplying = self
            .peak
            .map_or(0.0, |p| work.int8_macs as f64 / p.int8 + work.float_macs as f64 / p.float);
        if multiplying > reading { (multiplying, "peak") } else { (reading, name) }
    }
}

/// Everything measured so far.
struct Bench {
    limits: Limits,
    lines: Vec<String>,
}

impl Bench {
    /// Measures a call of `op` on what `make` makes, out of what is in the slot; it is called only if
    /// this bench is asked for.
    fn measure<S>(
        &mut self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        (kernel, name): (&str, &str),
        work: &Work,
        slot: &mut Option<S>,
        mut make: impl FnMut(Option<S>) -> S,
        op: impl Fn(&mut S),
    ) {
        let macs = work.int8_macs + work.float_macs;
        group.throughput(if macs > 0 {
            Throughput::Elements(macs as u64)
        } else {
            Throughput::Bytes(work.bytes as u64)
        });
        let mut samples: Vec<Duration> = Vec::new();
        group.bench_function(name, |b| {
            let made = make(slot.take());
            let state = slot.insert(made);
            b.iter_custom(|turns| {
                let start = Instant::now();
                (0..turns).for_each(|_| op(state));
                let took = start.elapsed();
                samples.push(took.div_f64(turns as f64));
                took
            });
        });
        samples.sort();
        // None where the command line asks for other benches.
        let Some(median) = samples.get(samples.len() / 2) else { return };
        let seconds = median.as_secs_f64();
        let (bound, limit) = self.limits.bound(work);
        self.lines.push(format!(
            "{kernel:<10} {name:<24} {:>10.2} us {:>8.1} GMAC/s {:>7.1} GB/s {:>6.1} % of {limit}",
            seconds * 1e6,
            macs as f64 / seconds / 1e9,
            work.bytes as f64 / seconds / 1e9,
            bound / seconds * 100.0
        ));
    }
}

fn new_backend(isa: Isa, threads: usize) -> CpuBackend {
    let mut backend = CpuBackend::new(isa, threads, threads);
    backend.begin_step();
    backend
}

fn entry(name: &str, dtype: TensorType, dims: &[usize]) -> Source {
    let dims: Vec<u64> = dims.iter().map(|&d| d as u64).collect();
    let bytes = dtype.bytes_of(dims.iter().product()).expect("whole blocks");
    Source::Synthetic(TensorEntry {
        name: name.to_owned(),
        dtype,
        dims,
        file: 0,
        offset: 0,
        bytes,
        hash: [0; 32],
    })
}

/// `rows x width` values of ordinary size.
fn values(rows: usize, width: usize) -> Vec<f32> {
    (0..rows * width).map(|i| ((i * 37) % 101) as f32 / 101.0 - 0.5).collect()
}

fn vector(backend: &mut CpuBackend, width: usize) -> <CpuBackend as Backend>::Vector {
    let source = entry("gain", TensorType::F32, &[width]);
    let loaded = backend.weights(&[vec![Part::Vector(&source, 0.0)]], &mut |_| {}).expect("memory");
    let Some(LoadedPart::Vector(vector)) = loaded.into_iter().next() else {
        unreachable!("a vector was asked for")
    };
    vector
}

fn tensor(backend: &mut CpuBackend, rows: usize, width: usize, input: bool) -> Tensor {
    let mut tensor = backend.tensor(rows, width, input).expect("memory");
    backend.upload(&values(rows, width), &mut tensor);
    tensor
}

/// Row-wise operations, with the quantising of what they write.
fn rows(c: &mut Criterion, bench: &mut Bench) {
    let (isa, threads) = (bench.limits.isa, bench.limits.threads);
    let mut group = c.benchmark_group("rows");
    for columns in [1, 64] {
        let name = format!("x{columns}");
        let make = |_| {
            let mut b = new_backend(isa, threads);
            let x = tensor(&mut b, columns, 576, false);
            let (gain, out) = (vector(&mut b, 576), tensor(&mut b, columns, 576, true));
            (b, x, gain, out)
        };
        let bytes = columns * 576 * (4 + 4 + 1);
        let work = Work { int8_macs: 0, float_macs: 0, bytes, set: bytes };
        bench.measure(
            &mut group,
            ("rms_norm", &format!("norm {name}")),
            &work,
            &mut None,
            make,
            |(b, x, gain, out)| {
                b.rms_norm(x, gain, 1e-5, out);
            },
        );
    }
    group.finish();
}

fn main() {
    let threads = std::env::var("MILLRACE_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let isa = Isa::detect().expect("an instruction set that this machine has");
    let limits = Limits::measure(isa, threads);
    let peak = limits.peak.map_or_else(
        || "unknown".to_owned(),
        |p| format!("{:.0} GMAC/s of bytes, {:.0} of f32", p.int8 / 1e9, p.float / 1e9),
    );
    let head = format!(
        "{threads} thread(s), {isa}; limits: L2 {:.1}, L3 {:.1}, memory {:.1} GB/s; products {peak}",
        limits.l2 / 1e9,
        limits.l3 / 1e9,
        limits.memory / 1e9
    );
    let mut bench = Bench { limits, lines: Vec::new() };
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(30))
        .measurement_time(Duration::from_millis(150))
        .configure_from_args();
    rows(&mut criterion, &mut bench);
    context::attention(&mut criterion, &mut bench);
    products::products(&mut criterion, &mut bench);
    products::zeros(&mut criterion, &mut bench);
    criterion.final_summary();
    let mut out = std::io::stdout().lock();
    // A reader that has left is no failure.
    let _ = writeln!(out, "\n{head}\n\n{}", bench.lines.join("\n"));
}
