//! Canonical tensor names, their shapes, and the order in which a step reads them.

use std::collections::HashMap;

use millrace_shared::model::{ModelConfig, RopeScaling, check_rank, head_name};

use super::Source;
use crate::LoadError;

/// Something to load: what one operation needs.
#[derive(Clone, Debug)]
pub enum Part<'a> {
    /// A vector of floats, with this added to each.
    Vector(&'a Source, f32),
    /// Matrices that share their input, one below the other.
    Matrices(Vec<&'a Source>),
    /// A matrix of floats that lies column by column.
    Transposed(&'a Source),
}

/// What lies together in memory, and in the cache of packed weights, in the order in which a step
/// reads it: a layer, the embedding, the head.
pub type Piece<'a> = Vec<Part<'a>>;

/// What became of a [`Part`].
#[derive(Debug)]
pub enum LoadedPart<W, V> {
    /// Of a vector.
    Vector(V),
    /// Of matrices.
    Matrices(W),
}

/// The parts of several pieces, one after the other.
pub type LoadedParts<W, V> = Vec<LoadedPart<W, V>>;

/// A stage's tensors by name, checked against the dimensions.
#[derive(Debug)]
pub struct Sources<'a> {
    config: &'a ModelConfig,
    all: HashMap<&'a str, &'a Source>,
}

/// What the name of the thin matrix before factored ones has after that of the first of them.
const INNER: &str = "_in";

/// First matrices of those that share their input.
const PRODUCTS: [&str; 6] = ["attn_q", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

impl<'a> Sources<'a> {
    /// Checks that the dimensions suit the kernels.
    ///
    /// # Errors
    /// If a width is no multiple of 32, a head none of 16, or heads do not divide.
    pub fn new(config: &'a ModelConfig, all: &'a [Source]) -> Result<Self, LoadError> {
        let bad = |what: String| Err(LoadError::Settings(what));
        let c = config;
        for (what, width) in [("hidden", c.hidden), ("ffn", c.ffn)] {
            if width == 0 || !width.is_multiple_of(32) {
                return bad(format!("{what} size {width} is not a multiple of 32"));
            }
        }
        if let Some(e) = &c.features.experts {
            if e.count == 0 || e.used == 0 || e.used > e.count {
                return bad(format!("{} of {} experts for a row", e.used, e.count));
            }
            if !e.shared_ffn.is_multiple_of(32) {
                let width = e.shared_ffn;
                return bad(format!("shared expert's size {width} is not a multiple of 32"));
            }
        }
        let queries = u64::from(c.heads) * u64::from(c.head_dim);
        if c.head_dim == 0
            || !c.head_dim.is_multiple_of(16)
            || !queries.is_multiple_of(32)
            || queries > 1 << 24
        {
            return bad(format!("{} heads of {} elements are not supported", c.heads, c.head_dim));
        }
        if c.kv_heads == 0 || c.heads == 0 || !c.heads.is_multiple_of(c.kv_heads) {
            return bad(format!("{} heads do not share {} KV heads", c.heads, c.kv_heads));
        }
        if c.rope.dim > c.head_dim || !c.rope.dim.is_multiple_of(2) {
            return bad(format!("{} rotated of {} head elements", c.rope.dim, c.head_dim));
        }
        Ok(Self { config, all: all.iter().map(|s| (s.entry().name.as_str(), s)).collect() })
    }

    fn find(&self, name: &str, dims: &[u64]) -> Result<&'a Source, LoadError> {
        let source =
            *self.all.get(name).ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
        let entry = source.entry();
        if entry.dims != dims {
            return Err(LoadError::Shape {
                tensor: name.to_owned(),
                found: entry.dims.clone(),
                expected: dims.to_vec(),
            });
        }
        if !entry.dtype.is_supported() || (dims.len() == 1 && !entry.dtype.is_float()) {
            return Err(unsupported(source));
        }
        if matches!(source, Source::Sparse(_)) && !name.starts_with("blk.") {
            return Err(LoadError::Settings(format!(
                "tensor '{name}' is kept without its zeros: only matrices of layers can be"
            )));
        }
        if !dims[0].is_multiple_of(entry.dtype.block_elements()) {
            return Err(LoadError::Settings(format!(
                "rows of tensor '{name}' ({} elements) are no whole {} blocks",
                dims[0],
                entry.dtype.as_str()
            )));
        }
        Ok(source)
    }

    /// The embedding matrix.
    ///
    /// # Errors
    /// If it is missing or misshapen.
    pub fn embedding(&self) -> Result<&'a Source, LoadError> {
        let dims = [self.config.hidden, self.config.vocab].map(u64::from);
        self.find("token_embd.weight", &dims)
    }

    /// The table of learned positions, where the model has one; `positions` are needed.
    ///
    /// # Errors
    /// If it is missing, misshapen or too short.
    pub fn positions(&self, positions: u32) -> Result<Option<Part<'a>>, LoadError> {
        if !self.config.features.learned_positions {
            return Ok(None);
        }
        let (hidden, context) = (self.config.hidden, self.config.context);
        if positions > context {
            return Err(LoadError::Settings(format!(
                "sequences of {positions} positions, but the model has learned {context}"
            )));
        }
        let table = self.find("position_embd.weight", &[hidden, context].map(u64::from))?;
        if !table.entry().dtype.is_float() {
            return Err(unsupported(table));
        }
        Ok(Some(Part::Vector(table, 0.0)))
    }

    /// The head's norm (its gain, and its bias where it has one) and matrix.
    ///
    /// # Errors
    /// If one is missing or misshapen.
    pub fn head(&self) -> Result<(Piece<'a>, &'a Source), LoadError> {
        let dims = [self.config.hidden, self.config.vocab].map(u64::from);
        Ok((self.norm("output_norm")?, self.find(head_name(self.config), &dims)?))
    }

    /// RoPE frequency factors, where the model has them, for sequences of at most so many positions.
    ///
    /// # Errors
    /// If they are missing or misshapen.
    pub fn rope_factors(&self, positions: u32) -> Result<Option<Vec<f32>>, LoadError> {
        let pairs = u64::from(self.config.rope.dim / 2);
        let name = match self.config.rope.scaling {
            scaling @ RopeScaling::Long { .. } => {
                let long = scaling.is_long(positions);
                if let Some(lists) = &self.config.features.long_factors {
                    let list = if long { &lists.long } else { &lists.short };
                    if list.len() as u64 != pairs {
                        let n = list.len();
                        let what = format!("{n} RoPE factors for {pairs} frequencies");
                        return Err(LoadError::Settings(what));
                    }
                    return Ok(Some(list.clone()));
                }
                if long { "rope_factors_long.weight" } else { "rope_factors_short.weight" }
            }
            _ if self.config.rope_factors => "rope_freqs.weight",
            _ => return Ok(None),
        };
        self.find(name, &[pairs])?.floats().map(Some)
    }

    /// The rank of matrices of a layer that share their input, where they are factored: the outputs of
    /// the thin matrix before them. `first` is the first one's name.
    pub(super) fn rank(&self, layer: u32, first: &str) -> Option<u64> {
        let inner = self.all.get(&*format!("blk.{layer}.{first}{INNER}.weight"))?;
        inner.entry().dims.get(1).copied().filter(|_| !self.config.features.transposed)
    }

    /// The ranks in some layers, each once.
    pub(super) fn ranks(&self, layers: std::ops::Range<u32>) -> Vec<u64> {
        let of_layer = |layer| PRODUCTS.iter().filter_map(move |first| self.rank(layer, first));
        let mut all: Vec<u64> = layers.flat_map(of_layer).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Gain and, where the family has them, bias of a norm.
    fn norm(&self, name: &str) -> Result<Piece<'a>, LoadError> {
        let hidden = u64::from(self.config.hidden);
        let mut norm = vec![self.gain(&format!("{name}.weight"), hidden)?];
        if self.config.features.layer_norm {
            norm.push(Part::Vector(self.find(&format!("{name}.bias"), &[hidden])?, 0.0));
        }
        Ok(norm)
    }

    /// The gain of a norm.
    fn gain(&self, name: &str, len: u64) -> Result<Part<'a>, LoadError> {
        let plus = if self.config.features.gain_plus_one { 1.0 } else { 0.0 };
        Ok(Part::Vector(self.find(name, &[len])?, plus))
    }

    /// Everything of one layer, in the order in which a step reads it: attention's norm; `q | k | v`;
    /// their biases; the gains of queries and keys; the output and its bias; the gain after it; the
    /// feed-forward part's norm; that part; the gain after it. What the family does not have is absent.
    /// Before factored matrices comes the thin one.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn layer(&self, layer: u32) -> Result<Piece<'a>, LoadError> {
        let c = self.config;
        let f = &c.features;
        let [h, head] = [c.hidden, c.head_dim].map(u64::from);
        let at = Layer {
            sources: self,
            layer,
            matrices: c.plain_matrices(),
            vectors: c.layer_vectors(),
        };
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut piece = self.norm(&name("attn_norm"))?;
        let qkv: &[&str] =
            if f.fused_qkv { &["attn_qkv"] } else { &["attn_q", "attn_k", "attn_v"] };
        piece.extend(at.product(qkv)?);
        for part in qkv {
            piece.extend(at.bias(part)?);
        }
        if f.qk_norm {
            piece.push(self.gain(&name("attn_q_norm.weight"), head)?);
            piece.push(self.gain(&name("attn_k_norm.weight"), head)?);
        }
        piece.extend(at.product(&["attn_output"])?);
        piece.extend(at.bias("attn_output")?);
        if f.post_norms {
            piece.push(self.gain(&name("post_attention_norm.weight"), h)?);
        }
        piece.extend(self.norm(&name("ffn_norm"))?);
        at.feed_forward(&mut piece)?;
        if f.post_norms {
            piece.push(self.gain(&name("post_ffw_norm.weight"), h)?);
        }
        Ok(piece)
    }
}

