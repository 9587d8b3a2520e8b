//! Element types, and a tensor as a file lists it.

use serde::{Deserialize, Serialize};

/// Types of activations and of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Dtype {
    /// 32-bit float.
    F32 = 0,
    /// IEEE half.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// Token ids.
    U32 = 3,
    /// Integers with a scale per position and head: the KV cache alone.
    Int8 = 4,
}

impl Dtype {
    /// Bytes per element, scales not counted.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }
    /// From the number on the wire.
    pub fn from_wire(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Bf16,
            3 => Self::U32,
            _ => return None,
        })
    }
    /// As flags spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::U32 => "u32",
            Self::Int8 => "int8",
        }
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            _ => Err(format!("unknown dtype '{s}': use f32, f16, bf16 or int8")),
        }
    }
}

macro_rules! tensor_types {
    ($($name:ident = $id:literal, $text:literal, $block:literal, $bytes:literal;)*) => {
        /// Storage types of GGUF tensors, by ggml's numbers, and, from 1000 on, of quantised matrices
        /// in folders. All known ones are named, so that an error can name what it does not support.
        #[allow(non_camel_case_types, missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[repr(u32)]
        pub enum TensorType { $($name = $id,)* }

        impl TensorType {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// From ggml's number.
            pub fn from_ggml(n: u32) -> Option<Self> {
                let found = match n { $($id => Some(Self::$name),)* _ => None };
                found.filter(|t| t.is_ggml())
            }
            /// As ggml spells it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
            /// Elements per block.
            pub fn block_elements(self) -> u64 {
                match self { $(Self::$name => $block,)* }
            }
            /// Bytes per block.
            pub fn block_bytes(self) -> u64 {
                match self { $(Self::$name => $bytes,)* }
            }
        }
    };
}

tensor_types! {
    F32 = 0, "F32", 1, 4;
    F16 = 1, "F16", 1, 2;
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q8_1 = 9, "Q8_1", 32, 36;
    Q2_K = 10, "Q2_K", 256, 84;
    Q3_K = 11, "Q3_K", 256, 110;
    Q4_K = 12, "Q4_K", 256, 144;
    Q5_K = 13, "Q5_K", 256, 176;
    Q6_K = 14, "Q6_K", 256, 210;
    Q8_K = 15, "Q8_K", 256, 292;
    IQ2_XXS = 16, "IQ2_XXS", 256, 66;
    IQ2_XS = 17, "IQ2_XS", 256, 74;
    IQ3_XXS = 18, "IQ3_XXS", 256, 98;
    IQ1_S = 19, "IQ1_S", 256, 50;
    IQ4_NL = 20, "IQ4_NL", 32, 18;
    IQ3_S = 21, "IQ3_S", 256, 110;
    IQ2_S = 22, "IQ2_S", 256, 82;
    IQ4_XS = 23, "IQ4_XS", 256, 136;
    I8 = 24, "I8", 1, 1;
    I16 = 25, "I16", 1, 2;
    I32 = 26, "I32", 1, 4;
    I64 = 27, "I64", 1, 8;
    F64 = 28, "F64", 1, 8;
    IQ1_M = 29, "IQ1_M", 256, 56;
    BF16 = 30, "BF16", 1, 2;
    TQ1_0 = 34, "TQ1_0", 256, 54;
    TQ2_0 = 35, "TQ2_0", 256, 66;
    MXFP4 = 39, "MXFP4", 32, 17;
    NVFP4 = 40, "NVFP4", 64, 36;
    Q1_0 = 41, "Q1_0", 128, 18;
    GPTQ_4 = 1000, "GPTQ-4", 32, 16;
    GPTQ_4_V2 = 1001, "GPTQ-4-v2", 32, 16;
    GPTQ_4_ACT = 1002, "GPTQ-4-act", 8, 4;
    GPTQ_4_V2_ACT = 1003, "GPTQ-4-v2-act", 8, 4;
    AWQ_4 = 1004, "AWQ-4", 32, 16;
    F8_E4M3 = 1005, "F8_E4M3", 1, 1;
    F8_E4M3_B128 = 1006, "F8_E4M3-128x128", 1, 1;
    INT4 = 1007, "INT4", 32, 24;
}

/// What else belongs to a matrix `NAME.weight`: `NAME.scales` and so on of a quantised one of a folder,
/// and what [`super::SparseForm::parts`] names.
const PARTS: [&str; 8] = [
    "scales",
    "qzeros",
    "g_idx",
    "columns",
    "bitmask",
    "row_starts",
    "tile_columns",
    "tile_starts",
];

impl TensorType {
    /// Bytes of `elements` elements; `None` where they do not fill whole blocks or overflow.
    pub fn bytes_of(self, elements: u64) -> Option<u64> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// Whether it is plain floats, each for itself.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Whether GGUF files have it.
    pub fn is_ggml(self) -> bool {
        (self as u32) < 1000
    }

