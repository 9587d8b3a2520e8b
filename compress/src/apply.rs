//! Carries one step out: from a model to another file.
//!
//! Layer by layer: the calibration text goes through a layer of the *source*, then that layer's
//! matrices are changed, on several threads, and written. Only a layer and the text's hidden states
//! are in memory. Steps that change shapes are in [`crate::structure`].

use std::collections::HashMap;
use std::path::Path;

use millrace_engine::quantize::BadWeight;
use millrace_shared::model::{TensorEntry, TensorType};

use crate::changed::{Changed, Done};
use crate::hessian::{ALIKE, Compensation, Moments};
use crate::mixed;
use crate::prune::{self, Histogram, Pattern};
use crate::quant::{encode_row, fallback, gptq, integer};
use crate::report::{StepReport, TensorReport, formats, skipped};
use crate::sink::check_target;
use crate::source::{is_head, is_layer_matrix, matrix_names, row_bytes};
use crate::sparse::race;
use crate::step::{Needs, Per, parse_type};
use crate::{
    Calibration, Calibrator, Changes, CompressError, Matrix, Sink, Slot, Source, Step, factor,
    parallel,
};
use crate::{storage, structure};

/// How steps are carried out.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// Token ids of the calibration text; may be empty where no step needs it.
    pub calibration: &'a [u32],
    /// What is known of this model and that text already: it is not computed again.
    pub known: Option<&'a Calibration>,
    /// Type of values that have no format of their own: F16, F32 or Q8_0.
    pub store: TensorType,
    /// Threads; they change nothing but the time.
    pub threads: usize,
    /// Whether a file at the target may be replaced.
    pub overwrite: bool,
}

