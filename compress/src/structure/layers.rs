//! Other layers: some of them, in another order, or means of neighbours.

use millrace_shared::model::FolderShape;

use super::{New, Shape, lowest};
use crate::{CompressError, Source};

/// Disjoint pairs of neighbours, those of least influence first.
pub(super) fn merged(influence: &[f64], count: usize) -> Vec<Vec<u32>> {
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
        assert_eq!(merged(&[1.0, 1.0, 1.0], 1), [vec![0, 1], vec![2]]);
    }
}
