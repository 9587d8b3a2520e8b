//! Blocks of a packed matrix that are all zeros, which every product passes over.
//!
//! A block of one group of rows times 32 inputs adds exactly nothing where all its weights are zero,
//! so results are the same bits as with it. Of a matrix that its file keeps in tiles, only those are in
//! memory, one after the other. Of others zeros are found once when they are loaded, and the layout
//! stays as it is: what is not read costs no time.

use super::{FLOAT_ROWS, Layout};
use crate::cpu::kernels::format::{Format, Kind, with_format};
use crate::model::Tiles;

/// Rows and columns, from the first ones on, that products pass over where all of such a tile is zero,
/// on every instruction set.
pub const ZERO_TILE: [usize; 2] = [FLOAT_ROWS, 32];
/// Least part of a matrix that must lie in such tiles; with less, all of it is multiplied.
pub const ZEROS_WORTH: f64 = 0.125;
/// The same for a few columns, which wait for memory alone: gaps cost them the processor's own
/// prefetching (measured: 0.6 of the speed with a quarter of zeros, about as fast with three quarters,
/// 1.6 to 2 times with nine tenths).
pub const ZEROS_WORTH_FEW: f64 = 0.8;
/// Fewest columns that are many.
const MANY: usize = 8;
/// Groups that are looked at first.
const SAMPLE: usize = 64;

/// Blocks of a group that follow each other, none of them zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u32,
    pub(crate) count: u32,
    /// Where they lie, in blocks from the group's beginning.
    pub(crate) at: u32,
}

impl Run {
    /// Their numbers.
    pub(crate) fn blocks(self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }
}

/// What is left of each group of rows.
#[derive(Debug)]
pub(crate) struct Kept {
    runs: Box<[Run]>,
    /// Where each group's runs begin, and where the last one's end.
    starts: Box<[u32]>,
    /// Whether a few columns are faster for it too.
    for_few: bool,
    /// Where each group begins in memory, in blocks, and where the last one ends; empty where zeros are
    /// there too.
    groups: Box<[u64]>,
}

impl Kept {
    /// Of a packed matrix; `None` where too few blocks are zeros to be worth it.
    pub(crate) fn find(layout: &Layout, data: &[u8]) -> Option<Self> {
        let (groups, blocks) = (layout.groups(), layout.cols / 32);
        if blocks == 0 {
            return None;
        }
        let group = |g: usize| &data[g * layout.group_bytes..][..layout.group_bytes];
        let worth =
            |zeros: usize, groups: usize| zeros as f64 >= ZEROS_WORTH * (groups * blocks) as f64;
        if groups > 4 * SAMPLE {
            let some = (0..groups).step_by(groups / SAMPLE);
            let looked = some.len();
            let zeros = some.map(|g| (0..blocks).filter(|&b| is_zero(layout, group(g), b)).count());
            if !worth(2 * zeros.sum::<usize>(), looked) {
                return None;
            }
        }
        let (mut runs, mut starts, mut kept) = (Vec::<Run>::new(), vec![0], 0);
        for g in 0..groups {
            let mut last: Option<Run> = None;
            for b in (0..blocks).filter(|&b| !is_zero(layout, group(g), b)) {
                kept += 1;
                match &mut last {
                    Some(run) if run.blocks().end == b => run.count += 1,
                    _ => runs.extend(last.replace(Run { first: b as u32, count: 1, at: b as u32 })),
                }
            }
            runs.extend(last);
            starts.push(u32::try_from(runs.len()).ok()?);
        }
        let (runs, starts) = (runs.into_boxed_slice(), starts.into_boxed_slice());
        let for_few = (groups * blocks - kept) as f64 >= ZEROS_WORTH_FEW * (groups * blocks) as f64;
        worth(groups * blocks - kept, groups).then_some(Self {
            runs,
            starts,
            for_few,
            groups: Box::default(),
        })
    }

    /// Of a matrix of which only these tiles are to be in memory.
    pub(crate) fn of_tiles(layout: &Layout, tiles: &Tiles) -> Self {
        let (mut runs, mut starts, mut groups) = (Vec::<Run>::new(), vec![0], vec![0]);
        let width = (tiles.width / 32) as u32;
        let mut end = 0u64;
        for g in 0..layout.groups() {
            let row = g * layout.r / FLOAT_ROWS;
            let columns = tiles.starts[row] as usize..tiles.starts[row + 1] as usize;
            let mut at = 0;
            let mut last: Option<Run> = None;
            for first in tiles.columns[columns].iter().map(|column| column * width) {
                match &mut last {
                    Some(run) if run.first + run.count == first => run.count += width,
                    _ => runs.extend(last.replace(Run { first, count: width, at })),
                }
                at += width;
            }
            runs.extend(last);
            starts.push(runs.len() as u32);
            end += u64::from(at);
            groups.push(end);
        }
        Self { runs: runs.into(), starts: starts.into(), for_few: true, groups: groups.into() }
    }

