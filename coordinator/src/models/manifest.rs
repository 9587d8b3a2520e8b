//! Hashes the tensors of a model file, or finds out that it was done before.

use std::fs::File;
use std::path::Path;

use millrace_engine::cache::KnownHashes;
use millrace_shared::model::gguf::Gguf;
use millrace_shared::model::{ModelConfig, ModelManifest};

use super::{ModelError, Progress};

/// Describes a model file: dimensions, tensors, hashes. Tensors are hashed unless the folder
/// `cache` says what they hash to and the file is what it was then.
///
/// # Errors
/// If the file is no sound model of a known family with supported tensor types, or cannot be read.
pub fn hash_manifest(
    path: &Path,
    name: &str,
    cache: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<ModelManifest, ModelError> {
    let gguf = Gguf::open(path)?;
    let config = gguf.config()?;
    gguf.check_supported_types()?;
    manifest_of(gguf, config, (path, name), cache, progress)
}

/// [`hash_manifest`] of a file whose directory was read and checked.
///
/// # Errors
/// If the file cannot be read.
pub fn manifest_of(
    mut gguf: Gguf,
    config: ModelConfig,
    (path, name): (&Path, &str),
    cache: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<ModelManifest, ModelError> {
    let mut known = KnownHashes::open(cache, path);
    let file = File::open(path).map_err(ModelError::io("open", path))?;
    let mut done = 0;
    let total: u64 = gguf.tensors.iter().map(|t| t.bytes).sum();
    progress.begin("hashing the model", Some(total));
    let mut advance = |bytes| {
        done += bytes;
        progress.advance(done);
    };
    for tensor in &mut gguf.tensors {
        let hash = known.hash(&file, tensor.offset, tensor.bytes, &mut advance);
        tensor.hash = hash.map_err(ModelError::io("read", path))?;
    }
    progress.end();
    known.save();
    Ok(ModelManifest::new(name.to_owned(), config, gguf.tensors, gguf.file_len))
}
