//! Loads the weights of a stage with all its threads: from the files of packed weights where there
//! are any, else from the model's tensors, packing them.
//!
//! All weights of a stage lie one after the other on huge pages, in the order in which a step reads
//! them, each page first touched by a thread of the stage. Cached files are copied there; only where
//! the system has no huge pages they are mapped instead, as a mapped file is then read faster than
//! small pages are.

mod work;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::backend::{Matrices, Vector};
use super::buffer::{ALIGN, Arena, Buf, Frozen};
use super::mapping::{Mapping, has_huge_pages};
use super::pack::{Kept, Layout, Packed, Packing, kind_of};
use super::pool::Pool;
use super::store::{self, HEADER_BYTES, Key, Saver, Store, Stored, Unsaved};
use crate::cache::InUse;
use crate::model::{LoadedPart, LoadedParts, Part, Piece, Source};
use crate::{LoadError, PackingReport};
use work::{Unit, Work, run, units};

/// What was loaded.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) parts: LoadedParts<Matrices, Vector>,
    /// Bytes of weights.
    pub(super) bytes: u64,
    pub(super) report: PackingReport,
    /// Keeps what was packed.
    pub(super) saver: Option<Saver>,
    /// Keeps the files of all pieces from being removed.
    pub(super) held: InUse,
}

/// A piece and where its parts go, in bytes from its beginning.
struct Plan<'a> {
    parts: Vec<(usize, PartPlan<'a>)>,
    bytes: usize,
    /// As they are in the model's file.
    source_bytes: u64,
    key: Option<Key>,
    /// Its file, if it has one.
    stored: Option<Stored>,
    /// Where it begins in the stage's memory.
    at: usize,
    /// Its bytes, if they are not there.
    apart: Option<Frozen<u8>>,
    /// What packing took, in thread time.
    nanos: AtomicU64,
}

