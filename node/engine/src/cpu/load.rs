//! Loads the weights of a stage with all its threads: from the files of packed weights where there
//! are any, else from the model's tensors, packing them.
//!
//! All weights of a stage lie one after the other on huge pages, in the order in which a step reads
//! them, each page first touched by a thread of the stage. Cached files are copied there; only where
//! the system has no huge pages they are mapped instead, as a mapped file is then read faster than
//! small pages are.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::backend::{Matrices, Vector};
use super::buffer::{ALIGN, Arena, Buf, Frozen, Shared};
use super::mapping::{Mapping, has_huge_pages};
use super::pack::{Layout, Packed, kind_of};
use super::pool::Pool;
use super::store::{self, HEADER_BYTES, Key, Saver, Store, Stored, Unsaved};
use crate::cache::InUse;
use crate::model::{LoadedPart, LoadedParts, Part, Piece, Source};
use crate::{LoadError, PackingReport};

/// Bytes of the model's file that a thread packs at a time: they fit its cache.
const PACK_BYTES: usize = 256 << 10;
/// Bytes that a thread copies at a time: a huge page.
const COPY_BYTES: usize = 2 << 20;
/// Bytes between two looks at the progress, for each thread.
const REPORT_BYTES: usize = 8 << 20;

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
    /// Each with its place in the piece.
    Matrices(Vec<(usize, Layout, &'a Source)>),
}

/// What one thread does at a time; `at` is a place in memory.
enum Work<'a> {
    Vector {
        source: &'a Source,
        plus: f32,
        at: usize,
    },
    Pack {
        layout: &'a Layout,
        source: &'a Source,
        first: usize,
        rows: usize,
        at: usize,
    },
    /// From a place in the file on.
    Copy {
        stored: &'a Stored,
        from: u64,
        at: usize,
    },
    /// Mapped bytes: touch and check them.
    Check {
        data: &'a [u8],
    },
}

struct Unit<'a> {
    /// Index of the plan.
    piece: usize,
    work: Work<'a>,
    /// In memory.
    bytes: usize,
    /// In the model's file.
    source_bytes: u64,
    /// Checksum of what was read.
    crc: AtomicU32,
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
        run(pool, &mut own, one, &self::units(one), &mut |_| {})?;
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
                        let layout = layout(source, r)?;
                        source_bytes += (layout.rows * layout.row_bytes()) as u64;
                        matrices.push((take(layout.bytes())?, layout, *source));
                    }
                    let at = matrices.first().map_or(0, |m| m.0);
                    parts.push((at, PartPlan::Matrices(matrices)));
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

