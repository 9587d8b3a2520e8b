//! Writing keys and values into the paged cache, rounded to its type.

use super::dispatch;
use super::lanes::scales;
use super::quads::{OFFSET, Quads};
use super::stored::KvType;

/// One head of one position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Store {
    /// `dim` elements each.
    pub(crate) key: *const f32,
    pub(crate) value: *const f32,
    /// The head's slice of the block; see `stored` for the layout.
    pub(crate) keys: *mut u8,
    pub(crate) values: *mut u8,
    pub(crate) kind: KvType,
    pub(crate) dim: usize,
    pub(crate) block_size: usize,
    /// Position in the block.
    pub(crate) offset: usize,
}

impl Store {
    /// Index of an element of the key.
    #[inline(always)]
    fn key_at(&self, d: usize) -> usize {
        let (columns, step) = (self.block_size.min(16), self.kind.step());
        let group = self.offset / columns * columns * self.dim;
        group + (d / step * columns + self.offset % columns) * step + d % step
    }

    /// Index of an element of the value.
    #[inline(always)]
    fn value_at(&self, d: usize) -> usize {
        let step = self.kind.step().min(self.block_size);
        (self.offset / step * self.dim + d) * step + self.offset % step
    }
}

dispatch! {
    /// Stores one head of one position.
    pub(crate) fn store = store_generic(s: &Store);
}

#[inline(always)]
unsafe fn store_generic<V: Quads>(s: &Store) {
    // SAFETY: as `Store` says; `dim` is a multiple of 16.
    unsafe {
        match s.kind {
            KvType::F32 => {
                for d in 0..s.dim {
                    *s.keys.cast::<f32>().add(s.key_at(d)) = *s.key.add(d);
                    *s.values.cast::<f32>().add(s.value_at(d)) = *s.value.add(d);
                }
            }
            KvType::F16 => {
                for d in (0..s.dim).step_by(16) {
                    V::load(s.value.add(d)).store_f16(s.values.cast::<u16>().add(s.value_at(d)));
                    let mut lanes = [0u16; 16];
                    V::load(s.key.add(d)).store_f16(lanes.as_mut_ptr());
                    for (i, x) in lanes.iter().enumerate() {
                        *s.keys.cast::<u16>().add(s.key_at(d + i)) = *x;
                    }
                }
            }
            KvType::Int8 => {
                let at = s.kind.element_bytes(s.block_size, s.dim) + s.offset * 4;
                let scale = int8::<V>(s.key, s.dim, |d, x| *s.keys.add(s.key_at(d)) = x);
                s.keys.add(at).cast::<f32>().write_unaligned(scale);
                let scale = int8::<V>(s.value, s.dim, |d, x| {
                    *s.values.add(s.value_at(d)) = x;
                });
                s.values.add(at).cast::<f32>().write_unaligned(scale);
            }
        }
    }
}

/// The largest magnitude of `n` elements; NaN where one is not finite.
#[inline(always)]
pub(super) unsafe fn absmax<V: Quads>(x: *const f32, n: usize) -> f32 {
    // SAFETY: `n` readable elements, a multiple of 16.
    unsafe {
        let zero = V::splat(0.0);
        let (mut most, mut poison) = (zero, zero);
        for i in (0..n).step_by(16) {
            let x = V::load(x.add(i));
            most = x.max(zero.sub(x)).max(most);
            poison = x.fma(zero, poison);
        }
        most.top() + poison.sum()
    }
}

/// Gives every element as `round(x * (127 / absmax)) + 128`, and returns `absmax / 127`.
#[inline(always)]
unsafe fn int8<V: Quads>(x: *const f32, n: usize, mut put: impl FnMut(usize, u8)) -> f32 {
    // SAFETY: `n` readable elements, a multiple of 16.
    unsafe {
        let (scale, inverse) = scales(absmax::<V>(x, n));
        for d in (0..n).step_by(16) {
            let mut lanes = [0i8; 16];
            V::load(x.add(d)).mul(V::splat(inverse)).store_i8(lanes.as_mut_ptr());
            for (i, &x) in lanes.iter().enumerate() {
                put(d + i, x as u8 ^ OFFSET);
            }
        }
        scale
    }
}
