//! Low rank, carried out: matrices that share their input become the product of matrices as high as
//! they and one thin one, which they share.
//!
//! `[q; k; v] x ~ A (B x)`: one decomposition of the matrices one below the other, so that `B` is
//! stored and multiplied once. `A`'s parts keep the names of the matrices, `B` is `NAME_in` after the
//! first of them; the engine multiplies both, whatever the family. Ranks are multiples of 32, as its
//! kernels need. Where factors would be no smaller, matrices stay as they are, and so do experts.

use std::path::Path;

use millrace_shared::model::{TensorEntry, TensorType};

use crate::apply::{Settings, encode};
use crate::lowrank::{Factors, GRAIN, Rank, factorise, grained, rank_of};
use crate::mixed::{Price, hull, spend};
use crate::quant::fallback;
use crate::report::{StepReport, TensorReport, type_name};
use crate::{
    Calibration, Calibrator, Changes, CompressError, Matrix, Needs, Sink, Slot, Source, Step,
    parallel,
};

/// Matrices of a layer that share their input, as files have them.
const GROUPS: [&[&str]; 6] = [
    &["attn_q", "attn_k", "attn_v"],
    &["attn_qkv"],
    &["attn_output"],
    &["ffn_gate", "ffn_up"],
    &["ffn_up"],
    &["ffn_down"],
];

/// Matrices that are factored together.
#[derive(Clone, Debug)]
struct Group {
    layer: u32,
    /// Places among the source's tensors.
    tensors: Vec<usize>,
    rows: usize,
    cols: usize,
    rank: usize,
}

impl Group {
    fn inner_name(&self, source: &Source) -> String {
        source.tensors[self.tensors[0]].name.replace(".weight", "_in.weight")
    }

    fn with(&self, rank: usize) -> Self {
        Self { rank, ..self.clone() }
    }

    fn pays(&self) -> bool {
        self.rank * (self.rows + self.cols) < self.rows * self.cols
    }
}

/// What is written: the bytes of tensors, by their slot, and what became of the matrices.
type Made = (Vec<(usize, Vec<u8>)>, Vec<TensorReport>);

/// Called with a layer's groups and what they see.
type Each<'a> = dyn FnMut(&[&Group], &Calibration) -> Result<(), CompressError> + 'a;

/// What is being done.
struct Job<'a> {
    source: &'a Source,
    settings: &'a Settings<'a>,
    aware: bool,
}

