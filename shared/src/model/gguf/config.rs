//! From metadata to the dimensions of a model, refusing what the engine would compute wrongly.

use super::{Gguf, GgufError};
use crate::model::{Family, ModelConfig, RopeConfig, RopeStyle, embedding_name};

/// Architectures with a definition.
const KNOWN: &str = "llama";

/// Largest values that are still plausible; they bound what a file can make the engine allocate.
const MAX_LAYERS: u32 = 1024;
const MAX_HIDDEN: u32 = 1 << 17;
const MAX_HEADS: u32 = 1024;
const MAX_HEAD_DIM: u32 = 1024;
const MAX_FFN: u32 = 1 << 20;
const MAX_VOCAB: u64 = 1 << 22;
const MAX_CONTEXT: u32 = 1 << 24;

/// The matrices of a layer in the Llama graph.
const LAYER_TENSORS: [&str; 9] = [
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_norm.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
];

impl Gguf {
    /// Dimensions of the model in this file.
    ///
    /// # Errors
    /// If the architecture has no definition, a key is missing, contradictory or implausible, or
    /// the file has tensors (biases, experts) that the architecture's graph would ignore.
    pub fn config(&self) -> Result<ModelConfig, GgufError> {
        match self.str("general.architecture")? {
            "llama" => self.llama(),
            other => Err(GgufError::Architecture { found: other.to_owned(), known: KNOWN }),
        }
    }

    fn llama(&self) -> Result<ModelConfig, GgufError> {
        if let Some(n) = self.opt_u32("llama.expert_count")?
            && n > 0
        {
            return Err(bad("llama.expert_count", "mixtures of experts are not supported"));
        }
        let layers = self.dimension("llama.block_count", MAX_LAYERS)?;
        let hidden = self.dimension("llama.embedding_length", MAX_HIDDEN)?;
        let heads = self.dimension("llama.attention.head_count", MAX_HEADS)?;
        let kv_heads = match self.metadata.get("llama.attention.head_count_kv") {
            Some(_) => self.dimension("llama.attention.head_count_kv", MAX_HEADS)?,
            None => heads,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(bad(
                "llama.attention.head_count_kv",
                format!("{heads} heads are no multiple of {kv_heads} key-value heads"),
            ));
        }
        let config = ModelConfig {
            family: Family::Llama,
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim: self.head_dim(hidden, heads)?,
            ffn: self.dimension("llama.feed_forward_length", MAX_FFN)?,
            vocab: self.vocab(hidden)?,
            context: self.dimension("llama.context_length", MAX_CONTEXT)?,
            rms_eps: self.epsilon()?,
            rope: self.rope(self.head_dim(hidden, heads)?)?,
            tied_head: self.tensor("output.weight").is_none(),
            rope_factors: self.tensor("rope_freqs.weight").is_some(),
        };
        self.check_graph(layers)?;
        Ok(config)
    }

    fn dimension(&self, key: &str, max: u32) -> Result<u32, GgufError> {
        match self.u32(key)? {
            n if (1..=max).contains(&n) => Ok(n),
            n => Err(bad(key, format!("{n} is implausible (1 to {max})"))),
        }
    }

    fn head_dim(&self, hidden: u32, heads: u32) -> Result<u32, GgufError> {
        const KEY: &str = "llama.attention.key_length";
        const VALUE: &str = "llama.attention.value_length";
        let dim = if self.metadata.get(KEY).is_some() {
            self.dimension(KEY, MAX_HEAD_DIM)?
        } else if hidden.is_multiple_of(heads) {
            hidden / heads
        } else {
            return Err(bad(
                "llama.attention.head_count",
                format!("{hidden} elements do not divide into {heads} heads"),
            ));
        };
        if dim > MAX_HEAD_DIM {
            return Err(bad(KEY, format!("heads of {dim} elements (at most {MAX_HEAD_DIM})")));
        }
        match self.opt_u32(VALUE)? {
            Some(v) if v != dim => Err(bad(
                VALUE,
                format!("values of {v} elements with keys of {dim} are not supported"),
            )),
            _ => Ok(dim),
        }
    }

