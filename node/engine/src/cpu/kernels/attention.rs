//! Attention of a run of positions of one sequence, for one key-value head.
//!
//! Keys in tiles of 64 positions, whatever the block size; tiles in order; a running maximum and sum
//! as usual. A score is one lane, sequential in the head's dimension; probabilities are summed in
//! the 16-lane order over the 64 places of the tile (`((v0 + v1) + (v2 + v3))`, then the tree),
//! masked ones as zero; an output is one lane, sequential in positions, and masked positions are
//! never multiplied. So nothing depends on which queries are computed together.

use super::dispatch;
use super::elementwise::exp;
use super::lanes::Lanes;

/// Positions of a tile.
pub(crate) const TILE: usize = 64;
/// Queries that share a pass over a tile.
const LUMP: usize = 4;

/// What to attend to. Queries are `count` positions times `group` heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attend<'a> {
    /// First query head of the first position; heads follow each other, positions are `q_stride`
    /// apart.
    pub(crate) q: *const f32,
    pub(crate) q_stride: usize,
    /// Where the results go, in the same arrangement.
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
    /// Keys and values of this layer; see `kv` for the layout.
    pub(crate) keys: *const u8,
    pub(crate) values: *const u8,
    pub(crate) half: bool,
    /// The sequence's blocks: enough for `first + count` positions, all in range.
    pub(crate) blocks: &'a [u32],
    pub(crate) block_size: usize,
    pub(crate) kv_heads: usize,
    pub(crate) kv_head: usize,
    pub(crate) group: usize,
    pub(crate) dim: usize,
    /// First position, and how many.
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) scale: f32,
    /// [`scratch_len`] floats.
    pub(crate) scratch: *mut f32,
}

/// Positions that one call takes, for heads in groups of `group`.
pub(crate) fn positions_per_call(group: usize) -> usize {
    (48 / group).max(1)
}

/// Floats of scratch that a call needs.
pub(crate) fn scratch_len(group: usize, dim: usize) -> usize {
    let queries = positions_per_call(group) * group;
    2 * TILE * dim + LUMP * TILE + queries * (dim + 2)
}

