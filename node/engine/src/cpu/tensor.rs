//! Activations: rows of f32, and beside them, where a matrix product will read them, their int8
//! form in blocks of 32.

use super::buffer::{Arena, Buf};
use crate::LoadError;

/// `rows x width` activations with room for `max_rows`.
#[derive(Debug)]
pub struct Tensor {
    pub(crate) data: Buf<f32>,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) quant: Quant,
}

/// The int8 form: per row and block of 32, `x ~ scale * q`.
#[derive(Debug)]
pub(crate) struct Quant {
    /// `rows x width`.
    pub(crate) q: Buf<i8>,
    /// `rows x blocks`.
    pub(crate) scale: Buf<f32>,
    /// `rows x blocks`: scale times the sum of `q`.
    pub(crate) scaled_sum: Buf<f32>,
    /// `rows x blocks`: sums of the first and last 16 `q`.
    pub(crate) sums: Buf<[i32; 2]>,
}

impl Tensor {
    /// An empty tensor with room for `max_rows` rows of `width`.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn new(
        arena: &mut Arena,
        max_rows: usize,
        width: usize,
        quantised: bool,
    ) -> Result<Self, LoadError> {
        let blocks = if quantised { max_rows * width.div_ceil(32) } else { 0 };
        Ok(Self {
            data: arena.take(max_rows * width)?,
            rows: 0,
            width,
            quant: Quant {
                q: arena.take(blocks * 32)?,
                scale: arena.take(blocks)?,
                scaled_sum: arena.take(blocks)?,
                sums: arena.take(blocks)?,
            },
        })
    }

    /// Row `i`.
    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.width..][..self.width]
    }
}
