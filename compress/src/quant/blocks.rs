//! Rows of weights as blocks of GGUF, with or without importance of the columns.
//!
//! Types and rules are llama.cpp's (`ggml-quants.c`): without importance its `_ref` functions, with
//! importance its `_impl` ones; Q4_0 and Q4_1 without importance are the engine's, which search for
//! better scales. Where rows do not fill blocks of 256, [`fallback`] is what llama.cpp takes.

use half::f16;
use millrace_engine::quantize::{BadWeight, Rounding, quantise_row};
use millrace_shared::model::TensorType;

use super::search::{EPS, Steps, affine, nearest, positive, symmetric};

/// Weights of a K block.
const SUPER: usize = 256;
/// Weights of the other blocks.
const BLOCK: usize = 32;

/// Types that matrices can be given.
pub const TYPES: [TensorType; 9] = [
    TensorType::Q8_0,
    TensorType::Q6_K,
    TensorType::Q5_0,
    TensorType::Q4_K,
    TensorType::Q4_1,
    TensorType::Q4_0,
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
];

/// The type of a matrix with rows of `cols` weights that was to be of another: as llama.cpp chooses.
/// `None` where nothing but floats fits.
pub fn fallback(dtype: TensorType, cols: usize) -> Option<TensorType> {
    let fits = |t: TensorType| (cols as u64).is_multiple_of(t.block_elements());
    let other = match dtype {
        TensorType::Q4_K => TensorType::Q5_0,
        TensorType::Q6_K => TensorType::Q8_0,
        other => other,
    };
    [dtype, other].into_iter().find(|&t| fits(t))
}

/// Writes a row as `dtype` (one of [`TYPES`], whose blocks it fills) into `out`. `importance` has a
/// weight for each column's squared error: the mean square of that input.
///
/// # Errors
/// If a weight is not finite, or too large for the type.
pub fn encode_row(
    dtype: TensorType,
    row: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), BadWeight> {
    if let Some(column) = row.iter().position(|x| !x.is_finite()) {
        return Err(BadWeight::NotFinite { column, value: row[column] });
    }
    let small = matches!(dtype, TensorType::Q4_0 | TensorType::Q4_1 | TensorType::Q5_0);
    let block = match (dtype, importance) {
        (TensorType::Q4_K | TensorType::Q6_K, _) => SUPER,
        (TensorType::Q5_0, _) => BLOCK,
        (_, Some(_)) if small => BLOCK,
        _ => return quantise_row(dtype, Rounding::Search, row, out),
    };
    // Of the row, as `quantize_row_q4_0_impl` has it.
    let mean_square = row.iter().map(|x| x * x).sum::<f32>() / row.len().max(1) as f32;
    let bytes = dtype.block_bytes() as usize;
    for (i, (x, out)) in row.chunks_exact(block).zip(out.chunks_exact_mut(bytes)).enumerate() {
        let importance = importance.map(|all| &all[i * block..][..block]);
        out.fill(0);
        let scales = match dtype {
            TensorType::Q4_K => q4_k(x, importance, out),
            TensorType::Q6_K => q6_k(x, importance, out),
            _ => small_block(dtype, x, importance, mean_square, out),
        };
        if let Some(&value) = scales.iter().find(|s| !f16::from_f32(**s).is_finite()) {
            return Err(BadWeight::TooLarge { column: i * block, value, dtype });
        }
    }
    Ok(())
}

/// Blocks of 32; the scales as they were before they became f16.
fn small_block(
    dtype: TensorType,
    x: &[f32],
    importance: Option<&[f32]>,
    mean_square: f32,
    out: &mut [u8],
) -> [f32; 2] {
    let mut weights = [1f32; BLOCK];
    if let Some(importance) = importance {
        for ((w, &i), &x) in weights.iter_mut().zip(importance).zip(x) {
            *w = i * (mean_square + x * x).sqrt();
        }
    }
    let mut q = [0u8; BLOCK];
    match dtype {
        TensorType::Q4_1 => {
            let steps = Steps { most: 15, first: -0.9, by: 0.05, count: 36 };
            let (d, min) = affine(x, steps, &weights, &mut q);
            put_f16(out, 0, d);
            put_f16(out, 2, -min);
            nibbles(&q, &mut out[4..]);
            [d, min]
        }
        TensorType::Q4_0 => {
            let d = symmetric(x, 8, &weights, &mut q);
            put_f16(out, 0, d);
            nibbles(&q, &mut out[2..]);
            [d, 0.0]
        }
        _ => {
            let d = if importance.is_some() {
                symmetric(x, 16, &weights, &mut q)
            } else {
                q5_0_plain(x, &mut q)
            };
            put_f16(out, 0, d);
            let high = q.iter().enumerate().fold(0u32, |h, (j, q)| h | u32::from(q >> 4) << j);
            out[2..6].copy_from_slice(&high.to_le_bytes());
            nibbles(&q, &mut out[6..]);
            [d, 0.0]
        }
    }
}

