//! Matrices as they lie in the device's memory, and products with them.
//!
//! | kept as | what a weight is | product |
//! |---|---|---|
//! | f32, f16, bf16 | itself, rounded | `linear` |
//! | int8 | `q * scale` of its output, `scale = absmax / 127` | `_weight_int8pack_mm`; where the device has none, `(x q) * scale` |
//! | int4 | `(q - 8) * scale + zero` of 32 inputs | `_weight_int4pack_mm` |
//! | fp8 | `q * scale` of the matrix; activations likewise, by their own largest | `_scaled_mm` |
//!
//! A matrix whose shape a kernel does not take is kept in the next better type: int4 as int8, fp8 as
//! what is computed in. So are embedding and head, where small differences choose the token, and of
//! which single rows are read; routers are always kept as floats.

use millrace_shared::options::{INT4_GROUP, Role, TorchDtype};
use tch::{Kind, TchError, Tensor};

use crate::Place;

/// Inputs that share a scale of int4.
pub(crate) const GROUP: i64 = INT4_GROUP as i64;
/// The largest value of E4M3.
const FP8_MAX: f64 = 448.0;
/// Below this there is nothing but zeros.
const TINY: f64 = 1e-30;

/// A matrix `rows x cols`.
#[derive(Debug)]
pub enum Matrix {
    /// Floats, in the type that is computed in.
    Plain(Tensor),
    /// `rows x cols` of i8, and a scale for each row.
    Int8 {
        /// Integers.
        q: Tensor,
        /// In the type that is computed in.
        scales: Tensor,
        /// Whether the device has a kernel for it.
        packed: bool,
    },
    /// In the order of the device's kernel.
    Int4 {
        /// Integers.
        q: Tensor,
        /// `cols / 32 x rows x 2`: scales and zeros.
        scales: Tensor,
    },
    /// E4M3.
    Fp8 {
        /// `rows x cols`.
        q: Tensor,
        /// One.
        scale: Tensor,
    },
}

/// Rows of floats on their way to a [`Matrix`].
#[derive(Debug)]
pub(crate) struct Builder {
    place: Place,
    dtype: TorchDtype,
    cols: i64,
    /// As floats, or as integers.
    q: Tensor,
    /// By rows: of int8 one, of int4 a pair for each group.
    scales: Tensor,
    filled: i64,
}

impl Builder {
    /// Room for a matrix.
    pub(crate) fn new(place: Place, role: Role, rows: i64, cols: i64) -> Result<Self, TchError> {
        let device = place.device;
        let dtype = place.kept().kept_as(role, rows as u64, cols as u64);
        let (kind, scales) = match dtype {
            TorchDtype::Int8 => (Kind::Int8, vec![rows]),
            TorchDtype::Int4 => (Kind::Int, vec![rows, cols / GROUP, 2]),
            // Quantised when all rows are there.
            _ => (place.compute, vec![0]),
        };
        let q = Tensor::f_empty([rows, cols], (kind, device))?;
        let scales = Tensor::f_empty(scales, (Kind::Float, device))?;
        Ok(Self { place, dtype, cols, q, scales, filled: 0 })
    }

    /// The next rows, one after the other.
    pub(crate) fn push(&mut self, rows: &[f32]) -> Result<(), TchError> {
        let count = rows.len() as i64 / self.cols;
        let x = Tensor::f_from_slice(rows)?.f_view([count, self.cols])?;
        let x = x.f_to_device(self.place.device)?;
        self.push_tensor(&x)
    }

    /// The next rows, as a matrix of f32 on the device.
    pub(crate) fn push_tensor(&mut self, x: &Tensor) -> Result<(), TchError> {
        let count = x.size()[0];
        let mut q = self.q.f_narrow(0, self.filled, count)?;
        match self.dtype {
            TorchDtype::Int8 => {
                let scale = x.f_abs()?.f_amax([1], true)?.f_clamp_min(TINY)?.f_div_scalar(127.0)?;
                q.f_copy_(&x.f_div(&scale)?.f_round()?)?;
                self.scales.f_narrow(0, self.filled, count)?.f_copy_(&scale.f_view([count])?)?;
            }
            TorchDtype::Int4 => {
                let x = x.f_view([count, self.cols / GROUP, GROUP])?;
                let (low, high) = (x.f_amin([2], true)?, x.f_amax([2], true)?);
                let scale = high.f_sub(&low)?.f_div_scalar(15.0)?.f_clamp_min(TINY)?;
                let steps = x.f_sub(&low)?.f_div(&scale)?.f_round()?.f_clamp(0.0, 15.0)?;
                q.f_copy_(&steps.f_view([count, self.cols])?)?;
                let zero = low.f_add(&scale.f_mul_scalar(8.0)?)?;
                let pairs = Tensor::f_cat(&[scale, zero], 2)?;
                self.scales.f_narrow(0, self.filled, count)?.f_copy_(&pairs)?;
            }
            _ => q.f_copy_(x)?,
        }
        self.filled += count;
        Ok(())
    }

