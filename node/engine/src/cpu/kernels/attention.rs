//! Attention of a run of positions of one sequence, for one key-value head.
//!
//! A sequence is cut into parts of [`PART`] positions, whatever the block size. Each part is computed
//! by itself: its scores, their maximum, probabilities, their sum, the sum of values. Parts are then
//! merged in order ([`merge`]), so that they may be computed anywhere. A score is one lane,
//! sequential in the head's dimension; probabilities are summed in 16 lanes, in order, then the tree;
//! an output is one lane, sequential in positions. Masked positions are never multiplied (or, as
//! integers, by zero). So nothing depends on which queries are computed together.
//!
//! With an int8 cache the products are of integers and exact: queries as i16, `absmax / 32767` per
//! head, and probabilities times value scales as i16, the largest of a part as 32767.

use std::ops::Range;

use super::dispatch;
use super::elementwise::exp;
use super::pairs::Pairs;
use super::part::{self, Part, locate};
use super::products::{scores, values};
use super::store::absmax;
use super::stored::{F16, F32, Int8, KvType, Stored};

/// Positions of a part.
pub(crate) const PART: usize = 512;
/// Most queries that share a pass over a part.
const LUMP: usize = 6;
/// Largest number in place of a float.
const INT_MAX: f32 = 32767.0;
/// The longest head: sums of products of i8 and i16 must fit an i32, as those over a part do.
pub(crate) const MAX_INT8_DIM: usize = PART;

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
    /// Keys and values of this layer; see `stored` for the layout.
    pub(crate) keys: *const u8,
    pub(crate) values: *const u8,
    pub(crate) kind: KvType,
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
    part::room(dim)
        + LUMP * (PART + PART / 2 + record_len(dim))
        + queries * (record_len(dim) + dim / 2)
        + queries.next_multiple_of(16)
}

/// Floats of a [`merge`] record: sums of values, then maximum, sum of probabilities, room.
pub(crate) fn record_len(dim: usize) -> usize {
    dim + 16
}

/// Parts of a sequence of so many positions.
pub(crate) fn parts(positions: usize) -> usize {
    positions.div_ceil(PART)
}

