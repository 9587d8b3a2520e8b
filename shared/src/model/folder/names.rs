//! Names of tensors: Hugging Face's and, canonical here, GGUF's.

use crate::model::{Family, ModelConfig};

/// Their names and ours, without what stands before and after them.
type Pair = (&'static str, &'static str);

/// Names in a layer, without `model.layers.N.` and `.weight` or `.bias`.
const LAYER: [Pair; 19] = [
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
    ("mlp.gate", "ffn_gate_inp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    // Of all experts in one, where the library has put them together; split into all.
    ("mlp.experts.gate_up_proj", "ffn_gate_up_exps"),
];
const GPT2: [Pair; 6] = [
    ("ln_1", "attn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
];
const NORMS: [Pair; 2] =
    [("post_attention_layernorm", "ffn_norm"), ("mlp.experts.down_proj", "ffn_down_exps")];
const NORMS_AROUND: [Pair; 3] = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const ENDS: [Pair; 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];
const GPT2_ENDS: [Pair; 5] = [
    ("transformer.wte.weight", "token_embd.weight"),
    ("transformer.wpe.weight", "position_embd.weight"),
    ("transformer.ln_f.weight", "output_norm.weight"),
    ("transformer.ln_f.bias", "output_norm.bias"),
    ("lm_head.weight", "output.weight"),
];
/// Before the number of an expert, and after it: Mixtral's names and the others'.
const EXPERTS: [&str; 2] = ["block_sparse_moe.experts.", "mlp.experts."];
const EXPERT: [Pair; 6] = [
    ("gate_proj", "ffn_gate"),
    ("up_proj", "ffn_up"),
    ("down_proj", "ffn_down"),
    ("w1", "ffn_gate"),
    ("w3", "ffn_up"),
    ("w2", "ffn_down"),
];

fn layer_names(config: &ModelConfig) -> impl Iterator<Item = &'static Pair> {
    let (names, norms): (&[_], &[_]) = match config.family {
        Family::Gemma2 | Family::Gemma3 => (&LAYER, &NORMS_AROUND),
        Family::Gpt2 => (&GPT2, &[]),
        _ => (&LAYER, &NORMS),
    };
    names.iter().chain(norms)
}

fn ends(config: &ModelConfig) -> &'static [Pair] {
    if config.family == Family::Gpt2 { &GPT2_ENDS } else { &ENDS }
}

/// Before the number of a layer.
fn prefix(config: &ModelConfig) -> &'static str {
    if config.family == Family::Gpt2 { "transformer.h." } else { "model.layers." }
}

/// `N.gate_proj` of an expert.
fn of_expert(stem: &str) -> Option<String> {
    let rest = EXPERTS.iter().find_map(|prefix| stem.strip_prefix(prefix))?;
    let (expert, part) = rest.split_once('.')?;
    let (_, ours) = EXPERT.iter().find(|(theirs, _)| *theirs == part)?;
    Some(format!("{ours}.{expert}"))
}

/// Tensors that hold nothing of the model: tables that old libraries stored, and the eyes of models
/// that also see.
pub(super) fn is_ignored(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
        // Masks of GPT-2.
        || name.ends_with(".attn.bias")
        || name.ends_with(".attn.masked_bias")
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
    // The first files of GPT-2 leave this out.
    let plain = match config.family {
        Family::Gpt2 if !plain.starts_with("transformer.") && plain != "lm_head.weight" => {
            format!("transformer.{plain}")
        }
        _ => plain,
    };
    if let Some((_, canonical)) = ends(config).iter().find(|(theirs, _)| *theirs == plain) {
        return Some((*canonical).to_owned());
    }
    let in_layer = || {
        let (layer, rest) = plain.strip_prefix(prefix(config))?.split_once('.')?;
        // Tensors of all experts are no modules with a weight.
        let (stem, kind) = match rest.rsplit_once('.')? {
            (_, "gate_up_proj" | "down_proj") => (rest, "weight"),
            parts => parts,
        };
        // The thin matrix before factored ones, in copies that Millrace made.
        let (stem, inner) = match stem.strip_suffix("_in") {
            Some(stem) => (stem, "_in"),
            None => (stem, ""),
        };
        let ours = match layer_names(config).find(|(theirs, _)| *theirs == stem) {
            Some((_, ours)) => (*ours).to_owned(),
            None => of_expert(stem)?,
        };
        Some(format!("blk.{layer}.{ours}{inner}.{kind}"))
    };
    Some(in_layer().unwrap_or_else(|| clip(name)))
}

/// The name in the files, for messages.
pub(super) fn original(config: &ModelConfig, canonical: &str) -> String {
    if let Some((theirs, _)) = ends(config).iter().find(|(_, ours)| *ours == canonical) {
        return (*theirs).to_owned();
    }
    let in_layer = || {
        let (layer, rest) = canonical.strip_prefix("blk.")?.split_once('.')?;
        let (stem, kind) = rest.rsplit_once('.')?;
        let (stem, inner) = match stem.strip_suffix("_in") {
            Some(stem) => (stem, "_in"),
            None => (stem, ""),
        };
        let theirs = match layer_names(config).find(|(_, ours)| *ours == stem) {
            Some((theirs, _)) => (*theirs).to_owned(),
            None => {
                let (stem, expert) = stem.split_once('.')?;
                let (theirs, _) = EXPERT.iter().find(|(_, ours)| *ours == stem)?;
                format!("mlp.experts.{expert}.{theirs}")
            }
        };
        Some(format!("{}{layer}.{theirs}{inner}.{kind}", prefix(config)))
    };
    in_layer().unwrap_or_else(|| canonical.to_owned())
}

/// Names are untrusted: at most 80 characters of one are shown.
pub(super) fn clip(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_debug).collect()
}
