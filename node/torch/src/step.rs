//! What the rows of a step see: slots of the cache under the step's block tables, masks, positions.
//!
//! Made once for each set of spans and each window, used by all layers. Single positions of sequences
//! of like lengths make one group, padded to its longest; what pads is masked, and the sequence's own.

use millrace_engine::model::{BlockTables, Span};
use tch::{Device, Kind, TchError, Tensor};

use crate::attention::Rope;
use crate::graphs::Fixed;

/// A group's longest sequence is at most so many times as long as its shortest, and a block.
const PADDING: usize = 2;
const SLACK: usize = 64;

/// What a step's operations share: where its rows go and what they see. Made once for each set of
/// spans, and forgotten with the step.
#[derive(Debug, Default)]
pub(crate) struct Step {
    spans: Vec<Span>,
    /// Slots of the rows.
    places: Option<Tensor>,
    /// Their positions.
    positions: Option<Tensor>,
    /// By rope: their cosines and sines, `n x 1 x pairs`.
    angles: Vec<(usize, Tensor, Tensor)>,
    /// By window: what is seen.
    groups: Vec<(usize, Vec<Group>)>,
    /// Where all of it lies, in a step of a graph's sizes.
    fixed: Option<Views>,
}

/// Inputs of a graph.
#[derive(Debug)]
struct Views {
    positions: Tensor,
    places: Tensor,
    /// By window: positions of the longest, how many each row sees, slots.
    seen: Vec<(usize, i64, Tensor, Tensor)>,
}

impl Views {
    /// One group, padded to the graph's sizes.
    fn group(&self, window: usize, device: Device) -> Result<Group, TchError> {
        let found = self.seen.iter().find(|(w, ..)| *w == window);
        let Some((_, longest, lens, slots)) = found else {
            return Err(TchError::Kind("invariant: a graph knows the stage's windows".to_owned()));
        };
        let rows = lens.numel() as i64;
        let lens = lens.f_view([rows, 1, 1, 1])?;
        let mask = Tensor::f_arange(*longest, (Kind::Int64, device))?.f_lt_tensor(&lens)?;
        Ok(Group {
            sizes: [rows, 1, *longest],
            rows: Rows::All,
            seen: Seen::Some(slots.shallow_clone()),
            mask: Some(mask),
            causal: false,
        })
    }
}

/// Rows that attend together.
#[derive(Debug)]
pub(crate) struct Group {
    /// Sequences, rows of each, positions that the longest sees.
    pub(crate) sizes: [i64; 3],
    pub(crate) rows: Rows,
    pub(crate) seen: Seen,
    /// True where a row sees a position: broadcasts to `sequences x 1 x rows x positions`.
    pub(crate) mask: Option<Tensor>,
    /// Whether row `i` sees exactly the first `i + 1` positions.
    pub(crate) causal: bool,
}

/// Which rows of the step.
#[derive(Debug)]
pub(crate) enum Rows {
    All,
    Run(i64, i64),
    Some(Tensor),
}

/// Which slots.
#[derive(Debug)]
pub(crate) enum Seen {
    /// So many from one on.
    Run(i64, i64),
    /// `sequences x positions` of them.
    Some(Tensor),
}

impl Step {
    /// A step begins: tables may have changed.
    pub(crate) fn clear(&mut self) {
        self.spans.clear();
        (self.places, self.positions) = (None, None);
        self.angles.clear();
        self.groups.clear();
        self.fixed = None;
    }

    /// A step begins whose rows are those of a graph.
    pub(crate) fn begin_fixed(&mut self, fixed: &Fixed) {
        self.clear();
        let seen = fixed.seen.iter();
        self.fixed = Some(Views {
            positions: fixed.positions.shallow_clone(),
            places: fixed.places.shallow_clone(),
            seen: seen
                .map(|s| (s.window, s.longest, s.lens.shallow_clone(), s.slots.shallow_clone()))
                .collect(),
        });
    }