    /// What makes a matrix of this type out of its own bytes: names of further tensors, and whether
    /// there is no matrix without. Empty for types whose rows lie one after the other as they are.
    pub fn parts(self) -> &'static [(&'static str, bool)] {
        const GPTQ: [(&str, bool); 3] = [("scales", true), ("qzeros", true), ("g_idx", false)];
        const ACT: [(&str, bool); 3] = [("scales", true), ("qzeros", true), ("g_idx", true)];
        match self {
            Self::GPTQ_4 | Self::GPTQ_4_V2 => &GPTQ,
            Self::GPTQ_4_ACT | Self::GPTQ_4_V2_ACT => &ACT,
            Self::AWQ_4 => &GPTQ[..2],
            Self::F8_E4M3 | Self::F8_E4M3_B128 => &GPTQ[..1],
            _ => &[],
        }
    }

    /// The type in which a matrix of several tensors is read, row by row; others are as they are.
    ///
    /// INT4 is blocks of 32: f32 scale, f32 minimum, nibbles as in Q4_1. It holds `scale * (q - zero)`
    /// exactly for groups of whole blocks. What F16 holds is rounded once, by 2^-11 of the value at
    /// most (below 2^-14 by 2^-25): groups that are scattered over the inputs, and eight-bit floats.
    pub fn read_as(self) -> Self {
        match self {
            Self::GPTQ_4 | Self::GPTQ_4_V2 | Self::AWQ_4 => Self::INT4,
            Self::GPTQ_4_ACT | Self::GPTQ_4_V2_ACT | Self::F8_E4M3 | Self::F8_E4M3_B128 => {
                Self::F16
            }
            other => other,
        }
    }

    /// The type as which the CPU engine computes with it: itself, or one that holds every value of
    /// it exactly. `None` where there is none.
    pub fn computed_as(self) -> Option<Self> {
        Some(match self.read_as() {
            Self::F32
            | Self::F16
            | Self::BF16
            | Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Q8_0
            | Self::Q2_K
            | Self::Q3_K
            | Self::Q4_K
            | Self::Q5_K
            | Self::Q6_K
            | Self::IQ4_NL
            | Self::IQ4_XS
            | Self::MXFP4
            | Self::INT4 => self.read_as(),
            // `d * q` with a `q` of -1, 0 or 1.
            Self::TQ1_0 | Self::TQ2_0 => Self::Q4_0,
            _ => return None,
        })
    }

    /// Whether the CPU engine computes with it.
    pub fn is_supported(self) -> bool {
        self.computed_as().is_some()
    }

    /// What to do about a tensor of a type that the CPU engine does not compute with: the end of a
    /// message.
    pub fn advice() -> String {
        let known = Self::ALL.iter().filter(|t| t.is_ggml() && t.is_supported());
        let names: Vec<&str> = known.map(|t| t.as_str()).collect();
        format!(
            "matrices can be {}, vectors F32; `millrace quantize` reads the same types, and makes \
             F16 and BF16 vectors F32; convert other files elsewhere, for example with \
             `llama-quantize --allow-requantize IN OUT Q8_0` of llama.cpp",
            names.join(", ")
        )
    }
}

/// A tensor of a model file: where it lies, and what it must hash to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Name as in the file.
    pub name: String,
    /// Storage type.
    pub dtype: TensorType,
    /// Dimensions, fastest first: a matrix is `[inputs, outputs]`.
    pub dims: Vec<u64>,
    /// Which of the model's files it is in.
    pub file: u16,
    /// Offset in the file, from its first byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// BLAKE3 of the bytes; zero until hashed.
    pub hash: [u8; 32],
}

impl TensorEntry {
    /// Elements in all.
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Whether it says no more than how a matrix beside it is read, see [`TensorType::parts`] and
    /// [`super::SparseForm::parts`].
    pub fn is_part(&self) -> bool {
        self.name.rsplit_once('.').is_some_and(|(_, kind)| PARTS.contains(&kind))
    }
}

#[cfg(test)]
mod tests {
    use super::TensorType;

    #[test]
    fn types_are_computed_as_types_with_kernels() {
        for &dtype in TensorType::ALL {
            let ggml = Some(dtype).filter(|d| d.is_ggml());
            assert_eq!(TensorType::from_ggml(dtype as u32), ggml);
            assert!(dtype.parts().is_empty() || (ggml.is_none() && dtype.read_as() != dtype));
            if let Some(other) = dtype.computed_as() {
                assert_eq!(other.computed_as(), Some(other), "{}", dtype.as_str());
                let whole = dtype.block_elements().is_multiple_of(other.block_elements());
                assert!(whole, "{} in blocks of another size", dtype.as_str());
            }
        }
    }

    #[test]
    fn advice_names_what_is_computed() {
        let advice = TensorType::advice();
        for (name, there) in [("Q5_1,", true), ("Q3_K,", true), ("MXFP4,", true), ("IQ2_XS", false)]
        {
            assert_eq!(advice.contains(name), there, "{name} in: {advice}");
        }
    }
}
