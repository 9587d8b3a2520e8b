//! Every kernel in every instruction set against the plain one, bit by bit, and against f64 within
//! tolerance.

use millrace_shared::model::{Activation, TensorType};

use super::elementwise::{self as ew, QuantOut};
use super::matmul::{Output, gated, matmul};
use crate::Isa;
use crate::cpu::buffer::{Arena, Shared};
use crate::cpu::pack::Packed;
use crate::cpu::pool::Pool;
use crate::cpu::tensor::Tensor;

/// xorshift: the same data everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// In -1..1.
    pub(super) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

pub(super) fn isas() -> Vec<Isa> {
    [Isa::Scalar, Isa::Avx2, Isa::Avx512].into_iter().filter(|&i| i <= Isa::best()).collect()
}

pub(super) const TYPES: [TensorType; 18] = [
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q4_K,
    TensorType::Q8_0,
    TensorType::Q6_K,
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q5_0,
    TensorType::Q3_K,
    TensorType::IQ4_NL,
    TensorType::TQ1_0,
    TensorType::TQ2_0,
    TensorType::Q5_1,
    TensorType::Q5_K,
    TensorType::Q2_K,
    TensorType::IQ4_XS,
    TensorType::MXFP4,
];

/// Where the f16 scales of a block lie in a file.
fn scales(dtype: TensorType) -> &'static [usize] {
    match dtype {
        TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4_K | TensorType::Q5_K => &[0, 2],
        TensorType::Q2_K => &[80, 82],
        TensorType::Q6_K => &[208],
        TensorType::Q3_K => &[108],
        TensorType::TQ1_0 => &[52],
        TensorType::TQ2_0 => &[64],
        TensorType::F32 | TensorType::MXFP4 => &[],
        _ => &[0],
    }
}

/// A random matrix in the layout of a file: random quants, small scales.
pub(super) fn matrix(dtype: TensorType, rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..(rows * cols) as u64 / dtype.block_elements() {
        let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| random.next() as u8).collect();
        let mut value = random.float() * 0.1;
        match dtype {
            TensorType::F32 => block.copy_from_slice(&value.to_le_bytes()),
            TensorType::BF16 => {
                block.copy_from_slice(&half::bf16::from_f32(value).to_bits().to_le_bytes());
            }
            TensorType::MXFP4 => block[0] = 118 + (random.next() & 3) as u8,
            _ => {
                for &at in scales(dtype) {
                    let bits = half::f16::from_f32(value).to_bits().to_le_bytes();
                    block[at..at + 2].copy_from_slice(&bits);
                    value = random.float() * 0.1;
                }
            }
        }
        out.extend(block);
    }
    out
}

pub(super) fn pack(
    dtype: TensorType,
    (rows, cols): (usize, usize),
    r: usize,
    data: &[u8],
) -> Packed {
    let row = data.len() / rows;
    let mut read = |first: usize, out: &mut [u8]| {
        out.copy_from_slice(&data[first * row..][..out.len()]);
        Ok(())
    };
    Packed::pack(dtype, (rows, cols), r, &mut Arena::new("a test"), &mut read).unwrap()
}

fn quantise(isa: Isa, t: &mut Tensor) {
    let (width, blocks) = (t.width, t.width / 32);
    for row in 0..t.rows {
        let out = QuantOut {
            q: t.quant.q[row * width..].as_mut_ptr(),
            scale: t.quant.scale[row * blocks..].as_mut_ptr(),
            scaled_sum: t.quant.scaled_sum[row * blocks..].as_mut_ptr(),
            sums: t.quant.sums[row * blocks..].as_mut_ptr(),
        };
        // SAFETY: a row of `width` elements and outputs for all its blocks.
        unsafe { ew::quantise(isa, t.data[row * width..].as_ptr(), width, out) };
    }
}

pub(super) fn activations(isa: Isa, rows: usize, width: usize, random: &mut Random) -> Tensor {
    let mut t = Tensor::new(&mut Arena::new("a test"), rows, width, true).unwrap();
    t.data.iter_mut().for_each(|x| *x = random.float() * 3.0);
    t.rows = rows;
    quantise(isa, &mut t);
    t
}

pub(super) fn group(isa: Isa) -> usize {
    super::group_rows(isa)
}

pub(super) fn product(isa: Isa, threads: usize, w: &[Packed], x: &Tensor, add: bool) -> Vec<f32> {
    let stride = w.iter().map(|p| p.rows).sum::<usize>() + 3;
    let mut out = vec![0.25f32; x.rows * stride];
    let data = Shared::new(&mut out);
    matmul(&mut Pool::new(threads, threads), isa, w, x, 0..x.rows, Output { data, stride, add });
    assert!(out.chunks(stride).all(|c| c[stride - 3..] == [0.25; 3]), "wrote past the rows");
    out
}

pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn products_are_the_same_bits_everywhere_and_close_to_exact() {
    let mut random = Random(7);
    for dtype in TYPES {
        let step = dtype.block_elements().max(32) as usize;
        for (rows, cols, columns) in
            [(1, step, 1), (7, step * 3, 9), (33, step, 17), (960, step * 2, 3), (16, step, 70)]
        {
            let file = matrix(dtype, rows, cols, &mut random);
            let seed = random.next();
            let reference = {
                let x = activations(Isa::Scalar, columns, cols, &mut Random(seed));
                let w = [pack(dtype, (rows, cols), 8, &file)];
                let got = product(Isa::Scalar, 1, &w, &x, false);
                close_to_exact(&w[0], &x, &got);
                got
            };
            for isa in isas() {
                for threads in [1, 2, 3] {
                    let x = activations(isa, columns, cols, &mut Random(seed));
                    let w = [pack(dtype, (rows, cols), group(isa), &file)];
                    let got = product(isa, threads, &w, &x, false);
                    assert_eq!(bits(&got), bits(&reference), "{dtype:?} {isa} {rows}x{cols}");
                }
            }
        }
    }
}

/// Tiles of zeros, a whole group of rows among them. No scale of MXFP4 is zero.
#[test]
fn zeros_are_passed_over_and_change_no_bit() {
    let mut random = Random(11);
    for dtype in TYPES.into_iter().filter(|&dtype| dtype != TensorType::MXFP4) {
        let (rows, across) = (50, 8);
        let cols = across * dtype.block_elements().max(32) as usize;
        let mut file = matrix(dtype, rows, cols, &mut random);
        let (row, tile) = (file.len() / rows, file.len() / rows / across);
        for group in 0..rows.div_ceil(16) {
            for b in (0..across).filter(|_| group == 0 || !random.next().is_multiple_of(8)) {
                for i in group * 16..rows.min(group * 16 + 16) {
                    file[i * row + b * tile..][..tile].fill(0);
                }
            }
        }
        for (isa, columns) in isas().into_iter().flat_map(|isa| [1, 5, 9].map(|c| (isa, c))) {
            let x = activations(isa, columns, cols, &mut random);
            for add in [false, true] {
                let run = |w: Packed| bits(&product(isa, 2, &[w], &x, add));
                let packed = || pack(dtype, (rows, cols), group(isa), &file);
                assert_eq!(run(packed()), run(packed().with_zeros()), "{dtype:?} {isa} {add}");
            }
        }
    }
}

/// Against f64 over the dequantised weights, with the error that int8 activations may cause.
fn close_to_exact(w: &Packed, x: &Tensor, got: &[f32]) {
    let stride = w.rows + 3;
    let mut weights = vec![0f32; w.cols];
    for row in 0..w.rows {
        w.unpack(row, &mut weights);
        for c in 0..x.rows {
            let pairs = || weights.iter().zip(x.row(c));
            let exact: f64 = pairs().map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            let size: f64 = pairs().map(|(&a, &b)| (f64::from(a) * f64::from(b)).powi(2)).sum();
            let difference = (f64::from(got[c * stride + row]) - exact).abs();
            assert!(difference <= 0.08 * size.sqrt() + 1e-3, "{:?}: {difference}", w.kind);
        }
    }
}

#[test]
fn several_matrices_and_addition() {
    let mut random = Random(11);
    let q = matrix(TensorType::Q4_1, 40, 64, &mut random);
    let v = matrix(TensorType::Q8_0, 9, 64, &mut random);
    for isa in isas() {
        let x = activations(isa, 5, 64, &mut Random(3));
        let pack_both = || {
            [
                pack(TensorType::Q4_1, (40, 64), group(isa), &q),
                pack(TensorType::Q8_0, (9, 64), group(isa), &v),
            ]
        };
        let [a, b] = pack_both();
        let (first, second) = (product(isa, 1, &[a], &x, false), product(isa, 1, &[b], &x, false));
        let both = product(isa, 2, &pack_both(), &x, false);
        let added = product(isa, 2, &pack_both(), &x, true);
        for c in 0..5 {
            let joint = &both[c * 52..][..49];
            assert_eq!(joint[..40], first[c * 43..][..40]);
            assert_eq!(joint[40..], second[c * 12..][..9]);
            let sums: Vec<f32> = joint.iter().map(|x| 0.25 + x).collect();
            assert_eq!(added[c * 52..][..49], sums[..]);
        }
    }
}

