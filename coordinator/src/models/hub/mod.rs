//! Models of the Hugging Face hub: named `org/name`, `org/name@revision` or `org/name:file`, found on
//! this machine or fetched into the cache.
//!
//! Files that Hugging Face's own tools have fetched are used where they lie. What is fetched here goes
//! on where it was cut off, and is checked against the lengths that the hub announces, and the SHA-256
//! where it names one. Without the hub, what is on this machine serves.

mod client;
mod download;
mod name;
mod select;
mod snapshots;

pub use name::HubName;

pub(super) use client::{Hub, HubError, HubFile, Listing};
pub(super) use download::{Wanted, hex, part_of};
pub(super) use select::{Choice, choose};
pub(super) use snapshots::by_hash;

use std::fs;
use std::path::{Path, PathBuf};

use super::resolve::lock;
use super::{ModelError, Progress, Settings};

/// The folder of the cache for repositories of the hub.
pub(super) fn own_root(cache: &Path) -> PathBuf {
    cache.join("models").join("hub")
}

/// The folder of the cache for a repository.
pub(super) fn own_folder(cache: &Path, repo: &str) -> PathBuf {
    snapshots::repo_folder(&own_root(cache), repo)
}

/// The file of a GGUF model; one in several files cannot be read here.
///
/// # Errors
/// Says what to do instead.
pub(super) fn only_part(parts: &[HubFile]) -> Result<&HubFile, String> {
    match parts {
        [one] if is_whole(parts) => Ok(one),
        _ => Err(format!(
            "it is split into several GGUF files ({}, …), which are not read in parts: name another quantisation, or download them, join them by 'llama-gguf-split --merge FIRST-PART JOINED.gguf', and name the joined file",
            parts.first().map_or("", |p| &p.path)
        )),
    }
}

/// A model that is whole on this machine.
pub(super) fn on_this_machine(name: &HubName, settings: &Settings) -> Option<PathBuf> {
    roots(settings).find_map(|root| {
        let (folder, files) = snapshots::local(&root, name)?;
        let choice = choose(&files, name.file.as_deref()).ok()?;
        let path = path_of(&folder, &choice);
        match choice {
            Choice::Gguf(parts) => is_whole(&parts).then_some(path),
            // One that was cut off lacks weights.
            Choice::Folder(_) => {
                millrace_shared::model::ModelFiles::open(&path).is_ok().then_some(path)
            }
        }
    })
}

/// Whether all parts of a split file are there.
fn is_whole(parts: &[HubFile]) -> bool {
    let count = |path: &str| path.rsplit_once("-of-")?.1.split('.').next()?.parse::<usize>().ok();
    parts.len() == 1 && count(&parts[0].path).is_none_or(|n| n == 1)
        || parts.first().and_then(|p| count(&p.path)) == Some(parts.len())
}

fn roots(settings: &Settings) -> impl Iterator<Item = PathBuf> {
    std::iter::once(own_root(&settings.cache)).chain(settings.hub_caches.iter().cloned())
}

/// The name and the file or folder of what was fetched here, by its files.
pub(super) fn name_of(root: &Path, files: &[PathBuf]) -> Option<(String, PathBuf)> {
    let first = files.iter().filter(|f| f.extension().is_some_and(|e| e == "gguf")).min();
    let inside = files.first()?.strip_prefix(root).ok()?;
    let mut parts = inside.iter();
    let repo = snapshots::repo_of(parts.next()?.to_str()?)?;
    let commit = parts.nth(1)?.to_str()?;
    let folder = snapshots::snapshot_folder(root, &repo, commit);
    match first {
        None => Some((repo, folder)),
        Some(file) => {
            let path = file.strip_prefix(&folder).ok()?.to_str()?.to_owned();
            Some((format!("{repo}:{}", select::short_name(&path)), file.clone()))
        }
    }
}

/// The models in a folder of Hugging Face's own tools, of each repository those of its main branch:
/// name, file or folder, files.
pub(super) fn models_in(root: &Path) -> Vec<(String, PathBuf, Vec<PathBuf>)> {
    let mut models = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let repo = entry.file_name().to_str().and_then(snapshots::repo_of);
        let name = repo.and_then(|repo| HubName::parse(&repo));
        let Some(name) = name else { continue };
        let Some((folder, files)) = snapshots::local(root, &name) else { continue };
        for choice in select::all(&files) {
            let path = path_of(&folder, &choice);
            let named = match &choice {
                Choice::Folder(_) => name.repo.clone(),
                Choice::Gguf(f) => format!("{}:{}", name.repo, select::short_name(&f[0].path)),
            };
            let files = choice.files().iter().map(|f| folder.join(&f.path)).collect();
            models.push((named, path, files));
        }
    }
    models
}

