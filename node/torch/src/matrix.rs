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

use millrace_shared::options::TorchDtype;
use tch::{Kind, TchError, Tensor};

use crate::Place;

/// Inputs that share a scale of int4.
pub(crate) const GROUP: i64 = 32;
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

/// What a matrix does in the model, as far as that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Embedding or head.
    Tokens,
    /// Chooses experts.
    Router,
    /// Any other.
    Layer,
}

impl Role {
    /// By the tensor's name.
    pub(crate) fn of(name: &str) -> Self {
        match name {
            "token_embd.weight" | "output.weight" => Self::Tokens,
            _ if name.contains(".ffn_gate_inp") => Self::Router,
            _ => Self::Layer,
        }
    }
}

/// What a matrix of this shape is kept as; `Bf16` stands for what is computed in.
fn kept_as(place: Place, role: Role, rows: i64, cols: i64) -> TorchDtype {
    // As the kernels of processors and GPUs together ask for it.
    let int4 = cols % 128 == 0 || (!place.device.is_cuda() && cols % GROUP == 0);
    match place.dtype {
        TorchDtype::Int8 | TorchDtype::Int4 | TorchDtype::Fp8 if role == Role::Router => {
            TorchDtype::Bf16
        }
        TorchDtype::Int4 if role == Role::Tokens => TorchDtype::Int8,
        TorchDtype::Fp8 if role == Role::Tokens => TorchDtype::Bf16,
        TorchDtype::Int4 if rows % 16 == 0 && int4 => TorchDtype::Int4,
        TorchDtype::Int4 => TorchDtype::Int8,
        TorchDtype::Fp8 if rows % 16 != 0 || cols % 16 != 0 => TorchDtype::Bf16,
        other => other,
    }
}

impl Builder {
    /// Room for a matrix.
    pub(crate) fn new(place: Place, role: Role, rows: i64, cols: i64) -> Result<Self, TchError> {
        let device = place.device;
        let dtype = kept_as(place, role, rows, cols);
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

    /// About what a matrix of this shape will take.
    pub(crate) fn expected_bytes(place: Place, role: Role, rows: u64, cols: u64) -> u64 {
        let n = rows.saturating_mul(cols);
        match kept_as(place, role, rows as i64, cols as i64) {
            TorchDtype::F32 | TorchDtype::F16 | TorchDtype::Bf16 => {
                n.saturating_mul(element_bytes(place.compute))
            }
            TorchDtype::Int8 | TorchDtype::Fp8 => n.saturating_add(rows * 4),
            // Half a byte, and two numbers for each group.
            TorchDtype::Int4 => n / 2 + n / GROUP as u64 * 2 * element_bytes(place.compute),
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
