//! Steps that change the shape of a model: fewer layers, heads, channels, or a narrower residual
//! stream. The result is a valid model file of the same family, and faster in any engine.
//!
//! What is kept untouched keeps its bytes; matrices that lose rows or columns are stored as floats (or
//! Q8_0, as settings say) and are to be quantised afterwards.

use std::path::Path;

use millrace_shared::model::gguf::gemma_scale;
use millrace_shared::model::{Family, FolderShape, ModelConfig, TensorEntry, TensorType};

use crate::apply::{Settings, encode};
use crate::quant::fallback;
use crate::report::{StepReport, TensorReport, type_name};
use crate::source::Kind;
use crate::{
    Calibration, Changes, CompressError, Matrix, Sink, Slot, Source, Step, calibrate, parallel,
};

/// Widths that the engine's kernels compute with are multiples of this.
const GRAIN: usize = 32;

/// A tensor of the result.
#[derive(Clone, Debug)]
struct New {
    name: String,
    /// Tensors of the source; the mean of several.
    from: Vec<usize>,
    rows: Option<Vec<usize>>,
    cols: Option<Vec<usize>>,
}

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
        dims[0] = cols.len() as u64;
    }
    if let (Some(rows), Some(dim)) = (&new.rows, dims.get_mut(1)) {
        *dim = rows.len() as u64;
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
    if let Some(rows) = &new.rows {
        m = m.keep_rows(rows);
    }
    if let Some(cols) = &new.cols {
        m = m.keep_cols(cols);
    }
    encode(&first.name, dtype, &mut m, None, None)
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
            layers_of(source, &kept.iter().map(|&l| vec![l]).collect::<Vec<_>>())
        }
        Step::DropLayers { count } => {
            check_left(*count, layers, "layers")?;
            let gone = lowest(&seen.influence, *count as usize);
            let kept: Vec<Vec<u32>> =
                (0..layers).filter(|l| !gone.contains(&(*l as usize))).map(|l| vec![l]).collect();
            layers_of(source, &kept)
        }
        Step::MergeLayers { count } => {
            check_left(*count, layers / 2 + 1, "pairs of layers")?;
            layers_of(source, &merged(&seen.influence, *count as usize))
        }
        Step::DropHeads { count } => heads(source, *count, seen),
        Step::DropChannels { fraction } => channels(source, *fraction, seen),
        Step::Width { hidden } => width(source, *hidden as usize, seen),
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

/// Disjoint pairs of neighbours, those of least influence first.
fn merged(influence: &[f64], count: usize) -> Vec<Vec<u32>> {
    let pairs: Vec<f64> = influence.windows(2).map(|w| w[0] + w[1]).collect();
    let mut with_next = vec![false; influence.len()];
    let mut made = 0;
    for first in lowest(&pairs, pairs.len()) {
        let free =
            !with_next[first] && !with_next[first + 1] && (first == 0 || !with_next[first - 1]);
        if free && made < count {
            with_next[first] = true;
            made += 1;
        }
    }
    let mut layers = Vec::new();
    let mut next = 0;
    while next < influence.len() {
        if with_next[next] {
            layers.push(vec![next as u32, next as u32 + 1]);
            next += 2;
        } else {
            layers.push(vec![next as u32]);
            next += 1;
        }
    }
    layers
}

/// A model whose layers are (means of) layers of the source.
fn layers_of(source: &Source, layers: &[Vec<u32>]) -> Result<Shape, CompressError> {
    let firsts: Vec<u32> = layers.iter().map(|l| l[0]).collect();
    let sees = |layer: u32| source.config.window(layer).is_some();
    let of_number = source.config.features.window.as_ref().is_some_and(|w| w.every > 0);
    let of = |(new, all): (u32, &Vec<u32>)| {
        all.iter().find(|&&old| sees(new) != sees(old)).map(|&old| (new, old))
    };
    if let Some((new, old)) = (0..).zip(layers).find_map(of)
        && of_number
    {
        return Err(CompressError::Settings(format!(
            "layer {old} would become layer {new}: which layers of {} see a window alone goes by their \
             numbers, so keep-layers is to keep that rhythm",
            source.config.family.as_str()
        )));
    }
    let find = |name: &str| source.tensors.iter().position(|t| t.name == name);
    let mut news = Vec::new();
    for (i, tensor) in source.tensors.iter().enumerate() {
        if Source::layer_of(&tensor.name).is_none() {
            news.push(New { name: tensor.name.clone(), from: vec![i], rows: None, cols: None });
        }
    }
    for (new, old) in layers.iter().enumerate() {
        let prefix = format!("blk.{}.", old[0]);
        for tensor in source.tensors.iter().filter(|t| t.name.starts_with(&prefix)) {
            let rest = &tensor.name[prefix.len()..];
            let from = old.iter().filter_map(|l| find(&format!("blk.{l}.{rest}"))).collect();
            news.push(New { name: format!("blk.{new}.{rest}"), from, rows: None, cols: None });
        }
    }
    let told: Vec<String> =
        layers.iter().map(|l| l.iter().map(u32::to_string).collect::<Vec<_>>().join("+")).collect();
    let note = format!("layers of the original: {}", told.join(" "));
    let dimensions = vec![("block_count", layers.len() as u32)];
    Ok((news, FolderShape { dimensions, layers: Some(firsts) }, note))
}

