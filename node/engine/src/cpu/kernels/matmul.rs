//! Matrix products: tiles over groups of rows and columns of activations, handed to
//! threads a few rows at a time.
//!
//! An output is one lane: blocks (or, for float weights, inputs) in order, so it does not depend on
//! the tile, the panel or the thread it was computed in. [`gated`] is two products and what is made
//! of them, block by block of 32 results, so that they never leave the thread.

use std::mem::MaybeUninit;
use std::ops::Range;

use millrace_shared::model::Activation;

use super::best::{self, Best};
use super::elementwise as ew;
use super::format::{Format, Kind, with_format};
use super::lanes::Lanes;
use super::rows::QuantRows;
use super::{Tile, dispatch, scalar};
use crate::Isa;
use crate::cpu::buffer::Shared;
use crate::cpu::pack::{Packed, Run};
use crate::cpu::pool::Pool;
use crate::cpu::tensor::Tensor;

/// Most columns that one pass over the weights serves: their int8 form stays in the level-2 cache.
const PANEL: usize = 64;
/// Fewest columns of a panel where threads have panels of their own.
const PANEL_MIN: usize = 32;
/// Rows of [`gated`] that make a block of its int8 form.
const BLOCK: usize = 32;

/// Results that an item of [`largest`] has at a time; 16 rows of all columns of a panel fit.
const SCANNED: usize = 2048;

/// Weights that an item of a product with up to four columns reads; with more columns it is less.
const ITEM_BYTES: usize = 24 << 10;

/// Where results go: `out[column * stride + row]`, added or stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output<'a> {
    pub(crate) data: Shared<'a, f32>,
    pub(crate) stride: usize,
    pub(crate) add: bool,
}

/// Where a matrix's rows go, from some row and column on.
#[derive(Clone, Copy)]
struct Target {
    at: *mut f32,
    stride: usize,
    add: bool,
}

/// `out = w x` for the given rows of `x`; the parts of `w` lie one after the other in the output.
pub(crate) fn matmul(
    pool: &mut Pool,
    isa: Isa,
    parts: &[Packed],
    x: &Tensor,
    columns: Range<usize>,
    out: Output<'_>,
) {
    let height: usize = parts.iter().map(|p| p.rows).sum();
    assert!(columns.end <= x.rows && height <= out.stride, "invariant: shapes fit");
    assert!(columns.is_empty() || (columns.len() - 1) * out.stride + height <= out.data.len());
    assert!(parts.iter().all(|p| p.cols == x.width), "invariant: inner dimensions agree");
    let width = panel_width(columns.len(), pool.threads());
    let panels = columns.len().div_ceil(width);
    let groups: usize = parts.iter().map(Packed::groups).sum();
    let bytes = parts.iter().map(|p| p.group_bytes).max().unwrap_or(1);
    // An item is some groups of rows times one panel, panel by panel: so the first threads have the
    // first columns, as with operations on rows, and find them in their caches.
    let per_item = groups_per_item(bytes, columns.len().min(width));
    let per_panel = groups.div_ceil(per_item);
    pool.each(per_panel * panels, &|_, item| {
        let (some, panel) = (item % per_panel * per_item, columns.start + item / per_panel * width);
        let some = some..groups.min(some + per_item);
        let panel = panel..columns.end.min(panel + width);
        let (mut first, mut row) = (0, 0);
        for part in parts {
            let start = some.start.clamp(first, first + part.groups()) - first;
            let end = some.end.clamp(first, first + part.groups()) - first;
            // SAFETY: shapes were checked above; items write rows of disjoint groups or columns.
            unsafe {
                let at = (panel.start - columns.start) * out.stride + row + start * part.r;
                let to =
                    Target { at: out.data.as_mut_ptr().add(at), stride: out.stride, add: out.add };
                panel_rows(isa, part, start..end, x, &panel, to);
            }
            first += part.groups();
            row += part.rows;
        }
    });
}

