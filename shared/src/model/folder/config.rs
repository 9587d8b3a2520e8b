//! `config.json`: from what `transformers` writes to dimensions and features.
//!
//! What would change the graph and is not known here is refused, not ignored.

use serde_json::Value;

use super::rope::{rope, rope_part};
use crate::model::limits::{
    MAX_CONTEXT, MAX_EXPERTS, MAX_FFN, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN, MAX_LAYERS, MAX_VOCAB,
};
use crate::model::{
    Activation, Experts, Family, Features, ModelConfig, RopeConfig, RopeScaling, Window,
};

/// Keys of an object, with messages that name them.
pub(super) struct Keys<'a>(pub(super) &'a Value);

impl<'a> Keys<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn u32(&self, key: &str, max: u32) -> Result<u32, String> {
        self.opt_u32(key, max)?.ok_or_else(|| format!("it has no key '{key}'"))
    }

    pub(super) fn opt_u32(&self, key: &str, max: u32) -> Result<Option<u32>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=u64::from(max)).contains(&n) => Ok(Some(n as u32)),
            _ => Err(format!("key '{key}': {value} is implausible (1 to {max})")),
        }
    }

    pub(super) fn opt_f32(&self, key: &str) -> Result<Option<f32>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x >= 0.0 => Ok(Some(x as f32)),
            _ => Err(format!("key '{key}': {value} is implausible")),
        }
    }

    pub(super) fn bool(&self, key: &str) -> Result<bool, String> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => {
                value.as_bool().ok_or_else(|| format!("key '{key}': {value} is no true or false"))
            }
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        self.get(key).and_then(Value::as_str)
    }
}

pub(super) fn config(json: &Value) -> Result<ModelConfig, String> {
    let outer = Keys(json);
    let name = outer.text("model_type").ok_or("it has no key 'model_type'")?;
    // A model that also sees: its text part.
    let keys = match name {
        "gemma3" => Keys(outer.get("text_config").ok_or("it has no key 'text_config'")?),
        _ => outer,
    };
    let plain = if name == "gemma3_text" { "gemma3" } else { name };
    let family = Family::ALL.into_iter().find(|f| f.as_str() == plain).ok_or_else(|| {
        format!("model type '{name}' is not supported (supported: {})", Family::known())
    })?;
    refuse_unknown(&keys)?;
    let names = Names::of(family);
    let hidden = keys.u32(names.hidden, MAX_HIDDEN)?;
    let heads = keys.u32(names.heads, MAX_HEADS)?;
    let kv_heads = match family {
        Family::Gpt2 => heads,
        _ => keys.opt_u32("num_key_value_heads", MAX_HEADS)?.unwrap_or(heads),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(format!("{heads} heads are no multiple of {kv_heads} key-value heads"));
    }
    let head_dim = match keys.opt_u32("head_dim", MAX_HEAD_DIM)? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(format!("{hidden} elements do not divide into {heads} heads")),
    };
    let layers = keys.u32(names.layers, MAX_LAYERS)?;
    let rms_eps = keys.opt_f32(names.eps)?.unwrap_or(names.usual_eps);
    if !(rms_eps > 0.0 && rms_eps < 1.0) {
        return Err(format!("key '{}': {rms_eps} is implausible (between 0 and 1)", names.eps));
    }
    let (rope, long_factors) = rope(&keys, family, head_dim)?;
    let experts = experts(&keys, family)?;
    let features = features(&keys, family, &rope, (layers, hidden, head_dim))?;
    Ok(ModelConfig {
        family,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: match (family, &experts) {
            (Family::Gpt2, _) => keys.opt_u32("n_inner", MAX_FFN)?.unwrap_or(4 * hidden),
            (Family::Qwen2Moe | Family::Qwen3Moe, Some(_)) => {
                keys.u32("moe_intermediate_size", MAX_FFN)?
            }
            _ => keys.u32("intermediate_size", MAX_FFN)?,
        },
        vocab: keys.u32("vocab_size", MAX_VOCAB)?,
        context: keys.u32(names.context, MAX_CONTEXT)?,
        rms_eps,
        tied_head: false,
        rope_factors: false,
        features: Features { experts, long_factors, ..features },
        rope,
    })
}

