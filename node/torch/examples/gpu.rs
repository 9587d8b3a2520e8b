//! What a device does: `gpu check DEVICE` says whether it is there; `gpu parity DEVICE` compares every
//! family, kept as every type, with f32 on the processor; `gpu bench DEVICE SHAPE…` measures models of
//! random weights beside what the device's memory and arithmetic could do at best, measured in the same
//! run. `benches/gpu.sh` carries and runs it.
//!
//! Shapes: `tiny`, `135m`, `8b`. Run in the repository's root: fixtures are read from there.

#![allow(clippy::print_stdout, clippy::unwrap_used, dead_code)]

#[path = "../../engine/tests/families/case.rs"]
mod case;
#[path = "gpu/model.rs"]
mod model;
#[path = "../../engine/tests/formats/rig.rs"]
mod rig;
#[path = "../../engine/tests/cpu_engine/tiny.rs"]
mod tiny;

use std::time::Instant;

use case::{CASES, Case};
use millrace_engine::{Engine, Isa};
use millrace_shared::model::{ModelFiles, TensorType};
use millrace_shared::options::{Device, TorchDtype, TorchOptions};
use millrace_torch::{Graphing, Place, TorchEngine};
use model::Loaded;
use rig::{deviations, floats, pipeline_of, run};
use tch::{Kind, Tensor};

const DTYPES: [TorchDtype; 6] = [
    TorchDtype::F32,
    TorchDtype::F16,
    TorchDtype::Bf16,
    TorchDtype::Int8,
    TorchDtype::Int4,
    TorchDtype::Fp8,
];

/// How far logits of the families' small models may be off, the median row's where experts are chosen.
fn bound(dtype: TorchDtype) -> f64 {
    match dtype {
        TorchDtype::F32 => 2e-3,
        TorchDtype::F16 => 0.01,
        TorchDtype::Bf16 => 0.05,
        TorchDtype::Int8 => 0.15,
        TorchDtype::Int4 | TorchDtype::Fp8 => 0.8,
    }
}

fn engine(device: Device, dtype: TorchDtype) -> Box<dyn Engine> {
    let options = TorchOptions { torch_dtype: Some(dtype), ..TorchOptions::default() }.on(device);
    Box::new(TorchEngine::new(options))
}

/// Prints a table; whether all of it is within its bounds.
fn parity(device: Device) -> bool {
    println!("| family | {} |", DTYPES.map(TorchDtype::as_str).join(" | "));
    println!("|---|{}", "---|".repeat(DTYPES.len()));
    let mut fine = true;
    for case in CASES.map(Case::read) {
        let folder = case.folder(TensorType::F32, 1);
        let files = ModelFiles::open(folder.path()).unwrap();
        let ends = [files.config.layers];
        let prompt = case.tokens("prompt");
        let of = |device, dtype| {
            let make = &mut |_| engine(device, dtype);
            run(pipeline_of(&files, &ends, Isa::best(), make), &prompt, 64)
        };
        let exact: Vec<Vec<f64>> =
            of(Device::Cpu, TorchDtype::F32).iter().map(|row| floats(row)).collect();
        let mut line = format!("| {} |", case.name);
        for dtype in DTYPES {
            let mut all = deviations(&of(device, dtype), &exact);
            all.sort_by(f64::total_cmp);
            let experts = files.config.features.experts.is_some();
            let found = all[if experts { all.len() / 2 } else { all.len() - 1 }];
            let good = found <= bound(dtype);
            fine &= good;
            line += &format!(" {found:.5}{} |", if good { "" } else { " **too far**" });
        }
        println!("{line}");
    }
    fine
}