/// As `quantize_row_q5_0_ref`.
fn q5_0_plain(x: &[f32], q: &mut [u8]) -> f32 {
    let extreme = x.iter().fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let d = extreme / -16.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    q.iter_mut().zip(x).for_each(|(q, &x)| *q = (x * inverse + 16.5).clamp(0.0, 31.0) as u8);
    d
}

fn put_f16(out: &mut [u8], at: usize, x: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
}

fn read_f16(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Element `j` low in byte `j`, element `j + 16` high.
pub(super) fn nibbles(q: &[u8; BLOCK], out: &mut [u8]) {
    for (j, out) in out.iter_mut().enumerate() {
        *out = (q[j] & 15) | (q[j + BLOCK / 2] << 4);
    }
}

/// Eight groups of 32 with scales and minima of six bits: `d * scale * q - dmin * min`.
fn q4_k(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> [f32; 2] {
    let (mut scales, mut mins, mut sums) = ([0f32; 8], [0f32; 8], [0f32; 8]);
    let mut q = [0u8; SUPER];
    let spread = 2.0 * x.iter().map(|x| x * x).sum::<f32>() / SUPER as f32;
    for (j, part) in x.chunks_exact(BLOCK).enumerate() {
        let mut weights = [0f32; BLOCK];
        let rms = (part.iter().map(|x| x * x).sum::<f32>() / BLOCK as f32).sqrt();
        for (i, (w, &x)) in weights.iter_mut().zip(part).enumerate() {
            *w = match importance {
                Some(all) => all[j * BLOCK + i] * (spread + x * x).sqrt(),
                None => rms + x.abs(),
            };
        }
        sums[j] = weights.iter().sum();
        let steps = match importance {
            Some(_) => Steps { most: 15, first: -0.9, by: 0.05, count: 36 },
            None => Steps { most: 15, first: -1.0, by: 0.1, count: 20 },
        };
        (scales[j], mins[j]) = affine(part, steps, &weights, &mut q[j * BLOCK..][..BLOCK]);
    }
    let (mut ls, mut lm) = ([0u8; 8], [0u8; 8]);
    let (d, dmin) = if importance.is_some() {
        (positive(&scales, 63, &sums, &mut ls), positive(&mins, 63, &sums, &mut lm))
    } else {
        (even(&scales, &mut ls), even(&mins, &mut lm))
    };
    put_f16(out, 0, d);
    put_f16(out, 2, dmin);
    put_six_bits(&ls, &lm, &mut out[4..16]);
    let (half_d, half_min) = (read_f16(out, 0), read_f16(out, 2));
    for (j, part) in x.chunks_exact(BLOCK).enumerate() {
        let (d, min) = (half_d * f32::from(ls[j]), half_min * f32::from(lm[j]));
        if d == 0.0 {
            continue;
        }
        for (q, &x) in q[j * BLOCK..].iter_mut().zip(part) {
            *q = nearest((x + min) / d).clamp(0, 15) as u8;
        }
    }
    for (pair, out) in q.chunks_exact(2 * BLOCK).zip(out[16..].chunks_exact_mut(BLOCK)) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = pair[i] | (pair[i + BLOCK] << 4);
        }
    }
    [d, dmin]
}

/// Levels of six bits, the greatest value's 63.
fn even(x: &[f32; 8], levels: &mut [u8; 8]) -> f32 {
    let max = x.iter().copied().fold(0f32, f32::max);
    let inverse = if max > 0.0 { 63.0 / max } else { 0.0 };
    levels.iter_mut().zip(x).for_each(|(l, &x)| *l = nearest(inverse * x).clamp(0, 63) as u8);
    max / 63.0
}

/// As `get_scale_min_k4` reads them.
fn put_six_bits(scales: &[u8; 8], mins: &[u8; 8], out: &mut [u8]) {
    for j in 0..8 {
        let (s, m) = (scales[j], mins[j]);
        if j < 4 {
            out[j] = s;
            out[j + 4] = m;
        } else {
            out[j + 4] = (s & 15) | (m << 4);
            out[j - 4] |= (s >> 4) << 6;
            out[j] |= (m >> 4) << 6;
        }
    }
}

