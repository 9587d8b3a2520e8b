//! Dimensions of a decoder, and which tensors its graph has.

use serde::{Deserialize, Serialize};

use super::{Family, Features, RopeConfig, RopeScaling, Window};

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
    /// Width of the feed-forward part, or of each expert.
    pub ffn: u32,
    /// Vocabulary.
    pub vocab: u32,
    /// Longest context the model was made for.
    pub context: u32,
    /// Epsilon of norms.
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

/// Greatest rank of factors.
const MAX_RANK: u64 = 1 << 16;

/// Whether factors may have that rank.
///
/// # Errors
/// What ranks can be.
pub fn check_rank(rank: u64) -> Result<(), String> {
    if rank > 0 && rank.is_multiple_of(32) && rank <= MAX_RANK {
        return Ok(());
    }
    Err(format!("has rank {rank}: the kernels compute with multiples of 32, up to {MAX_RANK}"))
}

/// The matrices of an expert, after `blk.N.` and before the expert's number.
const EXPERT: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];

impl ModelConfig {
    /// The matrices of a layer: their tensors' names after `blk.N.` and before `.weight`, and their
    /// columns (inputs) and rows (outputs). Those of expert `E` end in `.E`.
    pub fn layer_matrices(&self) -> Vec<(String, [u64; 2])> {
        self.matrices_of(self.features.experts.map_or(0, |e| e.count))
    }

    /// Those that one row is multiplied with: of the experts, as many as a row goes through.
    pub fn row_matrices(&self) -> Vec<(String, [u64; 2])> {
        self.matrices_of(self.features.experts.map_or(0, |e| e.used))
    }

    fn matrices_of(&self, experts: u32) -> Vec<(String, [u64; 2])> {
        let mut all: Vec<(String, [u64; 2])> =
            self.plain_matrices().into_iter().map(|(name, dims)| (name.to_owned(), dims)).collect();
        for expert in 0..experts {
            let one = |name: &str| (format!("{name}.{expert}"), self.expert_dims(name));
            all.extend(EXPERT.map(one));
        }
        all
    }

    /// As [`ModelConfig::layer_matrices`], but for those of experts.
    pub fn plain_matrices(&self) -> Vec<(&'static str, [u64; 2])> {
        let widths =
            [self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn];
        let [h, q, kv, f] = widths.map(u64::from);
        let features = &self.features;
        let mut all = if features.fused_qkv {
            vec![("attn_qkv", [h, q + 2 * kv])]
        } else {
            vec![("attn_q", [h, q]), ("attn_k", [h, kv]), ("attn_v", [h, kv])]
        };
        all.push(("attn_output", [q, h]));
        match &features.experts {
            Some(experts) => {
                all.push(("ffn_gate_inp", [h, u64::from(experts.count)]));
                let f = u64::from(experts.shared_ffn);
                if f > 0 {
                    all.extend([("ffn_gate_inp_shexp", [h, 1]), ("ffn_gate_shexp", [h, f])]);
                    all.extend([("ffn_up_shexp", [h, f]), ("ffn_down_shexp", [f, h])]);
                }
            }
            None if features.ungated => all.extend([("ffn_up", [h, f]), ("ffn_down", [f, h])]),
            None => all.extend([("ffn_gate", [h, f]), ("ffn_up", [h, f]), ("ffn_down", [f, h])]),
        }
        all
    }

    /// Inputs and outputs of an expert's matrix: `ffn_gate`, `ffn_up` or `ffn_down`.
    pub fn expert_dims(&self, name: &str) -> [u64; 2] {
        let [h, f] = [self.hidden, self.ffn].map(u64::from);
        if name == "ffn_down" { [f, h] } else { [h, f] }
    }

