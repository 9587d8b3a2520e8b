//! Canonical tensor names, their shapes, and where their bytes come from.

use std::fs::File;
use std::os::unix::fs::FileExt;

use half::{bf16, f16};
use millrace_shared::model::{ModelConfig, TensorEntry, TensorType, head_name};

use crate::{LoadError, TensorSource};

/// Bytes of one tensor.
#[derive(Clone, Debug)]
pub enum Source {
    /// In a file.
    File(TensorSource),
    /// Made up, for measurements: never NaN, never denormal.
    Synthetic(TensorEntry),
}

impl Source {
    /// Name, type, dimensions.
    pub fn entry(&self) -> &TensorEntry {
        match self {
            Self::File(source) => &source.entry,
            Self::Synthetic(entry) => entry,
        }
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn open(&self) -> Result<Reader<'_>, LoadError> {
        Ok(match self {
            Self::File(source) => {
                let file = File::open(&source.path)
                    .map_err(|e| LoadError::Io { path: source.path.clone(), source: e })?;
                Reader::File(file, source)
            }
            Self::Synthetic(_) => Reader::Synthetic(0x9e37_79b9_7f4a_7c15),
        })
    }

    /// Inputs and outputs of a matrix.
    ///
    /// # Errors
    /// If it is no matrix or too large to address.
    pub fn matrix(&self) -> Result<(usize, usize), LoadError> {
        let dims = &self.entry().dims;
        match dims.as_slice() {
            &[cols, rows] if cols.checked_mul(rows).is_some_and(|n| n < 1 << 40) => {
                Ok((cols as usize, rows as usize))
            }
            _ => Err(LoadError::Settings(format!(
                "tensor '{}' of shape {dims:?} is no matrix that fits in memory",
                self.entry().name
            ))),
        }
    }
}

/// Something to load: what one operation needs.
#[derive(Clone, Debug)]
pub enum Part<'a> {
    /// A vector of floats, with this added to each.
    Vector(&'a Source, f32),
    /// Matrices that share their input, one below the other.
    Matrices(Vec<&'a Source>),
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

/// An open tensor.
#[derive(Debug)]
pub enum Reader<'a> {
    /// A file, and where in it.
    File(File, &'a TensorSource),
    /// State of the generator.
    Synthetic(u64),
}

impl Reader<'_> {
    /// The first elements of a tensor of floats, as f32.
    ///
    /// # Errors
    /// If the file ends first or cannot be read.
    pub fn read_floats(&mut self, dtype: TensorType, out: &mut [f32]) -> Result<(), LoadError> {
        let mut bytes = vec![0; out.len() * dtype.block_bytes() as usize];
        self.read(0, &mut bytes)?;
        let halves = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match dtype {
            TensorType::F16 => {
                out.iter_mut().zip(halves).for_each(|(x, b)| *x = f16::from_bits(b).to_f32());
            }
            TensorType::BF16 => {
                out.iter_mut().zip(halves).for_each(|(x, b)| *x = bf16::from_bits(b).to_f32());
            }
            _ => {
                let floats = bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
                out.iter_mut().zip(floats).for_each(|(x, b)| *x = f32::from_le_bytes(b));
            }
        }
        Ok(())
    }

    /// Fills `bytes` from `offset` of the tensor on.
    ///
    /// # Errors
    /// If the file ends first or cannot be read.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), LoadError> {
        match self {
            Self::File(file, source) => file
                .read_exact_at(bytes, source.offset.saturating_add(offset))
                .map_err(|e| LoadError::Io { path: source.path.clone(), source: e }),
            Self::Synthetic(state) => {
                for chunk in bytes.chunks_mut(8) {
                    *state ^= *state << 13;
                    *state ^= *state >> 7;
                    *state ^= *state << 17;
                    // No exponent of all ones, whatever the type.
                    let bits = (*state & 0x0f0f_0f0f_0f0f_0f0f) | 0x2020_2020_2020_2020;
                    chunk.copy_from_slice(&bits.to_le_bytes()[..chunk.len()]);
                }
                Ok(())
            }
        }
    }
}