/// Seconds of the fastest of some runs; what was asked of the device has ended.
fn fastest(place: Place, runs: u32, mut work: impl FnMut()) -> f64 {
    let wait = || {
        if let tch::Device::Cuda(index) = place.device {
            tch::Cuda::synchronize(index as i64);
        }
    };
    work();
    wait();
    let once = |_| {
        let start = Instant::now();
        work();
        wait();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(once).fold(f64::MAX, f64::min)
}

/// Bytes a second of a large copy (read and written), multiply-adds a second of a large product.
fn limits(place: Place) -> (f64, f64) {
    let gpu = place.device.is_cuda();
    let bytes: i64 = if gpu { 4 << 30 } else { 256 << 20 };
    let from = Tensor::zeros([bytes], (Kind::Uint8, place.device));
    let mut to = Tensor::zeros([bytes], (Kind::Uint8, place.device));
    let copy = fastest(place, 5, || to.copy_(&from));
    let n: i64 = if gpu { 8192 } else { 1024 };
    let kind = if gpu { Kind::BFloat16 } else { Kind::Float };
    let a = Tensor::ones([n, n], (kind, place.device));
    let product = fastest(place, 5, || drop(a.matmul(&a)));
    (2.0 * bytes as f64 / copy, (n as f64).powi(3) / product)
}

fn bench(device: Device, shapes: &[String]) {
    let place = Place::open(device, TorchDtype::default_on(device)).unwrap();
    let (bandwidth, rate) = limits(place);
    println!(
        "{device}: copies {:.1} GB/s, multiplies {:.2} T/s (large product, {})",
        bandwidth / 1e9,
        rate / 1e12,
        if place.device.is_cuda() { "bf16" } else { "f32" }
    );
    println!("\n| model | kept as | test | tokens/s | ms a step | bound ms | share of bound |");
    println!("|---|---|---|---|---|---|---|");
    let usual = TorchDtype::default_on(device);
    let mut kinds = vec![(usual, Graphing::Auto)];
    if place.device.is_cuda() {
        kinds.push((usual, Graphing::Off));
    }
    kinds.extend([TorchDtype::Int8, TorchDtype::Int4].map(|dtype| (dtype, Graphing::Auto)));
    for name in shapes {
        for &(dtype, graphing) in &kinds {
            let without = if graphing == Graphing::Off { ", no graphs" } else { "" };
            let kept = format!("{}{without}", dtype.as_str());
            let options = TorchOptions { torch_dtype: Some(dtype), ..TorchOptions::default() };
            let engine = Box::new(TorchEngine::new(options.on(device)).graphing(graphing));
            let mut loaded = match Loaded::new(name, engine) {
                Ok(loaded) => loaded,
                Err(e) => {
                    println!("| {name} | {kept} | {e} | | | | |");
                    continue;
                }
            };
            for (test, rows, seconds) in loaded.measure() {
                // Weights are read once for a step, and each row multiplied with all of them.
                let read = loaded.bytes as f64 / bandwidth;
                let multiplied = rows as f64 * loaded.multiply_adds / rate;
                let bound = read.max(multiplied);
                println!(
                    "| {name} | {kept} | {test} | {:.1} | {:.3} | {:.3} | {:.0} % |",
                    rows as f64 / seconds,
                    seconds * 1e3,
                    bound * 1e3,
                    bound / seconds * 100.0
                );
            }
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage =
        "usage: gpu check DEVICE | gpu parity DEVICE | gpu bench DEVICE SHAPE… (tiny, 135m, 8b)";
    let fine = match &args[..] {
        [what, device, rest @ ..] => match (what.as_str(), device.parse::<Device>()) {
            (_, Err(e)) => {
                eprintln!("{e}");
                false
            }
            // Before anything else of libtorch.
            (_, Ok(device)) if Place::open(device, TorchDtype::F32).is_err() => {
                eprintln!("{}", Place::open(device, TorchDtype::F32).unwrap_err());
                false
            }
            ("check", Ok(_)) => true,
            ("parity", Ok(device)) => parity(device),
            ("bench", Ok(device)) => {
                bench(device, rest);
                true
            }
            _ => {
                eprintln!("{usage}");
                false
            }
        },
        _ => {
            eprintln!("{usage}");
            false
        }
    };
    std::process::exit(i32::from(!fine));
}
