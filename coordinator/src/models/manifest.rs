//! Hashes the tensors of a model, or finds out that it was done before.

use std::fs::File;
use std::path::Path;

use millrace_engine::cache::KnownHashes;
use millrace_shared::model::{ModelFiles, ModelManifest};

use super::{ModelError, Progress};

/// Describes a model by its directory: dimensions, tensors, hashes. Tensors are hashed unless the
/// folder `cache` says what they hash to and the file is what it was then.
///
/// # Errors
/// If a tensor's type is not supported, or a file cannot be read.
pub fn hash_manifest(
    files: &ModelFiles,
    name: &str,
    cache: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<ModelManifest, ModelError> {
    files.check_supported_types()?;
    let mut opened = Vec::with_capacity(files.paths.len());
    for path in &files.paths {
        let file = File::open(path).map_err(ModelError::io("open", path))?;
        opened.push((file, KnownHashes::open(cache, path)));
    }
    let mut done = 0;
    progress.begin("hashing the model", Some(files.weight_bytes()));
    let mut advance = |bytes| {
        done += bytes;
        progress.advance(done);
    };
    let mut tensors = files.tensors.clone();
    for tensor in &mut tensors {
        let (file, known) = &mut opened[usize::from(tensor.file)];
        let hash = known.hash(file, tensor.offset, tensor.bytes, &mut advance);
        tensor.hash = hash.map_err(ModelError::io("read", files.path_of(tensor)))?;
    }
    progress.end();
    opened.into_iter().for_each(|(_, known)| known.save());
    Ok(ModelManifest::new(name.to_owned(), files.config.clone(), tensors))
}