/// What dimensions are called.
struct Names {
    hidden: &'static str,
    heads: &'static str,
    layers: &'static str,
    context: &'static str,
    eps: &'static str,
    usual_eps: f32,
}

impl Names {
    fn of(family: Family) -> Self {
        match family {
            Family::Gpt2 => Self {
                hidden: "n_embd",
                heads: "n_head",
                layers: "n_layer",
                context: "n_positions",
                eps: "layer_norm_epsilon",
                usual_eps: 1e-5,
            },
            _ => Self {
                hidden: "hidden_size",
                heads: "num_attention_heads",
                layers: "num_hidden_layers",
                context: "max_position_embeddings",
                eps: "rms_norm_eps",
                usual_eps: 1e-6,
            },
        }
    }
}

/// The router's numbers; every layer has to have experts.
fn experts(keys: &Keys<'_>, family: Family) -> Result<Option<Experts>, String> {
    if !family.has_experts() {
        return Ok(None);
    }
    // Libraries write one name or the other.
    let count = match keys.opt_u32("num_local_experts", MAX_EXPERTS)? {
        Some(count) => count,
        None => keys.u32("num_experts", MAX_EXPERTS)?,
    };
    if keys.opt_u32("decoder_sparse_step", MAX_LAYERS)?.unwrap_or(1) != 1 {
        return Err("key 'decoder_sparse_step': layers without experts are not supported".into());
    }
    if keys.get("mlp_only_layers").and_then(Value::as_array).is_some_and(|l| !l.is_empty()) {
        return Err("key 'mlp_only_layers': layers without experts are not supported".into());
    }
    let shared_ffn = match family {
        Family::Qwen2Moe => keys.u32("shared_expert_intermediate_size", MAX_FFN)?,
        _ => 0,
    };
    Ok(Some(Experts {
        count,
        used: keys.u32("num_experts_per_tok", count)?,
        normalise: family == Family::Mixtral || keys.bool("norm_topk_prob")?,
        shared_ffn,
    }))
}

/// What changes the graph and has no place in it.
fn refuse_unknown(keys: &Keys<'_>) -> Result<(), String> {
    if keys.bool("mlp_bias")? {
        return Err("key 'mlp_bias': biases of the feed-forward part are not supported".to_owned());
    }
    for (key, usual) in [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
    ] {
        if keys.get(key).and_then(Value::as_bool).is_some_and(|stated| stated != usual) {
            return Err(format!("key '{key}': {} is not supported", !usual));
        }
    }
    Ok(())
}

fn features(
    keys: &Keys<'_>,
    family: Family,
    rope: &RopeConfig,
    (layers, hidden, head_dim): (u32, u32, u32),
) -> Result<Features, String> {
    let usual = Features::of(family, hidden);
    let named = ["hidden_activation", "hidden_act", "activation_function"];
    let gemma = matches!(family, Family::Gemma2 | Family::Gemma3);
    let activation = match (named.iter().find_map(|key| keys.text(key)), gemma) {
        (None, _) => usual.activation,
        (Some("silu" | "swish"), false) => Activation::Silu,
        // Gemma's first files said `gelu` and meant this.
        (Some("gelu"), true) | (Some("gelu_pytorch_tanh" | "gelu_new"), _) => Activation::GeluTanh,
        (Some(other), _) => {
            return Err(format!(
                "activation '{other}' is not supported (supported: silu, gelu_pytorch_tanh, gelu_new)"
            ));
        }
    };
    let window = window(keys, family, rope, layers)?;
    let scaled = keys.opt_f32("query_pre_attn_scalar")?.unwrap_or(head_dim as f32);
    // Qwen's models with experts say so in words.
    let stated = keys.get("qkv_bias").and_then(Value::as_bool);
    let plain = Features {
        qkv_bias: stated.unwrap_or(usual.qkv_bias) || keys.bool("attention_bias")?,
        activation,
        window,
        // As `Conv1D` keeps them.
        transposed: family == Family::Gpt2,
        ..usual
    };
    if !gemma {
        return Ok(plain);
    }
    Ok(Features {
        gain_plus_one: true,
        attention_scale: Some(1.0 / scaled.sqrt()),
        attention_softcap: keys.opt_f32("attn_logit_softcapping")?.unwrap_or(0.0),
        logit_softcap: keys.opt_f32("final_logit_softcapping")?.unwrap_or(0.0),
        ..plain
    })
}

