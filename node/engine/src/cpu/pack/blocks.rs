//! Blocks of model files with five, three or two bits a weight, or with a table: how they are read.
//!
//! Each is packed as itself, see `kernels::format`; scales that a file has as products of two numbers
//! are multiplied once where the product is exact in f32 (Q5_K, IQ4_XS), else both are kept (Q2_K).

use super::rows::{Stored, Words, nibbles, vectors, word, words};
use super::{f16_at, q4k_scales, u16_at};
use crate::cpu::kernels::format::{Iq4Nl, Iq4Xs, Mxfp4, Q2K, Q3K, Q5_0, Q5_1, Q5K};

/// Four low bits in pairs as in Q4_0, the high ones in a word of their own: bit `j` of element `j`.
fn fives(pairs: &[u8], high: u32) -> [u32; 8] {
    let low = words(pairs);
    let mut out = nibbles(low);
    // Four bits, one to each byte: shifted by 0, 7, 14 and 21.
    let spread = |v: usize| ((high >> (v * 4)) & 15).wrapping_mul(0x0020_4081) & 0x0101_0101;
    out[4] = (0..8).fold(0, |all, v| all | (spread(v) << v));
    out
}

impl Stored for Q5_0 {
    type Packed = Self;
    const FILE_BYTES: usize = 22;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        let quants = fives(&block[6..22], word(block, 2));
        Words { scale: u16_at(block, 0).into(), quants, ..Words::ONE }
    }
}

impl Stored for Q5_1 {
    type Packed = Self;
    const FILE_BYTES: usize = 24;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        let (scale, min) = (u16_at(block, 0).into(), u16_at(block, 2).into());
        Words { scale, min, quants: fives(&block[8..24], word(block, 4)), ..Words::ONE }
    }
}

impl Stored for Q5K {
    type Packed = Self;
    const FILE_BYTES: usize = 176;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        let (scale, min) = q4k_scales(&block[4..16], part);
        let scale = f16_at(block, 0) * f32::from(scale);
        let min = -(f16_at(block, 2) * f32::from(min));
        // Low bits as in Q4_K; bit `part` of 32 bytes before them is the high one.
        let low = &block[48 + part / 2 * 32..][..32];
        let quants = vectors::<Self>(std::array::from_fn(|i| {
            let low = (word(low, i * 4) >> (part % 2 * 4)) & 0x0f0f_0f0f;
            low | (((word(&block[16..48], i * 4) >> part) & 0x0101_0101) << 4)
        }));
        Words { scale: scale.to_bits(), min: min.to_bits(), quants, ..Words::ONE }
    }
}

impl Stored for Q2K {
    type Packed = Self;
    const FILE_BYTES: usize = 84;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        let low = &block[16 + part / 4 * 32..][..32];
        let quants = vectors::<Self>(std::array::from_fn(|i| {
            (word(low, i * 4) >> (part % 4 * 2)) & 0x0303_0303
        }));
        // A scale and the factor of a minimum in each byte; the minimum is subtracted.
        let pair = [block[part * 2], block[part * 2 + 1]];
        Words {
            scale: u16_at(block, 80).into(),
            min: u32::from(u16_at(block, 82) ^ 0x8000),
            sub: pair.map(|b| (b & 15) as i8),
            sub_min: pair.map(|b| (b >> 4) as i8),
            quants,
        }
    }
}

/// Scale `j` of a Q3_K block, 0..=15: four low bits in the first eight bytes, two high ones in the
/// last four.
fn q3k_scale(s: &[u8], j: usize) -> i8 {
    let low = (s[j % 8] >> (j / 8 * 4)) & 15;
    let high = (s[8 + j % 4] >> (j / 4 * 2)) & 3;
    (low | (high << 4)) as i8 - 32
}

impl Stored for Q3K {
    type Packed = Self;
    const FILE_BYTES: usize = 110;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        // Two low bits of a quant lie together, its high bit apart.
        let (high, low) = (&block[..32], &block[32 + part / 4 * 32..][..32]);
        let quants = vectors::<Self>(std::array::from_fn(|i| {
            let low = (word(low, i * 4) >> (part % 4 * 2)) & 0x0303_0303;
            let high = (word(high, i * 4) >> part) & 0x0101_0101;
            low | (high << 2)
        }));
        let sub = [0, 1].map(|half| q3k_scale(&block[96..108], part * 2 + half));
        Words { scale: u16_at(block, 108).into(), sub, quants, ..Words::ONE }
    }
}

impl Stored for Iq4Nl {
    type Packed = Self;
    const FILE_BYTES: usize = 18;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        let quants = nibbles(words(&block[2..18]));
        Words { scale: u16_at(block, 0).into(), quants, ..Words::ONE }
    }
}

impl Stored for Iq4Xs {
    type Packed = Self;
    const FILE_BYTES: usize = 136;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        let low = (block[4 + part / 2] >> (part % 2 * 4)) & 15;
        let high = (u16_at(block, 2) >> (part * 2)) & 3;
        let scale = f16_at(block, 0) * (i32::from(low | (high as u8) << 4) - 32) as f32;
        let quants = nibbles(words(&block[8 + part * 16..][..16]));
        Words { scale: scale.to_bits(), quants, ..Words::ONE }
    }
}

impl Stored for Mxfp4 {
    type Packed = Self;
    const FILE_BYTES: usize = 17;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        // Half of 2^(e - 127), for the table has twice the values; the smallest two are subnormal.
        let scale = match block[0] {
            e @ 0..2 => 0x0020_0000 << e,
            e => u32::from(e - 1) << 23,
        };
        Words { scale, quants: nibbles(words(&block[1..17])), ..Words::ONE }
    }
}
