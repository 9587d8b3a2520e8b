//! Tensors of which several lie in one: `q`, `k` and `v`, gate and up, all experts. Rows follow each
//! other in a matrix, and matrices in a tensor of three dimensions, so that each part is a matrix of
//! its own at some offset, and nothing is copied.

use std::collections::HashSet;

use super::{ModelConfig, TensorEntry};

/// A part: its name, and its rows.
type Part = (String, u64);

/// The tensors with each part as one of its own, in the same order; `sparse` are kept without zeros.
///
/// # Errors
/// If a matrix does not have the rows of its parts, or is sparse.
pub(super) fn split(
    config: &ModelConfig,
    tensors: Vec<TensorEntry>,
    sparse: &HashSet<String>,
) -> Result<Vec<TensorEntry>, (String, String)> {
    let mut all = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let inner = tensor.name.strip_suffix(".weight").and_then(|n| n.strip_prefix("blk."));
        let Some((layer, last)) = inner.and_then(|n| n.split_once('.')) else {
            all.push(tensor);
            continue;
        };
        // One output's weights, which some files keep as a vector.
        if last == "ffn_gate_inp_shexp" && tensor.dims.len() == 1 {
            all.push(TensorEntry { dims: vec![tensor.dims[0], 1], ..tensor });
            continue;
        }
        let layer = format!("blk.{layer}");
        let Some((parts, slices)) = parts(config, last, &tensor) else {
            all.push(tensor);
            continue;
        };
        if sparse.contains(&tensor.name) {
            let problem = "it holds several matrices, which cannot be without their zeros";
            return Err((tensor.name, problem.to_owned()));
        }
        let rows: u64 = parts.iter().map(|(_, rows)| rows).sum();
        let shape = match slices {
            None => vec![rows],
            Some(slices) => vec![rows / slices.max(1), slices],
        };
        if tensor.dims.get(1..) != Some(&shape[..]) {
            let problem = format!("{rows} rows are expected, its shape is {:?}", tensor.dims);
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

/// What lies in a tensor, and in how many slices where it has three dimensions; `None` where it is
/// one matrix.
fn parts(
    config: &ModelConfig,
    name: &str,
    tensor: &TensorEntry,
) -> Option<(Vec<Part>, Option<u64>)> {
    let plain = config.plain_matrices();
    let rows = |part: &str| plain.iter().find(|(name, _)| *name == part).map_or(0, |(_, d)| d[1]);
    let wide = tensor.dims.get(1) == Some(&(rows("ffn_gate") + rows("ffn_up")));
    let together: &[&str] = match name {
        "attn_qkv" if !config.features.fused_qkv => &["attn_q", "attn_k", "attn_v"],
        "ffn_up" if wide && !config.features.ungated => &["ffn_gate", "ffn_up"],
        _ => return of_experts(config, name),
    };
    Some((together.iter().map(|part| ((*part).to_owned(), rows(part))).collect(), None))
}

/// All experts' matrices in one tensor: `outputs x inputs` of each, expert by expert.
fn of_experts(config: &ModelConfig, name: &str) -> Option<(Vec<Part>, Option<u64>)> {
    let experts = config.features.experts.as_ref()?;
    let each: &[&str] = match name {
        "ffn_gate_up_exps" => &["ffn_gate", "ffn_up"],
        "ffn_gate_exps" => &["ffn_gate"],
        "ffn_up_exps" => &["ffn_up"],
        "ffn_down_exps" => &["ffn_down"],
        _ => return None,
    };
    let of = |expert: u32| {
        let one = move |part: &&str| (format!("{part}.{expert}"), config.expert_dims(part)[1]);
        each.iter().map(one)
    };
    Some(((0..experts.count).flat_map(of).collect(), Some(u64::from(experts.count))))
}