    /// The vectors of a layer: their tensors' names after `blk.N.`, and their lengths.
    pub fn layer_vectors(&self) -> Vec<(&'static str, u64)> {
        let [hidden, q, kv, head] =
            [self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim]
                .map(u64::from);
        let f = &self.features;
        let mut all = vec![("attn_norm.weight", hidden), ("ffn_norm.weight", hidden)];
        if f.layer_norm {
            all.extend([("attn_norm.bias", hidden), ("ffn_norm.bias", hidden)]);
        }
        if f.fused_qkv && (f.qkv_bias || f.biases) {
            all.push(("attn_qkv.bias", q + 2 * kv));
        } else if f.qkv_bias || f.biases {
            all.extend([("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)]);
        }
        if f.biases {
            let ffn = u64::from(self.ffn);
            all.extend([("attn_output.bias", hidden), ("ffn_up.bias", ffn)]);
            all.push(("ffn_down.bias", hidden));
        }
        if f.qk_norm {
            all.extend([("attn_q_norm.weight", head), ("attn_k_norm.weight", head)]);
        }
        if f.post_norms {
            all.extend([("post_attention_norm.weight", hidden), ("post_ffw_norm.weight", hidden)]);
        }
        all
    }

    /// What lies in no layer, but for the embedding and the head: names and dimensions, fastest first.
    pub(super) fn outer_tensors(&self) -> Vec<(&'static str, Vec<u64>)> {
        let [hidden, context] = [self.hidden, self.context].map(u64::from);
        let mut all = vec![("output_norm.weight", vec![hidden])];
        if self.features.layer_norm {
            all.push(("output_norm.bias", vec![hidden]));
        }
        if self.features.learned_positions {
            all.push(("position_embd.weight", vec![hidden, context]));
        }
        all
    }

    /// Whether the graph uses a tensor of that name, fused ones included.
    pub fn has_place(&self, name: &str) -> bool {
        let Some((layer, rest)) = name.strip_prefix("blk.").and_then(|r| r.split_once('.')) else {
            return self.has_place_outside(name);
        };
        if layer.parse::<u32>().is_ok_and(|layer| layer < self.layers) {
            return match rest.strip_suffix(".weight") {
                Some("attn_qkv") => true,
                Some(matrix) => {
                    if let Some(first) = matrix.strip_suffix("_in") {
                        return self.has_inner(first);
                    }
                    self.plain_matrices().iter().any(|(name, _)| *name == matrix)
                        || self.is_of_experts(matrix)
                        || self.layer_vectors().iter().any(|(vector, _)| *vector == rest)
                }
                None => self.layer_vectors().iter().any(|(vector, _)| *vector == rest),
            };
        }
        false
    }

    /// Whether a thin matrix may lie before that one (and those that share its input), where they are
    /// factored.
    fn has_inner(&self, first: &str) -> bool {
        let f = &self.features;
        if f.transposed {
            return false;
        }
        match first {
            "attn_q" => !f.fused_qkv,
            "attn_qkv" => f.fused_qkv,
            "attn_output" => true,
            "ffn_gate" => !f.ungated && f.experts.is_none(),
            "ffn_up" => f.ungated && f.experts.is_none(),
            "ffn_down" => f.experts.is_none(),
            _ => false,
        }
    }

    fn has_place_outside(&self, name: &str) -> bool {
        match name {
            "token_embd.weight" | "output.weight" => true,
            "rope_freqs.weight" => self.rope_factors,
            "rope_factors_long.weight" | "rope_factors_short.weight" => {
                matches!(self.rope.scaling, RopeScaling::Long { .. })
            }
            _ => self.outer_tensors().iter().any(|(outer, _)| *outer == name),
        }
    }

    /// Whether a matrix is an expert's, or holds those of all experts.
    fn is_of_experts(&self, matrix: &str) -> bool {
        let Some(experts) = &self.features.experts else { return false };
        if let Some(stem) = matrix.strip_suffix("_exps") {
            return EXPERT.contains(&stem) || stem == "ffn_gate_up";
        }
        matrix.split_once('.').is_some_and(|(stem, expert)| {
            EXPERT.contains(&stem) && expert.parse::<u32>().is_ok_and(|e| e < experts.count)
        })
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
    use crate::model::{RopeScaling, RopeStyle};

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
