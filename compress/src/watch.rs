//! Who looks on while a layer is computed for calibration: which matrix sees which inputs.
//!
//! Before each product of a layer its inputs are added to the moments of the matrices that are
//! multiplied. Experts are left out: their inputs are chosen inside the backend.

use std::collections::HashMap;

use millrace_engine::cpu::CpuBackend;
use millrace_engine::model::Backend;
use millrace_engine::model::observed::{Observer, Work};

use crate::hessian::Moments;

/// What was seen.
pub(crate) struct Watch {
    /// By the name of each product's first matrix.
    pub(crate) moments: HashMap<String, Moments>,
    /// The first name of those that share inputs, by each name.
    pub(crate) first: HashMap<String, String>,
    full: bool,
    threads: usize,
    room: Vec<f32>,
}

impl Watch {
    /// With `full`, products of inputs are kept, not only squares.
    pub(crate) fn new(full: bool, threads: usize) -> Self {
        Self { moments: HashMap::new(), first: HashMap::new(), full, threads, room: Vec::new() }
    }
}

impl Observer<CpuBackend> for Watch {
    fn around<R>(
        &mut self,
        backend: &mut CpuBackend,
        work: Work<'_, CpuBackend>,
        run: impl FnOnce(&mut CpuBackend) -> R,
    ) -> R {
        if let Some((about, x, rows)) = work.product
            && let Some(first) = about.names.first().filter(|name| name.starts_with("blk."))
        {
            self.room.resize(rows * about.cols, 0.0);
            backend.download(x, &mut self.room);
            let new = || Moments::new(about.cols, self.full);
            self.moments.entry(first.clone()).or_insert_with(new).add(&self.room, self.threads);
            for name in &about.names {
                self.first.insert(name.clone(), first.clone());
            }
        }
        run(backend)
    }
}
