//! Hashes the tensors of a model file, or finds out that it was done before.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use millrace_shared::model::gguf::Gguf;
use millrace_shared::model::{FileState, KnownHashes, ModelConfig, ModelManifest};

use super::{ModelError, Progress};

/// Bytes per read.
const CHUNK: usize = 1 << 20;

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
    let mut known = cache.map(|cache| KnownHashes::open(cache, path));
    let mut file = File::open(path).map_err(ModelError::io("open", path))?;
    let state = FileState::of(&file).map_err(ModelError::io("read", path))?;
    let mut buffer = Vec::new();
    let mut done = 0;
    let total: u64 = gguf.tensors.iter().map(|t| t.bytes).sum();
    progress.begin("hashing the model", Some(total));
    for tensor in &mut gguf.tensors {
        let found = known.as_mut().and_then(|k| k.get(&state, tensor.offset, tensor.bytes));
        if let Some(hash) = found {
            tensor.hash = hash;
            done += tensor.bytes;
            progress.advance(done);
            continue;
        }
        buffer.resize(CHUNK, 0);
        let mut hasher = blake3::Hasher::new();
        let mut read = || -> std::io::Result<()> {
            file.seek(SeekFrom::Start(tensor.offset))?;
            let mut left = tensor.bytes;
            while left > 0 {
                let n = left.min(CHUNK as u64) as usize;
                file.read_exact(&mut buffer[..n])?;
                hasher.update(&buffer[..n]);
                left -= n as u64;
                done += n as u64;
                progress.advance(done);
            }
            Ok(())
        };
        read().map_err(ModelError::io("read", path))?;
        tensor.hash = hasher.finalize().into();
        if let Some(known) = &mut known {
            known.insert(&file, &state, (tensor.offset, tensor.bytes), tensor.hash);
        }
    }
    progress.end();
    if let Some(known) = known {
        known.save();
    }
    Ok(ModelManifest::new(name.to_owned(), config, gguf.tensors, gguf.file_len))
}