/// Sixteen groups of 16 with signed scales of eight bits: `d * scale * (q - 32)`.
fn q6_k(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> [f32; 2] {
    let mut scales = [0f32; 16];
    let mut q = [32u8; SUPER];
    for (j, part) in x.chunks_exact(16).enumerate() {
        let own: Vec<f32> = part.iter().map(|x| x * x).collect();
        let weights = importance.map_or(&own[..], |all| &all[j * 16..][..16]);
        scales[j] = symmetric(part, 32, weights, &mut q[j * 16..][..16]);
    }
    let extreme = scales.iter().fold(0f32, |m, &s| if s.abs() > m.abs() { s } else { m });
    if extreme.abs() < EPS {
        out.fill(0);
        return [0.0; 2];
    }
    let inverse = -128.0 / extreme;
    let d = 1.0 / inverse;
    put_f16(out, 208, d);
    let half_d = read_f16(out, 208);
    for (j, part) in x.chunks_exact(16).enumerate() {
        let level = nearest(inverse * scales[j]).clamp(-128, 127);
        out[192 + j] = level as i8 as u8;
        let d = half_d * level as f32;
        if d == 0.0 {
            continue;
        }
        for (q, &x) in q[j * 16..].iter_mut().zip(part) {
            *q = (nearest(x / d).clamp(-32, 31) + 32) as u8;
        }
    }
    put_q6_k(&q, out);
    [d, 0.0]
}

/// The levels of a Q6_K block.
pub(super) fn put_q6_k(q: &[u8], out: &mut [u8]) {
    for half in 0..2 {
        let q = &q[half * 128..][..128];
        for l in 0..32 {
            let [a, b, c, e] = [q[l], q[l + 32], q[l + 64], q[l + 96]];
            out[half * 64 + l] = (a & 15) | (c << 4);
            out[half * 64 + l + 32] = (b & 15) | (e << 4);
            out[128 + half * 32 + l] = (a >> 4) | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6;
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_engine::cpu::dequantise_row;

    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        // Nearly normal, with an outlier now and then.
        (0..n).map(|i| (next() + next() + next()) * if i % 97 == 0 { 4.0 } else { 1.0 }).collect()
    }

    fn round_trip(dtype: TensorType, row: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
        let mut bytes = vec![0; dtype.bytes_of(row.len() as u64).unwrap() as usize];
        encode_row(dtype, row, importance, &mut bytes).unwrap();
        let mut back = vec![0f32; row.len()];
        assert!(dequantise_row(dtype, &bytes, &mut back));
        back
    }

    fn error(a: &[f32], b: &[f32], weights: &[f32]) -> f32 {
        a.iter().zip(b).zip(weights).map(|((a, b), w)| w * (a - b).powi(2)).sum()
    }

    #[test]
    fn every_type_reads_back_within_its_precision() {
        let row = numbers(1536, 7);
        let one = vec![1.0; row.len()];
        let square: f32 = row.iter().map(|x| x * x).sum();
        let limits = [0.02, 0.05, 0.08, 0.15, 0.15, 0.2];
        for (dtype, limit) in TYPES.into_iter().zip(limits) {
            for importance in [None, Some(&one[..])] {
                let rms = (error(&row, &round_trip(dtype, &row, importance), &one) / square).sqrt();
                assert!(rms < limit, "{}: {rms}", dtype.as_str());
            }
        }
    }

    #[test]
    fn importance_lowers_the_weighted_error() {
        let row = numbers(1024, 3);
        let weights: Vec<f32> = numbers(1024, 5).iter().map(|x| (x * 6.0).exp()).collect();
        for dtype in [
            TensorType::Q4_0,
            TensorType::Q4_1,
            TensorType::Q5_0,
            TensorType::Q4_K,
            TensorType::Q6_K,
        ] {
            let plain = error(&row, &round_trip(dtype, &row, None), &weights);
            let with = error(&row, &round_trip(dtype, &row, Some(&weights)), &weights);
            assert!(with < plain, "{}: {with} is not below {plain}", dtype.as_str());
        }
    }

    #[test]
    fn zeros_stay_zeros_and_extremes_are_refused() {
        for dtype in TYPES {
            assert!(round_trip(dtype, &[0.0; 512], None).iter().all(|&x| x == 0.0), "{dtype:?}");
        }
        let mut out = [0; 144];
        let error = encode_row(TensorType::Q4_K, &[f32::NAN; 256], None, &mut out).unwrap_err();
        assert!(matches!(error, BadWeight::NotFinite { column: 0, .. }));
        let error = encode_row(TensorType::Q4_K, &[3e38; 256], None, &mut out).unwrap_err();
        assert!(matches!(error, BadWeight::TooLarge { .. }));
    }

    #[test]
    fn rows_that_do_not_fill_blocks_fall_back() {
        use TensorType::{F32, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0};
        assert_eq!(fallback(Q4_K, 576), Some(Q5_0));
        assert_eq!(fallback(Q6_K, 576), Some(Q8_0));
        assert_eq!(fallback(Q4_K, 1536), Some(Q4_K));
        assert_eq!(fallback(Q4_0, 33), None);
        assert_eq!(fallback(F32, 33), Some(F32));
    }
}
