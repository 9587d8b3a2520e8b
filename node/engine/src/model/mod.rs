//! Models over backends: a decoder is written once, against [`Backend`].
//!
//! [`Backend`] has a dozen operations, fused at the level that both plain CPU kernels and a tensor
//! library do well. [`Llama`] is the decoder; [`weights`] finds and checks its tensors; [`Batch`] and
//! [`BlockTables`] hold what a step is about. Nothing here knows an instruction set.

mod batch;
mod llama;
mod tables;
pub mod weights;

use std::ops::Range;

use millrace_shared::model::{Dtype, ModelConfig};
use millrace_shared::wire::control::EngineSettings;

pub use batch::{Batch, Output, Span};
pub use llama::Llama;
pub use tables::BlockTables;
pub use weights::{LoadedPart, LoadedParts, Part, Piece, Source};

use crate::{LoadError, TopLogits};

/// Most rows whose largest logits are found together.
pub const TOP_ROWS: usize = 64;

/// What a decoder needs of the arithmetic. Tensors are `rows x width`, allocated at load for the
/// largest step; every operation sets the rows of what it writes.
pub trait Backend {
    /// Activations.
    type Tensor;
    /// A matrix, or several that share their input, one below the other.
    type Weight;
    /// A vector of f32.
    type Vector;
    /// K and V of all layers of the stage.
    type Kv;
    /// Lists of the largest logits of some rows.
    type Best;

    /// Room for `rows x width` activations; `input` if a matrix will be applied to them.
    ///
    /// # Errors
    /// If memory runs out.
    fn tensor(&mut self, rows: usize, width: usize, input: bool)
    -> Result<Self::Tensor, LoadError>;

    /// Loads weights; what is loaded comes in the same order, the parts of all pieces one after the
    /// other. `progress` gets the bytes done so far, as they are in the model's file.
    ///
    /// # Errors
    /// If memory runs out, a type is unsupported or a file cannot be read.
    fn weights(
        &mut self,
        pieces: &[Piece<'_>],
        progress: &mut dyn FnMut(u64),
    ) -> Result<LoadedParts<Self::Weight, Self::Vector>, LoadError>;

    /// Makes sure that all memory handed out so far is really there.
    ///
    /// # Errors
    /// If memory runs out.
    fn touch(&mut self) -> Result<(), LoadError>;

    /// Allocates the KV cache, and whatever attention and RoPE need besides (`factors`: frequency
    /// factors, if the model has them).
    ///
    /// # Errors
    /// If memory runs out or the settings are not supported.
    fn kv(
        &mut self,
        layers: usize,
        config: &ModelConfig,
        settings: &EngineSettings,
        factors: Option<&Source>,
    ) -> Result<Self::Kv, LoadError>;

    /// Rows of the embedding.
    fn embed(&mut self, table: &Self::Weight, tokens: &[u32], out: &mut Self::Tensor);
    /// Host to tensor.
    fn upload(&mut self, rows: &[f32], out: &mut Self::Tensor);
    /// Tensor to host.
    fn download(&mut self, x: &Self::Tensor, out: &mut [f32]);
    /// `x / rms(x) * gain`.
    fn rms_norm(&mut self, x: &Self::Tensor, gain: &Self::Vector, eps: f32, out: &mut Self::Tensor);
    /// `out = w x`.
    fn linear(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor);
    /// `out += w x`.
    fn linear_add(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor);
    /// `out = silu(gate x) * (up x)`, of the matrices `gate | up`.
    fn gated(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor);
    /// Rotates the query and key heads of `q | k | v` rows by their positions, and stores the key and
    /// value heads.
    fn write_kv(
        &mut self,
        qkv: &mut Self::Tensor,
        kv: &mut Self::Kv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
    );
    /// Causal attention of the query heads over the stored keys and values.
    fn attention(
        &mut self,
        qkv: &Self::Tensor,
        kv: &Self::Kv,
        layer: usize,
        spans: &[Span],
        tables: &BlockTables,
        out: &mut Self::Tensor,
    );
    /// Rounds to the activation dtype; the first row that is not finite, if any.
    fn settle(&mut self, x: &mut Self::Tensor, dtype: Dtype) -> Option<usize>;
    /// Keeps these rows (ascending) and drops the others.
    fn gather_rows(&mut self, rows: &[usize], x: &mut Self::Tensor);
    /// The head for some rows of its normalised input; returns `rows.len() x vocab` logits.
    fn logits<'t>(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        head: &Self::Weight,
        out: &'t mut Self::Tensor,
    ) -> &'t mut [f32];
    /// Room for the largest logits of `rows` rows, at most [`TOP_ROWS`].
    ///
    /// # Errors
    /// If memory runs out.
    fn best(&mut self, rows: usize) -> Result<Self::Best, LoadError>;
    /// As [`Backend::logits`], but only the `k[i]` largest (1 to `MAX_CANDIDATES`) of row
    /// `rows.start + i` are kept: `take(i, largest)` is called for each row, in order.
    fn top_logits(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        head: &Self::Weight,
        k: &[usize],
        best: &mut Self::Best,
        take: &mut dyn FnMut(usize, TopLogits<'_>),
    );
}
