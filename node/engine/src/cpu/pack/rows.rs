//! Moves quants and scales of file rows into packed groups, four quants at a time.
//!
//! A packed nibble byte holds elements `j` and `j + 16` of its block, as the bytes of Q4_0 and Q4_1
//! do: there, packing only moves words about. K quants are split up with masks over whole words.

use super::{f16_at, q4k_scales, u16_at};
use crate::cpu::kernels::format::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0};

/// Thirty-two weights on their way: `scale * sub * (q - bias) + min * sub_min`.
pub(super) struct Words {
    /// Bits of the scale and of the minimum, as they are packed.
    pub(super) scale: u32,
    pub(super) min: u32,
    pub(super) sub: [i8; 2],
    pub(super) sub_min: [i8; 2],
    /// Quants as they are packed, a word of every vector; what has fewer bits has fewer words.
    pub(super) quants: [u32; 8],
}

/// A format that model files have.
pub(super) trait Stored {
    /// What it is packed as.
    type Packed: Format;
    /// Bytes of a block of the file.
    const FILE_BYTES: usize;
    /// Blocks of 32 in it.
    const PARTS: usize = 1;

    /// Part `part` of a block.
    fn read(block: &[u8], part: usize) -> Words;
}

/// Calls `$f::<S>` with the [`Stored`] format of a file's quantised type; `$else` for other types.
macro_rules! with_stored {
    ($dtype:expr, $f:ident ( $($arg:expr),* ), $else:expr) => {{
        use $crate::cpu::kernels::format;
        use $crate::cpu::pack::converted;
        match $dtype {
            TensorType::Q4_0 => $f::<format::Q4_0>($($arg),*),
            TensorType::Q4_1 => $f::<format::Q4_1>($($arg),*),
            TensorType::Q5_0 => $f::<format::Q5_0>($($arg),*),
            TensorType::Q5_1 => $f::<format::Q5_1>($($arg),*),
            TensorType::Q5_K => $f::<format::Q5K>($($arg),*),
            TensorType::Q2_K => $f::<format::Q2K>($($arg),*),
            TensorType::Q8_0 => $f::<format::Q8_0>($($arg),*),
            TensorType::Q3_K => $f::<format::Q3K>($($arg),*),
            TensorType::Q4_K => $f::<format::Q4K>($($arg),*),
            TensorType::Q6_K => $f::<format::Q6K>($($arg),*),
            TensorType::IQ4_NL => $f::<format::Iq4Nl>($($arg),*),
            TensorType::IQ4_XS => $f::<format::Iq4Xs>($($arg),*),
            TensorType::MXFP4 => $f::<format::Mxfp4>($($arg),*),
            TensorType::INT4 => $f::<converted::Int4>($($arg),*),
            TensorType::TQ1_0 => $f::<converted::Tq1_0>($($arg),*),
            TensorType::TQ2_0 => $f::<converted::Tq2_0>($($arg),*),
            _ => $else,
        }
    }};
}
pub(super) use with_stored;

impl Words {
    /// What most formats have nothing else for.
    pub(super) const ONE: Self =
        Self { scale: 0, min: 0, sub: [1; 2], sub_min: [0; 2], quants: [0; 8] };

    /// The 32 values, of weights packed as `F`.
    pub(super) fn dequantise<F: Format>(&self, out: &mut [f32]) {
        let value = |bits: u32| match F::WIDE_SCALE {
            true => f32::from_bits(bits),
            false => half::f16::from_bits(bits as u16).to_f32(),
        };
        let (scale, min) = (value(self.scale), value(self.min));
        for (j, out) in out.iter_mut().enumerate() {
            // One lane alone.
            let q = F::quant(|i| self.quants[i / 4].to_le_bytes()[i % 4], 1, 0, j);
            let q = (i32::from(q) - F::BIAS) as f32;
            // Products are exact, so this has the one rounding of a fused multiply-add.
            *out = if F::MIN && F::HALVES {
                let [sub, sub_min] = [self.sub, self.sub_min].map(|s| f32::from(s[j / 16]));
                (scale * sub) * q + min * sub_min
            } else if F::MIN {
                scale * q + min
            } else if F::HALVES {
                (scale * f32::from(self.sub[j / 16])) * q
            } else {
                scale * q
            };
        }
    }
}

pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Sixteen bytes as four words.
pub(super) fn words(bytes: &[u8]) -> [u32; 4] {
    std::array::from_fn(|i| word(bytes, i * 4))
}

/// Quants of a byte each as words of vectors.
pub(super) fn vectors<F: Format>(q: [u32; 8]) -> [u32; 8] {
    const LOW: u32 = 0x0f0f_0f0f;
    let mut out = [0; 8];
    match F::BITS {
        2 => (0..8).for_each(|v| out[v % 2] |= q[v] << (v / 2 * 2)),
        4 | 5 => {
            (0..4).for_each(|v| out[v] = (q[v] & LOW) | ((q[v + 4] & LOW) << 4));
            if F::BITS == 5 {
                out[4] = (0..8).fold(0, |high, v| high | ((q[v] >> 4) & 0x0101_0101) << v);
            }
        }
        _ => out = q,
    }
    out
}

