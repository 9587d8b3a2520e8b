//! `config.json`: from what `transformers` writes to dimensions and features.
//!
//! What would change the graph and is not known here is refused, not ignored.

use serde_json::Value;

use crate::model::limits::{
    MAX_CONTEXT, MAX_FFN, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN, MAX_LAYERS, MAX_VOCAB,
};
use crate::model::{
    Activation, Family, Features, ModelConfig, RopeConfig, RopeScaling, RopeStyle, Window,
};

/// Keys of an object, with messages that name them.
struct Keys<'a>(&'a Value);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn u32(&self, key: &str, max: u32) -> Result<u32, String> {
        self.opt_u32(key, max)?.ok_or_else(|| format!("it has no key '{key}'"))
    }

    fn opt_u32(&self, key: &str, max: u32) -> Result<Option<u32>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=u64::from(max)).contains(&n) => Ok(Some(n as u32)),
            _ => Err(format!("key '{key}': {value} is implausible (1 to {max})")),
        }
    }

    fn opt_f32(&self, key: &str) -> Result<Option<f32>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x >= 0.0 => Ok(Some(x as f32)),
            _ => Err(format!("key '{key}': {value} is implausible")),
        }
    }

    fn bool(&self, key: &str) -> Result<bool, String> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => {
                value.as_bool().ok_or_else(|| format!("key '{key}': {value} is no true or false"))
            }
        }
    }

    fn text(&self, key: &str) -> Option<&'a str> {
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
    let hidden = keys.u32("hidden_size", MAX_HIDDEN)?;
    let heads = keys.u32("num_attention_heads", MAX_HEADS)?;
    let kv_heads = keys.opt_u32("num_key_value_heads", MAX_HEADS)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(format!("{heads} heads are no multiple of {kv_heads} key-value heads"));
    }
    let head_dim = match keys.opt_u32("head_dim", MAX_HEAD_DIM)? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(format!("{hidden} elements do not divide into {heads} heads")),
    };
    let layers = keys.u32("num_hidden_layers", MAX_LAYERS)?;
    let rms_eps = keys.opt_f32("rms_norm_eps")?.unwrap_or(1e-6);
    if !(rms_eps > 0.0 && rms_eps < 1.0) {
        return Err(format!("key 'rms_norm_eps': {rms_eps} is implausible (between 0 and 1)"));
    }
    let rope = rope(&keys, family, head_dim)?;
    Ok(ModelConfig {
        family,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: keys.u32("intermediate_size", MAX_FFN)?,
        vocab: keys.u32("vocab_size", MAX_VOCAB)?,
        context: keys.u32("max_position_embeddings", MAX_CONTEXT)?,
        rms_eps,
        tied_head: false,
        rope_factors: false,
        features: features(&keys, family, &rope, (layers, hidden, head_dim))?,
        rope,
    })
}

/// What changes the graph and has no place in it.
fn refuse_unknown(keys: &Keys<'_>) -> Result<(), String> {
    if keys.bool("mlp_bias")? {
        return Err("key 'mlp_bias': biases of the feed-forward part are not supported".to_owned());
    }
    if let Some(method) = keys.get("quantization_config").and_then(|q| q.get("quant_method")) {
        return Err(format!(
            "its weights are quantised by {method}, which is not supported: use the F16 or BF16 model, with --quantize q8_0 or q4_0"
        ));
    }
    Ok(())
}

