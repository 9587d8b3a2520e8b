//! Types of model files that are packed as another type, which holds each of their values exactly.
//!
//! The f16 scale stays as it is and the integers behind it stay the same integers, only stored with
//! another bias. A type belongs here only where that is so for every file: Q8_K has scales beyond
//! f16, the IQ2 and IQ3 types have tables of vectors, and no packed layout has those.

use super::rows::{Stored, Words, nibbles, word, words};
use super::u16_at;
use crate::cpu::kernels::format;

/// `d * (q - 1)`, a ternary digit; five of them in a byte.
pub(super) struct Tq1_0;

/// `d * (q - 1)`, 2 bits.
pub(super) struct Tq2_0;

/// `scale * (q - zero)` of GPTQ and AWQ, as the reader gives it: f32 scale, f32 minimum, nibbles.
pub(super) struct Int4;

impl Stored for Int4 {
    type Packed = format::Q4K;
    const FILE_BYTES: usize = 24;

    #[inline(always)]
    fn read(block: &[u8], _: usize) -> Words {
        let quants = nibbles(words(&block[8..24]));
        Words { scale: word(block, 0), min: word(block, 4), quants, ..Words::ONE }
    }
}

/// Ternary digits in pairs of nibbles, from a bias of 1 to one of 8.
fn digits(digit: impl Fn(usize) -> u8) -> [u32; 8] {
    nibbles(std::array::from_fn(|i| {
        let pair = |j: usize| (digit(i * 4 + j) + 7) | ((digit(16 + i * 4 + j) + 7) << 4);
        u32::from_le_bytes(std::array::from_fn(pair))
    }))
}

/// Element `e` of a TQ1_0 block. A byte is a fraction of 256; its digits are what multiplication by
/// three carries out, one after the other.
fn tq1_digit(block: &[u8], e: usize) -> u8 {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let (at, digit) = match e {
        0..160 => (e % 32, e / 32),
        160..240 => (32 + e % 16, (e - 160) / 16),
        _ => (48 + e % 4, (e - 240) / 4),
    };
    let fraction = block[at].wrapping_mul(POWERS[digit]);
    ((u16::from(fraction) * 3) >> 8) as u8
}

impl Stored for Tq1_0 {
    type Packed = format::Q4_0;
    const FILE_BYTES: usize = 54;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        let quants = digits(|e| tq1_digit(block, part * 32 + e));
        Words { scale: u16_at(block, 52).into(), quants, ..Words::ONE }
    }
}

impl Stored for Tq2_0 {
    type Packed = format::Q4_0;
    const FILE_BYTES: usize = 66;
    const PARTS: usize = 8;

    #[inline(always)]
    fn read(block: &[u8], part: usize) -> Words {
        let quants = digits(|e| (block[part / 4 * 32 + e] >> (part % 4 * 2)) & 3);
        Words { scale: u16_at(block, 64).into(), quants, ..Words::ONE }
    }
}
