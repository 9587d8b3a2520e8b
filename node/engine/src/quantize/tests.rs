//! Blocks against bounds and known bytes; whole files against threads, kinds of tensors, errors.

use std::path::{Path, PathBuf};

use half::f16;
use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::{Gguf, GgufWriter, Value};

use super::*;
use crate::cpu::dequantise_row;

const QUANTISED: [TensorType; 3] = [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_1];

/// Deterministic numbers (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// About normal, standard deviation 1.
    fn normal(&mut self) -> f32 {
        let uniform = |n: u64| (n >> 40) as f32 / (1u64 << 24) as f32;
        (0..12).map(|_| uniform(self.next())).sum::<f32>() - 6.0
    }

    fn row(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * scale).collect()
    }
}

fn encode(dtype: TensorType, rounding: Rounding, row: &[f32]) -> Result<Vec<u8>, BadWeight> {
    let mut out = vec![0xaa; dtype.bytes_of(row.len() as u64).unwrap() as usize];
    quantise_row(dtype, rounding, row, &mut out).map(|()| out)
}

fn decode(dtype: TensorType, bytes: &[u8]) -> Vec<f32> {
    let elements = bytes.len() as u64 / dtype.block_bytes() * dtype.block_elements();
    let mut out = vec![f32::NAN; elements as usize];
    assert!(dequantise_row(dtype, bytes, &mut out));
    out
}

fn round_trip(dtype: TensorType, rounding: Rounding, row: &[f32]) -> Vec<f32> {
    decode(dtype, &encode(dtype, rounding, row).unwrap())
}

fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// Largest error that reference rounding may make in a block.
fn bound(dtype: TensorType, block: &[f32]) -> f32 {
    let most = block.iter().fold(0f32, |m, x| m.max(x.abs()));
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    let greatest = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Half a step, the scale's own rounding to f16 (2^-11, or half its smallest step) at the largest
    // quant, and for Q4_0 a whole step at the side that has one quant less.
    let (step, quant) = match dtype {
        TensorType::Q8_0 => (most / 127.0 * 0.5, 127.0),
        TensorType::Q4_0 => (most / 8.0, 8.0),
        _ => ((greatest - least) / 15.0 * 0.5, 15.0),
    };
    let scale = if dtype == TensorType::Q4_1 { (greatest - least) / 15.0 } else { most / quant };
    let half = |x: f32| (x.abs() / 2048.0).max(f32::from_bits(0x3300_0000));
    let minimum = if dtype == TensorType::Q4_1 { half(least) } else { 0.0 };
    (step + quant * half(scale) + minimum) * 1.001
}

