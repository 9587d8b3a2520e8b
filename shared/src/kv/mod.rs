//! The KV block manager: which blocks of the paged KV cache belong to which sequence.
//!
//! One logical table per pipeline: a block id is the same index on every stage, only the
//! coordinator allocates and frees, and reuse is safe at once because every stage runs frames in
//! issue order. Blocks are reference-counted, so that sequences may share a prefix; writing into a
//! shared block needs a copy, which [`KvBlockManager::prepare_write`] asks for.
//!
//! Prefix cache: a full block whose content is certain is published under a [`BlockHash`] and can
//! be adopted by other sequences with the same tokens. When nobody holds it any more it counts as
//! free but keeps its content until no blank block is left, the longest unused going first.
//!
//! What it does not do: decide what is certain, or who gets blocks (the scheduler does).
//!
//! Invariant: every block is either free with no references, or has exactly as many references as
//! tables it stands in; a published block is never written again before it is taken anew. An
//! operation that fails changes nothing.

mod hash;
mod manager;
mod pool;

pub use hash::BlockHash;
pub use manager::{BlockCopy, BlockTable, KvBlockManager};
