//! Integers with one scale for a row or a tensor, fixed point, and signs alone. GGUF has no such
//! types: each gives the values that it would store, and [`crate::apply()`] tells how many bytes that takes.

use crate::Matrix;

/// Eight-bit integers `-127..=127` (symmetric, `scale * q`) or `0..=255` (affine, `scale * q + min`),
/// with one scale for each row or for the matrix. A symmetric scale is rounded to f16, so that
/// `as_q8_0` holds the result exactly. Returns the symmetric scales, one for each part.
pub fn int8(m: &mut Matrix, per_row: bool, affine: bool) -> Vec<f32> {
    let width = if per_row { m.cols } else { m.data.len() };
    let mut scales = Vec::new();
    for part in m.data.chunks_mut(width.max(1)) {
        match affine {
            true => int8_affine(part),
            false => scales.push(int8_symmetric(part)),
        }
    }
    scales
}

fn int8_symmetric(x: &mut [f32]) -> f32 {
    let most = x.iter().fold(0f32, |m, x| m.max(x.abs()));
    let scale = half::f16::from_f32(most / 127.0).to_f32();
    match scale == 0.0 {
        true => x.fill(0.0),
        false => x
            .iter_mut()
            .for_each(|x| *x = scale * (*x / scale).round_ties_even().clamp(-127.0, 127.0)),
    }
    scale
}

/// Blocks of Q8_0 with exactly these weights: whole multiples, up to 127, of their scale (of f16). There
/// is one scale for all, or one for each row, whose weights are whole blocks of 32. A block's own scale
/// would be another, and round them once more.
pub(crate) fn as_q8_0(m: &Matrix, scales: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(m.data.len() / 32 * 34);
    for i in 0..m.rows {
        let scale = scales[i.min(scales.len() - 1)];
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / f64::from(scale) };
        for block in m.row(i).chunks(32) {
            bytes.extend(half::f16::from_f32(scale).to_le_bytes());
            bytes.extend(block.iter().map(|x| (f64::from(*x) * inverse).round() as i8 as u8));
        }
    }
    bytes
}

fn int8_affine(x: &mut [f32]) {
    let least = x.iter().copied().fold(f32::INFINITY, f32::min);
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = (most - least) / 255.0;
    if scale > 0.0 {
        x.iter_mut().for_each(|x| {
            *x = scale * ((*x - least) / scale).round_ties_even().clamp(0.0, 255.0) + least;
        });
    }
}

/// `round(w * 2^p) * 2^-p`, the integers being of `bits` bits, two's complement: beyond their range
/// they stay at its end, or, with a `modulus`, come again at the other end of its residues, which are
/// those nearest to zero (from `-floor(q / 2)` on). Returns how many weights were beyond.
pub fn fixed_point(m: &mut Matrix, fraction_bits: i32, bits: u32, modulus: Option<u32>) -> u64 {
    let unit = 2f64.powi(fraction_bits);
    let count = modulus.unwrap_or(1 << bits);
    let least = -f64::from(count / 2);
    let most = least + f64::from(count - 1);
    let mut beyond = 0;
    for x in &mut m.data {
        let mut q = (f64::from(*x) * unit).round_ties_even();
        if q < least || q > most {
            beyond += 1;
            q = match modulus {
                Some(_) => (q - least).rem_euclid(f64::from(count)) + least,
                None => q.clamp(least, most),
            };
        }
        *x = (q / unit) as f32;
    }
    beyond
}

