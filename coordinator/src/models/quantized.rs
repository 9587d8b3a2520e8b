//! Quantising on load: a copy of a model file whose F32, F16 and BF16 matrices are smaller, kept in
//! the cache.
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
use millrace_shared::model::{Description, TensorType};

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
    let Description::Gguf(gguf) = Description::open(source)? else {
        let (path, to) = (source.to_owned(), to.as_str().to_ascii_lowercase());
        return Err(ModelError::NotQuantisable { path, to });
    };
    let options = Options { requantise: Requantise::Leave, ..Options::new(to) };
    let plan = quantize::plan(&gguf, &options)?;
    if plan.changed() == 0 {
        return Err(nothing_to_do(source, &plan, to));
    }
    let folder = cache.join("quantized");
    let name = to.as_str().to_ascii_lowercase();
    let hash = content(source, cache, progress).map_err(ModelError::io("read", source))?;
    let target = folder.join(format!("{}-{name}-r{REVISION}.{SUFFIX}", &hash.to_hex()[..32]));
    keep_in_use(cache, &target);
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
        sweep(&folder, None);
    }
    progress.begin(&format!("quantising the model to {name}"), Some(plan.source_bytes()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let written = plan.write(source, &target, true, threads, &mut |done| progress.advance(done));
    progress.end();
    written?;
    let bytes = fs::metadata(&target).map_or(0, |meta| meta.len());
    Cache::new(cache).tidy(bytes);
    drop(lock);
    Ok(target)
}

/// BLAKE3 of a file, remembered in `cache`.
fn content(
    path: &Path,
    cache: &Path,
    progress: &mut dyn Progress,
) -> std::io::Result<blake3::Hash> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let mut known = KnownHashes::open(Some(cache), path);
    let mut done = 0;
    progress.begin("hashing the model to quantise", Some(bytes));
    let hash = known.hash(&file, 0, bytes, &mut |n| {
        done += n;
        progress.advance(done);
    });
    progress.end();
    known.save();
    hash.map(blake3::Hash::from_bytes)
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
