//! The work of loading, cut into what one thread does at a time, and doing it.
//!
//! Units write to parts of the stage's memory that do not overlap, in any order.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::{MatrixPlan, PartPlan, Plan};
use crate::LoadError;
use crate::cpu::buffer::Shared;
use crate::cpu::pack::{Kept, Layout};
use crate::cpu::pool::Pool;
use crate::cpu::store::{HEADER_BYTES, Stored};
use crate::model::Source;

/// Bytes of the model's file that a thread packs at a time: they fit its cache.
const PACK_BYTES: usize = 256 << 10;
/// The same, where rows are put together of what lies column by column: few and long reads.
const TRANSPOSE_BYTES: usize = 4 << 20;
/// Bytes that a thread copies at a time: a huge page.
const COPY_BYTES: usize = 2 << 20;
/// Bytes between two looks at the progress, for each thread.
const REPORT_BYTES: usize = 8 << 20;
/// What one thread does at a time; `at` is a place in memory.
pub(super) enum Work<'a> {
    Vector {
        source: &'a Source,
        plus: f32,
        at: usize,
    },
    Pack {
        matrix: Matrix<'a>,
        transposed: bool,
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

/// A matrix that is to be packed.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    layout: &'a Layout,
    source: &'a Source,
    /// What of it is in memory, if not all.
    kept: Option<&'a Kept>,
}

pub(super) struct Unit<'a> {
    /// Index of the plan.
    pub(super) piece: usize,
    pub(super) work: Work<'a>,
    /// In memory.
    pub(super) bytes: usize,
    /// In the model's file.
    source_bytes: u64,
    /// Checksum of what was read.
    pub(super) crc: AtomicU32,
}

/// The work of all pieces, in the order of memory.
pub(super) fn units<'a>(plans: &'a [Plan<'a>]) -> Vec<Unit<'a>> {
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
                        for MatrixPlan { at, layout, source, kept } in matrices {
                            let what = Matrix { layout, source, kept: kept.as_ref() };
                            pack_units(what, false, plan.at + at, &mut add);
                        }
                    }
                    PartPlan::Transposed(layout, source) => {
                        let what = Matrix { layout, source, kept: None };
                        pack_units(what, true, plan.at + at, &mut add);
                    }
                }
            }
        }
    }
    units
}

fn pack_units<'a>(
    matrix: Matrix<'a>,
    transposed: bool,
    at: usize,
    add: &mut impl FnMut(Work<'a>, usize, u64),
) {
    let Matrix { layout, source, kept } = matrix;
    let row_bytes = layout.row_bytes();
    let unit = if transposed { TRANSPOSE_BYTES } else { PACK_BYTES };
    let groups = (unit / (row_bytes * layout.r).max(1)).max(1);
    let place = |group: usize| match kept.and_then(|kept| kept.start(group)) {
        Some(blocks) => blocks as usize * layout.block_bytes(),
        None => group * layout.group_bytes,
    };
    let file_bytes = u128::from(source.entry().bytes);
    for group in (0..layout.groups()).step_by(groups) {
        let groups = groups.min(layout.groups() - group);
        let first = group * layout.r;
        let rows = (groups * layout.r).min(layout.rows - first);
        let bytes = place(group + groups) - place(group);
        let work = Work::Pack { matrix, transposed, first, rows, at: at + place(group) };
        add(work, bytes, (file_bytes * rows as u128 / layout.rows as u128) as u64);
    }
}

/// Does all of it with all threads.
pub(super) fn run(
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
            Work::Pack { matrix, transposed, first, rows, at } => {
                let Matrix { layout, source, kept } = matrix;
                let started = Instant::now();
                let row_bytes = layout.row_bytes();
                buffer.resize((rows * row_bytes).max(buffer.len()), 0);
                let bytes = &mut buffer[..rows * row_bytes];
                if transposed {
                    source.open()?.read_columns((first, layout.rows), layout.cols, bytes)?;
                } else {
                    source.open()?.read((first * row_bytes) as u64, bytes)?;
                }
                match kept {
                    None => layout.pack(bytes, part(at)),
                    Some(kept) => kept.pack(layout, first / layout.r, bytes, part(at)),
                }
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