/// `out = activation(gate x) * (up x)`, and its int8 form.
pub(crate) fn gated(
    pool: &mut Pool,
    isa: Isa,
    parts: &[Packed],
    x: &Tensor,
    activation: Activation,
    out: &mut Tensor,
) {
    let [gate, up] = parts else { unreachable!("invariant: a gate and what goes through it") };
    let (rows, columns) = (out.width, x.rows);
    assert!(gate.rows == rows && up.rows == rows && rows.is_multiple_of(BLOCK));
    assert!(gate.cols == x.width && up.cols == x.width && columns * rows <= out.data.len());
    out.rows = columns;
    let quant = QuantRows::new(&mut out.quant, rows);
    let data = Shared::new(&mut out.data);
    let width = panel_width(columns, pool.threads());
    let bytes = BLOCK / gate.r * gate.group_bytes + BLOCK / up.r * up.group_bytes;
    let blocks = rows / BLOCK;
    // Memory is read best in long runs, of the gate, then of the rest: so items are large where they
    // need not be shared out evenly, or where columns are few and reading is all that counts.
    let per_item = match (pool.threads(), columns) {
        (1, _) => blocks,
        (threads, ..=4) => blocks.div_ceil(4 * threads),
        _ => groups_per_item(bytes, columns.min(width)),
    };
    let per_item = per_item.min(PANEL / columns.clamp(1, width));
    let per_panel = blocks.div_ceil(per_item);
    pool.each(per_panel * columns.div_ceil(width), &|_, item| {
        let first = item / per_panel * width;
        let panel = first..columns.min(first + width);
        let mut sums = [MaybeUninit::<f32>::uninit(); 2 * BLOCK * PANEL];
        let sums = sums.as_mut_ptr().cast::<f32>();
        let first = item % per_panel * per_item;
        let some = first..blocks.min(first + per_item);
        let n = some.len() * BLOCK;
        // SAFETY: shapes were checked above; `sums` has two times `n` results for each column, which
        // are written before they are read, and only this item has the outputs.
        unsafe {
            for (i, part) in [gate, up].into_iter().enumerate() {
                let groups = some.start * BLOCK / part.r..some.end * BLOCK / part.r;
                let to = Target { at: sums.add(i * n), stride: 2 * n, add: false };
                panel_rows(isa, part, groups, x, &panel, to);
            }
            for (c, column) in panel.enumerate() {
                let gate = sums.add(c * 2 * n);
                let y = data.slice(column * rows + first * BLOCK, n).as_mut_ptr();
                let quant = quant.blocks(column, some.clone());
                ew::gated(isa, gate, gate.add(n), y, n, activation, quant);
            }
        }
    });
}

/// Largest logits: `w x` for the given rows of `x`, at most `PANEL`, of which each row's list keeps
/// what it wants. `lists` has one for each row, thread by thread; results are seen while they are in
/// the level-1 cache and kept nowhere.
pub(crate) fn largest(
    pool: &mut Pool,
    isa: Isa,
    w: &Packed,
    x: &Tensor,
    columns: Range<usize>,
    lists: &mut [Best],
) {
    let (width, groups) = (columns.len(), w.groups());
    assert!((1..=PANEL).contains(&width) && columns.end <= x.rows, "invariant: shapes fit");
    assert!(w.cols == x.width && lists.len() >= pool.threads() * width);
    let lists = Shared::new(lists);
    // As much as the results have room for, but enough items for all threads.
    let rows = (SCANNED / width).min(SCANNED / 4);
    let per_item = (rows / w.r).min(groups.div_ceil(8 * pool.threads())).max(1);
    pool.each(groups.div_ceil(per_item), &|member, item| {
        let mut sums = [MaybeUninit::<f32>::uninit(); SCANNED];
        let sums = sums.as_mut_ptr().cast::<f32>();
        let some = item * per_item..groups.min((item + 1) * per_item);
        let first = some.start * w.r;
        let (n, stride) = (w.rows.min(some.end * w.r) - first, some.len() * w.r);
        // SAFETY: shapes were checked above; `sums` has `stride` results for each column, the first
        // `n` of which are written before they are read; each member has lists of its own.
        unsafe {
            panel_rows(isa, w, some, x, &columns, Target { at: sums, stride, add: false });
            let lists = lists.slice(member * width, width);
            for (c, list) in lists.iter_mut().enumerate() {
                best::scan(isa, sums.add(c * stride), n, first as u32, list);
            }
        }
    });
}

/// Columns of a panel: where they are many, each thread has some of its own, as with operations on
/// rows, though threads then read the same weights.
fn panel_width(columns: usize, threads: usize) -> usize {
    if columns < 2 * PANEL_MIN {
        return PANEL;
    }
    columns.div_ceil(threads).next_multiple_of(8).clamp(PANEL_MIN, PANEL)
}

/// Groups of `bytes` each that one item takes: about a microsecond's work at least.
fn groups_per_item(bytes: usize, columns: usize) -> usize {
    (ITEM_BYTES / (bytes * columns.div_ceil(4)).max(1)).max(1)
}

