//! Leaves zeros out of files: each matrix of a layer in the form that takes the fewest bytes, or in one
//! form.
//!
//! Weights have the same values as before, so a model computes the same bits (a zero has no sign
//! afterwards, and a block of zeros no scale). What a form brings: any makes the
//! file smaller; tiles make the engine's memory smaller and its products faster, since it computes with
//! them as they are. Matrices of the other forms have their zeros in memory.

use std::collections::HashSet;
use std::path::Path;

use millrace_engine::cpu::dequantise_row;
use millrace_shared::model::{Places, SparseForm, TensorEntry, TensorType, sparse_keys};

use crate::apply::Settings;
use crate::report::{StepReport, TensorReport, type_name};
use crate::source::{Kind, decode, is_layer_matrix};
use crate::sparse::race;
use crate::step::Form;
use crate::{Changes, CompressError, Matrix, Sink, Slot, Source, Step, parallel, prune};

/// How a matrix is to be kept, and where its tensors go.
#[derive(Clone, Copy)]
struct Choice {
    form: Option<SparseForm>,
    /// The slot of its values; the others come after it.
    slot: usize,
}

/// Carries a storage step out.
///
/// # Errors
/// If the model is a folder, a matrix cannot be kept so, or a file cannot be used.
pub(crate) fn apply(
    source: &Source,
    target: &Path,
    step: &Step,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<StepReport, CompressError> {
    let Step::Storage { form } = step else { unreachable!("invariant: only storage comes here") };
    if !matches!(source.kind, Kind::Gguf(_)) {
        return Err(CompressError::settings(
            "only GGUF files leave zeros out: folders of safetensors keep them",
        ));
    }
    let transposed = source.config.features.transposed;
    let apart = if transposed { HashSet::new() } else { source.apart()? };
    let job = Job { source, form: *form, apart };
    let batch = settings.threads.max(1) * 4;
    let (mut slots, mut choices, mut sparse) = (Vec::new(), Vec::new(), Vec::new());
    let mut done = 0;
    for tensors in source.tensors.chunks(batch) {
        let chosen = parallel(tensors.len(), settings.threads, |i| job.choose(&tensors[i]));
        for (tensor, chosen) in tensors.iter().zip(chosen) {
            let slot = slots.len();
            let places = chosen?;
            choices.push(Choice { form: places.as_ref().map(|(form, _)| *form), slot });
            match places {
                None => slots.push(Slot::like(tensor)),
                Some((form, shapes)) => {
                    sparse.push((tensor.name.clone(), [tensor.dims[0], tensor.dims[1]]));
                    let names = names(&tensor.name, form).into_iter().zip(shapes);
                    slots.extend(names.map(|(name, (dtype, dims))| Slot { name, dtype, dims }));
                }
            }
            done += tensor.bytes;
            progress(done);
        }
    }
    let mut changes = Changes::default();
    if !sparse.is_empty() {
        changes.keys = sparse_keys(&sparse).into();
    }
    let mut sink = Sink::create(source, target, settings.overwrite, &slots, &changes)?;
    let mut report = StepReport {
        step: step.describe(),
        bytes_before: source.stored_bytes,
        ..StepReport::default()
    };
    let all: Vec<(&TensorEntry, Choice)> = source.tensors.iter().zip(choices).collect();
    let mut sample = None;
    for some in all.chunks(batch) {
        let made = parallel(some.len(), settings.threads, |i| job.make(some[i]));
        for ((tensor, choice), made) in some.iter().zip(made) {
            let Made { parts, report: told, matrix } = made?;
            for (i, bytes) in parts.iter().enumerate() {
                report.bytes_stored += bytes.len() as u64;
                sink.put(choice.slot + i, bytes)?;
            }
            report.tensors.extend(told);
            sample = sample.or(matrix);
            done += tensor.bytes;
            progress(done);
        }
    }
    sink.finish()?;
    report.bytes_format = report.bytes_stored;
    report.notes = notes(&report, &all, sample.as_ref());
    Ok(report)
}

/// The names of a matrix's tensors in that form.
fn names(name: &str, form: SparseForm) -> [String; 3] {
    let stem = name.strip_suffix("weight").unwrap_or(name);
    let [index, starts] = form.parts();
    [name.to_owned(), format!("{stem}{index}"), format!("{stem}{starts}")]
}

/// A matrix's tensors, what is told of it, and itself, of the one that is timed.
struct Made {
    parts: Vec<Vec<u8>>,
    report: Option<TensorReport>,
    matrix: Option<Matrix>,
}

/// Type and dimensions of three tensors.
type Shapes = [(TensorType, Vec<u64>); 3];

struct Job<'a> {
    source: &'a Source,
    form: Form,
    /// Tensors that are one matrix, which lies row by row.
    apart: HashSet<String>,
}

