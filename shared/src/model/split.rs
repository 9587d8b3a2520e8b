//! Tensors of which several lie in one: `q`, `k` and `v`, gate and up. Rows follow each other in a
//! matrix, so that each part is a matrix of its own at some offset, and nothing is copied.

use super::{ModelConfig, TensorEntry};

/// The tensors with each part as one of its own, in the same order.
///
/// # Errors
/// If a matrix does not have the rows of its parts.
pub(super) fn split(
    config: &ModelConfig,
    tensors: Vec<TensorEntry>,
) -> Result<Vec<TensorEntry>, (String, String)> {
    let mut all = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let parts = tensor.name.strip_suffix(".weight").and_then(|n| parts(config, n, &tensor));
        let Some(parts) = parts else {
            all.push(tensor);
            continue;
        };
        let stem = tensor.name.rsplit_once('.').and_then(|(stem, _)| stem.rsplit_once('.'));
        let layer = stem.map_or("", |(layer, _)| layer);
        let rows = tensor.dims.get(1).copied().unwrap_or(0);
        let wanted: u64 = parts.iter().map(|(_, rows)| rows).sum();
        if tensor.dims.len() != 2 || rows != wanted {
            let problem = format!("{wanted} rows are expected, its shape is {:?}", tensor.dims);
            return Err((tensor.name, problem));
        }
        let mut offset = tensor.offset;
        for (part, part_rows) in parts {
            let bytes = tensor.bytes / rows * part_rows;
            all.push(TensorEntry {
                name: format!("{layer}.{part}.weight"),
                dims: vec![tensor.dims[0], part_rows],
                offset,
                bytes,
                ..tensor
            });
            offset += bytes;
        }
    }
    Ok(all)
}

/// What lies in a matrix: names and rows; `None` where it is one.
fn parts(
    config: &ModelConfig,
    name: &str,
    tensor: &TensorEntry,
) -> Option<Vec<(&'static str, u64)>> {
    let (_, last) = name.strip_prefix("blk.")?.split_once('.')?;
    let rows = |part: &str| {
        config.layer_matrices().iter().find(|(name, _)| *name == part).map_or(0, |(_, d)| d[1])
    };
    let wide = tensor.dims.get(1) == Some(&(rows("ffn_gate") + rows("ffn_up")));
    let parts: &[&'static str] = match last {
        "attn_qkv" => &["attn_q", "attn_k", "attn_v"],
        "ffn_up" if wide => &["ffn_gate", "ffn_up"],
        _ => return None,
    };
    Some(parts.iter().map(|part| (*part, rows(part))).collect())
}
