//! What a model is to a cluster: dimensions, tensors and their hashes, without the file.
//!
//! Two files with the same manifest hash compute the same thing, whatever the order of their
//! tensors or the rest of their metadata. Reading and hashing files happens elsewhere.

use serde::{Deserialize, Serialize};

use super::{ModelConfig, RopeScaling, TensorEntry};
use crate::wire::control::EngineSettings;

/// A model: dimensions, tensors, hashes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelManifest {
    /// Name for people and clients.
    pub name: String,
    /// Dimensions.
    pub config: ModelConfig,
    /// Tensors in file order, each with the BLAKE3 of its bytes.
    pub tensors: Vec<TensorEntry>,
    /// [`content_hash`] of config and tensors.
    pub content_hash: [u8; 32],
}

impl ModelManifest {
    /// A manifest of hashed tensors.
    pub fn new(name: String, config: ModelConfig, tensors: Vec<TensorEntry>) -> Self {
        let content_hash = content_hash(&config, &tensors);
        Self { name, config, tensors, content_hash }
    }

    /// Whether the hash fits the rest (a manifest that came from a peer).
    pub fn is_consistent(&self) -> bool {
        self.content_hash == content_hash(&self.config, &self.tensors)
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }
}

/// BLAKE3 over the dimensions and over name, type, shape and hash of each tensor, by name.
pub fn content_hash(config: &ModelConfig, tensors: &[TensorEntry]) -> [u8; 32] {
    let mut h = blake3::Hasher::new_derive_key("millrace model content 2");
    let config = bincode::serde::encode_to_vec(config, bincode::config::standard());
    h.update(&config.expect("invariant: plain numbers can be written down"));
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    order.sort_by(|a, b| a.name.cmp(&b.name));
    h.update(&(order.len() as u64).to_le_bytes());
    for t in order {
        hash_str(&mut h, &t.name);
        h.update(&(t.dtype as u32).to_le_bytes());
        h.update(&(t.dims.len() as u64).to_le_bytes());
        for d in &t.dims {
            h.update(&d.to_le_bytes());
        }
        h.update(&t.hash);
    }
    h.finalize().into()
}

/// Everything that may change a token, in one id: two stages may work on one pipeline exactly only
/// if theirs are equal. `engine_revision` is `Engine::numerics_revision`, which covers kernels,
/// activation group and parts of attention. The longest sequence counts where it chooses between two
/// lists of RoPE factors. Block sizes, cuts, threads and batches are absent on
/// purpose: they change nothing.
pub fn numerics_id(
    content_hash: &[u8; 32],
    engine_revision: &str,
    rope: RopeScaling,
    settings: &EngineSettings,
) -> [u8; 32] {
    let mut h = blake3::Hasher::new_derive_key("millrace numerics 2");
    h.update(content_hash);
    hash_str(&mut h, engine_revision);
    let long = rope.is_long(settings.max_model_len);
    h.update(&[settings.kv_dtype as u8, settings.activation_dtype as u8, u8::from(long)]);
    h.finalize().into()
}

fn hash_str(h: &mut blake3::Hasher, s: &str) {
    h.update(&(s.len() as u64).to_le_bytes());
    h.update(s.as_bytes());
}