/// Which layers are local: as `layer_types` lists them, else as the family did before it was written.
fn window(
    keys: &Keys<'_>,
    family: Family,
    rope: &RopeConfig,
    layers: u32,
) -> Result<Option<Window>, String> {
    // Models without windows may say 0.
    if keys.get("sliding_window").and_then(Value::as_u64) == Some(0) {
        return Ok(None);
    }
    let Some(size) = keys.opt_u32("sliding_window", u32::MAX)? else { return Ok(None) };
    let of = |every, offset| Window { size, every, offset, rope: None };
    let found = match keys.get("layer_types").and_then(Value::as_array) {
        Some(types) => listed(types, layers)?.map(|(every, offset)| of(every, offset)),
        None => match family {
            Family::Gemma2 => Some(of(2, 1)),
            Family::Gemma3 => {
                Some(of(keys.opt_u32("sliding_window_pattern", MAX_LAYERS)?.unwrap_or(6), 1))
            }
            family if is_qwen(family) && !keys.bool("use_sliding_window")? => None,
            family if is_qwen(family) => {
                return Err("'use_sliding_window' without 'layer_types' is not supported".into());
            }
            _ => Some(of(0, 0)),
        },
    };
    let Some(found) = found else { return Ok(None) };
    if family != Family::Gemma3 {
        return Ok(Some(found));
    }
    let stated = rope_part(keys, "sliding_attention").and_then(|v| v.get("rope_theta"));
    let base = stated.and_then(Value::as_f64).map(|x| x as f32);
    let base = base.or(keys.opt_f32("rope_local_base_freq")?).unwrap_or(10_000.0);
    let local = RopeConfig { base, scaling: RopeScaling::Linear(1.0), ..*rope };
    Ok(Some(Window { rope: Some(local), ..found }))
}

fn is_qwen(family: Family) -> bool {
    use Family::{Qwen2, Qwen2Moe, Qwen3, Qwen3Moe};
    matches!(family, Qwen2 | Qwen2Moe | Qwen3 | Qwen3Moe)
}

/// A regular pattern of local layers, as [`Window`] has it; `None` where no layer is.
fn listed(types: &[Value], layers: u32) -> Result<Option<(u32, u32)>, String> {
    let mut local = Vec::with_capacity(types.len());
    for kind in types {
        local.push(match kind.as_str() {
            Some("sliding_attention") => true,
            Some("full_attention") => false,
            _ => return Err(format!("key 'layer_types': {kind} is not supported")),
        });
    }
    if local.len() != layers as usize {
        return Err(format!("'layer_types' lists {} of {layers} layers", local.len()));
    }
    let global: Vec<u32> = (0..layers).filter(|&i| !local[i as usize]).collect();
    match global.as_slice() {
        [] => Ok(Some((0, 0))),
        all if all.len() == layers as usize => Ok(None),
        // The one there is says nothing of a next.
        &[only] if only + 1 == layers => Ok(Some((layers, 1))),
        &[first, ..] => {
            let every =
                global.get(1).map_or_else(|| layers.max(first + 1), |second| second - first);
            let offset = every - first % every;
            let pattern = |i: u32| !(i + offset).is_multiple_of(every);
            if (0..layers).all(|i| pattern(i) == local[i as usize]) {
                Ok(Some((every, offset)))
            } else {
                Err("key 'layer_types': local layers in no regular pattern".to_owned())
            }
        }
    }
}