/// Four words of nibble pairs, and nothing where the others would be.
pub(super) fn nibbles(low: [u32; 4]) -> [u32; 8] {
    [low[0], low[1], low[2], low[3], 0, 0, 0, 0]
}

impl Stored for Q4_0 {
    type Packed = Self;
    const FILE_BYTES: usize = 18;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        let scale = u16_at(block, 0).into();
        Words { scale, quants: nibbles(words(&block[2..18])), ..Words::ONE }
    }
}

impl Stored for Q4_1 {
    type Packed = Self;
    const FILE_BYTES: usize = 20;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        let (scale, min) = (u16_at(block, 0).into(), u16_at(block, 2).into());
        Words { scale, min, quants: nibbles(words(&block[4..20])), ..Words::ONE }
    }
}

impl Stored for Q8_0 {
    type Packed = Self;
    const FILE_BYTES: usize = 34;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        let quants = std::array::from_fn(|i| word(block, 2 + i * 4) ^ 0x8080_8080);
        Words { scale: u16_at(block, 0).into(), quants, ..Words::ONE }
    }
}

impl Stored for Q4K {
    type Packed = Self;
    const FILE_BYTES: usize = 144;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        const LOW: u32 = 0x0f0f_0f0f;
        let (scale, min) = q4k_scales(&block[4..16], part);
        let scale = f16_at(block, 0) * f32::from(scale);
        let min = -(f16_at(block, 2) * f32::from(min));
        // Even parts are the low halves of 32 bytes, odd ones the high halves.
        let quants = &block[16 + part / 2 * 32..][..32];
        let (first, second) = (words(&quants[..16]), words(&quants[16..]));
        let pair = |i: usize| match part % 2 {
            0 => (first[i] & LOW) | ((second[i] & LOW) << 4),
            _ => ((first[i] >> 4) & LOW) | (second[i] & !LOW),
        };
        let quants = nibbles(std::array::from_fn(pair));
        Words { scale: scale.to_bits(), min: min.to_bits(), quants, ..Words::ONE }
    }
}

impl Stored for Q6K {
    type Packed = Self;
    const FILE_BYTES: usize = 210;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        let (half, quarter) = (part / 4, part % 4);
        let low = &block[half * 64 + quarter % 2 * 32..][..32];
        let high = &block[128 + half * 32..][..32];
        let quants = std::array::from_fn(|i| {
            let low = (word(low, i * 4) >> (quarter / 2 * 4)) & 0x0f0f_0f0f;
            low | (((word(high, i * 4) >> (quarter * 2)) & 0x0303_0303) << 4)
        });
        let sub = [block[192 + part * 2] as i8, block[193 + part * 2] as i8];
        Words { scale: u16_at(block, 208).into(), sub, quants, ..Words::ONE }
    }
}

/// Writes words as lane `lane` of a packed block.
#[inline(always)]
fn write<F: Format>(out: &mut [u8], r: usize, lane: usize, words: &Words) {
    let (head, quants) = out.split_at_mut(F::quants_at(r));
    let width = F::SCALE_BYTES;
    head[lane * width..][..width].copy_from_slice(&words.scale.to_le_bytes()[..width]);
    if F::MIN {
        head[F::min_at(r) + lane * width..][..width]
            .copy_from_slice(&words.min.to_le_bytes()[..width]);
    }
    if F::HALVES {
        head[F::sub_at(r) + lane] = words.sub[0] as u8;
        head[F::sub_at(r) + r + lane] = words.sub[1] as u8;
        if F::MIN {
            head[F::sub_min_at(r) + lane] = words.sub_min[0] as u8;
            head[F::sub_min_at(r) + r + lane] = words.sub_min[1] as u8;
        }
    }
    for (quad, word) in quants.chunks_exact_mut(r * 4).zip(words.quants) {
        quad[lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// Packs the rows of one group, at most `r` of `cols` weights; what `out` has for others stays.
pub(super) fn pack_quants<S: Stored>(rows: &[u8], r: usize, cols: usize, out: &mut [u8]) {
    let row_bytes = cols / 32 / S::PARTS * S::FILE_BYTES;
    for (i, out) in out.chunks_exact_mut(S::Packed::block_bytes(r)).enumerate() {
        let at = i / S::PARTS * S::FILE_BYTES;
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            let words = S::read(&row[at..][..S::FILE_BYTES], i % S::PARTS);
            write::<S::Packed>(out, r, lane, &words);
        }
    }
}

/// Packs the rows of one group of floats of `B` bytes: element by element, `lanes` rows side by side.
pub(super) fn pack_floats<const B: usize>(rows: &[u8], lanes: usize, cols: usize, out: &mut [u8]) {
    // A few elements of every row at a time, so that what is written stays in the nearest cache.
    const STEP: usize = 32;
    for first in (0..cols).step_by(STEP) {
        let count = STEP.min(cols - first);
        let out = &mut out[first * lanes * B..][..count * lanes * B];
        for (lane, row) in rows.chunks_exact(cols * B).enumerate() {
            let row = &row[first * B..][..count * B];
            for (element, out) in row.chunks_exact(B).zip(out.chunks_exact_mut(lanes * B)) {
                out[lane * B..][..B].copy_from_slice(element);
            }
        }
    }
}