fn features(
    keys: &Keys<'_>,
    family: Family,
    rope: &RopeConfig,
    (layers, hidden, head_dim): (u32, u32, u32),
) -> Result<Features, String> {
    let activation = keys.text("hidden_activation").or_else(|| keys.text("hidden_act"));
    let gemma = matches!(family, Family::Gemma2 | Family::Gemma3);
    let activation = match (activation, gemma) {
        (None | Some("silu" | "swish"), false) => Activation::Silu,
        // Gemma's first files said `gelu` and meant this.
        (None | Some("gelu_pytorch_tanh" | "gelu"), true) | (Some("gelu_pytorch_tanh"), false) => {
            Activation::GeluTanh
        }
        (Some(other), _) => {
            return Err(format!(
                "activation '{other}' is not supported (supported: silu, gelu_pytorch_tanh)"
            ));
        }
    };
    let window = window(keys, family, rope, layers)?;
    let scaled = keys.opt_f32("query_pre_attn_scalar")?.unwrap_or(head_dim as f32);
    let usual = Features::of(family, hidden);
    let plain = Features {
        qkv_bias: usual.qkv_bias || keys.bool("attention_bias")?,
        activation,
        window,
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
    let Some(size) = keys.opt_u32("sliding_window", u32::MAX)? else { return Ok(None) };
    let of = |every, offset| Window { size, every, offset, rope: None };
    let found = match keys.get("layer_types").and_then(Value::as_array) {
        Some(types) => listed(types, layers)?.map(|(every, offset)| of(every, offset)),
        None => match family {
            Family::Gemma2 => Some(of(2, 1)),
            Family::Gemma3 => {
                Some(of(keys.opt_u32("sliding_window_pattern", MAX_LAYERS)?.unwrap_or(6), 1))
            }
            Family::Qwen2 | Family::Qwen3 if !keys.bool("use_sliding_window")? => None,
            Family::Qwen2 | Family::Qwen3 => {
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

/// Parameters of angles: for all layers, or those of one kind.
fn rope_part<'a>(keys: &Keys<'a>, kind: &str) -> Option<&'a Value> {
    let all = keys.get("rope_parameters").or_else(|| keys.get("rope_scaling"))?;
    match all.get(kind) {
        Some(part) => Some(part).filter(|v| !v.is_null()),
        None if all.get("full_attention").is_some() => None,
        None => Some(all),
    }
}

fn rope(keys: &Keys<'_>, family: Family, head_dim: u32) -> Result<RopeConfig, String> {
    let part = rope_part(keys, "full_attention");
    let stated = part.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64).map(|x| x as f32);
    let usual = if family == Family::Gemma3 { 1e6 } else { 1e4 };
    let base = stated.or(keys.opt_f32("rope_theta")?).unwrap_or(usual);
    if !(base.is_finite() && base > 1.0) {
        return Err(format!("key 'rope_theta': {base} is implausible (above 1)"));
    }
    let factor = part.and_then(|p| p.get("partial_rotary_factor")).and_then(Value::as_f64);
    let factor = factor.map(|x| x as f32).or(keys.opt_f32("partial_rotary_factor")?).unwrap_or(1.0);
    let dim = (head_dim as f32 * factor) as u32;
    if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
        return Err(format!("{dim} of {head_dim} elements of a head cannot be rotated"));
    }
    let scaling = scaling(part)?;
    Ok(RopeConfig { base, dim, style: RopeStyle::Halves, scaling })
}

fn scaling(part: Option<&Value>) -> Result<RopeScaling, String> {
    const NONE: RopeScaling = RopeScaling::Linear(1.0);
    let Some(part) = part else { return Ok(NONE) };
    let kind = part.get("rope_type").or_else(|| part.get("type")).and_then(Value::as_str);
    let number = |key: &str| {
        let value = part.get(key).and_then(Value::as_f64).map(|x| x as f32);
        let sound = |x: &f32| x.is_finite() && *x > 0.0;
        value.filter(sound).ok_or_else(|| format!("RoPE scaling: it has no sound '{key}'"))
    };
    match kind {
        None | Some("default") => Ok(NONE),
        Some("linear") => Ok(RopeScaling::Linear(number("factor")?)),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: number("original_max_position_embeddings")?,
        }),
        Some(other) => Err(format!(
            "RoPE scaling '{other}' is not supported (supported: default, linear, llama3)"
        )),
    }
}
