//! Which tensors a range of layers needs.

use std::ops::Range;

use super::{ModelConfig, TensorEntry};

/// Name of the embedding matrix.
pub const fn embedding_name() -> &'static str {
    "token_embd.weight"
}

/// Name of the matrix that the head multiplies with.
pub fn head_name(config: &ModelConfig) -> &'static str {
    if config.tied_head { embedding_name() } else { "output.weight" }
}

/// Name of a matrix whose type most matrices of layers have.
pub fn typical_name(config: &ModelConfig) -> &'static str {
    match config.features.experts {
        Some(_) => "blk.0.ffn_down.0.weight",
        None => "blk.0.ffn_down.weight",
    }
}

/// What part of a model a stage holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageTensors {
    /// The layers.
    pub layers: Range<u32>,
    /// Whether the embedding belongs to it (the first stage).
    pub embed: bool,
    /// Whether the final norm and the head belong to it (the last stage).
    pub head: bool,
}

/// The tensors of a stage, in file order.
pub fn stage_tensors<'a>(
    config: &ModelConfig,
    tensors: &'a [TensorEntry],
    stage: &StageTensors,
) -> Vec<&'a TensorEntry> {
    let wanted = |name: &str| -> bool {
        if let Some(rest) = name.strip_prefix("blk.") {
            return rest
                .split('.')
                .next()
                .and_then(|n| n.parse::<u32>().ok())
                .is_some_and(|n| stage.layers.contains(&n));
        }
        match name {
            "token_embd.weight" => stage.embed || (stage.head && config.tied_head),
            "output.weight" => stage.head && !config.tied_head,
            "output_norm.weight" | "output_norm.bias" => stage.head,
            "position_embd.weight" => stage.embed,
            "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight" => {
                !stage.layers.is_empty()
            }
            _ => false,
        }
    };
    tensors.iter().filter(|t| wanted(&t.name)).collect()
}
