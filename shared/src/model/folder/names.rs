//! Names of tensors: Hugging Face's and, canonical here, GGUF's.

use crate::model::{Family, ModelConfig};

/// Names in a layer, without `model.layers.N.` and `.weight` or `.bias`.
const LAYER: [(&str, &str); 12] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    // Split into both.
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
];
const NORMS: [(&str, &str); 1] = [("post_attention_layernorm", "ffn_norm")];
const NORMS_AROUND: [(&str, &str); 3] = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const ENDS: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

fn layer_names(
    config: &ModelConfig,
) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    let norms: &[_] = match config.family {
        Family::Gemma2 | Family::Gemma3 => &NORMS_AROUND,
        _ => &NORMS,
    };
    LAYER.iter().chain(norms)
}

/// Tensors that hold nothing of the model: tables that old libraries stored, and the eyes of models
/// that also see.
pub(super) fn is_ignored(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
        || ["vision_tower.", "multi_modal_projector.", "model.vision_tower."]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// The canonical name; unknown ones stay as they are, `None` for those without meaning.
pub(super) fn canonical(config: &ModelConfig, name: &str) -> Option<String> {
    if is_ignored(name) {
        return None;
    }
    let plain = match name.strip_prefix("language_model.") {
        Some(rest) => rest.to_owned(),
        None => name.replacen("model.language_model.", "model.", 1),
    };
    if let Some((_, canonical)) = ENDS.iter().find(|(theirs, _)| *theirs == plain) {
        return Some((*canonical).to_owned());
    }
    let in_layer = || {
        let (layer, rest) = plain.strip_prefix("model.layers.")?.split_once('.')?;
        let (stem, kind) = rest.rsplit_once('.')?;
        let (_, ours) = layer_names(config).find(|(theirs, _)| *theirs == stem)?;
        Some(format!("blk.{layer}.{ours}.{kind}"))
    };
    Some(in_layer().unwrap_or_else(|| clip(name)))
}

/// The name in the files, for messages.
pub(super) fn original(config: &ModelConfig, canonical: &str) -> String {
    if let Some((theirs, _)) = ENDS.iter().find(|(_, ours)| *ours == canonical) {
        return (*theirs).to_owned();
    }
    let in_layer = || {
        let (layer, rest) = canonical.strip_prefix("blk.")?.split_once('.')?;
        let (stem, kind) = rest.rsplit_once('.')?;
        let (theirs, _) = layer_names(config).find(|(_, ours)| *ours == stem)?;
        Some(format!("model.layers.{layer}.{theirs}.{kind}"))
    };
    in_layer().unwrap_or_else(|| canonical.to_owned())
}

/// Names are untrusted: at most 80 characters of one are shown.
pub(super) fn clip(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_debug).collect()
}
