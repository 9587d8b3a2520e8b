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
//!
//! # What has never run on a GPU
//! All that is tested here is tested on processors. On a GPU nothing has run yet, in particular:
//! - opening CUDA beside a libtorch that was linked for processors, and counting GPUs by the driver
//!   (`device`); free memory, bus addresses and `nvidia-smi` (`holders`; parsed samples are tested);
//! - every dtype there: bf16 and f16 products, `_weight_int8pack_mm`, `_weight_int4pack_mm` with CUDA's own
//!   packing, `_scaled_mm` for fp8, the fused RMS norm, scaled-dot-product attention with masks over padding;
//! - the shim (`shim/graphs.cpp`): it is built against PyTorch 2.11's and CUDA 13.0's headers, and all names
//!   that it needs were found in PyTorch 2.11's `libtorch_cuda.so`, whose refusal for want of a driver came
//!   back as a message; streams, pinned buffers, asynchronous copies, recording and replay have not run;
//! - decode steps as graphs (`graphs`): sizes, padding and inputs are tested by steps that run each time, for
//!   every family; recording, replay, refusal and running again by a recorder that counts;
//! - several GPUs under `millrace-node run --device cuda:all`: tested with the processor in their place;
//! - the targets of `benches/gpu.sh`, which prints what a GPU does against its own limits: on a
//!   processor the script runs whole.

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
mod graphs;
#[cfg(feature = "torch")]
mod holders;
#[cfg(feature = "torch")]
mod largest;
#[cfg(feature = "torch")]
mod matrix;
#[cfg(feature = "torch")]
mod operations;
#[cfg(feature = "torch")]
mod shim;
#[cfg(feature = "torch")]
mod step;
#[cfg(feature = "torch")]
mod weights;

#[cfg(feature = "torch")]
pub use backend::TorchBackend;
#[cfg(feature = "torch")]
pub use device::{Memory, Place, gpu_count};
#[cfg(feature = "torch")]
pub use engine::{Graphing, TorchEngine, numerics_revision};