    /// Whether rows may come as integers of groups ([`Builder::push_groups`]).
    pub(crate) fn takes_groups(&self) -> bool {
        self.dtype == TorchDtype::Int4
    }

    /// The next rows, as integers 0 to 15, and a scale and a zero for each 32 of them.
    pub(crate) fn push_groups(&mut self, steps: &[i32], pairs: &[f32]) -> Result<(), TchError> {
        let count = steps.len() as i64 / self.cols;
        let q = Tensor::f_from_slice(steps)?.f_view([count, self.cols])?;
        let pairs = Tensor::f_from_slice(pairs)?.f_view([count, self.cols / GROUP, 2])?;
        self.q.f_narrow(0, self.filled, count)?.f_copy_(&q)?;
        self.scales.f_narrow(0, self.filled, count)?.f_copy_(&pairs)?;
        self.filled += count;
        Ok(())
    }

    /// The matrix, once all rows are there.
    pub(crate) fn finish(self) -> Result<Matrix, TchError> {
        let Self { place, dtype, cols, q, scales, .. } = self;
        let probe = |m: &Matrix| {
            let x = Tensor::f_zeros([1, cols], (place.compute, place.device))?;
            m.product(&x).map(drop)
        };
        match dtype {
            TorchDtype::Int8 => {
                let scales = scales.f_to_kind(place.compute)?;
                let (q2, s2) = (q.shallow_clone(), scales.shallow_clone());
                let packed = Matrix::Int8 { q, scales, packed: true };
                match probe(&packed) {
                    Ok(()) => Ok(packed),
                    Err(_) => Ok(Matrix::Int8 { q: q2, scales: s2, packed: false }),
                }
            }
            TorchDtype::Int4 => {
                let q = if place.device.is_cuda() {
                    // Two to a byte, the first in its upper half.
                    let q = q.f_to_kind(Kind::Uint8)?;
                    let even = q.f_slice(1, 0, None, 2)?.f_mul_scalar(16)?;
                    let both = even.f_add(&q.f_slice(1, 1, None, 2)?)?.f_contiguous()?;
                    both.f_internal_convert_weight_to_int4pack(8)?
                } else {
                    q.f_internal_convert_weight_to_int4pack_for_cpu(1)?
                };
                let scales = scales.f_to_kind(place.compute)?.f_transpose(0, 1)?.f_contiguous()?;
                Ok(Matrix::Int4 { q, scales })
            }
            TorchDtype::Fp8 => {
                let x = q.f_to_kind(Kind::Float)?;
                let (q, scale) = to_fp8(&x)?;
                Ok(Matrix::Fp8 { q, scale })
            }
            _ => Ok(Matrix::Plain(q)),
        }
    }
}

/// Quantised by its largest element, and the scale.
fn to_fp8(x: &Tensor) -> Result<(Tensor, Tensor), TchError> {
    let x = x.f_to_kind(Kind::Float)?;
    let scale = x.f_abs()?.f_max()?.f_clamp_min(TINY)?.f_div_scalar(FP8_MAX)?;
    let q = x.f_div(&scale)?.f_clamp(-FP8_MAX, FP8_MAX)?.f_to_kind(Kind::Float8e4m3fn)?;
    Ok((q, scale))
}

