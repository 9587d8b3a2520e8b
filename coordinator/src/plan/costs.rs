//! From a model's directory, profiles and links to what the planner reckons with.
//!
//! Bytes are those that weights take in memory as the node's engine keeps them, not those of the file.
//! The planner knows one table of bytes for all nodes: where nodes keep weights differently
//! ([`ModelParts::mixed`]), it is what the largest needs, and who needs less has so much more memory.

use millrace_engine::cpu::packed_bytes;
use millrace_shared::model::{
    Dtype, ModelConfig, SparseForm, SparseForms, StageTensors, TensorEntry, TensorType, head_name,
    stage_tensors, typical_name,
};
use millrace_shared::options::{Role, TorchKept};
use millrace_shared::partition::{Curve, ModelCosts, NodeCosts};
use millrace_shared::wire::control::{PROFILE_ROWS, ProfileSpec, StageProfile};

/// How a node's engine keeps weights: the torch engine so, the others as the CPU engine packs them.
pub type Kept = Option<TorchKept>;

/// What a model is to a plan: its dimensions and tensors, hashed or not.
#[derive(Clone, Copy, Debug)]
pub struct ModelParts<'a> {
    /// Dimensions.
    pub config: &'a ModelConfig,
    /// Tensors in file order.
    pub tensors: &'a [TensorEntry],
}

impl ModelParts<'_> {
    fn dtype(&self, name: &str) -> TensorType {
        self.tensors.iter().find(|t| t.name == name).map_or(TensorType::F32, |t| t.dtype)
    }

    /// What nodes are asked to measure; `sharing` of them are on the same host.
    pub fn profile_spec(&self, sharing: u32) -> ProfileSpec {
        ProfileSpec {
            config: self.config.clone(),
            layer_type: self.dtype(typical_name(self.config)),
            head_type: self.dtype(head_name(self.config)),
            sharing,
        }
    }

    fn part(&self, stage: &StageTensors, bytes: impl Fn(&TensorEntry) -> u64) -> u64 {
        stage_tensors(self.config, self.tensors, stage).into_iter().map(bytes).sum()
    }

    /// Bytes of a stage in the model's file: what a node fetches.
    pub fn file_bytes(&self, stage: &StageTensors) -> u64 {
        self.part(stage, |t| t.bytes)
    }

    /// Bytes of a stage in memory.
    pub fn memory_bytes(&self, stage: &StageTensors, kept: Kept) -> u64 {
        let forms = SparseForms::of_tensors(self.tensors);
        self.part(stage, |tensor| in_memory(tensor, forms.of(tensor), kept))
    }

    /// What the planner needs for nodes that keep weights as they will, and the same nodes with memory to
    /// compare with that: never more than they can hold, and exactly that where all keep weights alike.
    pub fn mixed(
        &self,
        (nodes, kept): (&[NodeCosts], &[Kept]),
        positions: u64,
        kv_dtype: Dtype,
        batch_tokens: u32,
    ) -> (ModelCosts, Vec<NodeCosts>) {
        let of = |kept| self.costs(positions, kv_dtype, batch_tokens, kept);
        let mut tables: Vec<(Kept, ModelCosts)> = Vec::new();
        for &kept in kept {
            if !tables.iter().any(|(known, _)| *known == kept) {
                tables.push((kept, of(kept)));
            }
        }
        let mut tables = tables.into_iter();
        let Some((first, mut model)) = tables.next() else { return (of(None), nodes.to_vec()) };
        let all: Vec<(Kept, ModelCosts)> =
            [(first, model.clone())].into_iter().chain(tables).collect();
        for (_, other) in &all[1..] {
            let pairs = model.layer_bytes.iter_mut().zip(&other.layer_bytes);
            pairs.for_each(|(most, &bytes)| *most = (*most).max(bytes));
            model.embed_bytes = model.embed_bytes.max(other.embed_bytes);
            model.head_bytes = model.head_bytes.max(other.head_bytes);
        }
        let one = |(node, kept): (&NodeCosts, &Kept)| {
            let table = all.iter().find(|(known, _)| known == kept).map_or(&model, |(_, t)| t);
            // What every stage takes is the same for all.
            let for_weights = node.memory_bytes.saturating_sub(model.stage_bytes);
            let memory_bytes = match part_needed(table, &model) {
                part if part < 1.0 && for_weights > 0 => {
                    model.stage_bytes.saturating_add((for_weights as f64 / part) as u64)
                }
                _ => node.memory_bytes,
            };
            NodeCosts { memory_bytes, ..node.clone() }
        };
        let nodes = nodes.iter().zip(kept).map(one).collect();
        (model, nodes)
    }

    /// What the planner needs, with a KV cache of so many positions, where all nodes keep weights alike.
    pub fn costs(
        &self,
        positions: u64,
        kv_dtype: Dtype,
        batch_tokens: u32,
        kept: Kept,
    ) -> ModelCosts {
        let config = self.config;
        let layer = |l| StageTensors { layers: l..l + 1, embed: false, head: false };
        let layer_bytes: Vec<u64> =
            (0..config.layers).map(|l| self.memory_bytes(&layer(l), kept)).collect();
        let measured = self.measured_layer_bytes(kept).max(1) as f64;
        let layer_share = layer_bytes.iter().map(|&b| share(b as f64 / measured)).collect();
        let ends =
            |embed, head| self.memory_bytes(&StageTensors { layers: 0..0, embed, head }, kept);
        // What experts need beside, they need as often.
        let parts = 1 + u64::from(config.features.experts.is_some());
        let widest = parts * u64::from(6 * config.hidden + 3 * config.ffn);
        ModelCosts {
            layer_bytes,
            layer_share,
            embed_bytes: ends(true, false),
            head_bytes: ends(false, true),
            tied_head: config.tied_head,
            kv_bytes_per_layer: positions * config.kv_bytes_per_position(kv_dtype),
            // What a step needs beside its weights: a few rows of each width, as floats.
            stage_bytes: u64::from(batch_tokens) * widest * 4,
            row_bytes: u64::from(config.hidden) * 4,
        }
    }

    /// Bytes in memory of the layer that nodes measure: all its matrices of one type.
    fn measured_layer_bytes(&self, kept: Kept) -> u64 {
        let dtype = self.dtype(typical_name(self.config));
        let matrices = self.config.layer_matrices();
        let bytes = |(name, [cols, rows]): &(String, [u64; 2])| {
            if let Some(torch) = kept {
                return torch.matrix_bytes(Role::of(&format!(".{name}")), *rows, *cols);
            }
            let fitting = || packed_bytes(TensorType::Q8_0, *rows, *cols);
            packed_bytes(dtype, *rows, *cols).or_else(fitting).unwrap_or(0)
        };
        matrices.iter().map(bytes).sum::<u64>() + 2 * u64::from(self.config.hidden) * 4
    }

    /// Multiply-adds of one row in a layer, and in the head.
    pub fn multiply_adds(&self) -> (f64, f64) {
        let matrices = self.config.row_matrices();
        let layer = matrices.iter().map(|(_, [cols, rows])| (cols * rows) as f64).sum();
        (layer, f64::from(self.config.hidden) * f64::from(self.config.vocab))
    }
}

