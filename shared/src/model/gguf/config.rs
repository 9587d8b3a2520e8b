//! From metadata to the dimensions of a model, refusing what the engine would compute wrongly.

use super::{Gguf, GgufError};
use crate::model::limits::{
    MAX_CONTEXT, MAX_EXPERTS, MAX_FFN, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN, MAX_LAYERS, MAX_VOCAB,
};
use crate::model::sparse::sparse_parts;
use crate::model::{
    Experts, Family, Features, ModelConfig, RopeConfig, RopeScaling, Window, embedding_name,
};

/// Where the base of local layers' angles is not stated (llama.cpp has it as a constant).
const LOCAL_BASE: f32 = 10_000.0;
/// Every so many layers of Gemma 2 and 3, one sees everything.
const GEMMA_2_EVERY: u32 = 2;
const GEMMA_3_EVERY: u32 = 6;

impl Gguf {
    /// Dimensions of the model in this file.
    ///
    /// # Errors
    /// If the architecture has no definition, a key is missing, contradictory or implausible, or
    /// the file has tensors (biases, experts) that the architecture's graph would ignore.
    pub fn config(&self) -> Result<ModelConfig, GgufError> {
        let name = self.str("general.architecture")?;
        // Mistral's files say `llama`; its window is stated nowhere, and current models have none.
        let family = Family::ALL.into_iter().find(|f| f.gguf_name() == name).ok_or_else(|| {
            GgufError::Architecture { found: super::clip(name), known: known_architectures() }
        })?;
        let mut keys = Keys { gguf: self, family };
        if family == Family::Llama && keys.opt_u32("expert_count")?.is_some_and(|n| n > 0) {
            keys.family = Family::Mixtral;
        }
        let config = keys.config()?;
        self.check_graph(&config)?;
        Ok(config)
    }

    /// Every tensor must have a place in the graph: ignoring one would give wrong answers.
    fn check_graph(&self, config: &ModelConfig) -> Result<(), GgufError> {
        let parts = sparse_parts(&self.metadata);
        for t in &self.tensors {
            if !config.has_place(&t.name) && !parts.contains(&t.name) {
                return Err(GgufError::Tensor {
                    tensor: super::clip(&t.name),
                    problem: format!(
                        "it has no place in the {} graph of {} layers as Millrace defines it",
                        config.family.as_str(),
                        config.layers
                    ),
                });
            }
        }
        Ok(())
    }
}

/// Names of the architectures, for messages.
fn known_architectures() -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in Family::ALL.map(Family::gguf_name) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

/// Keys of one family: `FAMILY.what`.
pub(super) struct Keys<'a> {
    pub(super) gguf: &'a Gguf,
    pub(super) family: Family,
}