impl Job<'_> {
    /// How a tensor is kept, if without zeros.
    fn choose(&self, tensor: &TensorEntry) -> Result<Option<(SparseForm, Shapes)>, CompressError> {
        let matrix = is_layer_matrix(tensor) && tensor.dims.len() == 2;
        if !matrix || self.form.sparse().is_empty() || !self.apart.contains(&tensor.name) {
            return Ok(None);
        }
        let bytes = self.source.copy(tensor)?;
        let found = self.form.sparse().iter().filter_map(|&form| places(form, tensor, &bytes));
        let found = found.map(|(form, places)| (form, places.bytes(), places.shapes()));
        let Some((form, least, shapes)) = found.min_by_key(|(_, bytes, _)| *bytes) else {
            let (name, dtype) = (&tensor.name, tensor.dtype);
            return match (self.form, self.form.sparse()) {
                (Form::Auto, _) | (_, []) => Ok(None),
                (Form::Tiles, _) => Err(CompressError::Settings(format!(
                    "rows of {name} have {} weights, which are no whole tiles of {}: use form = \
                     \"auto\", which leaves such matrices as they are",
                    tensor.dims[0],
                    SparseForm::Tiles.width(dtype)
                ))),
                (_, [form, ..]) => Err(CompressError::Settings(format!(
                    "{name} is {}, whose weights have scales in common, and cannot be kept as {}: \
                     use form = \"tiles\", or store floats first",
                    dtype.as_str(),
                    form.as_str()
                ))),
            };
        };
        let smaller = least < tensor.bytes || self.form != Form::Auto;
        Ok(smaller.then_some((form, shapes)))
    }

    fn make(&self, (tensor, choice): (&TensorEntry, Choice)) -> Result<Made, CompressError> {
        let bytes = self.source.copy(tensor)?;
        let Some((form, places)) = choice.form.and_then(|form| places(form, tensor, &bytes)) else {
            return Ok(Made { parts: vec![bytes], report: None, matrix: None });
        };
        let parts = places.encode(&bytes).ok_or_else(|| {
            CompressError::Settings(format!("{} has too many weights to be sparse", tensor.name))
        })?;
        let cols = tensor.dims[0] as usize;
        let m = Matrix::new(tensor.dims[1] as usize, cols, decode(tensor, &bytes)?);
        let stored = parts.iter().map(|p| p.len() as u64).sum();
        let report = TensorReport {
            name: tensor.name.clone(),
            from: type_name(tensor.dtype),
            to: format!("{} {}", type_name(tensor.dtype), form.as_str()),
            elements: tensor.elements(),
            bytes_before: tensor.bytes,
            bytes_stored: stored,
            bytes_format: stored,
            error: 0.0,
            output_error: None,
            sparsity: 1.0 - m.nonzero() as f64 / m.data.len().max(1) as f64,
            zero_tiles: prune::zero_tiles(&m),
        };
        let matrix = (tensor.name == "blk.0.ffn_down.weight").then_some(m);
        Ok(Made { parts: parts.into(), report: Some(report), matrix })
    }
}

fn places(form: SparseForm, tensor: &TensorEntry, bytes: &[u8]) -> Option<(SparseForm, Places)> {
    let dtype = tensor.dtype;
    let zero = |line: &[u8]| match dtype {
        TensorType::F32 => line.as_chunks::<4>().0.iter().all(|b| u32::from_le_bytes(*b) << 1 == 0),
        TensorType::F16 | TensorType::BF16 => {
            line.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) << 1 == 0)
        }
        _ => {
            let mut values = [1f32; 256];
            let n = line.len() as u64 / dtype.block_bytes() * dtype.block_elements();
            let values = &mut values[..n as usize];
            dequantise_row(dtype, line, values) && values.iter().all(|x| *x == 0.0)
        }
    };
    let shape = [tensor.dims[0], tensor.dims[1]];
    Places::find(form, dtype, shape, bytes, zero).map(|places| (form, places))
}

fn notes(
    report: &StepReport,
    all: &[(&TensorEntry, Choice)],
    sample: Option<&Matrix>,
) -> Vec<String> {
    let mut notes = Vec::new();
    let of = |form| all.iter().filter(move |(_, choice)| choice.form == form);
    for form in SparseForm::ALL.into_iter().filter(|form| of(Some(*form)).count() > 0) {
        let what = match form {
            SparseForm::Tiles => {
                "in memory too only these tiles are there, and products read nothing else"
            }
            SparseForm::Csr | SparseForm::Bitmask => {
                "the file is smaller; in memory they have their zeros, and the engine is no faster"
            }
        };
        notes.push(format!("{} matrices as {}: {what}", of(Some(form)).count(), form.as_str()));
    }
    let dense = of(None).filter(|(t, _)| is_layer_matrix(t)).count();
    if dense > 0 && !report.tensors.is_empty() {
        notes.push(format!("{dense} matrices keep their zeros: without, they would take no less"));
    }
    if report.tensors.is_empty() {
        notes.push("all matrices have their zeros".to_owned());
    }
    let larger = report.tensors.iter().filter(|t| t.bytes_stored > t.bytes_before).count();
    if larger > 0 {
        notes.push(format!(
            "{larger} matrices take more bytes than with their zeros: form = \"auto\" leaves those"
        ));
    }
    if let Some(sample) = sample {
        notes.push(race(sample).told(sample));
    }
    notes
}
