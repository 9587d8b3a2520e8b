//! What a model is: dimensions, tensors and their types, which tensors a range of layers needs.

mod config;
pub mod gguf;
mod layers;
pub mod manifest;
mod types;

pub use config::{Family, ModelConfig, RopeConfig, RopeStyle};
pub use layers::{StageTensors, embedding_name, head_name, stage_tensors};
pub use manifest::{ModelManifest, numerics_id};
pub use types::{Dtype, TensorEntry, TensorType};
