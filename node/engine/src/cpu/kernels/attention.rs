//! Attention of a run of positions of one sequence, for one key-value head.
//!
//! A sequence is cut into parts of [`PART`] positions, whatever the block size. Each part is computed
//! by itself: its scores, their maximum, probabilities, their sum, the sum of values. Parts are then
//! merged in order ([`merge`]), so that they may be computed anywhere. A score is one lane,
//! sequential in the head's dimension; probabilities are summed in 16 lanes, in order, then the tree;
//! an output is one lane, sequential in positions. Masked positions are never multiplied (or, as
//! integers, by zero). So nothing depends on which queries are computed together.
//!
//! With an int8 cache the products are of integers and exact: queries in units of `absmax / 32639`
//! per head, and probabilities times value scales, the largest of a part as 32639.

use std::ops::Range;

use super::dispatch;
use super::elementwise::soft_cap;
use super::part::{self, Part, locate};
use super::products::{Scale, scores, values};
use super::quads::{FACTOR_BYTES, Quads};
pub(crate) use super::records::record_len;
use super::records::{finish, merge};
use super::softmax::{Scaled, factors, int_scales, integers, softmax};
use super::store::absmax;
use super::stored::{F16, F32, Int8, KvType, Stored};
use crate::Isa;

/// Positions of a part.
pub(crate) const PART: usize = 512;
/// Most queries that share a pass over a part.
const LUMP: usize = 6;
/// The same for integers, whose sums take two registers each.
const THREE: usize = 3;
/// The longest head: sums of products of i8 and factors must fit an i32, as those over a part do.
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
    /// Scores are `c * tanh(x / c)`; 0 for none.
    pub(crate) softcap: f32,
    /// For what is called, not inlined.
    pub(crate) isa: Isa,
    /// Positions that each sees, its own included.
    pub(crate) window: usize,
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
        + (2 * queries).next_multiple_of(16)
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
    /// `6 x PART` factors.
    integers: *mut f32,
    /// A record for each of 6 queries.
    now: *mut f32,
    /// A record for each query.
    totals: *mut f32,
    /// For each query `dim` factors.
    queries: *mut f32,
    /// For each query what becomes of its sums.
    scales: *mut Scale,
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
            let scales = ints.add(queries * a.dim / 2).cast();
            Self { part, scores, integers, now, totals, queries: ints, scales }
        }
    }
}

#[inline(always)]
unsafe fn attend_generic<V: Quads>(a: &Attend<'_>) {
    // SAFETY: as `Attend` says.
    unsafe {
        let s = Scratch::new(a);
        let len = record_len(a.dim);
        prepare::<V>(a, &s);
        let end = a.first + a.count;
        for p in a.unseen(a.first) / PART..parts(end) {
            // Queries of earlier positions see nothing of this part, those of much later ones nothing
            // any more; it is the first for those whose windows begin in it.
            let skipped = (p * PART).saturating_sub(a.first) * a.group;
            let old = a.begun_before(p * PART).max(skipped);
            let seen = a.begun_before((p + 1) * PART).max(old);
            one_part::<V>(a, &s, p, [skipped, old, seen], s.totals);
        }
        for i in 0..a.count * a.group {
            let to = a.out.add(i / a.group * a.out_stride + i % a.group * a.dim);
            finish::<V>(s.totals.add(i * len), to, a.dim);
        }
    }
}

#[inline(always)]
unsafe fn attend_part_generic<V: Quads>(a: &Attend<'_>, part: usize, records: *mut f32) {
    // SAFETY: as `Attend` says; a record for every query.
    unsafe {
        let s = Scratch::new(a);
        prepare::<V>(a, &s);
        one_part::<V>(a, &s, part, [0, 0, a.count * a.group], records);
    }
}

