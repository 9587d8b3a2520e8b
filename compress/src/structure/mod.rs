//! Steps that change the shape of a model: fewer layers, heads, channels, or a narrower residual
//! stream. The result is a valid model file of the same family, and faster in any engine.
//!
//! What is kept untouched keeps its bytes; matrices that lose rows or columns are stored as floats (or
//! Q8_0, as settings say) and are to be quantised afterwards.

mod cuts;
mod layers;

use std::path::Path;

use millrace_shared::model::gguf::gemma_scale;
use millrace_shared::model::{Family, FolderShape, TensorType};

use crate::apply::{Settings, encode};
use crate::quant::fallback;
use crate::report::{StepReport, TensorReport, type_name};
use crate::source::{Kind, matrix_names};
use crate::{
    Calibration, Changes, CompressError, Matrix, Sink, Slot, Source, Step, calibrate, parallel,
};

/// A tensor of the result.
#[derive(Clone, Debug)]
struct New {
    name: String,
    /// Tensors of the source; the mean of several.
    from: Vec<usize>,
    rows: Option<Kept>,
    cols: Option<Kept>,
}

/// Places that stay: the same ones in all matrices of a tensor, or those of each.
type Kept = Vec<Vec<usize>>;

impl New {
    fn is_copy(&self) -> bool {
        self.from.len() == 1 && self.rows.is_none() && self.cols.is_none()
    }
}

