//! The paged KV cache: keys and values `[layer][block][head]`, each head of a block as
//! `kernels::stored` lays it out.
//!
//! Keys lie so that a score is one lane. Blocks are named by the coordinator; this file neither
//! allocates nor frees them, and `model::Batch` has checked every index before it is used.

use millrace_shared::model::Dtype;

use super::buffer::{Arena, Buf};
use super::kernels::attention::MAX_INT8_DIM;
use super::kernels::stored::KvType;
use crate::LoadError;

/// Keys and values of a stage's layers.
#[derive(Debug)]
pub(crate) struct Kv {
    pub(crate) keys: Buf<u8>,
    pub(crate) values: Buf<u8>,
    pub(crate) kind: KvType,
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
    pub(crate) fn bytes(&self, kind: KvType) -> Option<usize> {
        [self.blocks, self.heads, kind.head_bytes(self.block_size, self.dim)]
            .iter()
            .try_fold(self.layers, |n, &x| n.checked_mul(x))
    }
}

impl Kv {
    /// Allocates and touches.
    ///
    /// # Errors
    /// If memory runs out or the dtype is none of f16, f32 and int8, or heads are too long for int8.
    pub(crate) fn new(arena: &mut Arena, shape: KvShape, dtype: Dtype) -> Result<Self, LoadError> {
        let Some(kind) = KvType::of(dtype) else {
            return Err(LoadError::Settings(format!(
                "the CPU engine keeps K and V as f16, f32 or int8, not {}",
                dtype.as_str()
            )));
        };
        if kind == KvType::Int8 && shape.dim > MAX_INT8_DIM {
            return Err(LoadError::Settings(format!(
                "an int8 KV cache holds heads of at most {MAX_INT8_DIM} elements, not {}; use f16",
                shape.dim
            )));
        }
        let bytes = shape.bytes(kind).unwrap_or(usize::MAX);
        let (keys, values) = (arena.take(bytes)?, arena.take(bytes)?);
        Ok(Self { keys, values, kind, shape })
    }

    /// Bytes of one head of a block, in keys and in values alike.
    pub(crate) fn head_bytes(&self) -> usize {
        self.kind.head_bytes(self.shape.block_size, self.shape.dim)
    }

    /// Byte offset of a layer, in keys and in values alike.
    pub(crate) fn layer_at(&self, layer: usize) -> usize {
        layer * self.shape.blocks * self.shape.heads * self.head_bytes()
    }
}
