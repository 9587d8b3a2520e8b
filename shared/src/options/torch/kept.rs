//! What the torch engine keeps matrices as, by their shape and by what they do: one rule for the engine,
//! which builds them, and for plans, which reckon with their bytes.

use serde::{Deserialize, Serialize};

use super::{TorchDtype, TorchOptions};
use crate::model::TensorEntry;
use crate::options::Device;

/// Inputs that share a scale of int4.
pub const INT4_GROUP: u64 = 32;

/// What a matrix does in the model, as far as that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Embedding or head.
    Tokens,
    /// Chooses experts.
    Router,
    /// Any other.
    Layer,
}

impl Role {
    /// By the tensor's name.
    pub fn of(name: &str) -> Self {
        match name {
            "token_embd.weight" | "output.weight" => Self::Tokens,
            _ if name.contains(".ffn_gate_inp") => Self::Router,
            _ => Self::Layer,
        }
    }
}

/// How a torch engine keeps weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TorchKept {
    /// As what it was told to.
    pub dtype: TorchDtype,
    /// In the memory of a GPU, which no other node has.
    pub gpu: bool,
}

impl TorchKept {
    /// By these options.
    pub fn by(options: &TorchOptions) -> Self {
        Self { dtype: options.dtype(), gpu: options.device() != Device::Cpu }
    }

    /// Bytes of an element that is multiplied.
    pub fn compute_bytes(self) -> u64 {
        match self.dtype {
            TorchDtype::F32 => 4,
            TorchDtype::Int8 | TorchDtype::Int4 if !self.gpu => 4,
            _ => 2,
        }
    }

    /// What a matrix of this shape is kept as; `Bf16` stands for what is computed in.
    pub fn kept_as(self, role: Role, rows: u64, cols: u64) -> TorchDtype {
        // As the kernels of processors and GPUs together ask for it.
        let int4 = cols.is_multiple_of(128) || (!self.gpu && cols.is_multiple_of(INT4_GROUP));
        match self.dtype {
            TorchDtype::Int8 | TorchDtype::Int4 | TorchDtype::Fp8 if role == Role::Router => {
                TorchDtype::Bf16
            }
            TorchDtype::Int4 if role == Role::Tokens => TorchDtype::Int8,
            TorchDtype::Fp8 if role == Role::Tokens => TorchDtype::Bf16,
            TorchDtype::Int4 if rows.is_multiple_of(16) && int4 => TorchDtype::Int4,
            TorchDtype::Int4 => TorchDtype::Int8,
            TorchDtype::Fp8 if !(rows.is_multiple_of(16) && cols.is_multiple_of(16)) => {
                TorchDtype::Bf16
            }
            other => other,
        }
    }

    /// Bytes of a matrix of this shape.
    pub fn matrix_bytes(self, role: Role, rows: u64, cols: u64) -> u64 {
        let n = rows.saturating_mul(cols);
        match self.kept_as(role, rows, cols) {
            TorchDtype::F32 | TorchDtype::F16 | TorchDtype::Bf16 => {
                n.saturating_mul(self.compute_bytes())
            }
            TorchDtype::Int8 => n.saturating_add(rows.saturating_mul(self.compute_bytes())),
            TorchDtype::Fp8 => n.saturating_add(4),
            // Half a byte, and two numbers for each group.
            TorchDtype::Int4 => n / 2 + n / INT4_GROUP * 2 * self.compute_bytes(),
        }
    }

    /// Bytes of a tensor of a model.
    pub fn tensor_bytes(self, tensor: &TensorEntry) -> u64 {
        match tensor.dims[..] {
            // The parts of a matrix that a checkpoint keeps as several tensors lie in the matrix.
            _ if tensor.is_part() => 0,
            [cols, rows] => self.matrix_bytes(Role::of(&tensor.name), rows, cols),
            _ => tensor.elements().saturating_mul(4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_matrix() {
        let of = |dtype, gpu, role| TorchKept { dtype, gpu }.matrix_bytes(role, 256, 128);
        let n = 256 * 128;
        for (dtype, gpu, expected) in [
            (TorchDtype::F32, false, 4 * n),
            (TorchDtype::Bf16, true, 2 * n),
            (TorchDtype::Int8, true, n + 2 * 256),
            (TorchDtype::Int8, false, n + 4 * 256),
            (TorchDtype::Int4, true, n / 2 + n / 32 * 4),
            (TorchDtype::Fp8, true, n + 4),
        ] {
            assert_eq!(of(dtype, gpu, Role::Layer), expected, "{dtype:?}");
        }
        assert_eq!(of(TorchDtype::Int4, true, Role::Tokens), n + 2 * 256);
        assert_eq!(of(TorchDtype::Int4, true, Role::Router), 2 * n);
        let odd = TorchKept { dtype: TorchDtype::Int4, gpu: true };
        assert_eq!(odd.kept_as(Role::Layer, 16, 96), TorchDtype::Int8);
        assert_eq!(Role::of("blk.3.ffn_gate_inp.weight"), Role::Router);
    }
}
