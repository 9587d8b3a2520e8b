//! Narrower layers: fewer heads, inner channels, or elements of the residual stream.

use std::collections::HashMap;

use millrace_shared::model::{Family, FolderShape, ModelConfig, TensorEntry};

use super::{Kept, New, Shape, check_left, lowest};
use crate::source::{Kind, matrix_names};
use crate::{Calibration, CompressError, Matrix, Source};

/// Widths that the engine's kernels compute with are multiples of this.
const GRAIN: usize = 32;

/// All tensors, cut by a rule: the rows and columns that stay, by name. A bias has an element for each row
/// of its matrix.
fn cut(source: &Source, rule: impl Fn(&TensorEntry) -> (Option<Kept>, Option<Kept>)) -> Vec<New> {
    let one = |(i, t): (usize, &TensorEntry)| {
        let (rows, cols) = match rule(t) {
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

/// That a step can cut what it is to cut.
fn check(source: &Source, what: Cut) -> Result<(), CompressError> {
    check_plain(&source.config, what)?;
    check_whole(source)?;
    match what {
        Cut::Attention => check_apart(source, "attn"),
        Cut::FeedForward => check_apart(source, "ffn"),
        // What goes of all matrices alike may go of several in one.
        Cut::Both => Ok(()),
    }
}

/// That the steps know the layers' parts that they cut.
fn check_plain(config: &ModelConfig, what: Cut) -> Result<(), CompressError> {
    let f = &config.features;
    let attention = f.fused_qkv || f.biases || f.transposed;
    let feed_forward = f.biases || f.transposed || f.ungated;
    let (refused, needs) = match what {
        Cut::Attention => (attention, "with matrices of their own for q, k and v"),
        Cut::FeedForward => (feed_forward, "with gated feed-forward parts"),
        Cut::Both => (
            attention || feed_forward,
            "with matrices of their own for q, k and v and gated feed-forward parts",
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
    let part = |t: &&TensorEntry| {
        // Experts are known by their slices.
        t.dims.len() < 3 && t.name.split('.').nth(2).is_some_and(|p| p.starts_with(begin))
    };
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

/// The scores of the inputs of a tensor's matrices, by the names of these.
fn scores_of(
    source: &Source,
    tensor: &TensorEntry,
    seen: &Calibration,
) -> Result<Vec<(String, Vec<f64>)>, CompressError> {
    let score = |(name, matrix): (String, Matrix)| {
        let moments = seen
            .moments(&name)
            .ok_or_else(|| CompressError::Settings(format!("what '{name}' sees is not known")))?;
        Ok((name, column_scores(&matrix, &moments.importance())))
    };
    source.matrices(tensor)?.into_iter().map(score).collect()
}

/// All places but those, in order.
fn others(n: usize, gone: &[usize]) -> Vec<usize> {
    (0..n).filter(|i| !gone.contains(i)).collect()
}

pub(super) fn heads(
    source: &Source,
    count: u32,
    seen: &Calibration,
) -> Result<Shape, CompressError> {
    let c = &source.config;
    check(source, Cut::Attention)?;
    check_left(count, c.kv_heads, "KV heads of a layer")?;
    let (kv, dim) = (c.kv_heads as usize, c.head_dim as usize);
    let group = (c.heads / c.kv_heads) as usize;
    if !((kv - count as usize) * group * dim).is_multiple_of(GRAIN) {
        return Err(CompressError::settings("what stays of the heads is no multiple of 32 wide"));
    }
    let mut kept = Vec::new();
    for layer in 0..c.layers {
        let tensor = source.tensor(&format!("blk.{layer}.attn_output.weight"))?;
        for (_, scores) in scores_of(source, tensor, seen)? {
            let per_head: Vec<f64> = scores.chunks(group * dim).map(|h| h.iter().sum()).collect();
            kept.push(others(kv, &lowest(&per_head, count as usize)));
        }
    }
    let spread = |heads: &[usize], width: usize| -> Option<Kept> {
        Some(vec![heads.iter().flat_map(|h| h * width..(h + 1) * width).collect()])
    };
    let news = cut(source, |tensor| {
        let Some(layer) = Source::layer_of(&tensor.name) else { return (None, None) };
        let heads = &kept[layer as usize];
        match tensor.name.split('.').nth(2) {
            Some("attn_q") => (spread(heads, group * dim), None),
            Some("attn_k" | "attn_v") => (spread(heads, dim), None),
            Some("attn_output") => (None, spread(heads, group * dim)),
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

pub(super) fn channels(
    source: &Source,
    fraction: f64,
    seen: &Calibration,
) -> Result<Shape, CompressError> {
    let c = &source.config;
    check(source, Cut::FeedForward)?;
    let ffn = c.ffn as usize;
    let left = (((1.0 - fraction) * ffn as f64 / GRAIN as f64).round() as usize).max(1) * GRAIN;
    let mut kept = HashMap::new();
    for tensor in source.layer_matrices().filter(|t| inner_part(&t.name) == Some("ffn_down")) {
        for (name, scores) in scores_of(source, tensor, seen)? {
            kept.insert(place_of(&name), others(ffn, &lowest(&scores, ffn - left.min(ffn))));
        }
    }
    let news = cut(source, |tensor| {
        let Some(part) = inner_part(&tensor.name) else { return (None, None) };
        let names = matrix_names(tensor);
        let mut all: Kept = names.iter().map(|name| kept[&place_of(name)].clone()).collect();
        match part {
            "ffn_down" => return (None, Some(all)),
            "ffn_gate_up" => all.iter_mut().for_each(|kept| {
                kept.extend(kept.clone().iter().map(|i| ffn + i));
            }),
            _ => {}
        }
        (Some(all), None)
    });
    let of = if c.features.experts.is_some() { " of each expert" } else { "" };
    let note = format!("{left} of {ffn} inner channels{of} stay in each layer");
    const OF_EXPERT: &str = "expert_feed_forward_length";
    let states = match &source.kind {
        Kind::Gguf(gguf) => {
            let family = gguf.str("general.architecture")?;
            gguf.opt_u32(&format!("{family}.{OF_EXPERT}"))?.is_some()
        }
        Kind::Folder(_) => false,
    };
    let key = match (&c.features.experts, c.family) {
        (None, _) => "feed_forward_length",
        (_, Family::Mixtral) if !states => "feed_forward_length",
        _ => OF_EXPERT,
    };
    let dimensions = vec![(key, left as u32)];
    Ok((news, FolderShape { dimensions, layers: None }, note))
}

/// Which part of a feed-forward part a tensor is, or has of all experts; `None` for the expert that all
/// rows share, and for others.
fn inner_part(name: &str) -> Option<&str> {
    let part = name.strip_prefix("blk.")?.strip_suffix(".weight")?.split('.').nth(1)?;
    let part = part.strip_suffix("_exps").unwrap_or(part);
    ["ffn_gate", "ffn_up", "ffn_down", "ffn_gate_up"].contains(&part).then_some(part)
}

/// The layer of a matrix, and its expert if it is one's.
fn place_of(name: &str) -> (Option<u32>, Option<u32>) {
    (Source::layer_of(name), name.split('.').nth(3).and_then(|expert| expert.parse().ok()))
}

pub(super) fn width(
    source: &Source,
    hidden: usize,
    seen: &Calibration,
) -> Result<Shape, CompressError> {
    let c = &source.config;
    check(source, Cut::Both)?;
    if hidden == 0 || hidden >= c.hidden as usize || !hidden.is_multiple_of(GRAIN) {
        return Err(CompressError::Settings(format!(
            "hidden = {hidden}: a narrower model has a multiple of 32 below {}",
            c.hidden
        )));
    }
    let mut scores = vec![0f64; c.hidden as usize];
    for layer in 0..c.layers {
        for part in ["attn_q", "ffn_gate", "ffn_gate_inp"] {
            let Some(seen) = seen.moments(&format!("blk.{layer}.{part}.weight")) else { continue };
            let importance = seen.importance();
            scores.iter_mut().zip(importance).for_each(|(s, x)| *s += f64::from(x));
        }
    }
    let kept = others(c.hidden as usize, &lowest(&scores, c.hidden as usize - hidden));
    let news = cut(source, |tensor| {
        let name = &tensor.name;
        let kept = || Some(vec![kept.clone()]);
        let part = name.split('.').nth(if name.starts_with("blk.") { 2 } else { 0 });
        match part {
            Some("attn_output" | "ffn_down" | "ffn_down_exps" | "ffn_down_shexp") => (kept(), None),
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
    fn columns_count_by_what_comes_in_and_what_goes_out() {
        let m = Matrix::new(2, 3, vec![1., 2., 0., 1., 0., 5.]);
        assert_eq!(column_scores(&m, &[1.0, 2.0, 0.0]), [2.0, 8.0, 0.0]);
    }

    #[test]
    fn parts_of_all_kinds_of_names_are_known() {
        assert_eq!(inner_part("blk.3.ffn_down.weight"), Some("ffn_down"));
        assert_eq!(inner_part("blk.3.ffn_gate_up_exps.weight"), Some("ffn_gate_up"));
        assert_eq!(inner_part("blk.3.ffn_up.7.weight"), Some("ffn_up"));
        for other in ["blk.3.ffn_up_shexp.weight", "blk.3.ffn_gate_inp.weight", "output.weight"] {
            assert_eq!(inner_part(other), None, "{other}");
        }
        assert_eq!(place_of("blk.3.ffn_up.7.weight"), (Some(3), Some(7)));
        assert_eq!(place_of("blk.3.ffn_up.weight"), (Some(3), None));
    }
}