dispatch! {
    /// Causal attention.
    pub(crate) fn attend = attend_generic(a: &Attend<'_>);
}

dispatch! {
    /// Records of one part, for queries that all see some of it: one for each at `records`.
    pub(crate) fn attend_part = attend_part_generic(
        a: &Attend<'_>, part: usize, records: *mut f32,
    );
}

dispatch! {
    /// Merges `parts` records that lie `stride` apart, in order, into the first, and gives the
    /// normalised result.
    pub(crate) fn join = join_generic(
        records: *mut f32, stride: usize, parts: usize, out: *mut f32, dim: usize,
    );
}

/// The parts of the scratch; lengths in floats.
#[derive(Clone, Copy)]
struct Scratch {
    /// `part::room`.
    part: *mut f32,
    /// `6 x PART`.
    scores: *mut f32,
    /// `6 x PART` i16.
    integers: *mut f32,
    /// A record for each of 6 queries.
    now: *mut f32,
    /// A record for each query.
    totals: *mut f32,
    /// For each query `dim` i16.
    queries: *mut f32,
    /// For each query what its scores are multiplied by.
    factors: *mut f32,
}

impl Scratch {
    #[inline(always)]
    unsafe fn new(a: &Attend<'_>) -> Self {
        let queries = positions_per_call(a.group) * a.group;
        // SAFETY: `scratch_len` floats.
        unsafe {
            let part = a.scratch;
            let scores = part.add(part::room(a.dim));
            let integers = scores.add(LUMP * PART);
            let now = integers.add(LUMP * PART / 2);
            let totals = now.add(LUMP * record_len(a.dim));
            let ints = totals.add(queries * record_len(a.dim));
            let factors = ints.add(queries * a.dim / 2);
            Self { part, scores, integers, now, totals, queries: ints, factors }
        }
    }
}

#[inline(always)]
unsafe fn attend_generic<V: Pairs>(a: &Attend<'_>) {
    // SAFETY: as `Attend` says.
    unsafe {
        let s = Scratch::new(a);
        let len = record_len(a.dim);
        prepare::<V>(a, &s);
        let end = a.first + a.count;
        for p in 0..parts(end) {
            // Queries of earlier positions see nothing of this part.
            let skipped = (p * PART).saturating_sub(a.first) * a.group;
            one_part::<V>(a, &s, p, skipped..a.count * a.group, p > 0, s.totals);
        }
        for i in 0..a.count * a.group {
            let to = a.out.add(i / a.group * a.out_stride + i % a.group * a.dim);
            finish::<V>(s.totals.add(i * len), to, a.dim);
        }
    }
}

#[inline(always)]
unsafe fn attend_part_generic<V: Pairs>(a: &Attend<'_>, part: usize, records: *mut f32) {
    // SAFETY: as `Attend` says; a record for every query.
    unsafe {
        let s = Scratch::new(a);
        prepare::<V>(a, &s);
        one_part::<V>(a, &s, part, 0..a.count * a.group, false, records);
    }
}

#[inline(always)]
unsafe fn join_generic<V: Pairs>(
    records: *mut f32,
    stride: usize,
    parts: usize,
    out: *mut f32,
    dim: usize,
) {
    // SAFETY: the caller gives the records and `dim` outputs.
    unsafe {
        for part in 1..parts {
            merge::<V>(records, records.add(part * stride), dim);
        }
        finish::<V>(records, out, dim);
    }
}

/// Adds a record to those of the parts before it.
#[inline(always)]
unsafe fn merge<V: Pairs>(total: *mut f32, next: *const f32, dim: usize) {
    // SAFETY: two records.
    unsafe {
        let (old, new) = (*total.add(dim), *next.add(dim));
        let top = if new > old { new } else { old };
        let mut shrink = [0f32; 16];
        (shrink[0], shrink[1]) = (old - top, new - top);
        exp(V::load(shrink.as_ptr())).store(shrink.as_mut_ptr());
        let (a, b) = (V::splat(shrink[0]), V::splat(shrink[1]));
        *total.add(dim) = top;
        let sum = total.add(dim + 1);
        *sum = (*sum).mul_add(shrink[0], *next.add(dim + 1) * shrink[1]);
        for d in (0..dim).step_by(16) {
            let old = V::load(total.add(d)).mul(a);
            V::load(next.add(d)).fma(b, old).store(total.add(d));
        }
    }
}

/// Normalises.
#[inline(always)]
unsafe fn finish<V: Pairs>(record: *const f32, out: *mut f32, dim: usize) {
    // SAFETY: a record and `dim` outputs.
    unsafe {
        let inverse = V::splat(1.0 / *record.add(dim + 1));
        for d in (0..dim).step_by(16) {
            V::load(record.add(d)).mul(inverse).store(out.add(d));
        }
    }
}

/// What scores are multiplied by, and queries as integers.
#[inline(always)]
unsafe fn prepare<V: Pairs>(a: &Attend<'_>, s: &Scratch) {
    // SAFETY: queries and scratch as `Attend` says.
    unsafe {
        for i in 0..a.count * a.group {
            let factor = s.factors.add(i);
            if a.kind != KvType::Int8 {
                *factor = a.scale;
                continue;
            }
            let q = query(a, i);
            let (scale, inverse) = int_scales(absmax::<V>(q, a.dim));
            *factor = scale * a.scale;
            let to = s.queries.cast::<i16>().add(i * a.dim);
            for d in (0..a.dim).step_by(16) {
                V::load(q.add(d)).mul(V::splat(inverse)).store_i16(to.add(d));
            }
        }
    }
}

/// Scale and its inverse of i16 in place of floats. NaN and infinity survive in the scale.
#[inline(always)]
fn int_scales(absmax: f32) -> (f32, f32) {
    if absmax < 1e-30 { (0.0, 0.0) } else { (absmax / INT_MAX, INT_MAX / absmax) }
}

/// Query `i`.
#[inline(always)]
unsafe fn query(a: &Attend<'_>, i: usize) -> *const f32 {
    // SAFETY: the caller gives an existing query.
    unsafe { a.q.add(i / a.group * a.q_stride + i % a.group * a.dim) }
}

/// One part for some queries, into their records or merged into them.
#[inline(always)]
unsafe fn one_part<V: Pairs>(
    a: &Attend<'_>,
    s: &Scratch,
    part: usize,
    queries: Range<usize>,
    add: bool,
    records: *mut f32,
) {
    let start = part * PART;
    let n = PART.min(a.first + a.count - start);
    // SAFETY: the part's positions have blocks; a record for every query.
    unsafe {
        let located = locate::<V>(a, start, n, queries.len(), s.part);
        let call = Call { a, s, part: &located, start, add, records };
        match (a.kind, located.widened) {
            (KvType::F32, _) | (_, true) => lumps::<V, F32>(&call, queries),
            (KvType::F16, _) => lumps::<V, F16>(&call, queries),
            (KvType::Int8, _) => lumps::<V, Int8>(&call, queries),
        }
    }
}

/// A part of a call.
struct Call<'a> {
    a: &'a Attend<'a>,
    s: &'a Scratch,
    part: &'a Part,
    start: usize,
    add: bool,
    records: *mut f32,
}