/// Carries a low-rank step out.
///
/// # Errors
/// If the family's matrices cannot be factored, a decomposition fails, or a file cannot be used.
pub(crate) fn apply(
    source: &Source,
    target: &Path,
    step: &Step,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<StepReport, CompressError> {
    let Step::LowRank { rank, energy, size, bytes, aware } = step else {
        unreachable!("invariant: only low rank comes here")
    };
    let job = Job { source, settings, aware: *aware };
    job.check()?;
    let mut groups = groups(source)?;
    let mut done = 0;
    for g in &mut groups {
        let of_size = || grained(rank_of(size.unwrap_or(1.0), g.rows, g.cols) as usize);
        g.rank = rank.map_or_else(of_size, |r| r as usize);
    }
    // A file begins with the shapes of all of it, so ranks are found before anything is written.
    match (energy, bytes) {
        (Some(part), _) => job.ranks_by_energy(&mut groups, *part, progress)?,
        (_, Some(budget)) => job.ranks_by_bytes(&mut groups, *budget, progress)?,
        _ => {}
    }
    if energy.is_some() || bytes.is_some() {
        done = source.weight_bytes();
        progress(done);
    }
    groups.retain(Group::pays);
    let (slots, places) = slots(source, &groups, settings.store);
    let mut sink = Sink::create(source, target, settings.overwrite, &slots, &Changes::default())?;
    let mut report = StepReport {
        step: step.describe(),
        bytes_before: source.stored_bytes,
        ..StepReport::default()
    };
    let factored: Vec<usize> = groups.iter().flat_map(|g| g.tensors.clone()).collect();
    for (i, tensor) in source.tensors.iter().enumerate().filter(|(i, _)| !factored.contains(i)) {
        let bytes = source.copy(tensor)?;
        report.bytes_stored += bytes.len() as u64;
        sink.put(places[i], &bytes)?;
        done += tensor.bytes;
    }
    progress(done);
    job.each_layer(&groups, &mut |mine, calibration| {
        let made = parallel(mine.len(), settings.threads, |i| {
            job.make(mine[i], calibration, &slots, &places)
        });
        for (group, made) in mine.iter().zip(made) {
            let (tensors, reports) = made?;
            for (slot, bytes) in tensors {
                report.bytes_stored += bytes.len() as u64;
                sink.put(slot, &bytes)?;
            }
            report.tensors.extend(reports);
            done += group.tensors.iter().map(|&i| source.tensors[i].bytes).sum::<u64>();
        }
        progress(done);
        Ok(())
    })?;
    sink.finish()?;
    report.bytes_format = report.bytes_stored;
    notes(&mut report, &groups, source);
    Ok(report)
}

impl Job<'_> {
    fn check(&self) -> Result<(), CompressError> {
        if self.source.config.features.transposed {
            return Err(CompressError::settings(
                "low rank needs a model whose matrices lie row by row",
            ));
        }
        match self.source.joined()? {
            Some(one) => Err(CompressError::Settings(format!(
                "tensor '{}' holds several matrices, which cannot be factored",
                one.name
            ))),
            None => Ok(()),
        }
    }

    /// Calls `each` with every layer's groups and what they see, where that is needed.
    fn each_layer(&self, groups: &[Group], each: &mut Each<'_>) -> Result<(), CompressError> {
        let (source, settings) = (self.source, self.settings);
        let needs = if self.aware { Needs::Products } else { Needs::Nothing };
        let mut calibrator = Calibrator::of(source, settings, needs)?;
        for layer in 0..source.config.layers {
            let seen = match &mut calibrator {
                Some(calibrator) => calibrator.next_layer()?.unwrap_or_default(),
                None => Calibration::default(),
            };
            let mine: Vec<&Group> = groups.iter().filter(|g| g.layer == layer).collect();
            each(&mine, settings.known.unwrap_or(&seen))?;
        }
        Ok(())
    }

    fn ranks_by_energy(
        &self,
        groups: &mut [Group],
        part: f64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), CompressError> {
        let ranks =
            self.each_group(groups, Rank::Energy(part), progress, |_, f| grained(f.rank()))?;
        groups.iter_mut().zip(ranks).for_each(|(g, rank)| g.rank = rank);
        Ok(())
    }

    /// Ranks with which all tensors take at most so many bytes: from the lowest on, the next step up is
    /// always the one that lowers the sum of squared relative errors most for a byte.
    fn ranks_by_bytes(
        &self,
        groups: &mut [Group],
        budget: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), CompressError> {
        let bytes = |i: &usize| self.source.tensors[*i].bytes;
        let whole: u64 = groups.iter().flat_map(|g| &g.tensors).map(bytes).sum();
        let fixed = self.source.weight_bytes() - whole;
        let least = |g: &Group| self.bytes_of(g, GRAIN).min(g.tensors.iter().map(bytes).sum());
        let least = fixed + groups.iter().map(least).sum::<u64>();
        if least > budget {
            return Err(CompressError::Settings(format!(
                "the budget of {budget} bytes cannot be met: with ranks of {GRAIN} the tensors take \
                 {least}; store factors in fewer bits, or drop layers first"
            )));
        }
        let prices = self.each_group(groups, Rank::Exactly(1), progress, |group, factors| {
            let total: f64 = factors.values.iter().map(|s| s * s).sum();
            let mut all = Vec::new();
            for rank in (GRAIN..).step_by(GRAIN).take_while(|&r| group.with(r).pays()) {
                let lost: f64 = factors.values.iter().skip(rank).map(|s| s * s).sum();
                let error = lost / total.max(f64::MIN_POSITIVE);
                all.push(Price { what: rank, bytes: self.bytes_of(group, rank), error });
            }
            // As it is: a rank that does not pay.
            let bytes = group.tensors.iter().map(bytes).sum();
            all.push(Price { what: group.rows.max(group.cols), bytes, error: 0.0 });
            all.sort_by_key(|p| p.bytes);
            hull(all)
        })?;
        let chosen = spend(&prices, budget - fixed);
        for ((group, prices), chosen) in groups.iter_mut().zip(&prices).zip(chosen) {
            group.rank = prices[chosen].what;
        }
        Ok(())
    }

    /// What `make` makes of each group's factors, in order.
    fn each_group<T: Send>(
        &self,
        groups: &[Group],
        rank: Rank,
        progress: &mut dyn FnMut(u64),
        make: impl Fn(&Group, &Factors) -> T + Sync,
    ) -> Result<Vec<T>, CompressError> {
        let (mut all, total) = (Vec::new(), self.source.weight_bytes());
        self.each_layer(groups, &mut |mine, calibration| {
            let found = parallel(mine.len(), self.settings.threads, |i| {
                self.factors(mine[i], rank, calibration).map(|(_, f)| make(mine[i], &f))
            });
            for one in found {
                all.push(one?);
            }
            progress(total * all.len() as u64 / groups.len() as u64);
            Ok(())
        })?;
        Ok(all)
    }

    /// Bytes of a group's factors.
    fn bytes_of(&self, group: &Group, rank: usize) -> u64 {
        let of = |cols: usize, rows: usize| {
            let dtype = fallback(self.settings.store, cols).unwrap_or(TensorType::F16);
            dtype.bytes_of(cols as u64).unwrap_or(0) * rows as u64
        };
        of(group.cols, rank) + of(rank, group.rows)
    }

    /// The matrices one below the other, and their factors.
    fn factors(
        &self,
        group: &Group,
        rank: Rank,
        calibration: &Calibration,
    ) -> Result<(Matrix, Factors), CompressError> {
        let mut data = Vec::with_capacity(group.rows * group.cols);
        for &i in &group.tensors {
            data.extend(self.source.matrix(&self.source.tensors[i])?.data);
        }
        let whole = Matrix::new(group.rows, group.cols, data);
        let name = &self.source.tensors[group.tensors[0]].name;
        let moments = match self.aware {
            true => Some(calibration.moments(name).ok_or_else(|| {
                CompressError::Settings(format!("what '{name}' sees is not known"))
            })?),
            false => None,
        };
        let factors = factorise(&whole, rank, moments)?;
        Ok((whole, factors))
    }

    fn make(
        &self,
        group: &Group,
        calibration: &Calibration,
        slots: &[Slot],
        places: &[usize],
    ) -> Result<Made, CompressError> {
        let (before, Factors { mut a, mut b, .. }) =
            self.factors(group, Rank::Exactly(group.rank), calibration)?;
        let first = places[group.tensors[0]] - 1;
        let mut tensors = Vec::new();
        tensors.push((first, encode(&slots[first].name, slots[first].dtype, &mut b, None, None)?));
        let mut reports = Vec::new();
        let mut row = 0;
        let inner_bytes = tensors[0].1.len() as u64;
        for (n, &i) in group.tensors.iter().enumerate() {
            let (tensor, slot) = (&self.source.tensors[i], &slots[places[i]]);
            let rows = row..row + slot.dims[1] as usize;
            let mut part = a.keep_rows(&rows.clone().collect::<Vec<_>>());
            let bytes = encode(&slot.name, slot.dtype, &mut part, None, None)?;
            a.data[rows.start * a.cols..rows.end * a.cols].copy_from_slice(&part.data);
            row = rows.end;
            let stored = bytes.len() as u64 + if n == 0 { inner_bytes } else { 0 };
            reports.push(report(tensor, slot.dtype, stored));
            tensors.push((places[i], bytes));
        }
        // Errors are those of what was stored.
        let after = Factors { a, b, energy: 1.0, values: Vec::new() }.product();
        let importance = calibration
            .moments(&self.source.tensors[group.tensors[0]].name)
            .map(crate::hessian::Moments::importance);
        for report in &mut reports {
            report.error = before.distance(&after).relative();
            report.output_error =
                importance.as_deref().map(|i| before.weighted_distance(&after, i).relative());
        }
        Ok((tensors, reports))
    }
}

