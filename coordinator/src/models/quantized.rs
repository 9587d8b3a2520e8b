//! Quantising on load: a copy of a model file, or of a folder, whose F32, F16 and BF16 matrices are
//! smaller, kept in the cache.
//!
//! The copy's name is the content of the source, the type and the quantiser's revision, so it is
//! made once, never stale, and shared by every path to the same content. It is the file that is
//! served: nodes fetch its bytes, and its hash is part of the numerics id. Matrices that are
//! quantised already are never quantised again here. Making a copy removes others that were not
//! used for long, by the rule of all kept files ([`Cache::tidy`]).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::Args;
use millrace_engine::cache::{Cache, KnownHashes};
use millrace_engine::quantize::{self, Options, Plan, REVISION, Requantise};
use millrace_shared::model::{FolderSource, TensorType};

use super::resolve::{keep_in_use, lock, sweep};
use super::{ModelError, Progress, cache_dir, resolve};

/// Types that a model can be given on load.
const TYPES: [TensorType; 3] = [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_1];
/// How the names of copies end.
const SUFFIX: &str = "gguf";

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
    let plan = quantize::plan_of(source, &options)?;
    if plan.changed() == 0 {
        return Err(nothing_to_do(source, &plan, to));
    }
    let folder = cache.join("quantized");
    let name = to.as_str().to_ascii_lowercase();
    let hash = content(&plan.files(), cache, progress).map_err(ModelError::io("read", source))?;
    let stem = format!("{}-{name}-r{REVISION}", &hash.to_hex()[..32]);
    // Only whole files have these names, and only whole folders.
    let (target, weights) = match plan.is_folder() {
        false => (folder.join(format!("{stem}.{SUFFIX}")), folder.join(format!("{stem}.{SUFFIX}"))),
        true => (folder.join(&stem), folder.join(&stem).join(FolderSource::weights_name())),
    };
    keep_in_use(cache, &weights);
    if weights.exists() {
        return Ok(target);
    }
    fs::create_dir_all(&folder).map_err(ModelError::io("create", &folder))?;
    let lock = lock(&folder, progress)?;
    if weights.exists() {
        return Ok(target);
    }
    if lock.is_some() {
        sweep(&folder, None);
    }
    progress.begin(&format!("quantising the model to {name}"), Some(plan.source_bytes()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let written = plan.write(&target, true, threads, &mut |done| progress.advance(done));
    progress.end();
    written?;
    let bytes = fs::metadata(&weights).map_or(0, |meta| meta.len());
    Cache::new(cache).tidy(bytes);
    drop(lock);
    Ok(target)
}

/// BLAKE3 of a file, or of the names and hashes of several; each remembered in `cache`.
fn content(
    paths: &[PathBuf],
    cache: &Path,
    progress: &mut dyn Progress,
) -> std::io::Result<blake3::Hash> {
    let lengths: Vec<u64> =
        paths.iter().map(|p| Ok(fs::metadata(p)?.len())).collect::<std::io::Result<_>>()?;
    let mut done = 0;
    progress.begin("hashing the model to quantise", Some(lengths.iter().sum()));
    let mut hashes = Vec::with_capacity(paths.len());
    for (path, bytes) in paths.iter().zip(lengths) {
        let file = File::open(path)?;
        let mut known = KnownHashes::open(Some(cache), path);
        let hash = known.hash(&file, 0, bytes, &mut |n| {
            done += n;
            progress.advance(done);
        });
        known.save();
        hashes.push(hash?);
    }
    progress.end();
    if let [one] = hashes[..] {
        return Ok(blake3::Hash::from_bytes(one));
    }
    let mut all = blake3::Hasher::new_derive_key("millrace model folder 1");
    for (path, hash) in paths.iter().zip(hashes) {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        all.update(&(name.len() as u64).to_le_bytes()).update(name).update(&hash);
    }
    Ok(all.finalize())
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
