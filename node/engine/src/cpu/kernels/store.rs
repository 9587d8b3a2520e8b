//! Writing keys and values into the paged cache, rounded to its type.

use super::dispatch;
use super::lanes::Lanes;

/// One head of one position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Store {
    /// `dim` elements each.
    pub(crate) key: *const f32,
    pub(crate) value: *const f32,
    /// The head's part of the block: keys `dim x block_size`, values `block_size x dim`.
    pub(crate) keys: *mut u8,
    pub(crate) values: *mut u8,
    pub(crate) half: bool,
    pub(crate) dim: usize,
    pub(crate) block_size: usize,
    /// Position in the block.
    pub(crate) offset: usize,
}

dispatch! {
    /// Stores one head of one position.
    pub(crate) fn store = store_generic(s: &Store);
}

#[inline(always)]
unsafe fn store_generic<V: Lanes>(s: &Store) {
    // SAFETY: as `Store` says; `dim` is a multiple of 16.
    unsafe {
        for d in (0..s.dim).step_by(16) {
            let (key, value) = (V::load(s.key.add(d)), V::load(s.value.add(d)));
            let at = s.offset * s.dim + d;
            if s.half {
                value.store_f16(s.values.cast::<u16>().add(at));
                let mut lanes = [0u16; 16];
                key.store_f16(lanes.as_mut_ptr());
                for (i, x) in lanes.iter().enumerate() {
                    *s.keys.cast::<u16>().add((d + i) * s.block_size + s.offset) = *x;
                }
            } else {
                value.store(s.values.cast::<f32>().add(at));
                let mut lanes = [0f32; 16];
                key.store(lanes.as_mut_ptr());
                for (i, x) in lanes.iter().enumerate() {
                    *s.keys.cast::<f32>().add((d + i) * s.block_size + s.offset) = *x;
                }
            }
        }
    }
}