fn report(tensor: &TensorEntry, dtype: TensorType, stored: u64) -> TensorReport {
    TensorReport {
        name: tensor.name.clone(),
        from: type_name(tensor.dtype),
        to: type_name(dtype),
        elements: tensor.elements(),
        bytes_before: tensor.bytes,
        bytes_stored: stored,
        bytes_format: stored,
        error: 0.0,
        output_error: None,
        sparsity: 0.0,
        zero_tiles: 0.0,
    }
}

fn groups(source: &Source) -> Result<Vec<Group>, CompressError> {
    let mut found = Vec::new();
    for layer in 0..source.config.layers {
        let place = |part: &&str| {
            let name = format!("blk.{layer}.{part}.weight");
            source.tensors.iter().position(|t| t.name == name)
        };
        let mut taken: Vec<usize> = Vec::new();
        for names in GROUPS {
            let all: Option<Vec<usize>> = names.iter().map(place).collect();
            let Some(tensors) = all.filter(|all| !all.iter().any(|i| taken.contains(i))) else {
                continue;
            };
            taken.extend(&tensors);
            let dims = |&i: &usize| source.tensors[i].dims[1] as usize;
            let rows = tensors.iter().map(dims).sum();
            let first = &source.tensors[tensors[0]];
            if source.tensor(&first.name.replace(".weight", "_in.weight")).is_ok() {
                return Err(CompressError::Settings(format!(
                    "tensor '{}' is factored already",
                    first.name
                )));
            }
            let cols = first.dims[0] as usize;
            found.push(Group { layer, tensors, rows, cols, rank: 0 });
        }
    }
    match found.is_empty() {
        true => Err(CompressError::settings("the model has no matrices to factor")),
        false => Ok(found),
    }
}

