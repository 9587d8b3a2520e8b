//! The models on this machine: fetched here, and by Hugging Face's own tools.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use millrace_engine::cache::{Cache, Kind, Thing};

use super::catalogue::{CATALOGUE, CatalogueEntry};
use super::hub::{self, HubName};
use super::resolve::{existing, fetched, hub_name};
use super::{ModelError, Settings};

/// Where a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the cache folder.
    Cache,
    /// Where Hugging Face's own tools keep it.
    HuggingFace,
}

/// A model on this machine.
#[derive(Clone, Debug)]
pub struct KeptModel {
    /// What commands take for it.
    pub name: String,
    /// File or folder.
    pub path: PathBuf,
    /// All its files.
    pub files: Vec<PathBuf>,
    /// Of all files.
    pub bytes: u64,
    /// When it was fetched or used last.
    pub last_used: SystemTime,
    /// A running process uses it.
    pub in_use: bool,
    /// Where it is.
    pub place: Place,
}

/// The models on this machine, by name.
///
/// # Errors
/// If there is no place for the cache, or a variable has a wrong value.
pub fn kept() -> Result<Vec<KeptModel>, ModelError> {
    Ok(kept_by(&Settings::from_env()?))
}

/// [`kept`] in other places.
pub fn kept_by(settings: &Settings) -> Vec<KeptModel> {
    let things = Cache::new(&settings.cache).things();
    let models = things.into_iter().filter(|t| t.kind == Kind::Model);
    let mut kept: Vec<KeptModel> = models.map(|t| of_thing(t, settings)).collect();
    for root in &settings.hub_caches {
        kept.extend(hub::models_in(root).into_iter().map(|(name, path, files)| {
            let metas = || files.iter().filter_map(|f| std::fs::metadata(f).ok());
            let times = metas().filter_map(|m| m.modified().ok());
            KeptModel {
                name,
                path,
                bytes: metas().map(|m| m.len()).sum(),
                last_used: times.max().unwrap_or(SystemTime::UNIX_EPOCH),
                files,
                in_use: false,
                place: Place::HuggingFace,
            }
        }));
    }
    kept.sort_by(|a, b| a.name.cmp(&b.name));
    kept
}

fn of_thing(thing: Thing, settings: &Settings) -> KeptModel {
    let first = thing.files.first().cloned().unwrap_or_default();
    let (name, path) = match hub::name_of(&hub::own_root(&settings.cache), &thing.files) {
        Some(named) => named,
        None => (catalogue_name(&first), first),
    };
    let Thing { files, bytes, last_used, in_use, .. } = thing;
    KeptModel { name, path, files, bytes, last_used, in_use, place: Place::Cache }
}

/// The name of a model of the catalogue by its folder; one that is in it no more has that of its file.
fn catalogue_name(file: &Path) -> String {
    let folder = file.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let is_it = |e: &&CatalogueEntry| e.sha256.get(..16) == Some(&*folder);
    match CATALOGUE.iter().find(is_it) {
        Some(entry) => entry.name.to_owned(),
        None => file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    }
}

/// The file or folder of a model if it is on this machine. Asks nobody.
///
/// # Errors
/// If the text is a path to what is no model, or a variable has a wrong value.
pub fn on_this_machine(model: &str) -> Result<Option<PathBuf>, ModelError> {
    if let Some(path) = existing(model)? {
        return Ok(Some(path));
    }
    let settings = Settings::from_env()?;
    if let Some(name) = hub_name(CATALOGUE, model) {
        return Ok(hub::on_this_machine(&name, &settings));
    }
    Ok(CATALOGUE.iter().find(|e| e.name == model).and_then(|e| fetched(e, &settings)))
}

/// Those of the models that a text means: by name or path, by repository alone where it has one.
pub fn named<'a>(models: &'a [KeptModel], text: &str) -> Vec<&'a KeptModel> {
    let same = |m: &&KeptModel| m.name.eq_ignore_ascii_case(text) || m.path == Path::new(text);
    let found: Vec<&KeptModel> = models.iter().filter(same).collect();
    if !found.is_empty() {
        return found;
    }
    let Some(wanted) = HubName::parse(text) else { return Vec::new() };
    let of_repo = |m: &&KeptModel| {
        let file = |f: &PathBuf| f.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_file = |w: &String| m.files.iter().any(|f| file(f).eq_ignore_ascii_case(w));
        HubName::parse(&m.name).is_some_and(|n| n.repo.eq_ignore_ascii_case(&wanted.repo))
            && wanted.file.as_ref().is_none_or(is_file)
    };
    models.iter().filter(of_repo).collect()
}