/// All tensors, cut by a rule: the rows and columns that stay, by name. A bias has an element for each row
/// of its matrix.
fn cut(
    source: &Source,
    rule: impl Fn(&str) -> (Option<Vec<usize>>, Option<Vec<usize>>),
) -> Vec<New> {
    let one = |(i, t): (usize, &TensorEntry)| {
        let (rows, cols) = match rule(&t.name) {
            (rows, _) if t.name.ends_with(".bias") => (None, rows),
            both => both,
        };
        New { name: t.name.clone(), from: vec![i], rows, cols }
    };
    source.tensors.iter().enumerate().map(one).collect()
}

/// What a step cuts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    Attention,
    FeedForward,
    Both,
}

/// That the steps know the layers' parts that they cut.
fn check_plain(config: &ModelConfig, what: Cut) -> Result<(), CompressError> {
    let f = &config.features;
    let attention = f.fused_qkv || f.biases || f.transposed;
    let feed_forward = f.experts.is_some() || f.biases || f.transposed || f.ungated;
    let (refused, needs) = match what {
        Cut::Attention => (attention, "with matrices of their own for q, k and v"),
        Cut::FeedForward => (feed_forward, "with gated feed-forward parts, without experts"),
        Cut::Both => (
            attention || feed_forward,
            "with matrices of their own for q, k and v, gated feed-forward parts and no experts",
        ),
    };
    if !refused {
        return Ok(());
    }
    Err(CompressError::Settings(format!(
        "{} models cannot be cut this way: only those {needs}; drop-layers works",
        config.family.as_str()
    )))
}

/// That what is to be cut is a matrix: of factors, inputs and outputs are not those of the matrix.
fn check_whole(source: &Source) -> Result<(), CompressError> {
    match source.tensors.iter().find(|t| t.name.ends_with("_in.weight")) {
        None => Ok(()),
        Some(one) => Err(CompressError::Settings(format!(
            "tensor '{}' is a factor: cut the model first, and factor what is left",
            one.name
        ))),
    }
}

/// That each matrix whose name begins so is a tensor of its own: some families' files have several in one.
fn check_apart(source: &Source, begin: &str) -> Result<(), CompressError> {
    let apart = source.apart()?;
    let part = |t: &&TensorEntry| t.name.split('.').nth(2).is_some_and(|p| p.starts_with(begin));
    match source.tensors.iter().filter(part).find(|t| !apart.contains(&t.name)) {
        None => Ok(()),
        Some(one) => Err(CompressError::Settings(format!(
            "tensor '{}' holds several matrices, which cannot be cut; drop-layers works",
            one.name
        ))),
    }
}

/// How much each input of a matrix adds to its outputs: `E[x_j^2] sum_i w_ij^2`.
fn column_scores(m: &Matrix, squares: &[f32]) -> Vec<f64> {
    let mut scores = vec![0f64; m.cols];
    for i in 0..m.rows {
        scores.iter_mut().zip(m.row(i)).for_each(|(s, &w)| *s += f64::from(w).powi(2));
    }
    scores.iter_mut().zip(squares).for_each(|(s, &x)| *s *= f64::from(x));
    scores
}

fn scores_of(source: &Source, name: &str, seen: &Calibration) -> Result<Vec<f64>, CompressError> {
    let tensor = source.tensor(name)?;
    let moments = seen
        .moments(name)
        .ok_or_else(|| CompressError::Settings(format!("what '{name}' sees is not known")))?;
    Ok(column_scores(&source.matrix(tensor)?, &moments.importance()))
}

/// All places but those, in order.
fn others(n: usize, gone: &[usize]) -> Vec<usize> {
    (0..n).filter(|i| !gone.contains(i)).collect()
}