#[test]
fn quantisation_is_the_same_and_keeps_extremes() {
    let mut random = Random(5);
    for special in [0.0, 1e-38, 1e-30, 65504.0, f32::MAX, f32::NAN, f32::INFINITY] {
        let mut values: Vec<f32> = (0..64).map(|_| random.float()).collect();
        values[17] = special;
        if special.abs() < 1e-20 {
            values.iter_mut().for_each(|x| *x *= special);
        }
        let run = |isa| {
            let mut t = Tensor::new(&mut Arena::new("a test"), 1, 64, true).unwrap();
            t.data.copy_from_slice(&values);
            t.rows = 1;
            quantise(isa, &mut t);
            (t.quant.q.to_vec(), bits(&t.quant.scale), t.quant.sums.to_vec())
        };
        let reference = run(Isa::Scalar);
        if special.is_finite() {
            assert!(reference.0.iter().all(|&q| q != -128));
        } else {
            assert!(!f32::from_bits(reference.1[0]).is_finite(), "lost a {special}");
        }
        for isa in isas().into_iter().filter(|_| special.is_finite()) {
            assert_eq!(run(isa), reference, "{isa} {special}");
        }
    }
}

#[test]
fn row_kernels_are_the_same_bits_and_right() {
    let n = 96;
    let mut random = Random(9);
    let x: Vec<f32> = (0..n).map(|_| random.float() * 30.0).collect();
    let g: Vec<f32> = (0..n).map(|_| random.float()).collect();
    let run = |isa, gate: Option<Activation>| {
        let mut t = Tensor::new(&mut Arena::new("a test"), 1, n, true).unwrap();
        let quant = QuantOut {
            q: t.quant.q.as_mut_ptr(),
            scale: t.quant.scale.as_mut_ptr(),
            scaled_sum: t.quant.scaled_sum.as_mut_ptr(),
            sums: t.quant.sums.as_mut_ptr(),
        };
        let y = t.data.as_mut_ptr();
        // SAFETY: `n` elements everywhere.
        unsafe {
            match gate {
                Some(activation) => {
                    ew::gated(isa, x.as_ptr(), g.as_ptr(), y, n, activation, quant);
                }
                None => ew::rms_norm(isa, x.as_ptr(), g.as_ptr(), y, n, 1e-5, quant),
            }
        }
        (bits(&t.data), t.quant.q.to_vec(), bits(&t.quant.scaled_sum))
    };
    for gate in [None, Some(Activation::Silu), Some(Activation::GeluTanh)] {
        let reference = run(Isa::Scalar, gate);
        for isa in isas() {
            assert_eq!(run(isa, gate), reference, "{isa}");
        }
        let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let rms = (square / n as f64 + 1e-5).sqrt();
        for (i, &got) in reference.0.iter().enumerate() {
            let (x, g) = (f64::from(x[i]), f64::from(g[i]));
            let exact = match gate {
                None => x / rms * g,
                Some(Activation::Silu) => x / (1.0 + (-x).exp()) * g,
                Some(Activation::GeluTanh) => {
                    let root = (2.0 / std::f64::consts::PI).sqrt();
                    0.5 * x * (1.0 + (root * (x + 0.044_715 * x.powi(3))).tanh()) * g
                }
            };
            let got = f64::from(f32::from_bits(got));
            // The tail of GELU is a difference in the exponent.
            let slack = if gate == Some(Activation::GeluTanh) { 2e-5 } else { 2e-6 };
            assert!((got - exact).abs() <= slack * exact.abs() + 1e-12, "{got} {exact}");
        }
    }
}

