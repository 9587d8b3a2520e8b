//! Families of models, and what they do.

use serde::{Deserialize, Serialize};

use super::rope::{LongFactors, RopeConfig};

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
    /// Mixtral: Mistral with experts.
    Mixtral = 7,
    /// Qwen 1.5 and 2 with experts, one of which all rows share.
    Qwen2Moe = 8,
    /// Qwen 3 with experts.
    Qwen3Moe = 9,
    /// GPT-2: learned positions, layer norms, biases everywhere, no gate.
    Gpt2 = 10,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::Mixtral,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::Gpt2,
    ];

    /// As `model_type` of `config.json` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Gpt2 => "gpt2",
        }
    }

    /// As `general.architecture` of GGUF spells it.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral | Self::Mixtral => "llama",
            Self::Qwen2Moe => "qwen2moe",
            Self::Qwen3Moe => "qwen3moe",
            other => other.as_str(),
        }
    }

    /// Whether its layers have experts.
    pub fn has_experts(self) -> bool {
        matches!(self, Self::Mixtral | Self::Qwen2Moe | Self::Qwen3Moe)
    }

    /// Their names, for messages.
    pub fn known() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }
}

/// What the feed-forward part does to numbers (those of its gate, where it has one).
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

/// A feed-forward part of many, of which a router picks a few for each row: those with the largest
/// scores, the first among equals. What they give is weighed by the softmax of the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    /// How many there are; the model's `ffn` is the width of each.
    pub count: u32,
    /// How many a row goes through.
    pub used: u32,
    /// The weights of those add up to 1; else those of all experts do.
    pub normalise: bool,
    /// Width of the one that all rows go through, with a gate of its own; 0 for none.
    pub shared_ffn: u32,
}

/// What a family does that Llama does not. The default is Llama's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Experts instead of one feed-forward part.
    pub experts: Option<Experts>,
    /// Norms take the mean away, and have biases.
    pub layer_norm: bool,
    /// Every matrix of a layer has a bias.
    pub biases: bool,
    /// The feed-forward part has no gate.
    pub ungated: bool,
    /// A table of positions is added to the embedding.
    pub learned_positions: bool,
    /// `q`, `k` and `v` are one matrix in the files.
    pub fused_qkv: bool,
    /// Matrices of layers lie in the files column by column.
    pub transposed: bool,
    /// For `RopeScaling::Long`, where no tensors hold them.
    pub long_factors: Option<LongFactors>,
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
            experts: None,
            layer_norm: false,
            biases: false,
            ungated: false,
            learned_positions: false,
            fused_qkv: false,
            transposed: false,
            long_factors: None,
        }
    }
}

impl Features {
    /// What all models of a family do, whatever their files say; `hidden` is their width.
    pub(super) fn of(family: Family, hidden: u32) -> Self {
        let llama = Self {
            qkv_bias: matches!(family, Family::Qwen2 | Family::Qwen2Moe),
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3 | Family::Qwen3Moe),
            ..Self::default()
        };
        match family {
            Family::Gemma2 | Family::Gemma3 => Self {
                post_norms: true,
                activation: Activation::GeluTanh,
                embedding_scale: (hidden as f32).sqrt(),
                ..llama
            },
            Family::Gpt2 => Self {
                activation: Activation::GeluTanh,
                layer_norm: true,
                biases: true,
                ungated: true,
                learned_positions: true,
                fused_qkv: true,
                ..llama
            },
            _ => llama,
        }
    }
}