impl Call<'_> {
    /// Positions of the part that query `i` sees.
    #[inline(always)]
    fn seen(&self, i: usize) -> usize {
        PART.min(self.a.first + i / self.a.group + 1 - self.start)
    }
}

/// Takes queries together, as many as registers allow.
#[inline(always)]
unsafe fn lumps<V: Pairs, E: Stored<V>>(c: &Call<'_>, queries: Range<usize>) {
    let mut i = queries.start;
    while i < queries.end {
        let left = queries.end - i;
        // SAFETY: existing queries.
        unsafe {
            let n = if V::WIDE {
                // Not six and one, but four and three.
                let n = left.div_ceil(left.div_ceil(LUMP));
                match n {
                    1 => lump::<V, E, 1>(c, i),
                    2 => lump::<V, E, 2>(c, i),
                    3 => lump::<V, E, 3>(c, i),
                    4 => lump::<V, E, 4>(c, i),
                    5 => lump::<V, E, 5>(c, i),
                    _ => lump::<V, E, 6>(c, i),
                }
                n
            } else {
                let n = left.div_ceil(left.div_ceil(4));
                match n {
                    1 => lump::<V, E, 1>(c, i),
                    2 => lump::<V, E, 2>(c, i),
                    3 => lump::<V, E, 3>(c, i),
                    _ => lump::<V, E, 4>(c, i),
                }
                n
            };
            i += n;
        }
    }
}

/// `N` queries from `i`.
#[inline(always)]
unsafe fn lump<V: Pairs, E: Stored<V>, const N: usize>(c: &Call<'_>, i: usize) {
    let (s, dim) = (c.s, c.a.dim);
    let len = record_len(dim);
    // Later queries see more.
    let (fewest, most) = (c.seen(i), c.seen(i + N - 1));
    // SAFETY: indices of the scratch and of existing queries.
    unsafe {
        let rows: [*mut f32; N] = std::array::from_fn(|q| s.scores.add(q * PART));
        let ints: [*mut i16; N] = std::array::from_fn(|q| s.integers.cast::<i16>().add(q * PART));
        let to = if c.add { s.now } else { c.records.add(i * len) };
        let records: [*mut f32; N] = std::array::from_fn(|q| to.add(q * len));
        all_scores::<V, E, N>(c, i, most, rows);
        let mut factors = [0f32; N];
        for q in 0..N {
            let n = c.seen(i + q);
            let (top, sum) = softmax::<V>(rows[q], n);
            (*records[q].add(dim), *records[q].add(dim + 1)) = (top, sum);
            if E::INTEGER {
                factors[q] = integers::<V>(c.part, rows[q], n, most, ints[q]);
            }
        }
        if E::INTEGER {
            let p = ints.map(|p| p.cast_const().cast());
            all_values::<V, E, N>(c, (0, most), p, factors, records, false);
        } else {
            let p = rows.map(|p| p.cast_const().cast());
            all_values::<V, E, N>(c, (0, fewest), p, factors, records, false);
            for q in 0..N {
                let range = (fewest, c.seen(i + q));
                if range.0 < range.1 {
                    all_values::<V, E, 1>(c, range, [p[q]], [0.0], [records[q]], true);
                }
            }
        }
        if c.add {
            for q in 0..N {
                merge::<V>(c.records.add((i + q) * len), records[q], dim);
            }
        }
    }
}