/// Layers that differ by little are taken for alike: their time is not a matter of single bytes.
fn share(ratio: f64) -> f64 {
    let rounded = (ratio * 50.0).round() / 50.0;
    if (0.97..=1.03).contains(&rounded) { 1.0 } else { rounded.max(0.02) }
}

/// The largest part of what `model` says that anything in `table` needs: at most 1.
fn part_needed(table: &ModelCosts, model: &ModelCosts) -> f64 {
    let kv = model.kv_bytes_per_layer;
    let layers = table.layer_bytes.iter().zip(&model.layer_bytes).map(|(&a, &b)| (a + kv, b + kv));
    let ends = [(table.embed_bytes, model.embed_bytes), (table.head_bytes, model.head_bytes)];
    let parts = layers.chain(ends).filter(|(_, most)| *most > 0);
    parts.map(|(needed, most)| needed as f64 / most as f64).fold(1e-9, f64::max)
}

/// Bytes of a tensor in memory, of a matrix that its file keeps in that form.
pub(super) fn in_memory(tensor: &TensorEntry, form: Option<SparseForm>, kept: Kept) -> u64 {
    if let Some(torch) = kept {
        return torch.tensor_bytes(tensor);
    }
    match (form, &tensor.dims[..]) {
        // It is part of the matrix beside it.
        _ if tensor.is_part() => 0,
        // As many tiles as the file has.
        (Some(SparseForm::Tiles), &[cols, rows]) => {
            let all = tensor.dtype.bytes_of(cols.saturating_mul(rows)).unwrap_or(0).max(1);
            let packed = packed_bytes(tensor.dtype, rows, cols).unwrap_or(all);
            (u128::from(packed) * u128::from(tensor.bytes) / u128::from(all)) as u64
        }
        (_, &[cols, rows]) => packed_bytes(tensor.dtype, rows, cols).unwrap_or(tensor.bytes),
        _ => tensor.bytes,
    }
}

/// A curve through the figures of [`PROFILE_ROWS`].
pub fn curve(seconds: &[f64; PROFILE_ROWS.len()]) -> Curve {
    Curve::new(PROFILE_ROWS.iter().zip(seconds).map(|(&rows, &s)| (f64::from(rows), s)))
}

/// A measured node.
pub fn node_costs(name: &str, profile: &StageProfile, memory_bytes: u64) -> NodeCosts {
    NodeCosts {
        name: name.to_owned(),
        // A time of nothing would be free.
        layer: curve(&profile.layer_seconds.map(|s| s.max(1e-9))),
        head: curve(&profile.head_seconds),
        embed: Curve::flat(0.0),
        pin: None,
        memory_bytes,
    }
}