/// A stage's tensors by name, checked against the dimensions.
#[derive(Debug)]
pub struct Sources<'a> {
    config: &'a ModelConfig,
    all: Vec<&'a Source>,
}

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
        Ok(Self { config, all: all.iter().collect() })
    }

    fn find(&self, name: &str, dims: &[u32]) -> Result<&'a Source, LoadError> {
        let found = self.all.iter().find(|s| s.entry().name == name);
        let source = *found.ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
        let entry = source.entry();
        let expected: Vec<u64> = dims.iter().map(|&d| u64::from(d)).collect();
        if entry.dims != expected {
            return Err(LoadError::Shape {
                tensor: name.to_owned(),
                found: entry.dims.clone(),
                expected,
            });
        }
        let float = matches!(entry.dtype, TensorType::F32 | TensorType::F16 | TensorType::BF16);
        if !entry.dtype.is_supported() || (dims.len() == 1 && !float) {
            return Err(LoadError::UnsupportedType {
                tensor: name.to_owned(),
                dtype: entry.dtype.as_str().to_owned(),
            });
        }
        if !expected[0].is_multiple_of(entry.dtype.block_elements()) {
            return Err(LoadError::Settings(format!(
                "rows of tensor '{name}' ({} elements) are no whole {} blocks",
                expected[0],
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
        self.find("token_embd.weight", &[self.config.hidden, self.config.vocab])
    }

    /// The head's gain and matrix.
    ///
    /// # Errors
    /// If one is missing or misshapen.
    pub fn head(&self) -> Result<(Part<'a>, &'a Source), LoadError> {
        let norm = self.gain("output_norm.weight", self.config.hidden)?;
        Ok((norm, self.find(head_name(self.config), &[self.config.hidden, self.config.vocab])?))
    }

    /// RoPE frequency factors, where the model has them.
    ///
    /// # Errors
    /// If they are missing or misshapen.
    pub fn rope_factors(&self) -> Result<Option<&'a Source>, LoadError> {
        if !self.config.rope_factors {
            return Ok(None);
        }
        self.find("rope_freqs.weight", &[self.config.rope.dim / 2]).map(Some)
    }

    /// The gain of a norm.
    fn gain(&self, name: &str, len: u32) -> Result<Part<'a>, LoadError> {
        let plus = if self.config.features.gain_plus_one { 1.0 } else { 0.0 };
        Ok(Part::Vector(self.find(name, &[len])?, plus))
    }

    /// Everything of one layer, in the order in which a step reads it: attention's gain; `q | k | v`;
    /// their biases; the gains of queries and keys; the output; the gain after it; the feed-forward
    /// part's gain; `gate | up`; `down`; the gain after it. What the family does not have is absent.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn layer(&self, layer: u32) -> Result<Piece<'a>, LoadError> {
        let c = self.config;
        let f = &c.features;
        let (h, q, kv) = (c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let name = |part: &str| format!("blk.{layer}.{part}");
        let get = |part: &str, dims: &[u32]| self.find(&name(part), dims);
        let gain = |part: &str, len: u32| self.gain(&name(part), len);
        let mut piece = vec![gain("attn_norm.weight", h)?];
        let qkv = [("attn_q.weight", q), ("attn_k.weight", kv), ("attn_v.weight", kv)];
        let qkv = qkv.map(|(part, rows)| get(part, &[h, rows]));
        piece.push(Part::Matrices(qkv.into_iter().collect::<Result<_, _>>()?));
        if f.qkv_bias {
            for (part, len) in [("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)] {
                piece.push(Part::Vector(get(part, &[len])?, 0.0));
            }
        }
        if f.qk_norm {
            piece.push(gain("attn_q_norm.weight", c.head_dim)?);
            piece.push(gain("attn_k_norm.weight", c.head_dim)?);
        }
        piece.push(Part::Matrices(vec![get("attn_output.weight", &[q, h])?]));
        if f.post_norms {
            piece.push(gain("post_attention_norm.weight", h)?);
        }
        piece.push(gain("ffn_norm.weight", h)?);
        let gate_up =
            vec![get("ffn_gate.weight", &[h, c.ffn])?, get("ffn_up.weight", &[h, c.ffn])?];
        piece.push(Part::Matrices(gate_up));
        piece.push(Part::Matrices(vec![get("ffn_down.weight", &[c.ffn, h])?]));
        if f.post_norms {
            piece.push(gain("post_ffw_norm.weight", h)?);
        }
        Ok(piece)
    }
}
