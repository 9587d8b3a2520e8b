//! One row of weights to the bytes of a GGUF type, as GGUF's reference quantisers (`ggml-quants.c`,
//! `quantize_row_*_ref`) do it, bit for bit; Q4_0 and Q4_1 also with searched scales.
//!
//! Blocks are of 32 weights. Scales are formed in f32 and stored as f16; a scale that f16 rounds to
//! zero stands for a block of equal values, whatever the quants.

use half::{bf16, f16};
use millrace_shared::model::TensorType;

use super::Rounding;
use super::search::{self, Affine};

/// Weights of a block.
pub(super) const BLOCK: usize = 32;

/// A value that a type cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum BadWeight {
    /// NaN or an infinity.
    #[error("weight {column} is {value}; a model has finite weights only")]
    NotFinite {
        /// Place in the row, from 0.
        column: usize,
        /// What it is.
        value: f32,
    },
    /// Too large.
    #[error("weights from {column} on are too large for {}: {value:e} does not fit", .dtype.as_str())]
    TooLarge {
        /// Place in the row, from 0: of the weight, or of its block.
        column: usize,
        /// The weight, scale or minimum that does not fit.
        value: f32,
        /// The type.
        dtype: TensorType,
    },
}

/// Writes `row` as `dtype` (one of [`super::TYPES`]) into `out`, which has the length that the type
/// needs; rows of quantised types are whole blocks.
///
/// # Errors
/// If a weight is not finite, or too large for the type.
pub fn quantise_row(
    dtype: TensorType,
    rounding: Rounding,
    row: &[f32],
    out: &mut [u8],
) -> Result<(), BadWeight> {
    if let Some(column) = row.iter().position(|x| !x.is_finite()) {
        return Err(BadWeight::NotFinite { column, value: row[column] });
    }
    let too_large = |column: usize, value| BadWeight::TooLarge { column, value, dtype };
    match dtype {
        TensorType::F32 => {
            out.chunks_exact_mut(4).zip(row).for_each(|(o, x)| o.copy_from_slice(&x.to_le_bytes()));
            Ok(())
        }
        TensorType::F16 => halves(row, out, |x| {
            let h = f16::from_f32(x);
            h.is_finite().then(|| h.to_le_bytes())
        })
        .map_err(|column| too_large(column, row[column])),
        TensorType::BF16 => halves(row, out, |x| {
            let h = bf16::from_f32(x);
            h.is_finite().then(|| h.to_le_bytes())
        })
        .map_err(|column| too_large(column, row[column])),
        _ => {
            let bytes = dtype.block_bytes() as usize;
            let (blocks, _) = row.as_chunks::<BLOCK>();
            for (i, (x, out)) in blocks.iter().zip(out.chunks_exact_mut(bytes)).enumerate() {
                let done = match dtype {
                    TensorType::Q8_0 => q8_0(x, out),
                    TensorType::Q4_0 => q4_0(x, rounding, out),
                    TensorType::Q4_1 => q4_1(x, rounding, out),
                    _ => unreachable!("invariant: plans have writable types only"),
                };
                done.map_err(|value| too_large(i * BLOCK, value))?;
            }
            Ok(())
        }
    }
}

/// The column that does not fit, otherwise.
fn halves(row: &[f32], out: &mut [u8], half: impl Fn(f32) -> Option<[u8; 2]>) -> Result<(), usize> {
    for (i, (out, &x)) in out.chunks_exact_mut(2).zip(row).enumerate() {
        out.copy_from_slice(&half(x).ok_or(i)?);
    }
    Ok(())
}

/// `x` as f16, or `x` again where that is infinite.
fn fits(x: f32) -> Result<f16, f32> {
    let h = f16::from_f32(x);
    if h.is_finite() { Ok(h) } else { Err(x) }
}

/// To the nearest integer, halves away from zero; small numbers only.
fn round_away(x: f32) -> i32 {
    let whole = x as i32;
    let rest = x - whole as f32;
    whole + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)
}

/// `1 / d`, or 0 where `d` is 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// `d = absmax / 127`, `q = round(x / d)`.
fn q8_0(x: &[f32; BLOCK], out: &mut [u8]) -> Result<(), f32> {
    let d = x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
    let scale = fits(d)?;
    // A subnormal `d` has no finite inverse, and is 0 as f16.
    let inv = if scale == f16::ZERO { 0.0 } else { inverse(d) };
    out[..2].copy_from_slice(&scale.to_le_bytes());
    for (out, x) in out[2..].iter_mut().zip(x) {
        *out = round_away(x * inv) as i8 as u8;
    }
    Ok(())
}

/// The value of greatest magnitude becomes -8: `d = it / -8`, `q = floor(x / d + 8.5)`, at most 15.
fn q4_0(x: &[f32; BLOCK], rounding: Rounding, out: &mut [u8]) -> Result<(), f32> {
    let extreme = x.iter().fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let d = extreme / -8.0;
    let mut scale = fits(d)?;
    let mut q = [8u8; BLOCK];
    if scale.to_f32() != 0.0 {
        let inv = inverse(d);
        q = std::array::from_fn(|i| (x[i] * inv + 8.5).min(15.0) as u8);
        if rounding == Rounding::Search {
            (scale, q) = search::q4_0(x, extreme, (scale, q));
        }
    }
    out[..2].copy_from_slice(&scale.to_le_bytes());
    put_nibbles(&q, &mut out[2..]);
    Ok(())
}

/// The least value becomes 0 and the greatest 15: `d = (max - min) / 15`, `q = floor((x - min) / d
/// + 0.5)`, at most 15.
fn q4_1(x: &[f32; BLOCK], rounding: Rounding, out: &mut [u8]) -> Result<(), f32> {
    let least = x.iter().copied().fold(f32::INFINITY, f32::min);
    let greatest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let d = (greatest - least) / 15.0;
    let mut block = Affine { scale: fits(d)?, min: fits(least)?, q: [0; BLOCK] };
    if block.scale != f16::ZERO {
        let inv = inverse(d);
        block.q = std::array::from_fn(|i| ((x[i] - least) * inv + 0.5).min(15.0) as u8);
        if rounding == Rounding::Search {
            block = search::q4_1(x, (least, greatest), block);
        }
    }
    out[..2].copy_from_slice(&block.scale.to_le_bytes());
    out[2..4].copy_from_slice(&block.min.to_le_bytes());
    put_nibbles(&block.q, &mut out[4..]);
    Ok(())
}

/// Element `j` low in byte `j`, element `j + 16` high.
fn put_nibbles(q: &[u8; BLOCK], out: &mut [u8]) {
    for (j, out) in out.iter_mut().enumerate() {
        *out = q[j] | (q[j + BLOCK / 2] << 4);
    }
}