/// The sign of each weight times the mean magnitude of its row, or of all of the matrix (rounded to
/// f16); zero counts as positive. Least squared error among matrices of that form (Rastegari et al.,
/// XNOR-Net, 2016). Returns the magnitudes, one for each part.
pub fn binary(m: &mut Matrix, per_row: bool) -> Vec<f32> {
    let together = if per_row { m.cols } else { m.data.len() }.max(1);
    let mut scales = Vec::new();
    for part in m.data.chunks_mut(together) {
        let mean = part.iter().map(|x| f64::from(x.abs())).sum::<f64>() / part.len() as f64;
        let scale = half::f16::from_f64(mean).to_f32();
        part.iter_mut().for_each(|x| *x = if *x < 0.0 { -scale } else { scale });
        scales.push(scale);
    }
    scales
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matrix() -> impl Strategy<Value = Matrix> {
        (1usize..5, 1usize..9).prop_flat_map(|(rows, cols)| {
            proptest::collection::vec(-3f32..3.0, rows * cols)
                .prop_map(move |data| Matrix::new(rows, cols, data))
        })
    }

    proptest! {
        #[test]
        fn int8_errs_by_half_a_step_at_most(m in matrix(), per_row: bool, affine: bool) {
            let mut q = m.clone();
            int8(&mut q, per_row, affine);
            for (i, (a, b)) in m.data.iter().zip(&q.data).enumerate() {
                let part = if per_row { m.row(i / m.cols) } else { &m.data[..] };
                let most = part.iter().copied().fold(f32::MIN, f32::max);
                let least = part.iter().copied().fold(f32::MAX, f32::min);
                let largest = most.max(-least);
                let step = if affine { (most - least) / 255.0 } else { largest / 127.0 };
                // f16 rounds the scale by 2^-11.
                prop_assert!((a - b).abs() <= step * 0.5 + largest * 0.001 + 1e-6);
            }
        }

        #[test]
        fn fixed_point_in_range_is_exact_to_half_a_unit(m in matrix(), p in 0i32..12) {
            let (mut saturated, mut wrapped) = (m.clone(), m.clone());
            let (a, b) = (fixed_point(&mut saturated, p, 24, None), fixed_point(&mut wrapped, p, 24, Some(1 << 24)));
            prop_assert_eq!((a, b), (0, 0));
            prop_assert_eq!(&saturated, &wrapped);
            let unit = 2f32.powi(-p);
            prop_assert!(m.data.iter().zip(&saturated.data).all(|(a, b)| (a - b).abs() <= unit / 2.0));
        }

        #[test]
        fn no_other_scale_of_signs_is_better(m in matrix(), other in 0.0f32..3.0) {
            let error = |part: &[f32], scale: f32| -> f32 {
                part.iter().map(|x| (x.abs() - scale).powi(2)).sum()
            };
            let (mut rows, mut whole) = (m.clone(), m.clone());
            binary(&mut rows, true);
            binary(&mut whole, false);
            for i in 0..m.rows {
                prop_assert!(error(m.row(i), rows.row(i)[0].abs()) <= error(m.row(i), other) + 1e-3);
            }
            let scale = whole.data[0].abs();
            prop_assert!(whole.data.iter().all(|x| x.abs() == scale));
            prop_assert!(error(&m.data, scale) <= error(&m.data, other) + 2e-3);
        }
    }

    #[test]
    fn q8_0_holds_integers_as_they_are() {
        use millrace_engine::cpu::dequantise_row;
        use millrace_shared::model::TensorType;

        // Rows of unlike sizes; in most blocks no weight comes near the greatest of its row.
        let at = |i: usize| {
            ((i * 7919 % 1013) as f32 / 506.0 - 1.0) * if i.is_multiple_of(97) { 2.0 } else { 0.3 }
        };
        let size = |i: usize| [1.0, 1e-3, 1e-5, 0.0][i / 96];
        let m = Matrix::new(4, 96, (0..384).map(|i| at(i) * size(i)).collect());
        for (signs, per_row) in [(false, true), (false, false), (true, true), (true, false)] {
            let mut q = m.clone();
            let scales = if signs { binary(&mut q, per_row) } else { int8(&mut q, per_row, false) };
            let bytes = as_q8_0(&q, &scales);
            let mut back = vec![0f32; 384];
            assert!(dequantise_row(TensorType::Q8_0, &bytes, &mut back));
            assert_eq!(back, q.data, "{signs} {per_row}");
        }
    }

    #[test]
    fn beyond_the_range_saturation_stays_and_wrap_around_turns() {
        let m = Matrix::new(1, 4, vec![1.0, 2.0, -2.0, -2.25]);
        let (mut saturated, mut wrapped) = (m.clone(), m);
        // Four bits, two of them behind the point: -2 to 1.75.
        assert_eq!(fixed_point(&mut saturated, 2, 4, None), 2);
        assert_eq!(saturated.data, [1.0, 1.75, -2.0, -2.0]);
        assert_eq!(fixed_point(&mut wrapped, 2, 4, Some(16)), 2);
        assert_eq!(wrapped.data, [1.0, -2.0, -2.0, 1.75]);
    }

    #[test]
    fn residues_are_those_nearest_to_zero() {
        let residues = |q: u32| {
            let mut m = Matrix::new(1, 9, (-4..5i8).map(f32::from).collect());
            fixed_point(&mut m, 0, 8, Some(q));
            m.data
        };
        assert_eq!(residues(5), [1.0, 2.0, -2.0, -1.0, 0.0, 1.0, 2.0, -2.0, -1.0]);
        assert_eq!(residues(4), [0.0, 1.0, -2.0, -1.0, 0.0, 1.0, -2.0, -1.0, 0.0]);
    }
}