fn heads(source: &Source, count: u32, seen: &Calibration) -> Result<Shape, CompressError> {
    let c = &source.config;
    check_plain(c, Cut::Attention)?;
    check_whole(source)?;
    check_apart(source, "attn")?;
    check_left(count, c.kv_heads, "KV heads of a layer")?;
    let (kv, dim) = (c.kv_heads as usize, c.head_dim as usize);
    let group = (c.heads / c.kv_heads) as usize;
    if !((kv - count as usize) * group * dim).is_multiple_of(GRAIN) {
        return Err(CompressError::settings("what stays of the heads is no multiple of 32 wide"));
    }
    let mut kept = Vec::new();
    for layer in 0..c.layers {
        let scores = scores_of(source, &format!("blk.{layer}.attn_output.weight"), seen)?;
        let per_head: Vec<f64> = scores.chunks(group * dim).map(|h| h.iter().sum()).collect();
        kept.push(others(kv, &lowest(&per_head, count as usize)));
    }
    let spread = |heads: &[usize], width: usize| -> Vec<usize> {
        heads.iter().flat_map(|h| h * width..(h + 1) * width).collect()
    };
    let news = cut(source, |name| {
        let Some(layer) = Source::layer_of(name) else { return (None, None) };
        let heads = &kept[layer as usize];
        match name.split('.').nth(2) {
            Some("attn_q") => (Some(spread(heads, group * dim)), None),
            Some("attn_k" | "attn_v") => (Some(spread(heads, dim)), None),
            Some("attn_output") => (None, Some(spread(heads, group * dim))),
            _ => (None, None),
        }
    });
    let left = c.kv_heads - count;
    let dimensions = vec![
        ("attention.head_count", left * group as u32),
        ("attention.head_count_kv", left),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.rope.dim),
    ];
    let note = format!("{} of {} query heads stay in each layer", left * group as u32, c.heads);
    Ok((news, FolderShape { dimensions, layers: None }, note))
}

fn channels(source: &Source, fraction: f64, seen: &Calibration) -> Result<Shape, CompressError> {
    let c = &source.config;
    check_plain(c, Cut::FeedForward)?;
    check_whole(source)?;
    check_apart(source, "ffn")?;
    let ffn = c.ffn as usize;
    let left = (((1.0 - fraction) * ffn as f64 / GRAIN as f64).round() as usize).max(1) * GRAIN;
    let mut kept = Vec::new();
    for layer in 0..c.layers {
        let scores = scores_of(source, &format!("blk.{layer}.ffn_down.weight"), seen)?;
        kept.push(others(ffn, &lowest(&scores, ffn - left.min(ffn))));
    }
    let news = cut(source, |name| {
        let Some(layer) = Source::layer_of(name) else { return (None, None) };
        let kept = || Some(kept[layer as usize].clone());
        match name.split('.').nth(2) {
            Some("ffn_gate" | "ffn_up") => (kept(), None),
            Some("ffn_down") => (None, kept()),
            _ => (None, None),
        }
    });
    let note = format!("{left} of {ffn} inner channels stay in each layer");
    let dimensions = vec![("feed_forward_length", left as u32)];
    Ok((news, FolderShape { dimensions, layers: None }, note))
}

fn width(source: &Source, hidden: usize, seen: &Calibration) -> Result<Shape, CompressError> {
    let c = &source.config;
    check_plain(c, Cut::Both)?;
    check_whole(source)?;
    if hidden == 0 || hidden >= c.hidden as usize || !hidden.is_multiple_of(GRAIN) {
        return Err(CompressError::Settings(format!(
            "hidden = {hidden}: a narrower model has a multiple of 32 below {}",
            c.hidden
        )));
    }
    let mut scores = vec![0f64; c.hidden as usize];
    for layer in 0..c.layers {
        for part in ["attn_q", "ffn_gate"] {
            let Some(seen) = seen.moments(&format!("blk.{layer}.{part}.weight")) else { continue };
            let importance = seen.importance();
            scores.iter_mut().zip(importance).for_each(|(s, x)| *s += f64::from(x));
        }
    }
    let kept = others(c.hidden as usize, &lowest(&scores, c.hidden as usize - hidden));
    let news = cut(source, |name| {
        let kept = || Some(kept.clone());
        let part = name.split('.').nth(if name.starts_with("blk.") { 2 } else { 0 });
        match part {
            Some("attn_output" | "ffn_down") => (kept(), None),
            Some("attn_q_norm" | "attn_k_norm") => (None, None),
            Some(factors) if factors.starts_with("rope_") => (None, None),
            _ => (None, kept()),
        }
    });
    let dimensions = vec![
        ("embedding_length", hidden as u32),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.rope.dim),
    ];
    let note = format!("{hidden} of {} elements of the residual stream stay", c.hidden);
    Ok((news, FolderShape { dimensions, layers: None }, note))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_disjoint_and_of_least_influence() {
        let all = merged(&[9.0, 1.0, 1.0, 2.0, 9.0], 2);
        assert_eq!(all, [vec![0], vec![1, 2], vec![3, 4]]);
        assert_eq!(merged(&[1.0, 1.0, 1.0], 1), [vec![0, 1], vec![2]]);
    }

    #[test]
    fn columns_count_by_what_comes_in_and_what_goes_out() {
        let m = Matrix::new(2, 3, vec![1., 2., 0., 1., 0., 5.]);
        assert_eq!(column_scores(&m, &[1.0, 2.0, 0.0]), [2.0, 8.0, 0.0]);
        assert_eq!(lowest(&[3.0, 1.0, 2.0], 2), [1, 2]);
    }

    #[test]
    fn something_must_be_left() {
        assert!(check_left(0, 4, "layers").is_err() && check_left(4, 4, "layers").is_err());
        assert!(check_left(3, 4, "layers").is_ok());
    }
}
