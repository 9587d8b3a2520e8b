//! What a model is: dimensions, tensors and their types, which tensors a range of layers needs.

mod config;
mod family;
mod files;
mod folder;
pub mod gguf;
mod layers;
mod limits;
pub mod manifest;
mod rope;
mod sparse;
mod split;
mod types;

pub use config::{ModelConfig, check_rank};
pub use family::{Activation, Experts, Family, Features, Window};
pub use files::{Description, ModelFileError, ModelFiles};
pub use folder::{FolderError, FolderShape, FolderSource, model_folder};
pub use layers::{StageTensors, embedding_name, head_name, stage_tensors, typical_name};
pub use manifest::{ModelManifest, numerics_id};
pub use rope::{LongFactors, RopeConfig, RopeScaling, RopeStyle};
pub use sparse::{
    Places, SPARSE_SHAPES, SPARSE_TENSORS, SparseForm, SparseForms, TILE_ROWS, is_sparse,
    sparse_keys,
};
pub use types::{Dtype, TensorEntry, TensorType};
