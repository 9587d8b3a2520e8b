//! Dimensions of a decoder.

use serde::{Deserialize, Serialize};

/// The model families the engine defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    /// Llama and what shares its graph.
    Llama,
}

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RopeStyle {
    /// Neighbours: `(0, 1), (2, 3), …` (GGUF's `llama`).
    Interleaved,
    /// Halves: `(0, d/2), (1, d/2 + 1), …` (Hugging Face's convention).
    Halves,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub base: f32,
    /// Rotated elements per head.
    pub dim: u32,
    /// Pairing.
    pub style: RopeStyle,
    /// Linear position scale: positions are divided by it; 1 for none.
    pub linear_scale: f32,
}

/// Dimensions of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Which definition.
    pub family: Family,
    /// Transformer layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Vocabulary.
    pub vocab: u32,
    /// Longest context the model was made for.
    pub context: u32,
    /// Epsilon of RMS normalisation.
    pub rms_eps: f32,
    /// Positions.
    pub rope: RopeConfig,
    /// Whether the head is the embedding matrix.
    pub tied_head: bool,
    /// Whether a tensor of RoPE frequency factors (`rope_freqs.weight`) is present.
    pub rope_factors: bool,
}

impl ModelConfig {
    /// The matrices of a layer: their tensors' names after `blk.N.` and before `.weight`, and their
    /// columns (inputs) and rows (outputs).
    pub fn layer_matrices(&self) -> [(&'static str, [u64; 2]); 7] {
        let widths =
            [self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn];
        let [h, q, kv, f] = widths.map(u64::from);
        [
            ("attn_q", [h, q]),
            ("attn_k", [h, kv]),
            ("attn_v", [h, kv]),
            ("attn_output", [q, h]),
            ("ffn_gate", [h, f]),
            ("ffn_up", [h, f]),
            ("ffn_down", [f, h]),
        ]
    }

    /// Bytes of K and V of one position in one layer, scales included.
    pub fn kv_bytes_per_position(&self, dtype: super::Dtype) -> u64 {
        let scale = if dtype == super::Dtype::Int8 { 4 } else { 0 };
        let head = u64::from(self.head_dim) * dtype.bytes() as u64 + scale;
        2 * u64::from(self.kv_heads) * head
    }
}