#[test]
fn round_trips_stay_within_bounds() {
    let mut random = Random(1);
    for dtype in QUANTISED {
        for exponent in -30..15 {
            let scale = 2f32.powi(exponent);
            for offset in [0.0, 3.0 * scale] {
                let row: Vec<f32> = random.row(96, scale).into_iter().map(|x| x + offset).collect();
                let back = round_trip(dtype, Rounding::Reference, &row);
                for (x, y) in row.chunks(32).zip(back.chunks(32)) {
                    let bound = bound(dtype, x);
                    for (x, y) in x.iter().zip(y) {
                        let error = (x - y).abs();
                        assert!(error <= bound, "{dtype:?} {scale:e}: {x} {y}: {error} > {bound}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_search_is_never_worse_and_mostly_better() {
    let mut random = Random(2);
    for dtype in [TensorType::Q4_0, TensorType::Q4_1] {
        let (mut plain, mut searched) = (0.0, 0.0);
        for i in 0..2000 {
            let row = random.row(32, 2f32.powi(i % 40 - 30));
            let error = |rounding| squared_error(&row, &round_trip(dtype, rounding, &row));
            let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
            let (p, s) = (error(Rounding::Reference), error(Rounding::Search));
            // The search counts in f32.
            assert!(s <= p * 1.0001, "{dtype:?}: {s} > {p} in {row:?}");
            plain += p / squares;
            searched += s / squares;
        }
        let gain = 1.0 - (searched / plain).sqrt();
        assert!(gain > 0.03, "{dtype:?}: the root of the mean squared error falls by {gain}");
    }
    let row = random.row(64, 1.0);
    let plain = encode(TensorType::Q8_0, Rounding::Reference, &row).unwrap();
    assert_eq!(plain, encode(TensorType::Q8_0, Rounding::Search, &row).unwrap());
}

#[test]
fn what_a_type_holds_exactly_stays() {
    let mut random = Random(3);
    for dtype in QUANTISED {
        for rounding in [Rounding::Reference, Rounding::Search] {
            for _ in 0..300 {
                // Random blocks with the extreme quants that a quantiser makes.
                let mut block: Vec<u8> =
                    (0..dtype.block_bytes()).map(|_| random.next() as u8).collect();
                block[..2].copy_from_slice(&f16::from_f32(0.0123).to_le_bytes());
                match dtype {
                    TensorType::Q8_0 => {
                        block[2..].iter_mut().for_each(|q| *q = if *q == 0x80 { 0x81 } else { *q });
                        block[2] = 127;
                    }
                    TensorType::Q4_0 => block[2] &= 0xf0,
                    _ => {
                        block[2..4].copy_from_slice(&f16::from_f32(-0.0876).to_le_bytes());
                        (block[4], block[5]) = (0x0f, 0xf0);
                    }
                }
                let row = decode(dtype, &block);
                let back = round_trip(dtype, rounding, &row);
                assert_eq!(row, back, "{dtype:?} {rounding:?}");
            }
        }
    }
}

/// What ggml's `quantize_row_*_ref` write for -1, -0.9375, …, 0.9375.
#[test]
fn known_bytes() {
    let row: Vec<f32> = (0..32).map(|i| (i - 16) as f32 / 16.0).collect();
    let hex = |dtype| -> String {
        let bytes = encode(dtype, Rounding::Reference, &row).unwrap();
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    };
    assert_eq!(hex(TensorType::Q4_0), "0030809191a2a2b3b3c4c4d5d5e6e6f7f7f8");
    assert_eq!(hex(TensorType::Q4_1), "223000bc80809191a2a2b3b3c4c4d5d5e6e6f7f7");
    assert_eq!(
        hex(TensorType::Q8_0),
        "082081899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77"
    );
}

#[test]
fn zeros_constants_and_tiny_values() {
    for dtype in QUANTISED {
        for rounding in [Rounding::Reference, Rounding::Search] {
            for value in [0.0, -0.0, f32::from_bits(1), -1e-40, 1e-12, -3e-9] {
                for mixed in [false, true] {
                    let row: Vec<f32> = (0..32)
                        .map(|i| if mixed { value * (i - 16) as f32 / 16.0 } else { value })
                        .collect();
                    let back = round_trip(dtype, rounding, &row);
                    let error = row.iter().zip(&back).fold(0f32, |m, (x, y)| m.max((x - y).abs()));
                    assert!(error <= 3.1e-9, "{dtype:?} {rounding:?} {value:e}: {error:e}");
                }
            }
            let half = vec![-0.5; 32];
            assert_eq!(
                round_trip(dtype, rounding, &half)[0],
                if dtype == TensorType::Q8_0 {
                    // 0.5 / 127 is no f16.
                    -127.0 * f16::from_f32(0.5 / 127.0).to_f32()
                } else {
                    -0.5
                }
            );
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    for dtype in TYPES {
        for (wrong, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-f32::INFINITY, "-inf")] {
            let mut row = vec![1.0; 64];
            row[40] = wrong;
            let error = encode(dtype, Rounding::Search, &row).unwrap_err().to_string();
            assert!(error.contains("weight 40") && error.contains(name), "{error}");
        }
    }
    let mut row = vec![1.0; 64];
    row[40] = 3e38;
    for dtype in QUANTISED {
        let error = encode(dtype, Rounding::Search, &row).unwrap_err();
        assert!(matches!(error, BadWeight::TooLarge { column: 32, .. }), "{error}");
        assert!(error.to_string().contains(dtype.as_str()), "{error}");
    }
    let error = encode(TensorType::F16, Rounding::Search, &row).unwrap_err();
    assert!(matches!(error, BadWeight::TooLarge { column: 40, .. }), "{error}");
    assert_eq!(round_trip(TensorType::F32, Rounding::Search, &row), row);
    row[40] = f32::MAX;
    assert!(encode(TensorType::BF16, Rounding::Search, &row).is_err());
}

#[test]
fn large_values_that_fit() {
    let mut random = Random(4);
    for (dtype, scale) in
        [(TensorType::Q8_0, 1e6), (TensorType::Q4_0, 8e4), (TensorType::Q4_1, 1e4)]
    {
        let row = random.row(320, scale);
        for rounding in [Rounding::Reference, Rounding::Search] {
            let back = round_trip(dtype, rounding, &row);
            let error = (squared_error(&row, &back) / squared_error(&row, &[0.0; 320])).sqrt();
            assert!(
                error < if dtype == TensorType::Q8_0 { 0.01 } else { 0.15 },
                "{dtype:?} {error}"
            );
        }
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A matrix of many rows, a vector in F16, rows that divide by nothing, an embedding.
fn model(dir: &Path, change: impl FnOnce(&mut [f32])) -> PathBuf {
    let mut random = Random(5);
    let mut matrix = random.row(64 * 257, 0.05);
    change(&mut matrix);
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama").set("general.file_type", 1u32);
    w.set("tokenizer.ggml.tokens", vec!["a".to_owned(), "b".to_owned()]);
    let halves: Vec<u8> =
        random.row(64, 1.0).iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    w.tensor("token_embd.weight", TensorType::F32, &[64, 3], floats(&random.row(192, 1.0)))
        .unwrap();
    w.tensor("blk.0.attn_norm.weight", TensorType::F16, &[64], halves).unwrap();
    w.tensor("blk.0.ffn_up.weight", TensorType::F32, &[64, 257], floats(&matrix)).unwrap();
    w.tensor("odd.weight", TensorType::F32, &[33, 2], floats(&random.row(66, 1.0))).unwrap();
    let path = dir.join("model.gguf");
    std::fs::write(&path, w.to_bytes()).unwrap();
    path
}

fn write(
    source: &Path,
    target: &Path,
    options: &Options,
    threads: usize,
) -> Result<Vec<TensorReport>, QuantizeError> {
    let plan = plan(&Gguf::open(source).unwrap(), source, options)?;
    let mut last = 0;
    let result = plan.write(target, false, threads, &mut |done| {
        assert!(done > last, "progress moves on");
        last = done;
    })?;
    assert_eq!(last, plan.source_bytes());
    assert_eq!(std::fs::metadata(target).unwrap().len(), plan.target_len());
    Ok(result)
}

#[test]
fn threads_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), |_| {});
    for to in TYPES {
        let file = |threads: usize| {
            let target = dir.path().join(format!("{}-{threads}", to.as_str()));
            let reports = write(&source, &target, &Options::new(to), threads).unwrap();
            let losses: Vec<Loss> = reports.iter().map(|r| r.loss).collect();
            (std::fs::read(target).unwrap(), losses)
        };
        let one = file(1);
        for threads in [2, 3, 64, 1000] {
            assert!(file(threads) == one, "{threads} threads, {}", to.as_str());
        }
    }
}

#[test]
fn a_file_keeps_order_shapes_and_keys() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), |_| {});
    let target = dir.path().join("q4.gguf");
    let reports = write(&source, &target, &Options::new(TensorType::Q4_0), 2).unwrap();
    let (before, after) = (Gguf::open(&source).unwrap(), Gguf::open(&target).unwrap());
    let names = |g: &Gguf| -> Vec<_> {
        g.tensors.iter().map(|t| (t.name.clone(), t.dims.clone())).collect()
    };
    assert_eq!(names(&before), names(&after));
    let types: Vec<TensorType> = after.tensors.iter().map(|t| t.dtype).collect();
    use TensorType::{F32, Q4_0, Q8_0};
    assert_eq!(types, [Q8_0, F32, Q4_0, F32]);
    assert!(after.tensors.iter().all(|t| t.offset % 32 == 0));
    assert_eq!(after.metadata.get("general.file_type"), Some(&Value::U32(2)));
    assert_eq!(after.metadata.get("general.quantization_version"), Some(&Value::U32(2)));
    assert_eq!(
        after.metadata.get("tokenizer.ggml.tokens"),
        before.metadata.get("tokenizer.ggml.tokens")
    );
    let loss = |i: usize| reports[i].loss.relative_rmse();
    assert!(loss(0) > 0.001 && loss(0) < 0.01 && loss(2) > 0.05 && loss(2) < 0.12, "{reports:?}");
    assert_eq!((loss(1), loss(3)), (0.0, 0.0));
    assert_eq!(reports[2].bytes_after, 64 / 32 * 18 * 257);
}

#[test]
fn quantised_matrices_are_not_quantised_again_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), |_| {});
    let q4 = dir.path().join("q4.gguf");
    write(&source, &q4, &Options::new(TensorType::Q4_1), 2).unwrap();
    let q8 = dir.path().join("q8.gguf");
    let mut options = Options::new(TensorType::Q8_0);
    let error = write(&q4, &q8, &options, 2).unwrap_err().to_string();
    assert!(error.contains("blk.0.ffn_up.weight") && error.contains("Q4_1"), "{error}");
    options.requantise = Requantise::Leave;
    assert_eq!(plan(&Gguf::open(&q4).unwrap(), &q4, &options).unwrap().changed(), 0);
    // Dequantised and quantised again: the same bytes.
    options = Options { requantise: Requantise::Allow, ..Options::new(TensorType::F32) };
    let floats = dir.path().join("f32.gguf");
    write(&q4, &floats, &options, 2).unwrap();
    assert!(Gguf::open(&floats).unwrap().tensors.iter().all(|t| t.dtype == TensorType::F32));
    let again = dir.path().join("again.gguf");
    write(&floats, &again, &Options::new(TensorType::Q4_1), 2).unwrap();
    let up = |path: &Path| {
        let entry = Gguf::open(path).unwrap().tensor("blk.0.ffn_up.weight").unwrap().clone();
        let bytes = std::fs::read(path).unwrap();
        decode(entry.dtype, &bytes[entry.offset as usize..][..entry.bytes as usize])
    };
    assert_eq!(up(&q4), up(&floats));
    let error =
        squared_error(&up(&again), &up(&q4)) / squared_error(&up(&q4), &vec![0.0; 64 * 257]);
    assert!(error.sqrt() < 0.01, "{error}");
}

