//! What files say of rotary positions.

use super::GgufError;
use super::config::Keys;
use crate::model::{Family, RopeConfig, RopeScaling, RopeStyle};

const TYPE: &str = "rope.scaling.type";
const FACTOR: &str = "rope.scaling.factor";
const ORIGINAL: &str = "rope.scaling.original_context_length";
/// On top of what the kind of scaling does to cosines and sines.
const ATTENTION: &str = "rope.scaling.attn_factor";

impl Keys<'_> {
    pub(super) fn rope(&self, head_dim: u32) -> Result<RopeConfig, GgufError> {
        const BASE: &str = "rope.freq_base";
        const DIM: &str = "rope.dimension_count";
        let base = self.gguf.opt_f32(&self.key(BASE))?.unwrap_or(10_000.0);
        if !(base.is_finite() && base > 1.0) {
            return Err(self.bad(BASE, format!("{base} is implausible (above 1)")));
        }
        // The converter of `llama` files has reordered their rows.
        let style = match self.family {
            Family::Llama | Family::Mistral | Family::Mixtral => RopeStyle::Interleaved,
            _ => RopeStyle::Halves,
        };
        if self.family == Family::Gpt2 {
            return Ok(RopeConfig { base, dim: 0, style, scaling: RopeScaling::Linear(1.0) });
        }
        let dim = self.opt_u32(DIM)?.unwrap_or(head_dim);
        if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
            return Err(self.bad(DIM, format!("{dim} must be even and at most {head_dim}")));
        }
        Ok(RopeConfig { base, dim, style, scaling: self.rope_scaling()? })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, GgufError> {
        let stated = self.gguf.opt_str(&self.key(TYPE))?;
        // Files of Phi 3 have the tensors, and the type is stated in few of them.
        if stated == Some("longrope") || self.gguf.tensor("rope_factors_long.weight").is_some() {
            return Ok(RopeScaling::Long {
                original_context: self.original_context()?,
                attention_factor: self.attention_factor(1.0)?,
            });
        }
        match stated {
            None | Some("linear") => self.rope_scale().map(RopeScaling::Linear),
            Some("none") => Ok(RopeScaling::Linear(1.0)),
            Some("yarn") => self.yarn(),
            Some(other) => Err(self.bad(
                TYPE,
                format!(
                    "RoPE scaling '{other}' is not supported (supported: none, linear, yarn, longrope, and Llama 3's, which files state as the tensor rope_freqs.weight)"
                ),
            )),
        }
    }

    fn original_context(&self) -> Result<f32, GgufError> {
        let original = self.opt_u32(ORIGINAL)?.filter(|&n| n > 0);
        let own = self.opt_u32("context_length")?;
        Ok(original.or(own).unwrap_or(1) as f32)
    }

    /// What the file says on top of the usual.
    fn attention_factor(&self, usual: f32) -> Result<f32, GgufError> {
        match self.opt_f32(ATTENTION)?.unwrap_or(1.0) {
            x if x > 0.0 => Ok(usual * x),
            x => Err(self.bad(ATTENTION, format!("{x} is no factor"))),
        }
    }

    fn yarn(&self) -> Result<RopeScaling, GgufError> {
        const MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";
        if self.opt_f32(MULTIPLIER)?.is_some_and(|x| x > 0.0) {
            return Err(self.bad(MULTIPLIER, "it is not supported"));
        }
        let factor = self.rope_scale()?;
        let beta = |key, usual| Ok::<f32, GgufError>(self.opt_f32(key)?.unwrap_or(usual));
        let fast = beta("rope.scaling.yarn_beta_fast", 32.0)?;
        let slow = beta("rope.scaling.yarn_beta_slow", 1.0)?;
        Ok(RopeScaling::Yarn {
            factor,
            original_context: self.original_context()?,
            beta_fast: fast,
            beta_slow: slow,
            truncate: true,
            attention_factor: self
                .attention_factor(RopeScaling::yarn_attention_factor(factor, 1.0))?,
        })
    }

    /// A factor without a type is linear; zero says nothing.
    fn rope_scale(&self) -> Result<f32, GgufError> {
        const OLD: &str = "rope.scale_linear";
        let (what, factor) = match self.gguf.opt_f32(&self.key(FACTOR))? {
            Some(factor) => (FACTOR, factor),
            None => (OLD, self.gguf.opt_f32(&self.key(OLD))?.unwrap_or(1.0)),
        };
        match factor {
            0.0 => Ok(1.0),
            f if f.is_finite() && f > 0.0 => Ok(f),
            f => Err(self.bad(what, format!("{f} is no scale"))),
        }
    }
}