    /// Makes this about other rows, if they are.
    fn about(&mut self, spans: &[Span]) {
        if self.fixed.is_none() && self.spans != spans {
            self.clear();
            self.spans.extend_from_slice(spans);
        }
    }

    /// Positions of all rows.
    pub(crate) fn positions(&mut self, spans: &[Span], device: Device) -> Result<Tensor, TchError> {
        self.about(spans);
        if let Some(fixed) = &self.fixed {
            return Ok(fixed.positions.shallow_clone());
        }
        let make = || {
            let all: Vec<i64> = spans
                .iter()
                .flat_map(|s| (0..s.count).map(|i| i64::from(s.position) + i as i64))
                .collect();
            upload(&all, device)
        };
        kept(&mut self.positions, make)
    }

    /// Slots of all rows.
    pub(crate) fn places(
        &mut self,
        spans: &[Span],
        tables: &BlockTables,
        (size, device): (usize, Device),
    ) -> Result<Tensor, TchError> {
        self.about(spans);
        if let Some(fixed) = &self.fixed {
            return Ok(fixed.places.shallow_clone());
        }
        let make = || {
            let mut all = Vec::new();
            for s in spans {
                all.extend(
                    (0..s.count).map(|i| slot(tables, s.slot, s.position as usize + i, size)),
                );
            }
            upload(&all, device)
        };
        kept(&mut self.places, make)
    }

    pub(crate) fn angles(
        &mut self,
        spans: &[Span],
        index: usize,
        rope: &Rope,
    ) -> Result<(Tensor, Tensor), TchError> {
        let positions = self.positions(spans, rope.cos.device())?;
        if let Some((_, cos, sin)) = self.angles.iter().find(|(i, ..)| *i == index) {
            return Ok((cos.shallow_clone(), sin.shallow_clone()));
        }
        let of = |table: &Tensor| table.f_index_select(0, &positions)?.f_unsqueeze(1);
        let (cos, sin) = (of(&rope.cos)?, of(&rope.sin)?);
        self.angles.push((index, cos.shallow_clone(), sin.shallow_clone()));
        Ok((cos, sin))
    }

    pub(crate) fn groups(
        &mut self,
        spans: &[Span],
        tables: &BlockTables,
        (size, window): (usize, usize),
        device: Device,
    ) -> Result<&[Group], TchError> {
        self.about(spans);
        let at = match self.groups.iter().position(|(w, _)| *w == window) {
            Some(at) => at,
            None => {
                let groups = match &self.fixed {
                    Some(fixed) => vec![fixed.group(window, device)?],
                    None => groups(spans, tables, (size, window), device)?,
                };
                self.groups.push((window, groups));
                self.groups.len() - 1
            }
        };
        Ok(&self.groups[at].1)
    }
}

fn kept(
    place: &mut Option<Tensor>,
    make: impl FnOnce() -> Result<Tensor, TchError>,
) -> Result<Tensor, TchError> {
    if place.is_none() {
        *place = Some(make()?);
    }
    Ok(place.as_ref().map_or_else(Tensor::new, Tensor::shallow_clone))
}

fn upload(all: &[i64], device: Device) -> Result<Tensor, TchError> {
    Tensor::f_from_slice(all)?.f_to_device(device)
}

pub(crate) fn slot(tables: &BlockTables, sequence: usize, position: usize, size: usize) -> i64 {
    i64::from(tables.blocks(sequence)[position / size]) * size as i64 + (position % size) as i64
}

/// What rows see: positions from the first to the last.
fn seen(span: &Span, window: usize) -> std::ops::Range<usize> {
    let first = span.position as usize;
    (first + 1).saturating_sub(window)..first + span.count
}

