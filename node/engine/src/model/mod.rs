//! Models over backends: a decoder is written once, against [`Backend`].
//!
//! [`Backend`] has a dozen operations, fused at the level that both plain CPU kernels and a tensor
//! library do well. [`Decoder`] is the decoder; [`weights`] finds and checks its tensors; [`Batch`] and
//! [`BlockTables`] hold what a step is about; [`observed`] lets somebody look on. Nothing here knows an instruction set.

mod batch;
mod decoder;
mod joined;
mod layer;
pub mod observed;
mod source;
mod sparse;
mod tables;
pub mod weights;

use std::ops::Range;

use millrace_shared::model::{Activation, Dtype, Experts, ModelConfig};
use millrace_shared::wire::control::EngineSettings;

pub use batch::{Batch, Output, Span};
pub use decoder::Decoder;
pub use source::{Reader, Source};
pub use sparse::Tiles;
pub use tables::BlockTables;
pub use weights::{LoadedPart, LoadedParts, Part, Piece};

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
    /// Room to send rows to their experts.
    type Routes;

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

    /// Allocates the KV cache of these layers, and whatever attention and RoPE need besides (`factors`:
    /// frequency factors, if the model has them): windows, scales and soft caps are the cache's.
    ///
    /// # Errors
    /// If memory runs out or the settings are not supported.
    fn kv(
        &mut self,
        layers: Range<u32>,
        config: &ModelConfig,
        settings: &EngineSettings,
        factors: Option<&[f32]>,
    ) -> Result<Self::Kv, LoadError>;

    /// Room to send `rows` rows to the experts of a layer.
    ///
    /// # Errors
    /// If memory runs out.
    fn routes(
        &mut self,
        rows: usize,
        hidden: usize,
        ffn: usize,
        experts: &Experts,
    ) -> Result<Self::Routes, LoadError>;

    /// Rows of the embedding.
    fn embed(&mut self, table: &Self::Weight, tokens: &[u32], out: &mut Self::Tensor);
    /// Adds each row's position's part of a table `positions x width`.
    fn add_positions(&mut self, table: &Self::Vector, spans: &[Span], out: &mut Self::Tensor);
    /// Host to tensor.
    fn upload(&mut self, rows: &[f32], out: &mut Self::Tensor);
    /// Tensor to host.
    fn download(&mut self, x: &Self::Tensor, out: &mut [f32]);
    /// Some rows to the host: `take(i, row)` is called for row `rows.start + i`, in order.
    fn read_rows(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        take: &mut dyn FnMut(usize, &[f32]),
    );
    /// `x / rms(x) * gain`.
    fn rms_norm(&mut self, x: &Self::Tensor, gain: &Self::Vector, eps: f32, out: &mut Self::Tensor);
    /// `(x - mean(x)) / sqrt(var(x) + eps) * gain + bias`.
    fn layer_norm(
        &mut self,
        x: &Self::Tensor,
        gain: &Self::Vector,
        bias: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    );
    /// `out = w x`.
    fn linear(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor);
    /// `out = w x`, where a matrix will be applied to `out`.
    fn linear_input(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor) {
        self.linear(x, w, out);
    }
    /// `out += w x`.
    fn linear_add(&mut self, x: &Self::Tensor, w: &Self::Weight, out: &mut Self::Tensor);
    /// `out = activation(gate x) * (up x)`, of the matrices `gate | up`.
    fn gated(
        &mut self,
        x: &Self::Tensor,
        w: &Self::Weight,
        activation: Activation,
        out: &mut Self::Tensor,
    );
    /// `x = activation(x + bias)`, where there is one.
    fn activate(
        &mut self,
        x: &mut Self::Tensor,
        bias: Option<&Self::Vector>,
        activation: Activation,
    );
    /// `out += sum of p_e down_e (activation(gate_e x) * up_e x)` over the experts `e` that the router
    /// picks for each row, in the order of their numbers. `scores` begin with the router's output;
    /// `weights` gives the matrices `gate | up` and `down` of an expert.
    fn experts<'w>(
        &mut self,
        x: &Self::Tensor,
        scores: &Self::Tensor,
        weights: &dyn Fn(usize) -> [&'w Self::Weight; 2],
        rule: (&Experts, Activation),
        routes: &mut Self::Routes,
        out: &mut Self::Tensor,
    ) where
        Self::Weight: 'w;
    /// `out += sigmoid(g) x`, `g` being element `column` of each row of `scores`.
    fn add_gated(
        &mut self,
        x: &Self::Tensor,
        scores: &Self::Tensor,
        column: usize,
        out: &mut Self::Tensor,
    );
    /// `out += x / rms(x) * gain`.
    fn rms_norm_add(
        &mut self,
        x: &Self::Tensor,
        gain: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    );
    /// `x / rms(x) * gain` for each of `count` heads as long as the gain, the first at `first`.
    fn norm_heads(
        &mut self,
        x: &mut Self::Tensor,
        first: usize,
        count: usize,
        gain: &Self::Vector,
        eps: f32,
    );
    /// Adds the bias to every row, from element `first` on.
    fn add_bias(&mut self, x: &mut Self::Tensor, first: usize, bias: &Self::Vector);
    /// Multiplies every element.
    fn scale(&mut self, x: &mut Self::Tensor, factor: f32);
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
    /// The head for some rows of its normalised input; returns `rows.len() x vocab` logits, each
    /// `c * tanh(x / c)` for a soft cap `c` above 0.
    fn logits<'t>(
        &mut self,
        x: &Self::Tensor,
        rows: Range<usize>,
        head: &Self::Weight,
        softcap: f32,
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
