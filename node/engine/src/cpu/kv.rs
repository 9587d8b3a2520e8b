//! The paged KV cache: keys `[layer][block][head][dim][position]`, values
//! `[layer][block][head][position][dim]`.
//!
//! Keys lie transposed so that a score is one lane. Blocks are named by the coordinator; this file
//! neither allocates nor frees them, and `model::Batch` has checked every index before it is used.

use millrace_shared::model::Dtype;

use super::buffer::{Arena, Buf};
use crate::LoadError;

/// Keys and values of a stage's layers.
#[derive(Debug)]
pub(crate) struct Kv {
    pub(crate) keys: Buf<u8>,
    pub(crate) values: Buf<u8>,
    /// f16, else f32.
    pub(crate) half: bool,
    pub(crate) shape: KvShape,
}

/// Sizes of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
}

impl KvShape {
    /// Bytes of the keys (as many again of the values); `None` where they overflow.
    pub(crate) fn bytes(&self, dtype: Dtype) -> Option<usize> {
        [self.blocks, self.block_size, self.heads, self.dim, dtype.bytes()]
            .iter()
            .try_fold(self.layers, |n, &x| n.checked_mul(x))
    }
}

impl Kv {
    /// Allocates and touches.
    ///
    /// # Errors
    /// If memory runs out or the dtype is neither f16 nor f32.
    pub(crate) fn new(arena: &mut Arena, shape: KvShape, dtype: Dtype) -> Result<Self, LoadError> {
        if !matches!(dtype, Dtype::F16 | Dtype::F32) {
            return Err(LoadError::Settings(format!(
                "the CPU engine keeps K and V as f16 or f32, not {}",
                dtype.as_str()
            )));
        }
        let bytes = shape.bytes(dtype).unwrap_or(usize::MAX);
        let (keys, values) = (arena.take(bytes)?, arena.take(bytes)?);
        Ok(Self { keys, values, half: dtype == Dtype::F16, shape })
    }

    /// Bytes of one element.
    pub(crate) fn element_bytes(&self) -> usize {
        if self.half { 2 } else { 4 }
    }

    /// Byte offset of a layer, in keys and in values alike.
    pub(crate) fn layer_at(&self, layer: usize) -> usize {
        let s = &self.shape;
        layer * s.blocks * s.heads * s.block_size * s.dim * self.element_bytes()
    }
}
