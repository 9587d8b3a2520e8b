//! Makes models smaller, and tells what that costs.
//!
//! A [`Source`] gives tensors one at a time as f32, a method changes them, a [`Sink`] writes them: a
//! model may be larger than memory, and nothing takes the place of a file before it is whole.
//! Arithmetic on matrices is in [`quant`], [`prune`] and [`lowrank`]; decompositions are faer's. What
//! inputs look like ([`hessian`]) comes from the CPU engine. No actors, no network, no tokenizer:
//! texts come as token ids.

mod apply;
mod calibrate;
mod changed;
pub mod compare;
mod error;
mod factor;
pub mod hessian;
pub mod judge;
pub mod lowrank;
mod matrix;
mod mixed;
pub mod page;
pub mod prune;
pub mod quant;
pub mod recipe;
mod report;
mod sink;
mod source;
pub mod sparse;
mod step;
mod storage;
mod structure;
pub mod survey;
pub mod tasks;
pub mod texts;
mod watch;

pub use apply::{Settings, apply};
pub use calibrate::{CALIBRATION_WINDOW, Calibration, Calibrator, LEAST_TOKENS, calibrate};
pub use error::CompressError;
pub use matrix::{Distance, Matrix, parallel};
pub use report::{StepReport, TensorReport};
pub use sink::{Changes, Sink, Slot};
pub use source::{Source, is_head, is_layer_matrix};
pub use step::{Form, Needs, Per, Step, parse_type};