impl Keys<'_> {
    pub(super) fn key(&self, what: &str) -> String {
        format!("{}.{what}", self.family.gguf_name())
    }

    pub(super) fn opt_u32(&self, what: &str) -> Result<Option<u32>, GgufError> {
        self.gguf.opt_u32(&self.key(what))
    }

    /// A positive number that is stated, or nothing.
    pub(super) fn opt_f32(&self, what: &str) -> Result<Option<f32>, GgufError> {
        match self.gguf.opt_f32(&self.key(what))? {
            Some(x) if !(x.is_finite() && x >= 0.0) => {
                Err(self.bad(what, format!("{x} is implausible")))
            }
            x => Ok(x),
        }
    }

    pub(super) fn bad(&self, what: &str, problem: impl Into<String>) -> GgufError {
        GgufError::BadValue { key: self.key(what), problem: problem.into() }
    }

    fn config(&self) -> Result<ModelConfig, GgufError> {
        let experts = self.experts()?;
        let layers = self.dimension("block_count", MAX_LAYERS)?;
        let hidden = self.dimension("embedding_length", MAX_HIDDEN)?;
        let heads = self.dimension("attention.head_count", MAX_HEADS)?;
        let kv_heads = match self.gguf.metadata.get(&self.key("attention.head_count_kv")) {
            Some(_) => self.dimension("attention.head_count_kv", MAX_HEADS)?,
            None => heads,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.bad(
                "attention.head_count_kv",
                format!("{heads} heads are no multiple of {kv_heads} key-value heads"),
            ));
        }
        let head_dim = self.head_dim(hidden, heads)?;
        let rope = self.rope(head_dim)?;
        Ok(ModelConfig {
            family: self.family,
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: self.ffn(experts.as_ref())?,
            vocab: self.vocab(hidden)?,
            context: self.dimension("context_length", MAX_CONTEXT)?,
            rms_eps: self.epsilon()?,
            tied_head: self.gguf.tensor("output.weight").is_none(),
            rope_factors: self.gguf.tensor("rope_freqs.weight").is_some(),
            features: Features {
                experts,
                ..self.features(&rope, (layers, hidden, heads, head_dim))?
            },
            rope,
        })
    }

    fn features(
        &self,
        rope: &RopeConfig,
        sizes: (u32, u32, u32, u32),
    ) -> Result<Features, GgufError> {
        let window = |every, rope| -> Result<Option<Window>, GgufError> {
            let size = self.opt_u32("attention.sliding_window")?.filter(|&n| n > 0);
            Ok(size.map(|size| Window { size, every, offset: 1, rope }))
        };
        let usual = Features::of(self.family, sizes.1);
        Ok(match self.family {
            Family::Gemma2 => Features {
                attention_scale: gemma_scale(self.family, sizes),
                attention_softcap: self.opt_f32("attn_logit_softcapping")?.unwrap_or(50.0),
                logit_softcap: self.opt_f32("final_logit_softcapping")?.unwrap_or(30.0),
                window: window(GEMMA_2_EVERY, None)?,
                ..usual
            },
            Family::Gemma3 => {
                let base = self.opt_f32("rope.local.freq_base")?.unwrap_or(LOCAL_BASE);
                let local = RopeConfig { base, scaling: RopeScaling::Linear(1.0), ..*rope };
                Features {
                    attention_scale: gemma_scale(self.family, sizes),
                    logit_softcap: self.opt_f32("final_logit_softcapping")?.unwrap_or(0.0),
                    window: window(GEMMA_3_EVERY, Some(local))?,
                    ..usual
                }
            }
            Family::Phi3 => Features { window: window(0, None)?, ..usual },
            _ => usual,
        })
    }

    /// What the router does is the family's: files state numbers and widths.
    fn experts(&self) -> Result<Option<Experts>, GgufError> {
        let count = self.opt_u32("expert_count")?.unwrap_or(0);
        if !self.family.has_experts() {
            return match count {
                0 => Ok(None),
                n => Err(self.bad("expert_count", format!("{n} experts are not supported"))),
            };
        }
        let count = self.dimension("expert_count", MAX_EXPERTS)?;
        let used = self.dimension("expert_used_count", count)?;
        let shared = match self.family {
            Family::Qwen2Moe => match self.opt_u32("expert_shared_feed_forward_length")? {
                Some(_) => self.dimension("expert_shared_feed_forward_length", MAX_FFN)?,
                None => self.dimension("feed_forward_length", MAX_FFN)?,
            },
            _ => 0,
        };
        let normalise = self.family != Family::Qwen2Moe;
        if let Some(stated) = self.gguf.opt_bool(&self.key("expert_weights_norm"))?
            && stated != normalise
        {
            return Err(self.bad("expert_weights_norm", format!("{stated} is not supported")));
        }
        Ok(Some(Experts { count, used, normalise, shared_ffn: shared }))
    }

    /// Of one expert, where there are some: else llama.cpp shares the whole out over those used.
    fn ffn(&self, experts: Option<&Experts>) -> Result<u32, GgufError> {
        const OF_EXPERT: &str = "expert_feed_forward_length";
        match experts {
            Some(_) if self.opt_u32(OF_EXPERT)?.is_some() => self.dimension(OF_EXPERT, MAX_FFN),
            Some(experts) if self.family != Family::Mixtral => {
                Ok(self.dimension("feed_forward_length", MAX_FFN)? / experts.used)
            }
            _ => self.dimension("feed_forward_length", MAX_FFN),
        }
    }

    fn dimension(&self, what: &str, max: u32) -> Result<u32, GgufError> {
        match self.gguf.u32(&self.key(what))? {
            n if (1..=max).contains(&n) => Ok(n),
            n => Err(self.bad(what, format!("{n} is implausible (1 to {max})"))),
        }
    }

    fn head_dim(&self, hidden: u32, heads: u32) -> Result<u32, GgufError> {
        const KEY: &str = "attention.key_length";
        const VALUE: &str = "attention.value_length";
        let dim = if self.gguf.metadata.get(&self.key(KEY)).is_some() {
            self.dimension(KEY, MAX_HEAD_DIM)?
        } else if hidden.is_multiple_of(heads) {
            hidden / heads
        } else {
            return Err(self.bad(
                "attention.head_count",
                format!("{hidden} elements do not divide into {heads} heads"),
            ));
        };
        if dim > MAX_HEAD_DIM {
            return Err(self.bad(KEY, format!("heads of {dim} elements (at most {MAX_HEAD_DIM})")));
        }
        match self.opt_u32(VALUE)? {
            Some(v) if v != dim => Err(self.bad(
                VALUE,
                format!("values of {v} elements with keys of {dim} are not supported"),
            )),
            _ => Ok(dim),
        }
    }

    fn vocab(&self, hidden: u32) -> Result<u32, GgufError> {
        let name = embedding_name();
        let wrong = |problem: String| GgufError::Tensor { tensor: name.to_owned(), problem };
        let embedding = (self.gguf.tensor(name))
            .ok_or_else(|| wrong("the model has no such tensor".to_owned()))?;
        let &[inner, vocab] = embedding.dims.as_slice() else {
            return Err(wrong(format!("shape {:?} is no matrix", embedding.dims)));
        };
        if inner != u64::from(hidden) {
            let key = self.key("embedding_length");
            return Err(wrong(format!("rows of {inner} elements, but {key} is {hidden}")));
        }
        if vocab > u64::from(MAX_VOCAB) {
            return Err(wrong(format!("a vocabulary of {vocab} is implausible")));
        }
        if let Some(tokens) = self.gguf.opt_strings("tokenizer.ggml.tokens")?
            && tokens.len() as u64 != vocab
        {
            return Err(wrong(format!("{vocab} rows, but {} tokens are listed", tokens.len())));
        }
        Ok(vocab as u32)
    }

    fn epsilon(&self) -> Result<f32, GgufError> {
        let key = match self.family {
            Family::Gpt2 => "attention.layer_norm_epsilon",
            _ => "attention.layer_norm_rms_epsilon",
        };
        match self.gguf.f32(&self.key(key))? {
            e if e > 0.0 && e < 1.0 => Ok(e),
            e => Err(self.bad(key, format!("{e} is implausible (between 0 and 1)"))),
        }
    }
}

/// The scale of attention that files of Gemma 2 and 3 do not state, of layers, hidden size, heads and
/// their width; `None` for other families. Of either's sizes, the largest scales by the width of all
/// heads: it is known by its layers, as llama.cpp knows it.
pub fn gemma_scale(
    family: Family,
    (layers, hidden, heads, head_dim): (u32, u32, u32, u32),
) -> Option<f32> {
    let largest = match family {
        Family::Gemma2 => 46,
        Family::Gemma3 => 62,
        _ => return None,
    };
    let scaled = if layers == largest { hidden / heads } else { head_dim };
    Some(1.0 / (scaled as f32).sqrt())
}
