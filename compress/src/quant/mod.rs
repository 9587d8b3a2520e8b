//! Fewer bits for each weight.

pub mod blocks;
mod gptq;
pub mod integer;
mod search;

pub use blocks::{TYPES, encode_row, fallback};
pub use gptq::gptq;