/// Groups `groups` of one matrix times the columns of one panel.
///
/// # Safety
/// They exist, in `x` too, and so does the target for each of their rows and columns.
unsafe fn panel_rows(
    isa: Isa,
    w: &Packed,
    groups: Range<usize>,
    x: &Tensor,
    panel: &Range<usize>,
    to: Target,
) {
    let widest = match (w.kind, isa) {
        (Kind::F32 | Kind::F16 | Kind::Bf16, _) => 4,
        #[cfg(target_arch = "x86_64")]
        (_, Isa::Avx512) => super::avx512::COLS,
        #[cfg(target_arch = "x86_64")]
        (_, Isa::Avx2) => super::avx2::COLS,
        _ => 4,
    };
    // Columns in tiles of nearly equal width.
    let tiles = panel.len().div_ceil(widest);
    let blocks = x.width / 32;
    let all = [Run { first: 0, count: blocks as u32, at: 0 }];
    for (nth, g) in groups.enumerate() {
        for i in 0..tiles {
            let start = panel.start + panel.len() * i / tiles;
            let cols = panel.start + panel.len() * (i + 1) / tiles - start;
            // SAFETY: offsets are of a group, of existing columns and of their outputs.
            unsafe {
                let group = w.data.as_ptr().add(w.group_at(g));
                let at = (start - panel.start) * to.stride + nth * w.r;
                let mut tile = Tile {
                    w: group,
                    runs: w.runs(g, panel.len(), &all),
                    blocks,
                    q: x.quant.q.as_ptr(),
                    scale: x.quant.scale.as_ptr(),
                    scaled_sum: x.quant.scaled_sum.as_ptr(),
                    sums: x.quant.sums.as_ptr(),
                    out: to.at.add(at),
                    stride: to.stride,
                    rows: w.r.min(w.rows - g * w.r),
                    add: to.add,
                };
                match w.kind {
                    Kind::F32 | Kind::F16 | Kind::Bf16 => {
                        let x = x.data.as_ptr().add(start * x.width);
                        float_tile(isa, &tile, x, w.kind, cols);
                    }
                    kind => {
                        tile.q = tile.q.add(start * blocks * 32);
                        tile.scale = tile.scale.add(start * blocks);
                        tile.scaled_sum = tile.scaled_sum.add(start * blocks);
                        tile.sums = tile.sums.add(start * blocks);
                        with_format!(kind, quant_tile(isa, &tile, cols, w.r), {});
                    }
                }
            }
        }
    }
}

/// One tile in the given instruction set.
///
/// # Safety
/// As [`Tile`] says, for weights packed in groups of `r`.
pub(super) unsafe fn quant_tile<F: Format>(isa: Isa, tile: &Tile<'_>, cols: usize, r: usize) {
    // SAFETY: the caller's promise; an `Isa` above scalar is only used where the machine has it.
    unsafe {
        match (isa, r) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, super::avx512::ROWS) => super::avx512::tile::<F>(tile, cols),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, super::avx2::ROWS) => super::avx2::tile::<F>(tile, cols),
            _ => scalar::tile::<F>(tile, cols, r),
        }
    }
}

dispatch! {
    /// One group of 16 float rows times up to 4 columns of f32, which follow each other.
    fn float_tile = float_tile_generic(tile: &Tile<'_>, x: *const f32, kind: Kind, cols: usize);
}

#[inline(always)]
unsafe fn float_tile_generic<V: Lanes>(t: &Tile<'_>, x: *const f32, kind: Kind, cols: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match cols {
            1 => float_columns::<V, 1>(t, x, kind),
            2 => float_columns::<V, 2>(t, x, kind),
            3 => float_columns::<V, 3>(t, x, kind),
            _ => float_columns::<V, 4>(t, x, kind),
        }
    }
}

#[inline(always)]
unsafe fn float_columns<V: Lanes, const N: usize>(t: &Tile<'_>, x: *const f32, kind: Kind) {
    // SAFETY: 32 inputs of 16 rows and of `N` columns exist for each block; outputs as `Tile` says.
    unsafe {
        let width = t.blocks * 32;
        let mut acc = [V::splat(0.0); N];
        for run in t.runs {
            let start = run.at as usize * 32;
            for (at, k) in (run.blocks().start * 32..run.blocks().end * 32).enumerate() {
                let at = (start + at) * 16;
                let w = match kind {
                    Kind::F32 => V::load(t.w.cast::<f32>().add(at)),
                    Kind::F16 => V::load_f16(t.w.cast::<u16>().add(at)),
                    _ => V::load_bf16(t.w.cast::<u16>().add(at)),
                };
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = w.fma(V::splat(*x.add(c * width + k)), *acc);
                }
            }
        }
        for (c, acc) in acc.iter().enumerate() {
            let mut sums = [0f32; 16];
            acc.store(sums.as_mut_ptr());
            for (lane, sum) in sums.iter().enumerate().take(t.rows) {
                let out = t.out.add(c * t.stride + lane);
                *out = if t.add { *out + sum } else { *sum };
            }
        }
    }
}
