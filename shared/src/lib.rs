//! The pure core of Millrace.
//!
//! Everything here is a value, a format or a state machine: no clocks, no sockets, no threads, and
//! no randomness that was not handed in. Time is an argument; what happens next is a return value.
//! Actors in `node/` and `coordinator/` only translate between these machines and the world, so
//! each rule of the system can be tested without starting it.
//!
//! Layout: [`id`] and [`error`] are the vocabulary; [`wire`] is every format that crosses a socket;
//! [`model`] describes models and reads GGUF directories; [`partition`] cuts a model into stages;
//! [`kv`] and [`scheduler`] decide what runs next, and [`sim`] shows in virtual time how well;
//! [`membership`] tracks nodes; [`sampling`] turns logits into tokens, [`pooling`] hidden states into
//! embeddings; [`names`] spells every metric
//! and environment variable; `flags` (feature `clap`) is what all command lines have in common.
#![forbid(unsafe_code)]

pub mod cluster_file;
pub mod dirs;
pub mod error;
#[cfg(feature = "clap")]
pub mod flags;
pub mod id;
pub mod kv;
pub mod membership;
pub mod model;
pub mod names;
pub mod options;
pub mod partition;
pub mod pooling;
pub mod sampling;
pub mod scheduler;
pub mod sim;
pub mod wire;
