//! Millrace's engine over libtorch, by way of `tch`: GPUs, and processors.
//!
//! The model definition is the engine crate's (`model::Decoder`), with every family that it knows; here
//! is the arithmetic alone, the `TorchBackend`. A crate of its own, so that the kernels of the CPU engine
//! compile once and the same, with or without it. Without the feature `torch` it is empty, so that
//! nothing here needs libtorch (`deploy/libtorch.sh`) unless it is asked for.
//!
//! Results are approximate: they may depend on the device, the batch and how a prompt is cut, by what
//! rounding does. The residual stream is f32 throughout; products are in the type that matrices are
//! kept as. Whatever libtorch refuses, memory above all, fails the step and nothing else.

#[cfg(feature = "torch")]
mod attention;
#[cfg(feature = "torch")]
mod backend;
#[cfg(feature = "torch")]
mod device;
#[cfg(feature = "torch")]
mod engine;
#[cfg(feature = "torch")]
mod experts;
#[cfg(feature = "torch")]
mod largest;
#[cfg(feature = "torch")]
mod matrix;
#[cfg(feature = "torch")]
mod operations;
#[cfg(feature = "torch")]
mod step;
#[cfg(feature = "torch")]
mod weights;

#[cfg(feature = "torch")]
pub use backend::TorchBackend;
#[cfg(feature = "torch")]
pub use device::{Memory, Place};
#[cfg(feature = "torch")]
pub use engine::{TorchEngine, numerics_revision};