fn layout(source: &Source, r: usize) -> Result<Layout, LoadError> {
    let entry = source.entry();
    let kind = kind_of(entry.dtype).ok_or_else(|| LoadError::UnsupportedType {
        tensor: entry.name.clone(),
        dtype: entry.dtype.as_str().to_owned(),
    })?;
    let (cols, rows) = source.matrix()?;
    Ok(Layout::new(kind, (rows, cols), r))
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

/// The work of all pieces, in the order of memory.
fn units<'a>(plans: &'a [Plan<'a>]) -> Vec<Unit<'a>> {
    let mut units = Vec::new();
    for (piece, plan) in plans.iter().enumerate() {
        let share = |bytes: usize| {
            let all = plan.bytes.max(1) as u128;
            (u128::from(plan.source_bytes) * bytes as u128 / all) as u64
        };
        let mut add = |work, bytes, source_bytes| {
            units.push(Unit { piece, work, bytes, source_bytes, crc: AtomicU32::new(0) });
        };
        if let Some(data) = &plan.apart {
            for data in data.chunks(COPY_BYTES) {
                add(Work::Check { data }, data.len(), share(data.len()));
            }
        } else if let Some(stored) = &plan.stored {
            // Whole huge pages of memory for each thread, not of the file.
            let mut done = 0;
            while done < plan.bytes {
                let at = plan.at + done;
                let bytes = (COPY_BYTES - at % COPY_BYTES).min(plan.bytes - done);
                let from = (HEADER_BYTES + done) as u64;
                add(Work::Copy { stored, from, at }, bytes, share(bytes));
                done += bytes;
            }
        } else {
            for (at, part) in &plan.parts {
                match part {
                    PartPlan::Vector(source, plus, len) => {
                        let work = Work::Vector { source, plus: *plus, at: plan.at + at };
                        add(work, len * 4, source.entry().bytes);
                    }
                    PartPlan::Matrices(matrices) => {
                        matrices.iter().for_each(|(at, layout, source)| {
                            pack_units(layout, source, plan.at + at, &mut add);
                        });
                    }
                }
            }
        }
    }
    units
}

fn pack_units<'a>(
    layout: &'a Layout,
    source: &'a Source,
    at: usize,
    add: &mut impl FnMut(Work<'a>, usize, u64),
) {
    let row_bytes = layout.row_bytes();
    let groups = (PACK_BYTES / (row_bytes * layout.r).max(1)).max(1);
    for group in (0..layout.groups()).step_by(groups) {
        let groups = groups.min(layout.groups() - group);
        let first = group * layout.r;
        let rows = (groups * layout.r).min(layout.rows - first);
        let at = at + group * layout.group_bytes;
        let work = Work::Pack { layout, source, first, rows, at };
        add(work, groups * layout.group_bytes, (rows * row_bytes) as u64);
    }
}

/// Does all of it with all threads.
fn run(
    pool: &mut Pool,
    memory: &mut [u8],
    plans: &[Plan<'_>],
    units: &[Unit<'_>],
    progress: &mut dyn FnMut(u64),
) -> Result<(), LoadError> {
    let memory = Shared::new(memory);
    let buffers: Vec<Mutex<Vec<u8>>> =
        (0..pool.threads()).map(|_| Mutex::new(Vec::new())).collect();
    let failure: Mutex<Option<LoadError>> = Mutex::new(None);
    let (mut rest, mut done) = (units, 0);
    while !rest.is_empty() {
        let (mut count, mut bytes) = (0, 0);
        while count < rest.len() && bytes < REPORT_BYTES * pool.threads() {
            bytes += rest[count].bytes;
            count += 1;
        }
        let (now, later) = rest.split_at(count);
        rest = later;
        pool.each(now.len(), &|member, index| {
            let unit = &now[index];
            let mut buffer = buffers[member].lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: units write to parts of the memory that do not overlap.
            let result = unsafe { unit.run(&memory, &mut buffer, &plans[unit.piece].nanos) };
            if let Err(error) = result {
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
            }
        });
        if let Some(error) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        done += now.iter().map(|u| u.source_bytes).sum::<u64>();
        progress(done);
    }
    Ok(())
}

impl Unit<'_> {
    /// Does it; `buffer` is for the rows of a file.
    ///
    /// # Safety
    /// Nobody else uses this unit's part of the memory.
    unsafe fn run(
        &self,
        memory: &Shared<'_, u8>,
        buffer: &mut Vec<u8>,
        nanos: &AtomicU64,
    ) -> Result<(), LoadError> {
        // SAFETY: the caller's promise.
        let part = |at| unsafe { memory.slice(at, self.bytes) };
        match self.work {
            Work::Vector { source, plus, at } => {
                let mut floats = vec![0.0; self.bytes / 4];
                source.open()?.read_floats(source.entry().dtype, &mut floats)?;
                for (to, x) in part(at).chunks_exact_mut(4).zip(floats) {
                    to.copy_from_slice(&(x + plus).to_ne_bytes());
                }
                Ok(())
            }
            Work::Pack { layout, source, first, rows, at } => {
                let started = Instant::now();
                let row_bytes = layout.row_bytes();
                buffer.resize((rows * row_bytes).max(buffer.len()), 0);
                let rows = &mut buffer[..rows * row_bytes];
                source.open()?.read((first * row_bytes) as u64, rows)?;
                layout.pack(rows, part(at));
                nanos.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
                Ok(())
            }
            Work::Copy { stored, from, at } => {
                let part = part(at);
                // A file that ends early has the wrong checksum, like any other damage.
                if stored.file.read_exact_at(part, from).is_ok() {
                    self.crc.store(crc32c::crc32c(part), Ordering::Relaxed);
                }
                Ok(())
            }
            Work::Check { data } => {
                self.crc.store(crc32c::crc32c(data), Ordering::Relaxed);
                Ok(())
            }
        }
    }
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
                    let packed = |(at, layout, _): (usize, Layout, &Source)| {
                        Packed::new(layout, data.part(at, layout.bytes() as usize))
                    };
                    LoadedPart::Matrices(Matrices(matrices.into_iter().map(packed).collect()))
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