/// The result's tensors, and where each of the source's is among them; a thin matrix comes just before
/// the first that needs it.
fn slots(source: &Source, groups: &[Group], store: TensorType) -> (Vec<Slot>, Vec<usize>) {
    let (mut slots, mut places) = (Vec::new(), Vec::new());
    for (i, tensor) in source.tensors.iter().enumerate() {
        let mut slot = Slot::like(tensor);
        if let Some(group) = groups.iter().find(|g| g.tensors.contains(&i)) {
            let fitting = |cols: usize| fallback(store, cols).unwrap_or(TensorType::F16);
            if group.tensors[0] == i {
                let name = group.inner_name(source);
                let dims = vec![group.cols as u64, group.rank as u64];
                slots.push(Slot { name, dtype: fitting(group.cols), dims });
            }
            slot.dims[0] = group.rank as u64;
            slot.dtype = fitting(group.rank);
        }
        places.push(slots.len());
        slots.push(slot);
    }
    (slots, places)
}

fn notes(report: &mut StepReport, groups: &[Group], source: &Source) {
    let mean = |of: &dyn Fn(&Group) -> usize| {
        groups.iter().map(of).sum::<usize>() as f64 / groups.len().max(1) as f64
    };
    if groups.is_empty() {
        report.notes.push("no factors would be smaller: the file is a copy".to_owned());
        return;
    }
    let (full, left) = (mean(&|g| g.rows * g.cols), mean(&|g| g.rank * (g.rows + g.cols)));
    report.notes.push(format!(
        "{} products of {} layers have rank {:.0} on average: {:.2} of the multiplications; the \
         engine multiplies factors",
        groups.len(),
        source.config.layers,
        mean(&|g| g.rank),
        left / full
    ));
    if source.config.features.experts.is_some() {
        report.notes.push("experts stay as they are: only attention is factored".to_owned());
    }
    report.notes.push(
        "other programs do not know factored matrices: the file is for this engine".to_owned(),
    );
}