fn unsupported(source: &Source) -> LoadError {
    let entry = source.entry();
    let (tensor, dtype) = (entry.name.clone(), entry.dtype.as_str().to_owned());
    LoadError::UnsupportedType { tensor, dtype }
}

/// One layer's tensors.
struct Layer<'s, 'a> {
    sources: &'s Sources<'a>,
    layer: u32,
    matrices: Vec<(&'static str, [u64; 2])>,
    vectors: Vec<(&'static str, u64)>,
}

impl<'a> Layer<'_, 'a> {
    /// Matrices that share their input, after the thin one that makes it where they are factored.
    fn product(&self, names: &[&str]) -> Result<Vec<Part<'a>>, LoadError> {
        let Some(rank) = self.sources.rank(self.layer, names[0]) else {
            return Ok(vec![self.matrices(names, None)?]);
        };
        let name = format!("blk.{}.{}{INNER}.weight", self.layer, names[0]);
        check_rank(rank).map_err(|e| LoadError::Settings(format!("tensor '{name}' {e}")))?;
        let known = self.matrices.iter().find(|(known, _)| *known == names[0]);
        let cols = known.map_or(0, |(_, dims)| dims[0]);
        let inner = Part::Matrices(vec![self.sources.find(&name, &[cols, rank])?]);
        Ok(vec![inner, self.matrices(names, Some(rank))?])
    }

