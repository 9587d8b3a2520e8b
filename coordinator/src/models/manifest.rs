//! Hashes the tensors of a model file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use millrace_shared::model::ModelManifest;
use millrace_shared::model::gguf::Gguf;

use super::{ModelError, Progress};

/// Bytes per read.
const CHUNK: usize = 1 << 20;

/// Reads a model file once and describes it: dimensions, tensors, hashes.
///
/// # Errors
/// If the file is no sound model of a known family with supported tensor types, or cannot be read.
pub fn hash_manifest(
    path: &Path,
    name: &str,
    progress: &mut dyn Progress,
) -> Result<ModelManifest, ModelError> {
    let mut gguf = Gguf::open(path)?;
    let config = gguf.config()?;
    gguf.check_supported_types()?;
    let mut file = File::open(path).map_err(ModelError::io("open", path))?;
    let mut buffer = vec![0u8; CHUNK];
    let mut done = 0;
    let total: u64 = gguf.tensors.iter().map(|t| t.bytes).sum();
    progress.begin("hashing the model", Some(total));
    for tensor in &mut gguf.tensors {
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
    }
    progress.end();
    Ok(ModelManifest::new(name.to_owned(), config, gguf.tensors, gguf.file_len))
}