impl Matrix {
    /// `x w^T`: `n x cols` to `n x rows`, in the type of `x`.
    pub(crate) fn product(&self, x: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Self::Plain(w) => x.f_linear(w, None::<&Tensor>),
            Self::Int8 { q, scales, packed: true } => x.f_internal_weight_int8pack_mm(q, scales),
            Self::Int8 { q, scales, packed: false } => {
                x.f_linear(&q.f_to_kind(x.f_kind()?)?, None::<&Tensor>)?.f_mul(scales)
            }
            Self::Int4 { q, scales } if x.device().is_cuda() => {
                x.f_internal_weight_int4pack_mm(q, GROUP, scales)
            }
            Self::Int4 { q, scales } => x.f_internal_weight_int4pack_mm_for_cpu(q, GROUP, scales),
            Self::Fp8 { q, scale } => {
                let (x8, x_scale) = to_fp8(x)?;
                let none = None::<&Tensor>;
                let w = q.f_transpose(0, 1)?;
                x8.f_internal_scaled_mm(&w, &x_scale, scale, none, none, x.f_kind()?, false)
            }
        }
    }

    /// Some rows, as f32; of an embedding.
    pub(crate) fn rows(&self, which: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Self::Plain(w) => w.f_index_select(0, which)?.f_to_kind(Kind::Float),
            Self::Int8 { q, scales, .. } => {
                let rows = q.f_index_select(0, which)?.f_to_kind(Kind::Float)?;
                rows.f_mul(&scales.f_index_select(0, which)?.f_unsqueeze(1)?)
            }
            Self::Int4 { .. } | Self::Fp8 { .. } => {
                Err(TchError::Kind("invariant: tables are kept in 8 bits at least".to_owned()))
            }
        }
    }

    /// Bytes of device memory.
    pub(crate) fn bytes(&self) -> u64 {
        let of = |t: &Tensor| t.numel() as u64 * element_bytes(t.kind());
        match self {
            Self::Plain(w) => of(w),
            Self::Int8 { q, scales, .. } | Self::Int4 { q, scales } => of(q) + of(scales),
            Self::Fp8 { q, scale } => of(q) + of(scale),
        }
    }
}

/// Bytes of an element.
pub(crate) fn element_bytes(kind: Kind) -> u64 {
    match kind {
        Kind::Int64 | Kind::Double => 8,
        Kind::Float | Kind::Int => 4,
        Kind::Half | Kind::BFloat16 | Kind::Int16 => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use millrace_shared::options::Device;

    use super::*;

    /// What was built from these rows, as floats: products with single inputs.
    fn read_back(dtype: TorchDtype, x: &[f32], cols: usize) -> Vec<f32> {
        let place = Place::open(Device::Cpu, dtype).unwrap();
        let rows = x.len() / cols;
        let mut builder = Builder::new(place, Role::Layer, rows as i64, cols as i64).unwrap();
        // In two parts, as large ones come.
        let half = rows / 2 * cols;
        builder.push(&x[..half]).unwrap();
        builder.push(&x[half..]).unwrap();
        let one = Tensor::eye(cols as i64, (place.compute, tch::Device::Cpu));
        let found = builder.finish().unwrap().product(&one).unwrap();
        let found = found.to_kind(Kind::Float).transpose(0, 1).contiguous().view([-1]);
        Vec::<f32>::try_from(&found).unwrap()
    }

    #[test]
    fn quantised_matrices_are_what_the_reference_says() {
        let (rows, cols) = (32, 64);
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.3
        };
        let x: Vec<f32> = (0..rows * cols).map(|_| next()).collect();
        let near = |found: &[f32], expected: &[f32], bound: f32| {
            let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(found.len() == expected.len() && off <= bound, "{off}");
        };

        // Each 32 inputs: 16 steps from the smallest to the largest.
        let int4: Vec<f32> = (x.chunks_exact(32))
            .flat_map(|group| {
                let low = group.iter().copied().fold(f32::MAX, f32::min);
                let scale = (group.iter().copied().fold(f32::MIN, f32::max) - low) / 15.0;
                group.iter().map(move |v| ((v - low) / scale).round().mul_add(scale, low))
            })
            .collect();
        let found = read_back(TorchDtype::Int4, &x, cols);
        near(&found, &int4, 1e-4);
        // The reference itself is no further from the weights than half a step.
        near(&int4, &x, 0.5 / 15.0 + 1e-6);

        // Each output: 127 steps to its largest.
        let int8: Vec<f32> = (x.chunks_exact(cols))
            .flat_map(|row| {
                let scale = row.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                row.iter().map(move |v| (v / scale).round() * scale)
            })
            .collect();
        near(&read_back(TorchDtype::Int8, &x, cols), &int8, 1e-4);
        near(&read_back(TorchDtype::F32, &x, cols), &x, 0.0);
    }
}
