//! The CPU engine: one stage in this machine's memory, computed by its own threads.
//!
//! **Placement changes nothing**: the same bits whatever the instruction set, the threads, the rest
//! of the batch, the chunks and the cuts. Only correctly rounded operations (`+ - * / fma sqrt`,
//! conversions) are used, and each result has one order:
//!
//! | operation | order |
//! |---|---|
//! | quantised product | integer dot product inside a block of 32 (exact), then blocks in order, one lane per output row: `acc = fma(d_w * dot, d_x, acc)`, then `acc = fma(min, d_x * sum_x, acc)` |
//! | float product | one lane per output row, `acc = fma(w, x, acc)`, inputs in order |
//! | activation int8 | per 32: `d = absmax / 127`, `q = round_even(x * (127 / absmax))` |
//! | RMS norm | squares in 16 lanes by fma, tree 8-4-2-1; `(x * (1 / sqrt(mean + eps))) * gain` |
//! | layer norm | sum, then squares of what differs from the mean, in 16 lanes, tree 8-4-2-1; `fma((x - mean) * (1 / sqrt(var + eps)), gain, bias)` |
//! | experts | picked by the largest scores, the first among equals; `exp(score - max)` summed by number; `x = fma(weight, y, x)` by number |
//! | RoPE | tables in f64 by `libm`'s own code; `fma(a, cos, -(b sin))`, `fma(a, sin, b cos)` |
//! | attention | parts of 512 positions, each by itself, then merged in order: `sum = fma(sum, exp(max - top), sum' * exp(max' - top))`, outputs likewise. In a part: a score is one lane over the head's elements, times `1 / sqrt(dim)`; `exp(score - max)` summed in 16 lanes, in order, tree 8-4-2-1; an output is one lane over positions |
//! | int8 cache | per head and position: `d = absmax / 127`, `q = round_even(x * (127 / absmax))`; products of integers (exact) with queries in units of `absmax / 32639` per head, and with `exp(..) * d`, the part's largest as 32639; a score is `(dot * d) * (d_query * (1 / sqrt(dim)))` |
//! | exp | own polynomial of degree 6 over fma, `kernels::elementwise::exp` |
//! | gate | `(g / (1 + exp(-g))) * u` |
//! | residual | `x + w y`, one addition; rounded to the activation dtype at each layer boundary |
//!
//! Blocks of a packed matrix that are all zeros are not multiplied: they add nothing, so no bit changes.
//! K and V are read back after rounding to the cache's dtype, also inside the current chunk. A step
//! allocates nothing; unsafe code is in `kernels`, `pool`, `mapping` and `buffer` alone.

mod backend;
mod buffer;
mod engine;
mod experts;
mod kernels;
mod kv;
pub mod limits;
mod load;
mod mapping;
mod memory;
mod pack;
mod pool;
mod rope;
mod store;
mod tensor;

pub use backend::CpuBackend;
pub use engine::CpuEngine;
pub use experts::Routed;
pub use memory::available_bytes;
pub use pack::{ZERO_TILE, ZEROS_WORTH, ZEROS_WORTH_FEW, dequantise_row, packed_bytes};
pub use rope::rope_tables;

/// Revision of everything in this engine that may change a token. Raise the first number with any
/// change of an order or formula in the table above. Another `libm` gives another revision by itself.
pub fn numerics_revision() -> String {
    format!("cpu/3;act32;part{};exp1;rope{:016x}", kernels::attention::PART, rope::fingerprint())
}
