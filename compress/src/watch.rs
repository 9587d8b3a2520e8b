//! Who looks on while a layer is computed for calibration: which matrix sees which inputs.
//!
//! Before each product of a layer its inputs are added to the moments of the matrices that are
//! multiplied; those of experts after it, when the backend has chosen which rows go where.

use std::collections::HashMap;

use millrace_engine::cpu::CpuBackend;
use millrace_engine::model::Backend;
use millrace_engine::model::observed::{About, Observer, Work};

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

impl Watch {
    /// Adds inputs of matrices, `n x cols`.
    fn add(&mut self, about: &About, x: &[f32]) {
        let threads = self.threads;
        if let Some(moments) = self.moments_of(about) {
            moments.add(x, threads);
        }
    }

    /// What those matrices saw until now.
    fn moments_of(&mut self, about: &About) -> Option<&mut Moments> {
        let first = about.names.first()?;
        if !self.moments.contains_key(first) {
            self.first.extend(about.names.iter().map(|name| (name.clone(), first.clone())));
            self.moments.insert(first.clone(), Moments::new(about.cols, self.full));
        }
        self.moments.get_mut(first)
    }

    /// All that was seen, and what experts are taken to have seen beside it.
    pub(crate) fn finish(mut self) -> Self {
        // blk.LAYER.NAME.EXPERT.weight
        let of_expert = |name: &str| name.split('.').count() == 5;
        let moments = self.moments.iter_mut().filter(|(name, _)| of_expert(name));
        moments.for_each(|(_, moments)| moments.add_alike());
        self
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
            && about.names.first().is_some_and(|name| name.starts_with("blk."))
        {
            let mut room = std::mem::take(&mut self.room);
            room.resize(rows * about.cols, 0.0);
            backend.download(x, &mut room);
            self.add(about, &room);
            self.room = room;
        }
        let done = run(backend);
        // Also those that no row went to.
        for about in work.experts.iter().flatten() {
            self.moments_of(about);
        }
        for routed in backend.take_routed() {
            let Some([outer, inner]) = work.experts.get(routed.expert) else { continue };
            self.add(outer, &routed.outer);
            self.add(inner, &routed.inner);
        }
        done
    }
}
