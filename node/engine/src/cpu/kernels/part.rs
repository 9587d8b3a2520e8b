//! Where a part of a sequence lies: pointers to groups of sixteen positions.
//!
//! Blocks of sixteen positions and more are read where they lie. Smaller ones are copied together
//! first, and f16 that many queries will read is widened once.

use super::attention::{Attend, PART};
use super::quads::Quads;
use super::stored::KvType;

/// Groups of sixteen positions in a part.
const GROUPS: usize = PART / 16;
/// Groups that are asked for in advance.
pub(super) const AHEAD: usize = GROUPS / 2;

/// A part of the sequence. Pointers beyond `groups` are only good for prefetching.
pub(super) struct Part {
    /// Rows of sixteen positions, one after the other, of each group.
    pub(super) keys: [*const u8; GROUPS + AHEAD],
    /// Rows of sixteen dimensions of each group: `dim / 16` per step.
    pub(super) values: [*const u8; GROUPS + AHEAD],
    /// Of each group, int8 alone.
    pub(super) key_scales: [*const f32; GROUPS],
    pub(super) value_scales: [*const f32; GROUPS],
    pub(super) groups: usize,
    /// Whether f16 has become f32.
    pub(super) widened: bool,
}

/// Room for a part in the scratch, in floats: elements of keys and of values, scales of both.
pub(super) fn room(dim: usize) -> usize {
    2 * PART * dim + 2 * PART
}

/// Finds `n` positions from `start`.
///
/// # Safety
/// As `Attend` says; `room` floats at `scratch`.
#[inline(always)]
pub(super) unsafe fn locate<V: Quads>(
    a: &Attend<'_>,
    start: usize,
    n: usize,
    queries: usize,
    scratch: *mut f32,
) -> Part {
    let null = std::ptr::null();
    let mut part = Part {
        keys: [null; GROUPS + AHEAD],
        values: [null; GROUPS + AHEAD],
        key_scales: [null.cast(); GROUPS],
        value_scales: [null.cast(); GROUPS],
        groups: n.div_ceil(16),
        widened: false,
    };
    // SAFETY: the caller's promise.
    unsafe {
        if a.block_size < 16 {
            gather(a, start, n, scratch, &mut part);
        } else {
            in_place(a, start, n, &mut part);
            if a.kind == KvType::F16 && queries >= WIDEN_QUERIES {
                widen::<V>(a.dim, scratch, &mut part);
            }
        }
    }
    part
}

/// Converting costs a pass over the part, which this many queries earn back.
const WIDEN_QUERIES: usize = 12;

/// Start of the slice of this head that holds a position, and the position's place in the block.
#[inline(always)]
fn slice_at(a: &Attend<'_>, position: usize) -> (usize, usize) {
    let block = a.blocks[position / a.block_size] as usize;
    let bytes = a.kind.head_bytes(a.block_size, a.dim);
    ((block * a.kv_heads + a.kv_head) * bytes, position % a.block_size)
}

#[inline(always)]
unsafe fn in_place(a: &Attend<'_>, start: usize, n: usize, part: &mut Part) {
    let scales = a.kind.element_bytes(a.block_size, a.dim);
    let group_bytes = a.kind.element_bytes(1, a.dim);
    // Groups that exist after the part's last: their keys are what is read next.
    let known = (a.blocks.len() * a.block_size - start) / 16;
    let groups = (part.groups + AHEAD).min(known);
    let mut g = 0;
    while g < groups {
        // Blocks divide parts, so this is the start of one.
        let (at, _) = slice_at(a, start + g * 16);
        for offset in (0..a.block_size).step_by(16).take(groups - g) {
            // SAFETY: blocks are in range, and hold whole groups.
            unsafe {
                part.keys[g] = a.keys.add(at + offset * group_bytes);
                part.values[g] = a.values.add(at + offset * group_bytes);
                if g < part.groups {
                    part.key_scales[g] = a.keys.add(at + scales + offset * 4).cast();
                    part.value_scales[g] = a.values.add(at + scales + offset * 4).cast();
                }
            }
            g += 1;
        }
    }
    debug_assert!(part.groups * 16 >= n);
    // After the keys come this part's values, and after those the next part's keys.
    let groups = part.groups;
    let next: [*const u8; AHEAD] = std::array::from_fn(|i| part.keys[groups + i]);
    for i in 0..AHEAD {
        part.keys[groups + i] = part.values[i];
        part.values[groups + i] = next[i];
    }
}

/// Copies small blocks together into the layout of a block of the whole part.
#[inline(always)]
unsafe fn gather(a: &Attend<'_>, start: usize, n: usize, scratch: *mut f32, part: &mut Part) {
    let (bs, dim, bytes, step) = (a.block_size, a.dim, a.kind.bytes(), a.kind.step());
    let scales_at = a.kind.element_bytes(bs, dim);
    // SAFETY: the caller's promise: positions before `start + n` have blocks.
    unsafe {
        let keys: *mut u8 = scratch.cast();
        let values: *mut u8 = scratch.add(PART * dim).cast();
        let key_scales = scratch.add(2 * PART * dim);
        let value_scales = key_scales.add(PART);
        for first in (0..n).step_by(bs) {
            let (at, _) = slice_at(a, start + first);
            let (k, v) = (a.keys.add(at), a.values.add(at));
            let column = bytes * step;
            for i in 0..dim / step {
                let to = first / 16 * 16 * dim * bytes + (i * 16 + first % 16) * column;
                k.add(i * bs * column).copy_to_nonoverlapping(keys.add(to), bs * column);
            }
            if step > bs {
                for d in 0..dim {
                    let to = values.add((first / step * dim + d) * step + first % step);
                    v.add(d * bs).copy_to_nonoverlapping(to, bs);
                }
            } else {
                v.copy_to_nonoverlapping(values.add(first * dim * bytes), bs * dim * bytes);
            }
            if a.kind == KvType::Int8 {
                let to = |scales: *mut f32| scales.add(first).cast::<u8>();
                k.add(scales_at).copy_to_nonoverlapping(to(key_scales), bs * 4);
                v.add(scales_at).copy_to_nonoverlapping(to(value_scales), bs * 4);
            }
        }
        for g in 0..part.groups {
            part.keys[g] = keys.add(g * 16 * dim * bytes);
            part.values[g] = values.add(g * 16 * dim * bytes);
            part.key_scales[g] = key_scales.add(g * 16);
            part.value_scales[g] = value_scales.add(g * 16);
        }
    }
}

/// Converts f16 to f32.
#[inline(always)]
unsafe fn widen<V: Quads>(dim: usize, scratch: *mut f32, part: &mut Part) {
    // SAFETY: the caller's promise.
    unsafe {
        for g in 0..part.groups {
            for (from, to) in [
                (&mut part.keys[g], scratch.add(g * 16 * dim)),
                (&mut part.values[g], scratch.add((PART + g * 16) * dim)),
            ] {
                for i in (0..16 * dim).step_by(16) {
                    V::load_f16(from.cast::<u16>().add(i)).store(to.add(i));
                }
                *from = to.cast();
            }
        }
    }
    part.widened = true;
}