/// Groups the rows of a step.
fn groups(
    spans: &[Span],
    tables: &BlockTables,
    (size, window): (usize, usize),
    device: Device,
) -> Result<Vec<Group>, TchError> {
    let mut all = Vec::new();
    let (mut single, longer): (Vec<&Span>, Vec<&Span>) = spans.iter().partition(|s| s.count == 1);
    single.sort_by_key(|s| (seen(s, window).len(), s.start));
    while let Some(first) = single.first() {
        let most = seen(first, window).len() * PADDING + SLACK;
        let count = single.iter().take_while(|s| seen(s, window).len() <= most).count();
        let rest = single.split_off(count);
        all.push(decodes(&single, tables, (size, window), device)?);
        single = rest;
    }
    for span in longer {
        all.push(prefill(span, tables, (size, window), device)?);
    }
    // One group in order is the step itself.
    if let [only] = &mut all[..] {
        let in_order = spans.len() == 1 || spans.is_sorted_by_key(|s| seen(s, window).len());
        if in_order {
            only.rows = Rows::All;
        }
    }
    Ok(all)
}

/// The slots of some positions of a sequence.
fn slots(
    tables: &BlockTables,
    span: &Span,
    range: std::ops::Range<usize>,
    size: usize,
) -> Vec<i64> {
    range.map(|p| slot(tables, span.slot, p, size)).collect()
}

/// One row of each of some sequences.
fn decodes(
    spans: &[&Span],
    tables: &BlockTables,
    (size, window): (usize, usize),
    device: Device,
) -> Result<Group, TchError> {
    let lens: Vec<i64> = spans.iter().map(|s| seen(s, window).len() as i64).collect();
    let longest = lens.iter().copied().max().unwrap_or(0);
    let mut all = Vec::with_capacity(spans.len() * longest as usize);
    for span in spans {
        let own = slots(tables, span, seen(span, window), size);
        // What pads is masked, and the sequence's own: another's might not be finite.
        let padding = longest as usize - own.len();
        let first = own.first().copied().unwrap_or(0);
        all.extend(own.into_iter().chain(std::iter::repeat_n(first, padding)));
    }
    let seen = match spans {
        [_] => run(&all),
        _ => None,
    };
    let count = spans.len() as i64;
    let mask = if lens.iter().all(|&l| l == longest) {
        None
    } else {
        let lens = upload(&lens, device)?.f_view([count, 1, 1, 1])?;
        Some(Tensor::f_arange(longest, (Kind::Int64, device))?.f_lt_tensor(&lens)?)
    };
    let rows: Vec<i64> = spans.iter().map(|s| s.start as i64).collect();
    Ok(Group {
        sizes: [count, 1, longest],
        rows: Rows::Some(upload(&rows, device)?),
        seen: match seen {
            Some(seen) => seen,
            None => Seen::Some(upload(&all, device)?),
        },
        mask,
        causal: false,
    })
}

/// Several rows of a sequence.
fn prefill(
    span: &Span,
    tables: &BlockTables,
    (size, window): (usize, usize),
    device: Device,
) -> Result<Group, TchError> {
    let range = seen(span, window);
    let (n, len, first) = (span.count as i64, range.len() as i64, range.start as i64);
    let all = slots(tables, span, range, size);
    let causal = span.position == 0 && span.count <= window;
    let mask = if causal {
        None
    } else {
        let options = (Kind::Int64, device);
        let rows = Tensor::f_arange(n, options)?.f_add_scalar(i64::from(span.position))?;
        let rows = rows.f_view([1, 1, n, 1])?;
        let keys = Tensor::f_arange(len, options)?.f_add_scalar(first)?;
        let before = keys.f_le_tensor(&rows)?;
        match i64::try_from(window) {
            Ok(window) => {
                let near = keys.f_gt_tensor(&rows.f_sub_scalar(window)?)?;
                Some(before.f_logical_and(&near)?)
            }
            Err(_) => Some(before),
        }
    };
    let seen = match run(&all) {
        Some(seen) => seen,
        None => Seen::Some(upload(&all, device)?),
    };
    let rows = Rows::Run(span.start as i64, n);
    Ok(Group { sizes: [1, n, len], rows, seen, mask, causal })
}

/// Slots that follow one another.
fn run(slots: &[i64]) -> Option<Seen> {
    let together = slots.windows(2).all(|w| w[1] == w[0] + 1);
    slots.first().filter(|_| together).map(|&first| Seen::Run(first, slots.len() as i64))
}