    /// Matrices that share their input, of `rank` elements where they are factored; one alone where
    /// they lie column by column.
    fn matrices(&self, names: &[&str], rank: Option<u64>) -> Result<Part<'a>, LoadError> {
        let transposed = self.sources.config.features.transposed;
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            let known = self.matrices.iter().find(|(known, _)| known == name);
            let mut dims = known.map_or([0, 0], |(_, dims)| *dims);
            dims[0] = rank.unwrap_or(dims[0]);
            if transposed {
                dims.reverse();
            }
            let layer = self.layer;
            found.push(self.sources.find(&format!("blk.{layer}.{name}.weight"), &dims)?);
        }
        match found[..] {
            [one] if transposed && one.entry().dtype.is_float() => Ok(Part::Transposed(one)),
            [one] if transposed => Err(unsupported(one)),
            _ => Ok(Part::Matrices(found)),
        }
    }

    /// The bias of a matrix, if the family has it.
    fn bias(&self, matrix: &str) -> Result<Option<Part<'a>>, LoadError> {
        let name = format!("{matrix}.bias");
        let Some((_, len)) = self.vectors.iter().find(|(known, _)| *known == name) else {
            return Ok(None);
        };
        let source = self.sources.find(&format!("blk.{}.{name}", self.layer), &[*len])?;
        Ok(Some(Part::Vector(source, 0.0)))
    }

    /// `gate | up` and `down`; or `up` and `down` with biases; or the router's matrix, with the gate of
    /// the shared expert below it, then each expert's, then the shared one's.
    fn feed_forward(&self, piece: &mut Piece<'a>) -> Result<(), LoadError> {
        let c = self.sources.config;
        let Some(experts) = &c.features.experts else {
            if !c.features.ungated {
                piece.extend(self.product(&["ffn_gate", "ffn_up"])?);
                piece.extend(self.product(&["ffn_down"])?);
                return Ok(());
            }
            for name in ["ffn_up", "ffn_down"] {
                piece.extend(self.product(&[name])?);
                piece.extend(self.bias(name)?);
            }
            return Ok(());
        };
        let router: &[&str] = match experts.shared_ffn {
            0 => &["ffn_gate_inp"],
            _ => &["ffn_gate_inp", "ffn_gate_inp_shexp"],
        };
        piece.push(self.matrices(router, None)?);
        for expert in 0..experts.count {
            let get = |name: &str| {
                let full = format!("blk.{}.{name}.{expert}.weight", self.layer);
                self.sources.find(&full, &c.expert_dims(name))
            };
            piece.push(Part::Matrices(vec![get("ffn_gate")?, get("ffn_up")?]));
            piece.push(Part::Matrices(vec![get("ffn_down")?]));
        }
        if experts.shared_ffn > 0 {
            piece.push(self.matrices(&["ffn_gate_shexp", "ffn_up_shexp"], None)?);
            piece.push(self.matrices(&["ffn_down_shexp"], None)?);
        }
        Ok(())
    }
}