/// Carries a structural step out.
///
/// # Errors
/// If the family has what the step cannot cut, too little would be left, or a file cannot be used.
pub(crate) fn apply(
    source: &Source,
    target: &Path,
    step: &Step,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<StepReport, CompressError> {
    let seen = match (settings.known, step) {
        (Some(_), _) | (_, Step::KeepLayers { .. }) => Calibration::default(),
        _ => {
            let (all, layers) = (source.weight_bytes(), u64::from(source.config.layers));
            let mut told = |done: u32| progress(all * u64::from(done) / layers);
            calibrate(source, settings.calibration, settings.threads, false, &mut told)?
        }
    };
    let (news, shape, note) = plan(source, step, settings.known.unwrap_or(&seen))?;
    check_scale(source, &shape)?;
    let mut notes = vec![note];
    notes.extend(elsewhere(source, &shape));
    let slots: Vec<Slot> = news.iter().map(|new| slot(source, new, settings.store)).collect();
    let changes = Changes { shape, ..Changes::default() };
    let mut sink = Sink::create(source, target, settings.overwrite, &slots, &changes)?;
    let mut report = StepReport {
        step: step.describe(),
        bytes_before: source.stored_bytes,
        notes,
        ..StepReport::default()
    };
    let batch = settings.threads.max(1) * 4;
    let mut done = (step.passes() - 1) * source.weight_bytes();
    for first in (0..news.len()).step_by(batch) {
        let count = batch.min(news.len() - first);
        let made = parallel(count, settings.threads, |i| {
            make(source, &news[first + i], slots[first + i].dtype)
        });
        for (i, bytes) in (first..).zip(made) {
            let bytes = bytes?;
            let (new, slot) = (&news[i], &slots[i]);
            report.bytes_stored += bytes.len() as u64;
            let before = &source.tensors[new.from[0]];
            done += before.bytes;
            if !new.is_copy() && slot.dims.len() > 1 {
                report.tensors.push(TensorReport {
                    name: slot.name.clone(),
                    from: type_name(before.dtype),
                    to: type_name(slot.dtype),
                    elements: slot.dims.iter().product(),
                    bytes_before: before.bytes,
                    bytes_stored: bytes.len() as u64,
                    bytes_format: bytes.len() as u64,
                    error: 0.0,
                    output_error: None,
                    sparsity: 0.0,
                    zero_tiles: 0.0,
                });
            }
            sink.put(i, &bytes)?;
            progress(done);
        }
    }
    sink.finish()?;
    report.bytes_format = report.bytes_stored;
    Ok(report)
}

/// A dimension of the result.
fn new_of(shape: &FolderShape, key: &str, old: u32) -> u32 {
    shape.dimensions.iter().find(|(known, _)| *known == key).map_or(old, |(_, n)| *n)
}

/// That attention goes on as it did: GGUF files of some families have no key for its scale, which
/// follows from the model's size.
fn check_scale(source: &Source, shape: &FolderShape) -> Result<(), CompressError> {
    let c = &source.config;
    let size = |layers, hidden, heads| gemma_scale(c.family, (layers, hidden, heads, c.head_dim));
    let before = size(c.layers, c.hidden, c.heads);
    let after = size(
        new_of(shape, "block_count", c.layers),
        new_of(shape, "embedding_length", c.hidden),
        new_of(shape, "attention.head_count", c.heads),
    );
    if before == after || matches!(source.kind, Kind::Folder(_)) {
        return Ok(());
    }
    Err(CompressError::Settings(format!(
        "a GGUF file of {} has no key for the scale of attention, which readers take from the number of \
         layers: this one would be read with another; begin with the folder of safetensors, whose \
         config.json has it",
        c.family.as_str()
    )))
}

/// What other programs may have against a model of that shape.
fn elsewhere(source: &Source, shape: &FolderShape) -> Option<String> {
    let c = &source.config;
    let hidden = new_of(shape, "embedding_length", c.hidden);
    let heads = new_of(shape, "attention.head_count", c.heads);
    let folder = matches!(source.kind, Kind::Folder(_));
    if folder && !hidden.is_multiple_of(heads) {
        return Some(format!(
            "transformers refuses some families whose hidden size ({hidden}) is no multiple of their \
             {heads} heads; this engine does not mind"
        ));
    }
    let square = matches!(c.family, Family::Qwen2 | Family::Qwen2Moe | Family::Phi3);
    (!folder && square && heads * c.head_dim != hidden).then(|| {
        format!(
            "llama.cpp refuses {} models whose heads ({heads} of {}) are not as wide together as the \
             hidden size ({hidden}); this engine does not mind",
            c.family.as_str(),
            c.head_dim
        )
    })
}

fn slot(source: &Source, new: &New, store: TensorType) -> Slot {
    let tensor = &source.tensors[new.from[0]];
    let mut dims = tensor.dims.clone();
    if let Some(cols) = &new.cols {
        dims[0] = cols[0].len() as u64;
    }
    if let (Some(rows), Some(dim)) = (&new.rows, dims.get_mut(1)) {
        *dim = rows[0].len() as u64;
    }
    let dtype = match (new.is_copy(), dims.len()) {
        (true, _) => tensor.dtype,
        (_, 1) => TensorType::F32,
        _ => fallback(store, dims[0] as usize).unwrap_or(TensorType::F16),
    };
    Slot { name: new.name.clone(), dtype, dims }
}

fn make(source: &Source, new: &New, dtype: TensorType) -> Result<Vec<u8>, CompressError> {
    let first = &source.tensors[new.from[0]];
    if new.is_copy() {
        return source.copy(first);
    }
    let mut m = source.matrix(first)?;
    for &other in &new.from[1..] {
        let other = source.matrix(&source.tensors[other])?;
        m.data.iter_mut().zip(&other.data).for_each(|(a, b)| *a += b);
    }
    let parts = new.from.len() as f32;
    m.data.iter_mut().for_each(|x| *x /= parts);
    if new.rows.is_some() || new.cols.is_some() {
        m = cut_each(m.split(matrix_names(first).len()), new);
    }
    encode(&first.name, dtype, &mut m, None, None)
}

/// What stays of each matrix, one below the other.
fn cut_each(matrices: Vec<Matrix>, new: &New) -> Matrix {
    let mut whole = Matrix::new(0, 0, Vec::new());
    for (i, mut part) in matrices.into_iter().enumerate() {
        if let Some(rows) = &new.rows {
            part = part.keep_rows(&rows[i.min(rows.len() - 1)]);
        }
        if let Some(cols) = &new.cols {
            part = part.keep_cols(&cols[i.min(cols.len() - 1)]);
        }
        whole.rows += part.rows;
        whole.cols = part.cols;
        whole.data.extend(part.data);
    }
    whole
}

/// Tensors, dimensions, and what to tell.
type Shape = (Vec<New>, FolderShape, String);

fn plan(source: &Source, step: &Step, seen: &Calibration) -> Result<Shape, CompressError> {
    let layers = source.config.layers;
    match step {
        Step::KeepLayers { layers: kept } => {
            if let Some(bad) = kept.iter().find(|&&l| l >= layers) {
                return Err(CompressError::Settings(format!(
                    "there is no layer {bad}: the model has 0 to {}",
                    layers - 1
                )));
            }
            layers::layers_of(source, &kept.iter().map(|&l| vec![l]).collect::<Vec<_>>())
        }
        Step::DropLayers { count } => {
            check_left(*count, layers, "layers")?;
            let gone = lowest(&seen.influence, *count as usize);
            let kept: Vec<Vec<u32>> =
                (0..layers).filter(|l| !gone.contains(&(*l as usize))).map(|l| vec![l]).collect();
            layers::layers_of(source, &kept)
        }
        Step::MergeLayers { count } => {
            check_left(*count, layers / 2 + 1, "pairs of layers")?;
            layers::layers_of(source, &layers::merged(&seen.influence, *count as usize))
        }
        Step::DropHeads { count } => cuts::heads(source, *count, seen),
        Step::DropChannels { fraction } => cuts::channels(source, *fraction, seen),
        Step::Width { hidden } => cuts::width(source, *hidden as usize, seen),
        _ => unreachable!("invariant: only structural steps come here"),
    }
}

fn check_left(count: u32, of: u32, what: &str) -> Result<(), CompressError> {
    if count > 0 && count < of {
        return Ok(());
    }
    Err(CompressError::Settings(format!(
        "{count} of {of} {what} cannot go: 1 to {} can",
        of.saturating_sub(1)
    )))
}

/// The places of the `count` lowest.
fn lowest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_matrix_its_own_places_stay() {
        let all = Matrix::new(4, 2, (0..8).map(|x| x as f32).collect());
        let cut = |rows: Option<Kept>, cols: Option<Kept>| {
            cut_each(all.clone().split(2), &New { name: String::new(), from: vec![0], rows, cols })
        };
        assert_eq!(cut(Some(vec![vec![1]]), None).data, [2., 3., 6., 7.]);
        assert_eq!(cut(None, Some(vec![vec![0], vec![1]])).data, [0., 2., 5., 7.]);
        let both = cut(Some(vec![vec![0], vec![1]]), Some(vec![vec![1]]));
        assert_eq!((both.rows, both.cols, both.data), (2, 1, vec![1., 7.]));
    }

    #[test]
    fn the_lowest_are_found() {
        assert_eq!(lowest(&[3.0, 1.0, 2.0], 2), [1, 2]);
    }

    #[test]
    fn something_must_be_left() {
        assert!(check_left(0, 4, "layers").is_err() && check_left(4, 4, "layers").is_err());
        assert!(check_left(3, 4, "layers").is_ok());
    }
}