#[inline(always)]
unsafe fn join_generic<V: Quads>(
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

/// What becomes of the sums of queries, and queries as integers.
#[inline(always)]
unsafe fn prepare<V: Quads>(a: &Attend<'_>, s: &Scratch) {
    // SAFETY: queries and scratch as `Attend` says.
    unsafe {
        for i in 0..a.count * a.group {
            let to = s.scales.add(i);
            if a.kind != KvType::Int8 {
                *to = Scale { factor: a.scale, excess: 0 };
                continue;
            }
            let q = query(a, i);
            let (scale, inverse) = int_scales(absmax::<V>(q, a.dim));
            let excess = factors::<V>(q, a.dim, inverse, a.integer_query(s, i));
            *to = Scale { factor: scale * a.scale, excess };
        }
    }
}

impl Attend<'_> {
    /// Positions that the one at `position` no longer sees.
    #[inline(always)]
    fn unseen(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    /// Queries whose windows begin before position `end`.
    #[inline(always)]
    fn begun_before(&self, end: usize) -> usize {
        if end == 0 {
            return 0;
        }
        let last = end.saturating_add(self.window - 1);
        last.saturating_sub(self.first).min(self.count) * self.group
    }

    /// Factors of query `i`.
    #[inline(always)]
    unsafe fn integer_query(&self, s: &Scratch, i: usize) -> *mut u8 {
        // SAFETY: the caller gives an existing query.
        unsafe { s.queries.cast::<u8>().add(i * self.dim / 4 * FACTOR_BYTES) }
    }
}

/// Query `i`.
#[inline(always)]
unsafe fn query(a: &Attend<'_>, i: usize) -> *const f32 {
    // SAFETY: the caller gives an existing query.
    unsafe { a.q.add(i / a.group * a.q_stride + i % a.group * a.dim) }
}

/// One part for some queries: merged into the records of those from the first number to the second, as
/// the records of those from there to the third.
#[inline(always)]
unsafe fn one_part<V: Quads>(
    a: &Attend<'_>,
    s: &Scratch,
    part: usize,
    [begin, old, end]: [usize; 3],
    records: *mut f32,
) {
    let start = part * PART;
    let n = PART.min(a.first + a.count - start);
    // SAFETY: the part's positions have blocks; a record for every query.
    unsafe {
        let located = locate::<V>(a, start, n, end - begin, s.part);
        let call = Call { a, s, part: &located, start, old, records };
        match (a.kind, located.widened) {
            (KvType::F32, _) | (_, true) => lumps::<V, F32>(&call, begin..end),
            (KvType::F16, _) => lumps::<V, F16>(&call, begin..end),
            (KvType::Int8, _) => lumps::<V, Int8>(&call, begin..end),
        }
    }
}

/// A part of a call.
struct Call<'a> {
    a: &'a Attend<'a>,
    s: &'a Scratch,
    part: &'a Part,
    start: usize,
    /// Queries before it have records that this part's are merged into.
    old: usize,
    records: *mut f32,
}

impl Call<'_> {
    /// Positions of the part that query `i` sees.
    #[inline(always)]
    fn seen(&self, i: usize) -> usize {
        PART.min(self.a.first + i / self.a.group + 1 - self.start)
    }

    /// Positions at its beginning that query `i` no longer sees.
    #[inline(always)]
    fn unseen(&self, i: usize) -> usize {
        self.a.unseen(self.a.first + i / self.a.group).saturating_sub(self.start)
    }
}

