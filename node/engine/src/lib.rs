//! Blocking compute: model definitions, kernels, KV cache, weight loading.
//!
//! Two seams. [`Engine`] (dynamic, coarse: one micro-batch through one stage) separates actors from
//! compute and lets a mock stand in. [`model::Backend`] (static) separates the definition of a model
//! from the arithmetic. Nothing here is asynchronous and nothing knows of a network: frames come in
//! and go out as owned buffers, and only the engine's own threads compute.

pub mod cache;
mod clock;
pub mod cpu;
mod head;
pub mod mock;
pub mod model;
pub mod profile;
pub mod quantize;
mod seam;
pub mod stage;
pub mod target;
pub mod thread;

pub use head::{HeadLogits, HeadRow, HeadWant, TopLogits};
pub use seam::{
    Engine, Isa, LoadError, LoadedStage, LogitsRow, PackingReport, StageInput, StageOutput,
    StageSpec, StepError, TensorSource,
};