dispatch! {
    /// Causal attention.
    pub(crate) fn attend = attend_generic(a: &Attend<'_>);
}

/// The parts of the scratch.
struct Scratch {
    /// `dim x 64`.
    keys: *mut f32,
    /// `64 x dim`.
    values: *mut f32,
    /// `4 x 64`.
    scores: *mut f32,
    /// `queries x dim`.
    out: *mut f32,
    max: *mut f32,
    sum: *mut f32,
}

#[inline(always)]
unsafe fn attend_generic<V: Lanes>(a: &Attend<'_>) {
    let queries = a.count * a.group;
    // SAFETY: the scratch has `scratch_len` floats; everything else as `Attend` says.
    unsafe {
        let keys = a.scratch;
        let values = keys.add(TILE * a.dim);
        let scores = values.add(TILE * a.dim);
        let out = scores.add(LUMP * TILE);
        let max = out.add(queries * a.dim);
        let s = Scratch { keys, values, scores, out, max, sum: max.add(queries) };
        for i in 0..queries {
            *s.max.add(i) = f32::NEG_INFINITY;
            *s.sum.add(i) = 0.0;
        }
        for i in (0..queries * a.dim).step_by(16) {
            V::splat(0.0).store(s.out.add(i));
        }
        let end = a.first + a.count;
        for tile in 0..end.div_ceil(TILE) {
            let start = tile * TILE;
            fetch::<V>(a, &s, start, TILE.min(end - start));
            // Queries that see the same number of positions go together, up to four.
            let seen = |i: usize| TILE.min((a.first + i / a.group + 1).saturating_sub(start));
            let mut i = 0;
            while i < queries {
                let n = seen(i);
                let mut lump = 1;
                while lump < LUMP && i + lump < queries && seen(i + lump) == n {
                    lump += 1;
                }
                if n > 0 {
                    match lump {
                        1 => lump_tile::<V, 1>(a, &s, i, n),
                        2 => lump_tile::<V, 2>(a, &s, i, n),
                        3 => lump_tile::<V, 3>(a, &s, i, n),
                        _ => lump_tile::<V, 4>(a, &s, i, n),
                    }
                }
                i += lump;
            }
        }
        for i in 0..queries {
            let inverse = V::splat(1.0 / *s.sum.add(i));
            let to = a.out.add(i / a.group * a.out_stride + i % a.group * a.dim);
            for d in (0..a.dim).step_by(16) {
                V::load(s.out.add(i * a.dim + d)).mul(inverse).store(to.add(d));
            }
        }
    }
}

/// Reads `n` positions from `start` into the scratch as f32.
#[inline(always)]
unsafe fn fetch<V: Lanes>(a: &Attend<'_>, s: &Scratch, start: usize, n: usize) {
    let bs = a.block_size;
    for (i, &block) in a.blocks[start / bs..(start + n).div_ceil(bs)].iter().enumerate() {
        let at = (block as usize * a.kv_heads + a.kv_head) * bs * a.dim;
        // SAFETY: the block is in range; a tile holds whole blocks. Keys are `dim x bs`, values
        // `bs x dim`.
        unsafe {
            let element = |p: *const u8, i: usize| {
                if a.half {
                    half::f16::from_bits(*p.cast::<u16>().add(i)).to_f32()
                } else {
                    *p.cast::<f32>().add(i)
                }
            };
            let lanes = |p: *const u8, i: usize| {
                if a.half {
                    V::load_f16(p.cast::<u16>().add(i))
                } else {
                    V::load(p.cast::<f32>().add(i))
                }
            };
            for d in 0..a.dim {
                let to = s.keys.add(d * TILE + i * bs);
                if bs.is_multiple_of(16) {
                    for j in (0..bs).step_by(16) {
                        lanes(a.keys, at + d * bs + j).store(to.add(j));
                    }
                } else {
                    for j in 0..bs {
                        *to.add(j) = element(a.keys, at + d * bs + j);
                    }
                }
            }
            let used = bs.min(n - i * bs);
            for j in (0..used * a.dim).step_by(16) {
                lanes(a.values, at + j).store(s.values.add(i * bs * a.dim + j));
            }
        }
    }
}

/// One tile for `N` queries from `i` that see its first `n` positions.
#[inline(always)]
unsafe fn lump_tile<V: Lanes, const N: usize>(a: &Attend<'_>, s: &Scratch, i: usize, n: usize) {
    // SAFETY: indices of the scratch and of existing queries.
    unsafe {
        let mut q = [a.q; N];
        for (c, q) in q.iter_mut().enumerate() {
            *q = a.q.add((i + c) / a.group * a.q_stride + (i + c) % a.group * a.dim);
        }
        let mut rows = [s.scores; N];
        for (c, row) in rows.iter_mut().enumerate() {
            *row = s.scores.add(c * TILE);
        }
        let wide = n.next_multiple_of(16);
        product::<V, N>(q, s.keys, TILE, rows, a.dim, wide, false);
        for (c, &row) in rows.iter().enumerate() {
            let correction = softmax::<V>(row, n, a.scale, s.max.add(i + c), s.sum.add(i + c));
            let correction = V::splat(correction);
            for d in (0..a.dim).step_by(16) {
                let o = s.out.add((i + c) * a.dim + d);
                V::load(o).mul(correction).store(o);
            }
        }
        let mut out = [s.out; N];
        for (c, out) in out.iter_mut().enumerate() {
            *out = s.out.add((i + c) * a.dim);
        }
        product::<V, N>(rows.map(|p| p.cast_const()), s.values, a.dim, out, n, a.dim, true);
    }
}

/// Turns `n` scores of a tile into unnormalised probabilities; returns what older sums shrink by.
#[inline(always)]
unsafe fn softmax<V: Lanes>(
    scores: *mut f32,
    n: usize,
    scale: f32,
    max: *mut f32,
    sum: *mut f32,
) -> f32 {
    // SAFETY: 64 scores.
    unsafe {
        let mut top = *max;
        for j in (0..n.next_multiple_of(16)).step_by(16) {
            V::load(scores.add(j)).mul(V::splat(scale)).store(scores.add(j));
        }
        for j in n..TILE {
            *scores.add(j) = f32::NEG_INFINITY;
        }
        let mut highest = [0f32; 16];
        let lanes = V::load(scores)
            .max(V::load(scores.add(16)))
            .max(V::load(scores.add(32)).max(V::load(scores.add(48))));
        lanes.store(highest.as_mut_ptr());
        for x in highest {
            top = if x > top { x } else { top };
        }
        let mut parts = [V::splat(0.0); 4];
        for (v, part) in parts.iter_mut().enumerate() {
            if v * 16 < n {
                exp(V::load(scores.add(v * 16)).sub(V::splat(top))).store(scores.add(v * 16));
                for j in n.clamp(v * 16, v * 16 + 16)..v * 16 + 16 {
                    *scores.add(j) = 0.0;
                }
                *part = V::load(scores.add(v * 16));
            }
        }
        let total = parts[0].add(parts[1]).add(parts[2].add(parts[3])).sum();
        let mut correction = [0f32; 16];
        exp(V::splat(*max - top)).store(correction.as_mut_ptr());
        *max = top;
        *sum = (*sum).mul_add(correction[0], total);
        correction[0]
    }
}

/// `c[q][0..n] = sum over k of a[q][k] * b[k * stride ..][0..n]`, from zero or on top of `c`; `n` is
/// a multiple of 16. One lane per output, `k` in order.
#[inline(always)]
unsafe fn product<V: Lanes, const N: usize>(
    a: [*const f32; N],
    b: *const f32,
    stride: usize,
    c: [*mut f32; N],
    k: usize,
    n: usize,
    on_top: bool,
) {
    let mut at = 0;
    // SAFETY: the caller's promise; `at` never passes `n`.
    unsafe {
        if V::WIDE {
            while at + 32 <= n {
                strip::<V, N, 2>(a, b.add(at), stride, c.map(|c| c.add(at)), k, on_top);
                at += 32;
            }
        }
        while at < n {
            strip::<V, N, 1>(a, b.add(at), stride, c.map(|c| c.add(at)), k, on_top);
            at += 16;
        }
    }
}

#[inline(always)]
unsafe fn strip<V: Lanes, const N: usize, const W: usize>(
    a: [*const f32; N],
    b: *const f32,
    stride: usize,
    c: [*mut f32; N],
    k: usize,
    on_top: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[V::splat(0.0); W]; N];
        if on_top {
            for q in 0..N {
                for w in 0..W {
                    acc[q][w] = V::load(c[q].add(w * 16));
                }
            }
        }
        for i in 0..k {
            let mut row = [V::splat(0.0); W];
            for (w, row) in row.iter_mut().enumerate() {
                *row = V::load(b.add(i * stride + w * 16));
            }
            for q in 0..N {
                let x = V::splat(*a[q].add(i));
                for w in 0..W {
                    acc[q][w] = row[w].fma(x, acc[q][w]);
                }
            }
        }
        for q in 0..N {
            for w in 0..W {
                acc[q][w].store(c[q].add(w * 16));
            }
        }
    }
}
