//! What a model is: dimensions, tensors and their types, which tensors a range of layers needs.

mod config;
mod files;
mod folder;
pub mod gguf;
mod layers;
mod limits;
pub mod manifest;
mod split;
mod types;

pub use config::{
    Activation, Family, Features, ModelConfig, RopeConfig, RopeScaling, RopeStyle, Window,
};
pub use files::{Description, ModelFileError, ModelFiles};
pub use folder::{FolderError, model_folder};
pub use layers::{StageTensors, embedding_name, head_name, stage_tensors};
pub use manifest::{ModelManifest, numerics_id};
pub use types::{Dtype, TensorEntry, TensorType};