/// Takes queries together, as many as registers allow.
#[inline(always)]
unsafe fn lumps<V: Quads, E: Stored<V>>(c: &Call<'_>, queries: Range<usize>) {
    let mut i = queries.start;
    while i < queries.end {
        let end = if i < c.old { c.old } else { queries.end };
        let left = end - i;
        // SAFETY: existing queries.
        unsafe {
            let n = if V::WIDE {
                // Not six and one, but four and three.
                let most = if E::INTEGER && left != 4 { THREE } else { LUMP };
                let n = left.div_ceil(left.div_ceil(most));
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
unsafe fn lump<V: Quads, E: Stored<V>, const N: usize>(c: &Call<'_>, i: usize) {
    let (s, dim) = (c.s, c.a.dim);
    let len = record_len(dim);
    // Later queries see more.
    let (fewest, most) = (c.seen(i), c.seen(i + N - 1));
    // SAFETY: indices of the scratch and of existing queries.
    unsafe {
        let rows: [*mut f32; N] = std::array::from_fn(|q| s.scores.add(q * PART));
        let ints: [*mut u8; N] =
            std::array::from_fn(|q| s.integers.cast::<u8>().add(q * PART / 4 * FACTOR_BYTES));
        let add = i < c.old;
        let to = if add { s.now } else { c.records.add(i * len) };
        let records: [*mut f32; N] = std::array::from_fn(|q| to.add(q * len));
        all_scores::<V, E, N>(c, i, most, rows);
        let mut scales = [Scale { factor: 1.0, excess: 0 }; N];
        for q in 0..N {
            let (hidden, n) = (c.unseen(i + q), c.seen(i + q));
            restrict(c.a, rows[q], n, hidden);
            let mut scaled = Scaled::<V>::new(c.part, n, (q, N));
            let (top, sum) = softmax::<V, E>(rows[q], n, dim, &mut scaled);
            (*records[q].add(dim), *records[q].add(dim + 1)) = (top, sum);
            if hidden > 0 {
                forget(rows[q], hidden);
            }
            if E::INTEGER {
                scales[q] = integers::<V>(&scaled, rows[q], most, ints[q]);
            }
        }
        if E::INTEGER {
            let p = ints.map(<*mut u8>::cast_const);
            all_values::<V, E, N>(c, (0, most), p, scales, records, false);
        } else {
            let p = rows.map(|p| p.cast_const().cast());
            all_values::<V, E, N>(c, (0, fewest), p, scales, records, false);
            for q in 0..N {
                let range = (fewest, c.seen(i + q));
                if range.0 < range.1 {
                    all_values::<V, E, 1>(c, range, [p[q]], [scales[q]], [records[q]], true);
                }
            }
        }
        if add {
            for q in 0..N {
                merge::<V>(c.records.add((i + q) * len), records[q], dim);
            }
        }
    }
}

/// Caps `n` scores, and hides the first `hidden` ones. Few models have either, and a kernel of each shape
/// has this: so it is not inlined.
#[inline(never)]
unsafe fn restrict(a: &Attend<'_>, scores: *mut f32, n: usize, hidden: usize) {
    // SAFETY: the caller gives so many scores.
    let scores = unsafe { std::slice::from_raw_parts_mut(scores, n) };
    if a.softcap > 0.0 {
        soft_cap(a.isa, scores, a.softcap);
    }
    scores[..hidden].fill(f32::NEG_INFINITY);
}

/// Makes probabilities of hidden positions, which are next to nothing, nothing.
#[inline(never)]
unsafe fn forget(probabilities: *mut f32, hidden: usize) {
    // SAFETY: the caller gives so many.
    unsafe { std::slice::from_raw_parts_mut(probabilities, hidden) }.fill(0.0);
}

/// Scores with the first `n` positions, and with some after them.
#[inline(always)]
unsafe fn all_scores<V: Quads, E: Stored<V>, const N: usize>(
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
            if E::INTEGER { a.integer_query(s, i + q).cast_const() } else { query(a, i + q).cast() }
        });
        let scales: [Scale; N] = std::array::from_fn(|q| *s.scales.add(i + q));
        let mut group = 0;
        if V::WIDE {
            if E::INTEGER && N > THREE {
                while group + 2 <= groups {
                    scores::<V, E, N, 2>(c.part, group, a.dim, queries, scales, rows);
                    group += 2;
                }
            } else {
                while group + 4 <= groups {
                    scores::<V, E, N, 4>(c.part, group, a.dim, queries, scales, rows);
                    group += 4;
                }
            }
        }
        while group < groups {
            scores::<V, E, N, 1>(c.part, group, a.dim, queries, scales, rows);
            group += 1;
        }
    }
}

/// Sums of values for all dimensions.
#[inline(always)]
unsafe fn all_values<V: Quads, E: Stored<V>, const N: usize>(
    c: &Call<'_>,
    range: (usize, usize),
    p: [*const u8; N],
    scales: [Scale; N],
    out: [*mut f32; N],
    on_top: bool,
) {
    let dim = c.a.dim;
    let mut column = 0;
    // SAFETY: the caller's promise.
    unsafe {
        if V::WIDE {
            if E::INTEGER && N > THREE {
                while column + 2 <= dim / 16 {
                    values::<V, E, N, 2>(c.part, column, dim, range, p, scales, out, on_top);
                    column += 2;
                }
            } else {
                while column + 4 <= dim / 16 {
                    values::<V, E, N, 4>(c.part, column, dim, range, p, scales, out, on_top);
                    column += 4;
                }
            }
        }
        while column < dim / 16 {
            values::<V, E, N, 1>(c.part, column, dim, range, p, scales, out, on_top);
            column += 1;
        }
    }
}
