//! Quantisation whose later columns make up for the errors of earlier ones (Frantar et al., GPTQ,
//! 2022).
//!
//! Scales are those of the row before anything is made up for, by importance ("static groups"), so
//! that columns can be taken in any order: those with the most active inputs first, while there is
//! most left to make up for them. On text that was not calibrated with, both matter: columns in order
//! with scales of the moment do worse than plain rounding where inputs are many and texts short.

use half::f16;
use millrace_engine::quantize::BadWeight;
use millrace_shared::model::TensorType;

use super::encode_row;
use crate::hessian::Compensation;

/// Writes a row as blocks of `dtype`. The row holds afterwards what was stored.
///
/// # Errors
/// As [`encode_row`].
pub fn gptq(
    dtype: TensorType,
    row: &mut [f32],
    by: &Compensation,
    out: &mut [u8],
) -> Result<(), BadWeight> {
    let cols = row.len();
    let block = dtype.block_elements() as usize;
    let bytes = dtype.block_bytes() as usize;
    encode_row(dtype, row, Some(&by.importance), out)?;
    let groups: Vec<Vec<(f32, f32, f32)>> =
        out.chunks_exact(bytes).map(|out| grid(dtype, out)).collect();
    let mut levels = vec![0u8; cols];
    let mut left: Vec<f32> = by.order.iter().map(|&j| row[j]).collect();
    for (k, &j) in by.order.iter().enumerate() {
        let of_block = &groups[j / block];
        let (scale, min, most) = of_block[j % block * of_block.len() / block];
        let level = if scale == 0.0 { 0.0 } else { ((left[k] - min) / scale).round() };
        let level = level.clamp(0.0, most);
        levels[j] = level as u8;
        row[j] = scale * level + min;
        let factors = &by.u[k * cols + k..(k + 1) * cols];
        let error = (left[k] - row[j]) / factors[0];
        left[k + 1..].iter_mut().zip(&factors[1..]).for_each(|(w, f)| *w -= error * f);
    }
    for (levels, out) in levels.chunks_exact(block).zip(out.chunks_exact_mut(bytes)) {
        put_levels(dtype, levels, out);
    }
    Ok(())
}

/// Scale, minimum and greatest level of each group of a block.
fn grid(dtype: TensorType, block: &[u8]) -> Vec<(f32, f32, f32)> {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let d = half(0);
    match dtype {
        TensorType::Q4_0 => vec![(d, -8.0 * d, 15.0)],
        TensorType::Q4_1 => vec![(d, half(2), 15.0)],
        TensorType::Q5_0 => vec![(d, -16.0 * d, 31.0)],
        TensorType::Q8_0 => vec![(d, -127.0 * d, 254.0)],
        TensorType::Q4_K => (0..8).map(|j| q4_k_group(&block[4..16], j, d, half(2))).collect(),
        TensorType::Q6_K => {
            let d = half(208);
            let group = |s: &u8| {
                let scale = d * f32::from(*s as i8);
                (scale, -32.0 * scale, 63.0)
            };
            block[192..208].iter().map(group).collect()
        }
        _ => unreachable!("invariant: error compensation is for blocks"),
    }
}

fn q4_k_group(six: &[u8], j: usize, d: f32, dmin: f32) -> (f32, f32, f32) {
    let (scale, min) = if j < 4 {
        (six[j] & 63, six[j + 4] & 63)
    } else {
        ((six[j + 4] & 15) | ((six[j - 4] >> 6) << 4), (six[j + 4] >> 4) | ((six[j] >> 6) << 4))
    };
    (d * f32::from(scale), -dmin * f32::from(min), 15.0)
}

/// Replaces the levels of a block whose scales stay.
fn put_levels(dtype: TensorType, q: &[u8], out: &mut [u8]) {
    let pair = |out: &mut [u8], q: &[u8]| {
        let half = q.len() / 2;
        out.iter_mut().enumerate().for_each(|(i, o)| *o = (q[i] & 15) | (q[i + half] << 4));
    };
    match dtype {
        TensorType::Q4_0 => pair(&mut out[2..18], q),
        TensorType::Q4_1 => pair(&mut out[4..20], q),
        TensorType::Q5_0 => {
            let high = q.iter().enumerate().fold(0u32, |h, (j, q)| h | u32::from(q >> 4) << j);
            out[2..6].copy_from_slice(&high.to_le_bytes());
            pair(&mut out[6..22], q);
        }
        TensorType::Q8_0 => {
            out[2..34].iter_mut().zip(q).for_each(|(o, &q)| *o = q.wrapping_sub(127));
        }
        TensorType::Q4_K => {
            for (q, out) in q.chunks_exact(64).zip(out[16..].chunks_exact_mut(32)) {
                pair(out, q);
            }
        }
        _ => super::blocks::put_q6_k(q, out),
    }
}

#[cfg(test)]
mod tests {
    use millrace_engine::cpu::dequantise_row;

    use super::*;
    use crate::hessian::Moments;
    use crate::hessian::tests::inputs;

    /// Squared error of outputs for the inputs themselves.
    fn output_error(x: &[f32], a: &[f32], b: &[f32]) -> f64 {
        let one = |x: &[f32]| -> f64 {
            let dot: f64 = x.iter().zip(a).zip(b).map(|((x, a), b)| f64::from(x * (a - b))).sum();
            dot * dot
        };
        x.chunks_exact(a.len()).map(one).sum()
    }

    #[test]
    fn what_is_returned_is_what_is_stored_and_outputs_err_less() {
        let cols = 512;
        let x = inputs(900, cols, 9);
        let mut moments = Moments::new(cols, true);
        moments.add(&x, 1);
        let by = moments.compensation(true).unwrap();
        use TensorType::{Q4_0, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0};
        for dtype in [Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K] {
            let original = inputs(1, cols, 4);
            let mut bytes = vec![0; dtype.bytes_of(cols as u64).unwrap() as usize];
            let (mut stored, mut plain) = (vec![0f32; cols], vec![0f32; cols]);
            encode_row(dtype, &original, None, &mut bytes).unwrap();
            dequantise_row(dtype, &bytes, &mut plain);
            let mut row = original.clone();
            gptq(dtype, &mut row, &by, &mut bytes).unwrap();
            dequantise_row(dtype, &bytes, &mut stored);
            for (a, b) in row.iter().zip(&stored) {
                assert!((a - b).abs() <= 1e-5 * (1.0 + a.abs()), "{dtype:?}: {a} {b}");
            }
            let (with, without) =
                (output_error(&x, &original, &row), output_error(&x, &original, &plain));
            assert!(with < 0.9 * without, "{dtype:?}: {with} {without}");
        }
    }
}
