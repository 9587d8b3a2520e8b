//! Dimensions of a decoder, and what its family does besides.

use serde::{Deserialize, Serialize};

/// The model families the engine defines. The graph is one; what differs is in [`Features`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Family {
    /// Llama 2 and 3, and what shares their graph.
    Llama = 0,
    /// Mistral: a sliding window.
    Mistral = 1,
    /// Qwen 2 and 2.5: biases.
    Qwen2 = 2,
    /// Qwen 3: queries and keys are normalised.
    Qwen3 = 3,
    /// Gemma 2: norms around both parts, soft caps, every other layer local.
    Gemma2 = 4,
    /// Gemma 3: norms around both parts, five of six layers local.
    Gemma3 = 5,
    /// Phi 3 and 4.
    Phi3 = 6,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
    ];

    /// As `general.architecture` of GGUF and `model_type` of `config.json` spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
        }
    }

    /// Their names, for messages.
    pub fn known() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }
}

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RopeStyle {
    /// Neighbours: `(0, 1), (2, 3), …` (GGUF's `llama`).
    Interleaved,
    /// Halves: `(0, d/2), (1, d/2 + 1), …` (Hugging Face's convention).
    Halves,
}

/// How angles are stretched for contexts longer than the model was first trained for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Positions are divided by it; 1 for none.
    Linear(f32),
    /// Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between mixed.
    Llama3 {
        /// Divisor of slow frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are slow.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are fast.
        high_freq_factor: f32,
        /// Context of the first training.
        original_context: f32,
    },
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
    /// For long contexts.
    pub scaling: RopeScaling,
}

/// What goes through the gate of the feed-forward part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    #[default]
    Silu = 0,
    /// GELU by way of tanh.
    GeluTanh = 1,
}

/// Attention that sees the last positions alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// How many positions, its own included.
    pub size: u32,
    /// Which layers: all whose number, counted from `offset`, is no multiple of it; 0 for every layer.
    pub every: u32,
    /// Of the count: with 1, layers `every - 1`, `2 every - 1`, … see everything.
    pub offset: u32,
    /// Base and scaling of the angles in these layers, where they differ.
    pub rope: Option<RopeConfig>,
}

/// What a family does that Llama does not. The default is Llama's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Features {
    /// `q`, `k` and `v` have biases.
    pub qkv_bias: bool,
    /// Query and key heads are normalised before they are rotated.
    pub qk_norm: bool,
    /// What attention and the feed-forward part give is normalised before it is added.
    pub post_norms: bool,
    /// Gains of norms are stored less 1.
    pub gain_plus_one: bool,
    /// In the feed-forward part.
    pub activation: Activation,
    /// Rows of the embedding are multiplied by it.
    pub embedding_scale: f32,
    /// Scores are multiplied by it; `1 / sqrt(head_dim)` where nothing is said.
    pub attention_scale: Option<f32>,
    /// Scores are `c * tanh(x / c)`; 0 for none.
    pub attention_softcap: f32,
    /// The same for logits.
    pub logit_softcap: f32,
    /// Local layers.
    pub window: Option<Window>,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            qkv_bias: false,
            qk_norm: false,
            post_norms: false,
            gain_plus_one: false,
            activation: Activation::Silu,
            embedding_scale: 1.0,
            attention_scale: None,
            attention_softcap: 0.0,
            logit_softcap: 0.0,
            window: None,
        }
    }
}

impl Features {
    /// What all models of a family do, whatever their files say; `hidden` is their width.
    pub(super) fn of(family: Family, hidden: u32) -> Self {
        let gemma = matches!(family, Family::Gemma2 | Family::Gemma3);
        let llama = Self {
            qkv_bias: family == Family::Qwen2,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            ..Self::default()
        };
        if !gemma {
            return llama;
        }
        Self {
            post_norms: true,
            activation: Activation::GeluTanh,
            embedding_scale: (hidden as f32).sqrt(),
            ..llama
        }
    }
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
    /// What the family does besides.
    pub features: Features,
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

    /// The vectors of a layer: their tensors' names after `blk.N.`, and their lengths.
    pub fn layer_vectors(&self) -> Vec<(&'static str, u64)> {
        let [hidden, q, kv, head] =
            [self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim]
                .map(u64::from);
        let mut all = vec![("attn_norm.weight", hidden), ("ffn_norm.weight", hidden)];
        if self.features.qkv_bias {
            all.extend([("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)]);
        }
        if self.features.qk_norm {
            all.extend([("attn_q_norm.weight", head), ("attn_k_norm.weight", head)]);
        }
        if self.features.post_norms {
            all.extend([("post_attention_norm.weight", hidden), ("post_ffw_norm.weight", hidden)]);
        }
        all
    }

    /// Whether the graph uses a tensor of that name, fused ones included.
    pub fn has_place(&self, name: &str) -> bool {
        let Some((layer, rest)) = name.strip_prefix("blk.").and_then(|r| r.split_once('.')) else {
            return match name {
                "token_embd.weight" | "output_norm.weight" | "output.weight" => true,
                _ => name == "rope_freqs.weight" && self.rope_factors,
            };
        };
        layer.parse::<u32>().is_ok_and(|layer| layer < self.layers)
            && (rest == "attn_qkv.weight"
                || self.layer_vectors().iter().any(|(vector, _)| *vector == rest)
                || (self.layer_matrices().iter())
                    .any(|(matrix, _)| rest.strip_suffix(".weight") == Some(matrix)))
    }

    /// The window of a layer, if it has one.
    pub fn window(&self, layer: u32) -> Option<&Window> {
        let local = |w: &&Window| w.every == 0 || !(layer + w.offset).is_multiple_of(w.every);
        self.features.window.as_ref().filter(local)
    }

    /// Bytes of K and V of one position in one layer, scales included.
    pub fn kv_bytes_per_position(&self, dtype: super::Dtype) -> u64 {
        let scale = if dtype == super::Dtype::Int8 { 4 } else { 0 };
        let head = u64::from(self.head_dim) * dtype.bytes() as u64 + scale;
        2 * u64::from(self.kv_heads) * head
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_local_as_their_family_says() {
        let rope = RopeConfig {
            base: 1e4,
            dim: 16,
            style: RopeStyle::Halves,
            scaling: RopeScaling::Linear(1.0),
        };
        let mut config = ModelConfig {
            family: Family::Gemma3,
            layers: 12,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: 128,
            vocab: 64,
            context: 64,
            rms_eps: 1e-5,
            rope,
            tied_head: true,
            rope_factors: false,
            features: Features::default(),
        };
        let local = |config: &ModelConfig| -> Vec<u32> {
            (0..12).filter(|&i| config.window(i).is_some()).collect()
        };
        assert!(local(&config).is_empty());
        let mut window = |every, offset| {
            config.features.window = Some(Window { size: 8, every, offset, rope: None });
            local(&config)
        };
        assert_eq!(window(0, 0).len(), 12);
        assert_eq!(window(2, 1), [0, 2, 4, 6, 8, 10]);
        assert_eq!(window(6, 1), [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]);
    }
}
