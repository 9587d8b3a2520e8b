//! Quantising on load: a copy of a model file whose F32, F16 and BF16 matrices are smaller, kept in
//! the cache.
//!
//! The copy's name is the content of the source, the type and the quantiser's revision, so it is
//! made once, never stale, and shared by every path to the same content. It is the file that is
//! served: nodes fetch its bytes, and its hash is part of the numerics id. Matrices that are
//! quantised already are never quantised again here.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use millrace_engine::quantize::{self, Options, Plan, REVISION, Requantise};
use millrace_shared::model::TensorType;
use millrace_shared::model::gguf::Gguf;

use super::resolve::{lock, sweep};
use super::{ModelError, Progress, cache_dir, resolve};

/// Types that a model can be given on load.
const TYPES: [TensorType; 3] = [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_1];
/// Bytes per read.
const CHUNK: usize = 1 << 20;
/// A file that has not changed for so long has a time of change that tells.
const SETTLED: Duration = Duration::from_secs(2);

/// What is done with a model before it is served: the same flag on every command that starts one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct ModelOptions {
    /// Serve an F32, F16 or BF16 model quantised: q8_0, q4_0 or q4_1. Made once and kept in the
    /// cache; with four bits, embedding and output matrix become q8_0
    #[arg(long, value_name = "TYPE", requires = "model", value_parser = on_load_type)]
    pub quantize: Option<TensorType>,
}

fn on_load_type(s: &str) -> Result<TensorType, String> {
    quantize::parse_type(s, &TYPES)
}

/// [`resolve()`], then [`quantized`] where the options say so.
///
/// # Errors
/// Those of both.
pub fn resolve_as(
    model: &str,
    options: ModelOptions,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ModelError> {
    let path = resolve(model, progress)?;
    match options.quantize {
        None => Ok(path),
        Some(to) => quantized(&path, to, &cache_dir()?, progress),
    }
}

/// The copy of `source` with `to` for its float matrices, in `cache`; made where it is missing. One
/// process at a time makes copies. Blocks.
///
/// # Errors
/// If there is nothing to quantise, a weight does not fit, or a file cannot be used.
pub fn quantized(
    source: &Path,
    to: TensorType,
    cache: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ModelError> {
    let options = Options { requantise: Requantise::Leave, ..Options::new(to) };
    let plan = quantize::plan(&Gguf::open(source)?, &options)?;
    if plan.changed() == 0 {
        return Err(nothing_to_do(source, &plan, to));
    }
    let folder = cache.join("quantized");
    let name = to.as_str().to_ascii_lowercase();
    let hash = content(source, &folder, progress).map_err(ModelError::io("read", source))?;
    let target = folder.join(format!("{}-{name}-r{REVISION}.gguf", &hash.to_hex()[..32]));
    // Only whole files have this name.
    if target.exists() {
        return Ok(target);
    }
    fs::create_dir_all(&folder).map_err(ModelError::io("create", &folder))?;
    let lock = lock(&folder, progress)?;
    if target.exists() {
        return Ok(target);
    }
    if lock.is_some() {
        sweep(&folder);
    }
    progress.begin(&format!("quantising the model to {name}"), Some(plan.source_bytes()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let written = plan.write(source, &target, true, threads, &mut |done| progress.advance(done));
    progress.end();
    written?;
    drop(lock);
    Ok(target)
}

/// BLAKE3 of a file. Remembered in `folder` under what the system says of the file (place, length,
/// times of change), so that a large model is not read again at each start.
fn content(
    path: &Path,
    folder: &Path,
    progress: &mut dyn Progress,
) -> std::io::Result<blake3::Hash> {
    let file = File::open(path)?;
    let state = state(&file.metadata()?);
    let seen = folder.join("seen");
    let note = seen.join(&*blake3::hash(state.as_bytes()).to_hex());
    // A note that was not written to its end is no hash.
    if let Some(hash) = fs::read(&note).ok().and_then(|h| blake3::Hash::from_hex(h).ok()) {
        return Ok(hash);
    }
    let hash = hash(&file, progress)?;
    let after = file.metadata()?;
    // A change within a tick of the clock would not show; a file that is still written has none.
    let settled = after.modified()?.elapsed().is_ok_and(|age| age > SETTLED);
    if settled && self::state(&after) == state {
        // Without a note the file is read again.
        let _ = fs::create_dir_all(&seen).and_then(|()| fs::write(&note, hash.to_hex().as_bytes()));
    }
    Ok(hash)
}

/// Changes whenever a file does.
fn state(meta: &fs::Metadata) -> String {
    let (m, c) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
    format!("{} {} {} {m:?} {c:?}", meta.dev(), meta.ino(), meta.len())
}

fn hash(mut file: &File, progress: &mut dyn Progress) -> std::io::Result<blake3::Hash> {
    progress.begin("hashing the model to quantise", Some(file.metadata()?.len()));
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; CHUNK];
    let mut done = 0;
    let result = loop {
        match file.read(&mut buffer) {
            Ok(0) => break Ok(hasher.finalize()),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                done += n as u64;
                progress.advance(done);
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => break Err(e),
        }
    };
    progress.end();
    result
}

fn nothing_to_do(source: &Path, plan: &Plan, to: TensorType) -> ModelError {
    let mut types: Vec<&str> = plan
        .tensors
        .iter()
        .filter(|t| t.from.dims.len() == 2)
        .map(|t| t.from.dtype.as_str())
        .collect();
    types.sort_unstable();
    types.dedup();
    ModelError::NothingToQuantize {
        path: source.to_owned(),
        types: types.join(", "),
        to: to.as_str().to_ascii_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::NoProgress;

    #[test]
    fn a_changed_file_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let (path, cache) = (dir.path().join("model"), dir.path().join("cache"));
        let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let mut seen = Vec::new();
        for content in ["one", "two", "two"] {
            if fs::read(&path).ok().as_deref() != Some(content.as_bytes()) {
                fs::write(&path, content).unwrap();
                File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
            }
            let hash = super::content(&path, &cache, &mut NoProgress).unwrap();
            assert_eq!(hash, blake3::hash(content.as_bytes()));
            seen.push(fs::read_dir(cache.join("seen")).unwrap().count());
        }
        // The same length and time of modification: the time of change tells them apart.
        assert_eq!(seen, [1, 2, 2]);
        // A note that is cut short is not believed.
        for note in fs::read_dir(cache.join("seen")).unwrap() {
            fs::write(note.unwrap().path(), "12").unwrap();
        }
        let hash = super::content(&path, &cache, &mut NoProgress).unwrap();
        assert_eq!(hash, blake3::hash(b"two"));
        // One that changed just now is not remembered.
        fs::write(&path, "now").unwrap();
        super::content(&path, &cache, &mut NoProgress).unwrap();
        assert_eq!(fs::read_dir(cache.join("seen")).unwrap().count(), 2);
    }
}