    /// Where a group begins in memory, in blocks (the one after the last: where that ends); `None` where
    /// zeros are there too.
    pub(crate) fn start(&self, g: usize) -> Option<u64> {
        self.groups.get(g).copied()
    }

    /// Bytes in memory of a matrix without its zeros.
    pub(crate) fn bytes(&self, layout: &Layout) -> u64 {
        self.groups.last().map_or(0, |&blocks| blocks.saturating_mul(layout.block_bytes() as u64))
    }

    /// Packs whole groups from `first` on, see [`Layout::pack`], but for their zeros.
    pub(crate) fn pack(&self, layout: &Layout, first: usize, rows: &[u8], mut out: &mut [u8]) {
        let block = layout.block_bytes();
        let mut group = vec![0; layout.group_bytes];
        for (g, rows) in (first..).zip(rows.chunks(layout.r * layout.row_bytes())) {
            group.fill(0);
            layout.pack(rows, &mut group);
            for run in self.group(g) {
                let from = &group[run.first as usize * block..][..run.count as usize * block];
                let (to, rest) = std::mem::take(&mut out).split_at_mut(from.len());
                to.copy_from_slice(from);
                out = rest;
            }
        }
    }

    /// Whether so many columns are faster for it.
    pub(crate) fn pays(&self, columns: usize) -> bool {
        self.for_few || columns >= MANY
    }

    /// What is left of one group.
    pub(crate) fn group(&self, g: usize) -> &[Run] {
        &self.runs[self.starts[g] as usize..self.starts[g + 1] as usize]
    }
}

/// Whether block `b` of a group adds nothing, whatever the inputs.
fn is_zero(layout: &Layout, group: &[u8], b: usize) -> bool {
    let float = || {
        let bytes = layout.group_bytes / layout.cols * 32;
        let values = &group[b * bytes..][..bytes];
        match layout.kind {
            Kind::F32 => values.chunks_exact(4).all(is_zero_scale),
            _ => values.chunks_exact(2).all(is_zero_scale),
        }
    };
    with_format!(layout.kind, is_zero_block(group, b, layout.r), float())
}

/// Scales and minima are zero, or their factors are.
fn is_zero_block<F: Format>(group: &[u8], b: usize, r: usize) -> bool {
    let block = &group[b * F::block_bytes(r)..][..F::block_bytes(r)];
    (0..r).all(|lane| {
        let value =
            |at: usize| is_zero_scale(&block[at + lane * F::SCALE_BYTES..][..F::SCALE_BYTES]);
        let factors = |at: usize| F::HALVES && block[at + lane] == 0 && block[at + r + lane] == 0;
        (value(0) || factors(F::sub_at(r)))
            && (!F::MIN || value(F::min_at(r)) || factors(F::sub_min_at(r)))
    })
}

/// A float of two or four bytes, of either sign.
fn is_zero_scale(x: &[u8]) -> bool {
    match *x {
        [a, b] => u16::from_le_bytes([a, b]) << 1 == 0,
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]) << 1 == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pack::kind_of;
    use millrace_shared::model::TensorType;

    /// Of floats, `groups` of 16 rows and 8 blocks, in which these are zeros.
    fn found(groups: usize, zeros: impl Fn(usize, usize) -> bool) -> Option<Kept> {
        let layout = Layout::new(kind_of(TensorType::F16).unwrap(), (groups * 16, 8 * 32), 16);
        let block = |i: usize| if zeros(i / 8, i % 8) { [0, 0x80] } else { [0, 0x3c] };
        let data: Vec<u8> = (0..groups * 8).flat_map(|i| block(i).repeat(16 * 32)).collect();
        Kept::find(&layout, &data)
    }

    #[test]
    fn what_is_not_zero_is_kept_in_runs() {
        let kept = found(2, |g, b| g == 1 || b == 0 || b == 4).unwrap();
        let run = |first| Run { first, count: 3, at: first };
        assert_eq!(kept.group(0), [run(1), run(5)]);
        assert_eq!(kept.group(1), []);
    }

    #[test]
    fn few_columns_take_more_zeros() {
        let half = found(4, |_, b| b < 4).unwrap();
        assert_eq!([1, MANY - 1, MANY].map(|columns| half.pays(columns)), [false, false, true]);
        assert!(found(4, |_, b| b < 7).unwrap().pays(1));
    }

    #[test]
    fn few_zeros_are_not_worth_it() {
        assert!(found(3, |_, _| false).is_none());
        assert!(found(16, |g, b| b == 0 && g > 0).is_none());
        assert!(found(16, |_, b| b == 0).is_some());
        // Many groups, of which some are looked at first.
        assert!(found(400, |_, b| b == 7).is_some());
        assert!(found(400, |_, _| false).is_none());
    }
}