/// What names a choice: the file, or the folder.
fn path_of(folder: &Path, choice: &Choice) -> PathBuf {
    match choice {
        Choice::Folder(_) => folder.to_owned(),
        Choice::Gguf(files) => folder.join(&files[0].path),
    }
}

/// Brings a model of the hub to this machine, as it is there now; where the hub cannot be reached,
/// what is here serves. The caller holds [`own_folder`]: half of it is a model that nobody uses yet.
pub(super) fn fetch(
    name: &HubName,
    settings: &Settings,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ModelError> {
    let failed = |problem: String| ModelError::Fetch { name: name.to_string(), attempts: problem };
    let hub = Hub::new(settings);
    // Whoever meant a path reads that there is none.
    let is_path = name.revision.is_none() && name.file.is_none();
    let no_path = if is_path { "; nor is there such a file or folder here" } else { "" };
    let listing = match list(&hub, name, settings) {
        Ok(listing) => listing,
        Err(HubError::Refused(problem)) => return Err(failed(problem + no_path)),
        Err(HubError::Unreachable(problem)) => {
            return on_this_machine(name, settings).ok_or_else(|| failed(problem + no_path));
        }
    };
    let choice = choose(&listing.files, name.file.as_deref()).map_err(failed)?;
    if let Choice::Gguf(parts) = &choice {
        only_part(parts).map_err(failed)?;
    }
    for root in &settings.hub_caches {
        let folder = snapshots::snapshot_folder(root, &name.repo, &listing.commit);
        if choice.files().iter().all(|file| has(&folder, file)) {
            return Ok(path_of(&folder, &choice));
        }
    }
    let root = own_root(&settings.cache);
    let folder = snapshots::snapshot_folder(&root, &name.repo, &listing.commit);
    fs::create_dir_all(&folder).map_err(ModelError::io("create", &folder))?;
    let lock = lock(&snapshots::repo_folder(&root, &name.repo), progress)?;
    let alone = lock.is_some();
    let place = (folder.as_path(), alone);
    let result = fetch_files(&hub, name, &listing.commit, choice.files(), place, progress);
    drop(lock);
    result.map_err(|e| failed(e.into_text()))?;
    snapshots::refer(&root, name, &listing.commit).map_err(ModelError::io("write", &root))?;
    Ok(path_of(&folder, &choice))
}

/// What the hub has of a name, unless it must not be asked.
pub(super) fn list(
    hub: &Hub<'_>,
    name: &HubName,
    settings: &Settings,
) -> Result<Listing, HubError> {
    if settings.offline {
        let text = "HF_HUB_OFFLINE is set, and this machine does not have it".to_owned();
        return Err(HubError::Unreachable(text));
    }
    hub.list(name)
}

fn has(folder: &Path, file: &HubFile) -> bool {
    let meta = fs::metadata(folder.join(&file.path));
    meta.is_ok_and(|m| m.is_file() && file.bytes.is_none_or(|n| n == m.len()))
}

fn fetch_files(
    hub: &Hub<'_>,
    name: &HubName,
    commit: &str,
    files: &[HubFile],
    (folder, alone): (&Path, bool),
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    let missing: Vec<&HubFile> = files.iter().filter(|file| !has(folder, file)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let total: Option<u64> = files.iter().map(|f| f.bytes).sum();
    let what = match missing.as_slice() {
        [one] => format!("fetching {}", one.path),
        many => format!("fetching {} files of {}", many.len(), name.repo),
    };
    progress.begin(&what, total);
    let mut before: u64 = files.iter().filter(|f| has(folder, f)).filter_map(|f| f.bytes).sum();
    let mut result = Ok(());
    for file in missing {
        let target = folder.join(&file.path);
        let made = target.parent().map_or(Ok(()), fs::create_dir_all);
        let wanted = Wanted {
            url: hub.url(&name.repo, commit, &file.path),
            bytes: file.bytes,
            sha256: file.sha256.as_deref(),
            target: &target,
            alone,
        };
        result = made
            .map_err(|e| HubError::Refused(format!("cannot write {}: {e}", folder.display())))
            .and_then(|()| hub.download(&wanted, &mut |done| progress.advance(before + done)));
        if result.is_err() {
            break;
        }
        before += fs::metadata(&target).map_or(0, |m| m.len());
    }
    progress.end();
    result?;
    match files.iter().find(|file| !has(folder, file)) {
        None => Ok(()),
        Some(gone) => Err(HubError::Refused(format!(
            "{} went while the others came; fetch it again",
            folder.join(&gone.path).display()
        ))),
    }
}