/// Carries a step out. `progress` gets the bytes of the source's tensors done, of
/// [`Step::passes`] times all of them.
///
/// # Errors
/// If settings cannot be, a file cannot be used, or weights are not finite. The target is then as it
/// was.
pub fn apply(
    source: &Source,
    target: &Path,
    step: &Step,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<StepReport, CompressError> {
    // What cannot be computed is not named by the engine: that knows layers alone.
    apply_unnamed(source, target, step, settings, progress).map_err(|error| match error {
        CompressError::Step(_) => source.broken().unwrap_or(error),
        other => other,
    })
}

fn apply_unnamed(
    source: &Source,
    target: &Path,
    step: &Step,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<StepReport, CompressError> {
    step.check()?;
    check_target(&source.path, target, settings.overwrite)?;
    use TensorType::{BF16, F16, F32, Q8_0};
    if !matches!(settings.store, F32 | F16 | BF16 | Q8_0) {
        return Err(CompressError::Settings(format!(
            "values cannot be kept as {}: use f32, f16, bf16 or q8_0, and quantise afterwards",
            settings.store.as_str()
        )));
    }
    if step.needs() > Needs::Nothing && settings.calibration.is_empty() {
        return Err(CompressError::Settings(format!(
            "step '{}' looks at what matrices see: give a calibration text",
            step.describe()
        )));
    }
    if matches!(step, Step::LowRank { .. }) {
        return factor::apply(source, target, step, settings, progress);
    }
    if let Step::Storage { .. } = step {
        return storage::apply(source, target, step, settings, progress);
    }
    if step.is_structural() {
        return structure::apply(source, target, step, settings, progress);
    }
    let types = types(source, step, settings, progress)?;
    let slots: Vec<Slot> =
        source.tensors.iter().zip(&types).map(|(t, &dtype)| Slot::of_type(t, dtype)).collect();
    let sink = Sink::create(source, target, settings.overwrite, &slots, &Changes::default())?;
    let global = global_threshold(source, step, progress)?;
    let first = (step.passes() - 1) * source.weight_bytes();
    let job = Job { source, step, settings, types, global };
    job.run(sink, &mut |done| progress(first + done))
}

/// The type of each tensor.
fn types(
    source: &Source,
    step: &Step,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<TensorType>, CompressError> {
    if let Step::Mixed { bytes } = step {
        return mixed::choose(source, *bytes, settings, progress);
    }
    let mut types = Vec::with_capacity(source.tensors.len());
    for tensor in &source.tensors {
        let cols = tensor.dims[0] as usize;
        let wanted = match step {
            Step::Quantise { to, .. } if is_layer_matrix(tensor) => Some(parse_type(to)?),
            Step::Quantise { to, output, .. } if is_head(tensor) => {
                Some(head_type(parse_type(to)?, output.as_deref())?)
            }
            _ if is_layer_matrix(tensor) => Some(stored_as(step, settings)),
            _ => None,
        };
        types.push(match wanted {
            None => tensor.dtype,
            Some(wanted) => fallback(wanted, cols).unwrap_or(TensorType::F16),
        });
    }
    Ok(types)
}

fn head_type(to: TensorType, output: Option<&str>) -> Result<TensorType, CompressError> {
    match output {
        Some(name) => parse_type(name),
        // Fewer bits hurt the choice among tokens.
        None if to.block_elements() > 1 => Ok(TensorType::Q8_0),
        None => Ok(to),
    }
}

/// Q8_0 holds integers of eight bits with a scale of f16 exactly, if its blocks have that scale.
fn stored_as(step: &Step, settings: &Settings<'_>) -> TensorType {
    match step {
        Step::Int8 { affine: false, .. } | Step::Binary { .. } => TensorType::Q8_0,
        _ => settings.store,
    }
}

fn global_threshold(
    source: &Source,
    step: &Step,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<f32>, CompressError> {
    let Step::Magnitude { sparsity: Some(sparsity), global: true, .. } = step else {
        return Ok(None);
    };
    let (mut all, mut done) = (Histogram::default(), 0);
    for tensor in source.layer_matrices() {
        all.add(&source.floats(tensor)?);
        done += tensor.bytes;
        progress(done);
    }
    all.threshold(*sparsity).map(Some)
}

/// What is being done.
struct Job<'a> {
    source: &'a Source,
    step: &'a Step,
    settings: &'a Settings<'a>,
    types: Vec<TensorType>,
    global: Option<f32>,
}

impl Job<'_> {
    fn run(
        &self,
        mut sink: Sink,
        progress: &mut dyn FnMut(u64),
    ) -> Result<StepReport, CompressError> {
        let source = self.source;
        let mut report = StepReport {
            step: self.step.describe(),
            bytes_before: source.stored_bytes,
            ..StepReport::default()
        };
        let (mut done, mut beyond, mut blind, mut sample) = (0, 0, 0, None);
        let mut calibrator = Calibrator::of(source, self.settings, self.step.needs())?;
        for layer in std::iter::once(None).chain((0..source.config.layers).map(Some)) {
            let seen = match (&mut calibrator, layer) {
                (Some(calibrator), Some(_)) => calibrator.next_layer()?.unwrap_or_default(),
                _ => Calibration::default(),
            };
            let calibration = self.settings.known.unwrap_or(&seen);
            let of_layer = |t: &&TensorEntry| Source::layer_of(&t.name) == layer;
            let indices: Vec<usize> =
                (0..source.tensors.len()).filter(|&i| of_layer(&&source.tensors[i])).collect();
            let factors = self.factors(&indices, calibration)?;
            let saw_nothing = |name: &String| {
                calibration.moments(name).is_some_and(|moments| moments.positions == ALIKE)
            };
            blind += self.names(&indices).iter().filter(|name| saw_nothing(name)).count();
            let threads = self.settings.threads;
            let changed = parallel(indices.len(), threads, |i| {
                self.tensor(indices[i], calibration, &factors)
            });
            for (&index, changed) in indices.iter().zip(changed) {
                let tensor = &source.tensors[index];
                let bytes = match changed? {
                    Some(changed) => {
                        report.bytes_format += changed.bytes_format;
                        report.tensors.push(changed.report(tensor, self.types[index]));
                        beyond += changed.beyond;
                        sample = sample.or(changed.sample);
                        changed.bytes
                    }
                    None => {
                        let copy = source.copy(tensor)?;
                        report.bytes_format += copy.len() as u64;
                        copy
                    }
                };
                report.bytes_stored += bytes.len() as u64;
                sink.put(index, &bytes)?;
                done += tensor.bytes;
                progress(done);
            }
        }
        sink.finish()?;
        self.notes(&mut report, (beyond, blind), sample.as_ref());
        Ok(report)
    }

    /// The names of the matrices that change in those tensors.
    fn names(&self, indices: &[usize]) -> Vec<String> {
        let tensors = indices.iter().map(|&i| &self.source.tensors[i]);
        tensors.filter(|t| is_layer_matrix(t)).flat_map(matrix_names).collect()
    }

    /// The compensation of each matrix's inputs, by the name of the moments' first matrix.
    fn factors(
        &self,
        indices: &[usize],
        calibration: &Calibration,
    ) -> Result<HashMap<String, Compensation>, CompressError> {
        let gptq = matches!(self.step, Step::Quantise { gptq: true, .. });
        if !gptq && !matches!(self.step, Step::Sparsegpt { .. }) {
            return Ok(HashMap::new());
        }
        let names = self.names(indices);
        let mut keys: Vec<&str> = names.iter().filter_map(|name| calibration.key(name)).collect();
        keys.sort_unstable();
        keys.dedup();
        let made = parallel(keys.len(), self.settings.threads, |i| {
            calibration.moments(keys[i]).map(|m| m.compensation(gptq)).transpose()
        });
        let mut factors = HashMap::new();
        for (key, made) in keys.into_iter().zip(made) {
            factors.extend(made?.map(|made| (key.to_owned(), made)));
        }
        Ok(factors)
    }

    /// A tensor's matrices changed, or `None` for one that stays as it is.
    fn tensor(
        &self,
        index: usize,
        calibration: &Calibration,
        factors: &HashMap<String, Compensation>,
    ) -> Result<Option<Done>, CompressError> {
        let (tensor, dtype) = (&self.source.tensors[index], self.types[index]);
        let head = is_head(tensor) && dtype != tensor.dtype;
        if !head && !is_layer_matrix(tensor) {
            return Ok(None);
        }
        let mut all: Option<Done> = None;
        for (name, before) in self.source.matrices(tensor)? {
            let seen = (calibration.moments(&name), calibration.key(&name));
            let factor = seen.1.and_then(|key| factors.get(key));
            let importance = seen.0.map(Moments::importance);
            let done = self.matrix((&name, before), (dtype, head), importance, factor)?;
            match &mut all {
                None => all = Some(done),
                Some(all) => all.add(done),
            }
        }
        Ok(all)
    }

    /// A matrix changed.
    fn matrix(
        &self,
        (name, before): (&str, Matrix),
        (dtype, head): (TensorType, bool),
        importance: Option<Vec<f32>>,
        factor: Option<&Compensation>,
    ) -> Result<Done, CompressError> {
        let mut after = before.clone();
        let mut changed = Changed::default();
        if !head {
            changed = self.change(&mut after, name, importance.as_deref(), factor)?;
        }
        let Changed { bytes_format, beyond, scales } = changed;
        let bytes = match dtype {
            TensorType::Q8_0 if !scales.is_empty() => integer::as_q8_0(&after, &scales),
            _ => self.encode(name, dtype, &mut after, importance.as_deref(), factor)?,
        };
        let elements = after.data.len() as u64;
        let zeros = (elements - after.nonzero()) as f64;
        Ok(Done {
            bytes_format: if bytes_format == 0 { bytes.len() as u64 } else { bytes_format },
            bytes,
            beyond,
            error: before.distance(&after),
            output_error: importance.map(|i| before.weighted_distance(&after, &i)),
            zeros,
            tiles: prune::zero_tiles(&after) * elements as f64,
            sample: (zeros > 0.05 * elements as f64 && name == "blk.0.ffn_down.weight")
                .then_some(after),
        })
    }

    /// Changes values.
    fn change(
        &self,
        m: &mut Matrix,
        name: &str,
        importance: Option<&[f32]>,
        factor: Option<&Compensation>,
    ) -> Result<Changed, CompressError> {
        let (n, rows) = (m.data.len() as u64, m.rows as u64);
        let unknown = || CompressError::Settings(format!("what '{name}' sees is not known"));
        let pattern = match self.step {
            Step::Quantise { .. } | Step::Mixed { .. } => return Ok(Changed::default()),
            Step::Int8 { per, affine } => {
                let scales = integer::int8(m, *per == Per::Row, *affine);
                let parts = if *per == Per::Row { rows } else { 1 };
                let bytes_format = n + parts * if *affine { 4 } else { 2 };
                return Ok(Changed { bytes_format, scales, ..Changed::default() });
            }
            Step::FixedPoint { fraction_bits, bits, wrap, modulo } => {
                let modulus = modulo.or(wrap.then_some(1 << bits));
                let beyond = integer::fixed_point(m, *fraction_bits, *bits, modulus);
                let bytes_format = (n * u64::from(*bits)).div_ceil(8) + 1;
                return Ok(Changed { bytes_format, beyond, ..Changed::default() });
            }
            Step::Binary { per } => {
                let scales = integer::binary(m, *per == Per::Row);
                let bytes_format = n.div_ceil(8) + 2 * scales.len() as u64;
                return Ok(Changed { bytes_format, scales, ..Changed::default() });
            }
            Step::Clip { min, max } => {
                prune::clip(m, *min, *max);
                return Ok(Changed::default());
            }
            Step::SignedThreshold { theta } => {
                prune::signed_threshold(m, *theta);
                Pattern::Tensor
            }
            Step::Magnitude { sparsity, threshold, pattern, .. } => {
                match (self.global.or(*threshold), sparsity) {
                    (Some(theta), _) => prune::threshold(m, theta),
                    (None, part) => {
                        let scores = prune::magnitude(m);
                        prune::prune(m, &scores, *pattern, part.unwrap_or(0.0));
                    }
                }
                *pattern
            }
            Step::Random { sparsity, seed, pattern } => {
                let scores = prune::random(m, *seed, name);
                prune::prune(m, &scores, *pattern, *sparsity);
                *pattern
            }
            Step::Wanda { sparsity, pattern } => {
                let scores = prune::wanda(m, importance.ok_or_else(unknown)?);
                prune::prune(m, &scores, *pattern, *sparsity);
                *pattern
            }
            Step::Sparsegpt { sparsity, pattern } => {
                let factor = factor.ok_or_else(unknown)?;
                let cols = m.cols;
                let rows = m.data.chunks_exact_mut(cols);
                rows.for_each(|row| prune::sparsegpt(row, &factor.u, *pattern, *sparsity));
                *pattern
            }
            _ => unreachable!("invariant: structural steps go elsewhere"),
        };
        let nonzero = m.nonzero();
        let bytes_format = match pattern {
            Pattern::TwoOfFour => formats::two_of_four(n),
            Pattern::Tile => formats::tiles(n, nonzero),
            _ => formats::sparse(rows, n, nonzero),
        };
        Ok(Changed { bytes_format, ..Changed::default() })
    }

    /// The bytes of a matrix, which holds afterwards what they say.
    fn encode(
        &self,
        name: &str,
        dtype: TensorType,
        m: &mut Matrix,
        importance: Option<&[f32]>,
        factor: Option<&Compensation>,
    ) -> Result<Vec<u8>, CompressError> {
        let importance = match self.step {
            Step::Quantise { importance: true, .. } | Step::Mixed { .. } => importance,
            _ => None,
        };
        let compensate = match self.step {
            Step::Quantise { gptq: true, .. } if dtype.block_elements() > 1 => factor,
            _ => None,
        };
        encode(name, dtype, m, importance, compensate)
    }

    fn notes(
        &self,
        report: &mut StepReport,
        (beyond, blind): (u64, usize),
        sample: Option<&Matrix>,
    ) {
        if report.bytes_format != report.bytes_stored {
            let stored = report.tensors.first().map_or("floats", |t| t.to.as_str());
            let (bytes, format) = (report.bytes_stored, report.bytes_format);
            report.notes.push(match self.step.prunes() {
                true => format!(
                    "zeros are stored as {stored} too, {bytes} bytes: in a GGUF file it would be about \
                     {format} without them (method = 'storage')"
                ),
                false => format!(
                    "GGUF has no such format: the file holds the values as {stored}, {bytes} bytes; \
                     the format itself would take {format}"
                ),
            });
        }
        if report.sparsity() > 0.05 && self.step.prunes() {
            report.notes.push(skipped(report));
            if let Some(sample) = sample {
                report.notes.push(race(sample).told(sample));
            }
        }
        if beyond > 0 {
            report.notes.push(format!("{beyond} weights were beyond the range of the integers"));
        }
        if blind > 0 {
            report.notes.push(format!(
                "no position of the calibration text went to {blind} matrices of experts, which were \
                 changed as if all inputs were alike: a longer text may tell more"
            ));
        }
        let other: Vec<&TensorReport> = report
            .tensors
            .iter()
            .filter(|t| match self.step {
                Step::Quantise { to, .. } => {
                    !t.to.eq_ignore_ascii_case(to) && t.name.starts_with("blk.")
                }
                _ => false,
            })
            .collect();
        if let Some(first) = other.first() {
            report.notes.push(format!(
                "{} matrices are {} instead: their rows do not fill blocks",
                other.len(),
                first.to
            ));
        }
    }
}

/// A matrix as bytes of a type; it holds afterwards what they say.
pub(crate) fn encode(
    name: &str,
    dtype: TensorType,
    m: &mut Matrix,
    importance: Option<&[f32]>,
    compensate: Option<&Compensation>,
) -> Result<Vec<u8>, CompressError> {
    let cols = m.cols;
    let width = row_bytes(dtype, cols, name)?;
    let mut bytes = vec![0u8; width * m.rows];
    let rows = m.data.chunks_exact_mut(cols).zip(bytes.chunks_exact_mut(width));
    for (row, (weights, out)) in rows.enumerate() {
        let done: Result<(), BadWeight> = match compensate {
            Some(u) => gptq(dtype, weights, u, out),
            None => encode_row(dtype, weights, importance, out),
        };
        done.map_err(|source| CompressError::Weight { tensor: name.to_owned(), row, source })?;
        millrace_engine::cpu::dequantise_row(dtype, out, weights);
    }
    Ok(bytes)
}