#[test]
fn soft_caps_and_plain_norms_are_the_same_bits_and_right() {
    let mut random = Random(10);
    let x: Vec<f32> = (0..83).map(|_| random.float() * 90.0).collect();
    let gain: Vec<f32> = (0..80).map(|_| random.float()).collect();
    let run = |isa| {
        let mut capped = x.clone();
        ew::soft_cap(isa, &mut capped, 30.0);
        let (mut norm, mut sum) = (x[..80].to_vec(), gain.clone());
        let at = norm.as_mut_ptr();
        // SAFETY: 80 elements everywhere.
        unsafe {
            ew::rms_norm_add(isa, x.as_ptr(), gain.as_ptr(), sum.as_mut_ptr(), 80, 1e-5, true);
            ew::rms_norm_add(isa, at, gain.as_ptr(), at, 80, 1e-5, false);
        }
        (capped, norm, sum)
    };
    let (capped, norm, sum) = run(Isa::Scalar);
    for isa in isas() {
        let other = run(isa);
        assert_eq!(bits(&other.0), bits(&capped), "{isa}");
        assert_eq!(bits(&other.1), bits(&norm), "{isa}");
        assert_eq!(bits(&other.2), bits(&sum), "{isa}");
    }
    for (got, &x) in capped.iter().zip(&x) {
        let exact = 30.0 * (f64::from(x) / 30.0).tanh();
        assert!((f64::from(*got) - exact).abs() < 1e-5, "{got} {exact}");
    }
    let rms = (x[..80].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 80.0 + 1e-5).sqrt();
    for i in 0..80 {
        let exact = f64::from(x[i]) / rms * f64::from(gain[i]);
        assert!((f64::from(norm[i]) - exact).abs() < 1e-5);
        assert!((f64::from(sum[i]) - exact - f64::from(gain[i])).abs() < 1e-5);
    }
}

/// Against the products and the activation one after the other.
#[test]
fn gated_is_the_same_bits_as_its_parts() {
    let types = [TensorType::Q4_1, TensorType::Q8_0, TensorType::F16];
    for (n, (columns, dtype)) in
        [1, 3, 16, 70, 130].into_iter().flat_map(|c| types.map(|t| (c, t))).enumerate()
    {
        let (rows, cols) = (96, 64);
        let mut random = Random(n as u64 + 1);
        let data: [_; 2] = std::array::from_fn(|_| matrix(dtype, rows, cols, &mut random));
        let seed = random.next();
        let run = |isa: Isa, threads| {
            let mut pool = Pool::new(threads, threads);
            let parts: Vec<Packed> =
                data.iter().map(|d| pack(dtype, (rows, cols), group(isa), d)).collect();
            let x = activations(isa, columns, cols, &mut Random(seed));
            let mut arena = Arena::new("a test");
            let mut both = Tensor::new(&mut arena, columns, 2 * rows, false).unwrap();
            let data = Shared::new(&mut both.data);
            let to = Output { data, stride: 2 * rows, add: false };
            matmul(&mut pool, isa, &parts, &x, 0..columns, to);
            let mut apart = Tensor::new(&mut arena, columns, rows, true).unwrap();
            for (row, y) in both.data.chunks_exact(2 * rows).zip(apart.data.chunks_mut(rows)) {
                let (mut q, mut sums) = ([0i8; 96], [[0i32; 2]; 3]);
                let [mut scale, mut scaled_sum] = [[0f32; 3]; 2];
                let quant = QuantOut {
                    q: q.as_mut_ptr(),
                    scale: scale.as_mut_ptr(),
                    scaled_sum: scaled_sum.as_mut_ptr(),
                    sums: sums.as_mut_ptr(),
                };
                let (gate, up) = row.split_at(rows);
                // SAFETY: 96 elements everywhere.
                unsafe {
                    let y = y.as_mut_ptr();
                    let act = Activation::Silu;
                    ew::gated(isa, gate.as_ptr(), up.as_ptr(), y, rows, act, quant);
                }
            }
            apart.rows = columns;
            quantise(isa, &mut apart);
            let mut out = Tensor::new(&mut arena, columns, rows, true).unwrap();
            gated(&mut pool, isa, &parts, &x, Activation::Silu, &mut out);
            assert_eq!(out.rows, columns);
            for t in [&apart, &out] {
                assert!(t.data.iter().all(|x| x.is_finite()), "{dtype:?} {isa}");
            }
            let all = |t: &Tensor| {
                let q = &t.quant;
                (bits(&t.data), q.q.to_vec(), bits(&q.scale), bits(&q.scaled_sum), q.sums.to_vec())
            };
            assert_eq!(all(&out), all(&apart), "{dtype:?} {isa} x{columns}, {threads} threads");
            bits(&out.data)
        };
        let reference = run(Isa::Scalar, 1);
        for isa in isas() {
            for threads in [1, 3] {
                assert_eq!(run(isa, threads), reference, "{dtype:?} {isa} x{columns}");
            }
        }
    }
}

#[test]
fn finite_sees_every_place() {
    for isa in isas() {
        for at in 0..64 {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [1.0f32; 64];
                // SAFETY: 64 elements.
                assert!(unsafe { ew::finite(isa, x.as_ptr(), 64) });
                x[at] = bad;
                // SAFETY: 64 elements.
                assert!(!unsafe { ew::finite(isa, x.as_ptr(), 64) });
            }
        }
    }
}
