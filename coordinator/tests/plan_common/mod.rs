//! A model for plans: dimensions and tensors without a file.

use millrace_shared::model::{
    Family, Features, ModelConfig, RopeConfig, RopeScaling, RopeStyle, TensorEntry, TensorType,
};

/// The dimensions of SmolLM2 135M.
pub(crate) fn config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocab: 49_152,
        context: 8192,
        rms_eps: 1e-5,
        rope: RopeConfig {
            base: 100_000.0,
            dim: 64,
            style: RopeStyle::Interleaved,
            scaling: RopeScaling::Linear(1.0),
        },
        tied_head: true,
        rope_factors: false,
        features: Features::default(),
    }
}

/// Its tensors, in the types of its usual file.
pub(crate) fn tensors(c: &ModelConfig) -> Vec<TensorEntry> {
    let entry = |name: String, dtype: TensorType, dims: &[u64]| TensorEntry {
        name,
        dtype,
        dims: dims.to_vec(),
        file: 0,
        offset: 0,
        bytes: dtype.bytes_of(dims.iter().product()).unwrap(),
        hash: [0; 32],
    };
    let [h, kv, f, vocab] = [c.hidden, c.kv_heads * c.head_dim, c.ffn, c.vocab].map(u64::from);
    let mut all = vec![
        entry("token_embd.weight".into(), TensorType::Q8_0, &[h, vocab]),
        entry("output_norm.weight".into(), TensorType::F32, &[h]),
    ];
    for layer in 0..c.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let matrices = [
            ("attn_q", [h, h]),
            ("attn_k", [h, kv]),
            ("attn_v", [h, kv]),
            ("attn_output", [h, h]),
            ("ffn_gate", [h, f]),
            ("ffn_up", [h, f]),
            ("ffn_down", [f, h]),
        ];
        all.extend(matrices.iter().map(|(n, dims)| entry(name(n), TensorType::Q4_1, dims)));
        all.extend(["attn_norm", "ffn_norm"].map(|n| entry(name(n), TensorType::F32, &[h])));
    }
    all
}