enum PartPlan<'a> {
    Vector(&'a Source, f32, usize),
    Matrices(Vec<MatrixPlan<'a>>),
    /// One that lies column by column.
    Transposed(Layout, &'a Source),
}

/// A matrix that is to be packed.
pub(super) struct MatrixPlan<'a> {
    /// Its place in the piece.
    at: usize,
    layout: Layout,
    source: &'a Source,
    /// What of it is in memory, if not all.
    kept: Option<Kept>,
}

impl<'a> MatrixPlan<'a> {
    /// At the beginning of a piece, in groups of `r` rows.
    ///
    /// # Errors
    /// If it is no matrix, of a type that is unsupported, or its tiles are not as they are to be.
    pub(super) fn new(source: &'a Source, r: usize) -> Result<Self, LoadError> {
        let layout = layout(source, r)?;
        let kept = source.tiles()?.map(|tiles| Kept::of_tiles(&layout, &tiles));
        Ok(Self { at: 0, layout, source, kept })
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> u64 {
        self.kept.as_ref().map_or_else(|| self.layout.bytes(), |kept| kept.bytes(&self.layout))
    }
}

/// Loads `pieces`, packed with `r` rows per group. `progress` gets the bytes done so far, as they are
/// in the model's file.
///
/// # Errors
/// If memory runs out, a type is unsupported or a file cannot be read.
pub(super) fn load(
    pool: &mut Pool,
    arena: &mut Arena,
    store: Option<Store>,
    (pieces, r): (&[Piece<'_>], usize),
    progress: &mut dyn FnMut(u64),
) -> Result<Loaded, LoadError> {
    let started = Instant::now();
    let mapped = !has_huge_pages();
    let keys: Vec<Key> = pieces.iter().filter_map(|p| store::key(p, r)).collect();
    let held = store.as_ref().map(|store| store.hold(&keys)).unwrap_or_default();
    let mut plans =
        pieces.iter().map(|p| Plan::new(p, r, store.as_ref())).collect::<Result<Vec<_>, _>>()?;
    let mut block = place(&mut plans, arena, mapped)?;
    let units = units(&plans);
    run(pool, &mut block, &plans, &units, progress)?;
    let damaged = damaged(&plans, &units);
    drop(units);
    for piece in damaged {
        let plan = &mut plans[piece];
        if let (Some(store), Some(key)) = (&store, &plan.key) {
            store.damaged(key);
        }
        // Memory of its own: what was copied is not zero, what was mapped cannot be written.
        (plan.stored, plan.apart, plan.at) = (None, None, 0);
        let mut own = arena.take(plan.bytes)?;
        let one = std::slice::from_ref(&*plan);
        run(pool, &mut own, one, &work::units(one), &mut |_| {})?;
        plan.apart = Some(own.freeze());
    }
    let loaded = finish(plans, block.freeze(), store, (started, mapped, pool.threads()));
    Ok(Loaded { held, ..loaded })
}

impl<'a> Plan<'a> {
    fn new(piece: &Piece<'a>, r: usize, store: Option<&Store>) -> Result<Self, LoadError> {
        let (mut parts, mut bytes, mut source_bytes) = (Vec::new(), 0usize, 0);
        let too_big =
            || LoadError::Settings("a layer does not fit in the address space".to_owned());
        // Where the next `size` bytes go.
        let mut take = |size: u64| -> Result<usize, LoadError> {
            let at = bytes;
            let size = usize::try_from(size).ok().and_then(|s| s.checked_next_multiple_of(ALIGN));
            bytes = size.and_then(|s| bytes.checked_add(s)).ok_or_else(too_big)?;
            Ok(at)
        };
        for part in piece {
            match part {
                Part::Vector(source, plus) => {
                    let elements = source.entry().elements();
                    source_bytes += source.entry().bytes;
                    let at = take(elements.saturating_mul(4))?;
                    parts.push((at, PartPlan::Vector(source, *plus, elements as usize)));
                }
                Part::Matrices(sources) => {
                    let mut matrices = Vec::with_capacity(sources.len());
                    for source in sources {
                        let mut plan = MatrixPlan::new(source, r)?;
                        source_bytes += source.entry().bytes;
                        plan.at = take(plan.bytes())?;
                        matrices.push(plan);
                    }
                    let at = matrices.first().map_or(0, |m| m.at);
                    parts.push((at, PartPlan::Matrices(matrices)));
                }
                Part::Transposed(source) => {
                    let (rows, cols) = source.matrix()?;
                    let layout = Layout::new(packing(source)?, (rows, cols), r);
                    source_bytes += source.entry().bytes;
                    parts.push((take(layout.bytes())?, PartPlan::Transposed(layout, source)));
                }
            }
        }
        let key = store.and_then(|_| store::key(piece, r));
        let stored = store.zip(key.as_ref()).and_then(|(s, key)| s.open(key, bytes as u64));
        let nanos = AtomicU64::new(0);
        Ok(Self { parts, bytes, source_bytes, key, stored, at: 0, apart: None, nanos })
    }

    /// Its bytes, once they are loaded; `block` is the stage's memory.
    fn data(&self, block: &Frozen<u8>) -> Frozen<u8> {
        self.apart.clone().unwrap_or_else(|| block.part(self.at, self.bytes))
    }
}

fn packing(source: &Source) -> Result<Packing, LoadError> {
    let entry = source.entry();
    kind_of(entry.dtype).ok_or_else(|| LoadError::UnsupportedType {
        tensor: entry.name.clone(),
        dtype: entry.dtype.as_str().to_owned(),
    })
}

fn layout(source: &Source, r: usize) -> Result<Layout, LoadError> {
    let (cols, rows) = source.matrix()?;
    Ok(Layout::new(packing(source)?, (rows, cols), r))
}

/// Gives every piece its place: in one block of memory, or, where that has no huge pages and the
/// piece has a file, in a mapping of the file.
fn place(plans: &mut [Plan<'_>], arena: &mut Arena, mapped: bool) -> Result<Buf<u8>, LoadError> {
    let mut total = 0;
    for plan in plans {
        let map = plan.stored.as_ref().filter(|_| mapped).and_then(|stored| {
            // Refused: then it is read.
            Mapping::file(&stored.file, HEADER_BYTES + plan.bytes).ok()
        });
        plan.apart = map.map(|map| Frozen::file(Arc::new(map), HEADER_BYTES));
        plan.at = total;
        if plan.apart.is_none() {
            total += plan.bytes;
        }
    }
    arena.take(total)
}

/// The pieces whose files do not hold what their headers say.
fn damaged(plans: &[Plan<'_>], units: &[Unit<'_>]) -> Vec<usize> {
    let mut found: Vec<Option<u32>> = vec![None; plans.len()];
    for unit in units.iter().filter(|u| matches!(u.work, Work::Copy { .. } | Work::Check { .. })) {
        let crc = unit.crc.load(Ordering::Relaxed);
        let before = found[unit.piece].unwrap_or(0);
        found[unit.piece] = Some(crc32c::crc32c_combine(before, crc, unit.bytes));
    }
    let wrong = |piece: &usize| {
        let stored = plans[*piece].stored.as_ref().map(|s| s.crc);
        found[*piece].is_some_and(|crc| stored != Some(crc))
    };
    (0..plans.len()).filter(wrong).collect()
}

/// Hands out what was loaded, and starts to keep what was packed.
fn finish(
    plans: Vec<Plan<'_>>,
    block: Frozen<u8>,
    store: Option<Store>,
    (started, mapped, threads): (Instant, bool, usize),
) -> Loaded {
    let mut report = PackingReport { mapped, ..PackingReport::default() };
    let (mut parts, mut bytes, mut saved) = (Vec::new(), 0, 0);
    let mut unsaved = Vec::new();
    for plan in plans {
        let data = plan.data(&block);
        bytes += plan.bytes as u64;
        match (plan.stored, plan.key) {
            (Some(stored), _) => {
                report.cached_bytes += plan.bytes as u64;
                saved += stored.nanos;
            }
            (None, key) => {
                report.packed_bytes += plan.bytes as u64;
                let nanos = plan.nanos.into_inner();
                unsaved.extend(key.map(|key| Unsaved { key, data: data.clone(), nanos }));
            }
        }
        for (at, part) in plan.parts {
            parts.push(match part {
                PartPlan::Vector(_, _, len) => LoadedPart::Vector(Vector(data.part(at, len))),
                PartPlan::Matrices(matrices) => {
                    let packed = |plan: MatrixPlan<'_>| {
                        let data = data.part(plan.at, plan.bytes() as usize);
                        match plan.kept {
                            None => Packed::new(plan.layout, data),
                            Some(kept) => Packed::without_zeros(plan.layout, data, kept),
                        }
                    };
                    LoadedPart::Matrices(Matrices(matrices.into_iter().map(packed).collect()))
                }
                PartPlan::Transposed(layout, _) => {
                    let data = data.part(at, layout.bytes() as usize);
                    LoadedPart::Matrices(Matrices(vec![Packed::new(layout, data)]))
                }
            });
        }
    }
    report.mapped &= report.cached_bytes > 0;
    report.saved_seconds = saved as f64 / 1e9 / threads as f64;
    report.seconds = started.elapsed().as_secs_f64();
    let saver = store.filter(|_| !unsaved.is_empty());
    let saver = saver.map(|store| Saver::start(store, unsaved));
    Loaded { parts, bytes, report, saver, held: InUse::default() }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use millrace_shared::model::{Places, SparseForm, TensorEntry, TensorType};

    use super::*;
    use crate::TensorSource;

    /// What a stage is to have room for: of a matrix in tiles only these, of others all.
    #[test]
    fn tiles_take_the_memory_of_what_is_kept() {
        let (dtype, shape) = (TensorType::F16, [64u64, 48]);
        // Two of six tiles.
        let there = |i: usize| matches!((i / 64 / 16, i % 64 / 32), (0, 1) | (2, 0));
        let dense: Vec<u8> =
            (0..64 * 48).flat_map(|i| if there(i) { [0, 0x3c] } else { [0, 0] }).collect();
        let zero = |line: &[u8]| line.iter().all(|byte| *byte == 0);
        let bytes_as = |form: SparseForm| {
            let places = Places::find(form, dtype, shape, &dense, zero).unwrap();
            let mut file = tempfile::NamedTempFile::new().unwrap();
            let mut offset = 0;
            let names = ["weight", form.parts()[0], form.parts()[1]];
            let mut sources = Vec::new();
            let parts = places.shapes().into_iter().zip(places.encode(&dense).unwrap());
            for (end, ((dtype, dims), data)) in names.into_iter().zip(parts) {
                file.write_all(&data).unwrap();
                let (name, bytes) = (format!("blk.0.ffn_up.{end}"), data.len() as u64);
                let dims = if end == "weight" { shape.to_vec() } else { dims };
                let entry =
                    TensorEntry { name, dtype, dims, file: 0, offset, bytes, hash: [0; 32] };
                sources.push(TensorSource { entry, path: file.path().to_owned(), offset });
                offset += bytes;
            }
            let sources = Source::of_tensors(&sources).unwrap();
            MatrixPlan::new(&sources[0], 16).unwrap().bytes()
        };
        let all = 2 * 64 * 48;
        let forms = [SparseForm::Csr, SparseForm::Bitmask, SparseForm::Tiles];
        assert_eq!(forms.map(bytes_as), [all, all, all / 3]);
    }
}
