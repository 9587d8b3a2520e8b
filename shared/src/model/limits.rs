//! Largest dimensions that are still plausible; they bound what a file can make the engine allocate.

pub(super) const MAX_LAYERS: u32 = 1024;
pub(super) const MAX_HIDDEN: u32 = 1 << 17;
pub(super) const MAX_HEADS: u32 = 1024;
pub(super) const MAX_HEAD_DIM: u32 = 1024;
pub(super) const MAX_FFN: u32 = 1 << 20;
pub(super) const MAX_VOCAB: u32 = 1 << 22;
pub(super) const MAX_CONTEXT: u32 = 1 << 24;
pub(super) const MAX_EXPERTS: u32 = 1024;