#[test]
fn failures_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), |m| m[64 * 200 + 7] = f32::NAN);
    let target = dir.path().join("out.gguf");
    let options = Options::new(TensorType::Q8_0);
    let error = write(&source, &target, &options, 2).unwrap_err().to_string();
    assert_eq!(
        error,
        "tensor 'blk.0.ffn_up.weight', row 200: weight 7 is NaN; a model has finite weights only"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the source is there");

    let source = model(dir.path(), |_| {});
    std::fs::write(&target, b"precious").unwrap();
    assert!(matches!(
        write(&source, &target, &options, 1),
        Err(QuantizeError::Target(TargetError::Exists(_)))
    ));
    assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    let same = plan(&Gguf::open(&source).unwrap(), &source, &options).unwrap();
    let link = dir.path().join("link.gguf");
    std::fs::hard_link(&source, &link).unwrap();
    for path in [&source, &link] {
        let error = same.write(path, true, 1, &mut |_| {});
        assert!(matches!(error, Err(QuantizeError::Target(TargetError::SameFile(_)))));
    }
    same.write(&target, true, 1, &mut |_| {}).unwrap();
    assert!(Gguf::open(&target).is_ok());
    assert!(matches!(
        plan(&Gguf::open(&source).unwrap(), &source, &Options::new(TensorType::Q6_K)),
        Err(QuantizeError::Type(TensorType::Q6_K))
    ));
}
