//! The KV block manager: which blocks of the paged KV cache belong to which sequence.
//!
//! One logical table per pipeline: a block id is the same index on every stage, only the
//! coordinator allocates and frees, and reuse is safe at once because every stage runs frames in
//! issue order. Blocks are reference-counted, so that sequences may share a prefix; writing into a
//! shared block needs a copy, which [`KvBlockManager::prepare_write`] asks for.
//!
//! What it does not do: look at token ids (a prefix cache hashes them on top of this), or decide
//! who gets blocks (the scheduler does).
//!
//! Invariant: every block is either in the free list with no references, or out of it with exactly
//! as many references as tables it stands in. An operation that fails changes nothing.

mod manager;
mod pool;

pub use manager::{BlockCopy, BlockTable, KvBlockManager};
