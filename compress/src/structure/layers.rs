//! Other layers: some of them, in another order, or means of neighbours.

use millrace_shared::model::FolderShape;

use super::{New, Shape};
use crate::{CompressError, Source};

/// `count` disjoint pairs of neighbours, of the least sum of influences (by dynamic programming over
/// layers).
pub(super) fn merged(influence: &[f64], count: usize) -> Vec<Vec<u32>> {
    let n = influence.len();
    let pair = |last: usize| influence[last - 1] + influence[last];
    // Of the first layers, with so many pairs.
    let mut least = vec![vec![f64::INFINITY; count + 1]; n + 1];
    least.iter_mut().for_each(|of| of[0] = 0.0);
    for layers in 2..=n {
        for pairs in 1..=count {
            let with = least[layers - 2][pairs - 1] + pair(layers - 1);
            least[layers][pairs] = with.min(least[layers - 1][pairs]);
        }
    }
    let mut with_next = vec![false; n];
    let (mut layers, mut pairs) = (n, count);
    while layers >= 2 && pairs > 0 {
        if least[layers - 2][pairs - 1] + pair(layers - 1) <= least[layers - 1][pairs] {
            with_next[layers - 2] = true;
            (layers, pairs) = (layers - 2, pairs - 1);
        } else {
            layers -= 1;
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
pub(super) fn layers_of(source: &Source, layers: &[Vec<u32>]) -> Result<Shape, CompressError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_disjoint_and_of_least_influence() {
        let all = merged(&[9.0, 1.0, 1.0, 2.0, 9.0], 2);
        assert_eq!(all, [vec![0], vec![1, 2], vec![3, 4]]);
        assert_eq!(merged(&[1.0, 1.0, 1.0], 1), [vec![0], vec![1, 2]]);
        // The least pair alone would leave no second one.
        assert_eq!(merged(&[9.0, 1.0, 1.0, 9.0], 2), [vec![0, 1], vec![2, 3]]);
    }
}