/// Scores with the first `n` positions, and with some after them.
#[inline(always)]
unsafe fn all_scores<V: Pairs, E: Stored<V>, const N: usize>(
    c: &Call<'_>,
    i: usize,
    n: usize,
    rows: [*mut f32; N],
) {
    let (a, s) = (c.a, c.s);
    let groups = n.div_ceil(16);
    // SAFETY: the caller's promise.
    unsafe {
        let queries: [*const u8; N] = std::array::from_fn(|q| {
            if E::INTEGER {
                s.queries.cast::<i16>().add((i + q) * a.dim).cast_const().cast()
            } else {
                query(a, i + q).cast()
            }
        });
        let factors: [f32; N] = std::array::from_fn(|q| *s.factors.add(i + q));
        let mut group = 0;
        if V::WIDE {
            while group + 4 <= groups {
                scores::<V, E, N, 4>(c.part, group, a.dim, queries, factors, rows);
                group += 4;
            }
        }
        while group < groups {
            scores::<V, E, N, 1>(c.part, group, a.dim, queries, factors, rows);
            group += 1;
        }
    }
}

/// Sums of values for all dimensions.
#[inline(always)]
unsafe fn all_values<V: Pairs, E: Stored<V>, const N: usize>(
    c: &Call<'_>,
    range: (usize, usize),
    p: [*const u8; N],
    factors: [f32; N],
    out: [*mut f32; N],
    on_top: bool,
) {
    let dim = c.a.dim;
    let mut column = 0;
    // SAFETY: the caller's promise.
    unsafe {
        if V::WIDE {
            while column + 4 <= dim / 16 {
                values::<V, E, N, 4>(c.part, column, dim, range, p, factors, out, on_top);
                column += 4;
            }
        }
        while column < dim / 16 {
            values::<V, E, N, 1>(c.part, column, dim, range, p, factors, out, on_top);
            column += 1;
        }
    }
}

/// Turns `n` scores into unnormalised probabilities, followed by zeros up to a multiple of 16; returns
/// the largest score and the sum.
#[inline(always)]
unsafe fn softmax<V: Pairs>(scores: *mut f32, n: usize) -> (f32, f32) {
    let end = n.next_multiple_of(16);
    // SAFETY: scores up to a multiple of 16.
    unsafe {
        for j in n..end {
            *scores.add(j) = f32::NEG_INFINITY;
        }
        let mut most = V::load(scores);
        for j in (16..end).step_by(16) {
            most = V::load(scores.add(j)).max(most);
        }
        let top = most.top();
        let mut sums = V::splat(0.0);
        for j in (0..end).step_by(16) {
            let at = scores.add(j);
            exp(V::load(at).sub(V::splat(top))).store(at);
            for k in n.clamp(j, j + 16)..j + 16 {
                *scores.add(k) = 0.0;
            }
            sums = sums.add(V::load(at));
        }
        (top, sums.sum())
    }
}

/// Turns `n` probabilities into integers with the scales of values in them, followed by zeros up to
/// position `end` and its group; returns what the integers are to be multiplied by.
#[inline(always)]
unsafe fn integers<V: Pairs>(part: &Part, p: *mut f32, n: usize, end: usize, to: *mut i16) -> f32 {
    // SAFETY: probabilities up to a multiple of 16, integers and scales likewise.
    unsafe {
        let zero = V::splat(0.0);
        let (mut most, mut poison) = (zero, zero);
        for j in (0..n).step_by(16) {
            let mut scales = part.value_scales[j / 16];
            let mut some = [0f32; 16];
            if n - j < 16 {
                scales.copy_to_nonoverlapping(some.as_mut_ptr(), n - j);
                scales = some.as_ptr();
            }
            let x = V::load(p.add(j)).mul(V::load(scales));
            x.store(p.add(j));
            most = x.max(most);
            poison = x.fma(zero, poison);
        }
        let (scale, inverse) = int_scales(most.top() + poison.sum());
        for j in (0..n).step_by(16) {
            V::load(p.add(j)).mul(V::splat(inverse)).store_i16(to.add(j));
        }
        for j in (n.next_multiple_of(16)..end).step_by(16) {
            zero.store_i16(to.add(j));
        }
        scale
    }
}
