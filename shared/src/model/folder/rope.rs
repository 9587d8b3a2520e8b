//! What `config.json` says of rotary positions.

use serde_json::Value;

use super::config::Keys;
use crate::model::limits::MAX_CONTEXT;
use crate::model::{Family, LongFactors, RopeConfig, RopeScaling, RopeStyle};

/// Parameters of angles: for all layers, or those of one kind.
pub(super) fn rope_part<'a>(keys: &Keys<'a>, kind: &str) -> Option<&'a Value> {
    let all = keys.get("rope_parameters").or_else(|| keys.get("rope_scaling"))?;
    match all.get(kind) {
        Some(part) => Some(part).filter(|v| !v.is_null()),
        None if all.get("full_attention").is_some() => None,
        None => Some(all),
    }
}

pub(super) fn rope(
    keys: &Keys<'_>,
    family: Family,
    head_dim: u32,
) -> Result<(RopeConfig, Option<LongFactors>), String> {
    let part = rope_part(keys, "full_attention");
    let stated = part.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64).map(|x| x as f32);
    let usual = match family {
        Family::Gemma3 | Family::Mixtral => 1e6,
        _ => 1e4,
    };
    let base = stated.or(keys.opt_f32("rope_theta")?).unwrap_or(usual);
    if !(base.is_finite() && base > 1.0) {
        return Err(format!("key 'rope_theta': {base} is implausible (above 1)"));
    }
    let style = RopeStyle::Halves;
    if family == Family::Gpt2 {
        let scaling = RopeScaling::Linear(1.0);
        return Ok((RopeConfig { base, dim: 0, style, scaling }, None));
    }
    let factor = part.and_then(|p| p.get("partial_rotary_factor")).and_then(Value::as_f64);
    let factor = factor.map(|x| x as f32).or(keys.opt_f32("partial_rotary_factor")?).unwrap_or(1.0);
    let dim = (head_dim as f32 * factor) as u32;
    if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
        return Err(format!("{dim} of {head_dim} elements of a head cannot be rotated"));
    }
    let (scaling, factors) = Scaling { keys, part }.read(dim / 2)?;
    Ok((RopeConfig { base, dim, style, scaling }, factors))
}

/// Keys of the scaling, some of which may stand beside it.
struct Scaling<'a> {
    keys: &'a Keys<'a>,
    part: Option<&'a Value>,
}

impl Scaling<'_> {
    /// A positive number, if it is stated.
    fn stated(&self, key: &str) -> Result<Option<f32>, String> {
        let Some(value) = self.part.and_then(|p| p.get(key)).filter(|v| !v.is_null()) else {
            return Ok(None);
        };
        match value.as_f64().map(|x| x as f32) {
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
            _ => Err(format!("RoPE scaling: key '{key}': {value} is implausible")),
        }
    }

    fn number(&self, key: &str) -> Result<f32, String> {
        self.stated(key)?.ok_or_else(|| format!("RoPE scaling: it has no sound '{key}'"))
    }

    /// Context of the first training: here, or beside the scaling, as Phi has it.
    fn original_context(&self) -> Result<f32, String> {
        const KEY: &str = "original_max_position_embeddings";
        match self.stated(KEY)? {
            Some(context) => Ok(context),
            None => match self.keys.opt_u32(KEY, MAX_CONTEXT)? {
                Some(context) => Ok(context as f32),
                None => self.number(KEY),
            },
        }
    }

    /// By how much the context has grown.
    fn growth(&self, original_context: f32) -> Result<f32, String> {
        match self.stated("factor")? {
            Some(factor) => Ok(factor),
            None => {
                let context = self.keys.u32("max_position_embeddings", MAX_CONTEXT)?;
                Ok(context as f32 / original_context)
            }
        }
    }

    fn read(&self, pairs: u32) -> Result<(RopeScaling, Option<LongFactors>), String> {
        let text = |key| self.part.and_then(|p| p.get(key)).and_then(Value::as_str);
        let scaling = match text("rope_type").or_else(|| text("type")) {
            None | Some("default") => RopeScaling::Linear(1.0),
            Some("linear") => RopeScaling::Linear(self.number("factor")?),
            Some("llama3") => RopeScaling::Llama3 {
                factor: self.number("factor")?,
                low_freq_factor: self.number("low_freq_factor")?,
                high_freq_factor: self.number("high_freq_factor")?,
                original_context: self.original_context()?,
            },
            Some("yarn") => self.yarn()?,
            Some("longrope" | "su") => return self.long(pairs),
            Some(other) => {
                return Err(format!(
                    "RoPE scaling '{other}' is not supported (supported: default, linear, llama3, yarn, longrope)"
                ));
            }
        };
        Ok((scaling, None))
    }

    /// As `transformers` has it (`_compute_yarn_parameters`).
    fn yarn(&self) -> Result<RopeScaling, String> {
        let original_context = match self.original_context() {
            // Old files of Qwen leave it out, and mean the context.
            Err(_) => self.keys.u32("max_position_embeddings", MAX_CONTEXT)? as f32,
            stated => stated?,
        };
        let factor = self.growth(original_context)?;
        let usual = |weight| RopeScaling::yarn_attention_factor(factor, weight);
        let stated = self.stated("attention_factor")?;
        let mixed = match (self.stated("mscale")?, self.stated("mscale_all_dim")?) {
            (Some(one), Some(all)) => usual(one) / usual(all),
            _ => usual(1.0),
        };
        let truncate = self.part.and_then(|p| p.get("truncate")).and_then(Value::as_bool);
        Ok(RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast: self.stated("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.stated("beta_slow")?.unwrap_or(1.0),
            truncate: truncate.unwrap_or(true),
            attention_factor: stated.unwrap_or(mixed),
        })
    }

    /// As `transformers` has it (`_compute_longrope_parameters`).
    fn long(&self, pairs: u32) -> Result<(RopeScaling, Option<LongFactors>), String> {
        let original_context = self.original_context()?;
        let growth = self.growth(original_context)?;
        let usual = RopeScaling::long_attention_factor(growth, original_context);
        let attention_factor = self.stated("attention_factor")?.unwrap_or(usual);
        let list = |key: &str| -> Result<Vec<f32>, String> {
            let list = self.part.and_then(|p| p.get(key)).and_then(Value::as_array);
            let list = list.ok_or_else(|| format!("RoPE scaling: it has no list '{key}'"))?;
            let sound =
                |x: &Value| x.as_f64().map(|x| x as f32).filter(|x| x.is_finite() && *x > 0.0);
            let factors: Option<Vec<f32>> = list.iter().map(sound).collect();
            match factors {
                Some(factors) if factors.len() == pairs as usize => Ok(factors),
                _ => Err(format!("RoPE scaling: '{key}' must list {pairs} positive numbers")),
            }
        };
        let factors = LongFactors { short: list("short_factor")?, long: list("long_factor")? };
        Ok((RopeScaling::Long { original_context, attention_factor }, Some(factors)))
    }
}