    fn vocab(&self, hidden: u32) -> Result<u32, GgufError> {
        let name = embedding_name();
        let wrong = |problem: String| GgufError::Tensor { tensor: name.to_owned(), problem };
        let embedding =
            self.tensor(name).ok_or_else(|| wrong("the model has no such tensor".to_owned()))?;
        let &[inner, vocab] = embedding.dims.as_slice() else {
            return Err(wrong(format!("shape {:?} is no matrix", embedding.dims)));
        };
        if inner != u64::from(hidden) {
            return Err(wrong(format!(
                "rows of {inner} elements, but llama.embedding_length is {hidden}"
            )));
        }
        if vocab > MAX_VOCAB {
            return Err(wrong(format!("a vocabulary of {vocab} is implausible")));
        }
        if let Some(tokens) = self.opt_strings("tokenizer.ggml.tokens")?
            && tokens.len() as u64 != vocab
        {
            return Err(wrong(format!("{vocab} rows, but {} tokens are listed", tokens.len())));
        }
        Ok(vocab as u32)
    }

    fn epsilon(&self) -> Result<f32, GgufError> {
        const KEY: &str = "llama.attention.layer_norm_rms_epsilon";
        match self.f32(KEY)? {
            e if e > 0.0 && e < 1.0 => Ok(e),
            e => Err(bad(KEY, format!("{e} is implausible (between 0 and 1)"))),
        }
    }

    fn rope(&self, head_dim: u32) -> Result<RopeConfig, GgufError> {
        const BASE: &str = "llama.rope.freq_base";
        const DIM: &str = "llama.rope.dimension_count";
        let base = self.opt_f32(BASE)?.unwrap_or(10_000.0);
        if !(base.is_finite() && base > 1.0) {
            return Err(bad(BASE, format!("{base} is implausible (above 1)")));
        }
        let dim = self.opt_u32(DIM)?.unwrap_or(head_dim);
        if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
            return Err(bad(DIM, format!("{dim} must be even and at most {head_dim}")));
        }
        let linear_scale = self.rope_scale()?;
        Ok(RopeConfig { base, dim, style: RopeStyle::Interleaved, linear_scale })
    }

    /// A factor without a type is linear; zero says nothing.
    fn rope_scale(&self) -> Result<f32, GgufError> {
        const TYPE: &str = "llama.rope.scaling.type";
        const FACTOR: &str = "llama.rope.scaling.factor";
        const OLD: &str = "llama.rope.scale_linear";
        match self.opt_str(TYPE)? {
            None | Some("linear") => {}
            Some("none") => return Ok(1.0),
            Some(other) => {
                return Err(bad(
                    TYPE,
                    format!(
                        "RoPE scaling '{other}' is not supported (supported: none, linear, and Llama 3's, which files state as the tensor rope_freqs.weight)"
                    ),
                ));
            }
        }
        let (key, factor) = match self.opt_f32(FACTOR)? {
            Some(factor) => (FACTOR, factor),
            None => (OLD, self.opt_f32(OLD)?.unwrap_or(1.0)),
        };
        match factor {
            0.0 => Ok(1.0),
            f if f.is_finite() && f > 0.0 => Ok(f),
            f => Err(bad(key, format!("{f} is no scale"))),
        }
    }

    /// Every tensor must have a place in the graph: ignoring one would give wrong answers.
    fn check_graph(&self, layers: u32) -> Result<(), GgufError> {
        for t in &self.tensors {
            let known = match t.name.strip_prefix("blk.").and_then(|r| r.split_once('.')) {
                Some((n, rest)) => {
                    n.parse::<u32>().is_ok_and(|n| n < layers) && LAYER_TENSORS.contains(&rest)
                }
                None => matches!(
                    t.name.as_str(),
                    "token_embd.weight"
                        | "output_norm.weight"
                        | "output.weight"
                        | "rope_freqs.weight"
                ),
            };
            if !known {
                return Err(GgufError::Tensor {
                    tensor: super::clip(&t.name),
                    problem: format!(
                        "it has no place in the llama graph of {layers} layers as Millrace defines it"
                    ),
                });
            }
        }
        Ok(())
    }
}

fn bad(key: &str, problem: impl Into<String>) -> GgufError {
    GgufError::BadValue { key: key.to_owned(), problem: problem.into() }
}
