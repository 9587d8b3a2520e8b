//! Files of the hub on this machine: those that Hugging Face's own tools keep, which are used where
//! they lie, and those that were fetched here, in folders of the same form:
//! `models--org--name/refs/BRANCH` names a commit, `models--org--name/snapshots/COMMIT/` has files.
//!
//! A file with its name is whole: both writers give it the name when it is.

use std::fs;
use std::path::{Path, PathBuf};

use super::HubFile;
use super::name::{HubName, is_relative};

/// How deep folders of a repository are looked into.
const MAX_DEPTH: usize = 4;
/// Most files of a snapshot that are looked at.
const MAX_FILES: usize = 10_000;
/// Longest name of a commit.
const MAX_COMMIT: usize = 64;

/// The folder of a repository.
pub(in crate::models) fn repo_folder(root: &Path, repo: &str) -> PathBuf {
    root.join(format!("models--{}", repo.replace('/', "--")))
}

/// The name of the repository that a folder is of.
pub(in crate::models) fn repo_of(folder: &str) -> Option<String> {
    let (owner, name) = folder.strip_prefix("models--")?.split_once("--")?;
    Some(format!("{owner}/{name}"))
}

/// The folder of one commit's files.
pub(in crate::models) fn snapshot_folder(root: &Path, repo: &str, commit: &str) -> PathBuf {
    repo_folder(root, repo).join("snapshots").join(commit)
}

/// What this machine has of the commit that a name means here, if anything.
pub(in crate::models) fn local(root: &Path, name: &HubName) -> Option<(PathBuf, Vec<HubFile>)> {
    let revision = name.revision();
    let at = |commit: &str| snapshot_folder(root, &name.repo, commit);
    let reference = repo_folder(root, &name.repo).join("refs").join(revision);
    let referred = fs::read_to_string(reference).ok();
    let referred = referred.as_deref().map(str::trim).filter(|c| is_commit(c));
    let folder = referred.map(at).filter(|f| f.is_dir());
    let folder = folder.or_else(|| is_commit(revision).then(|| at(revision)))?;
    let files = files(&folder);
    (!files.is_empty()).then_some((folder, files))
}

fn is_commit(text: &str) -> bool {
    (1..=MAX_COMMIT).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Remembers which commit a branch was at.
pub(in crate::models) fn refer(root: &Path, name: &HubName, commit: &str) -> std::io::Result<()> {
    let path = repo_folder(root, &name.repo).join("refs").join(name.revision());
    fs::create_dir_all(path.parent().unwrap_or(root))?;
    fs::write(path, commit)
}

/// The files below a folder, by their paths in it; links are followed.
pub(in crate::models) fn files(folder: &Path) -> Vec<HubFile> {
    let mut found = Vec::new();
    collect(folder, "", MAX_DEPTH, &mut found);
    found.sort_by(|a: &HubFile, b| a.path.cmp(&b.path));
    found
}

fn collect(folder: &Path, prefix: &str, depth: usize, found: &mut Vec<HubFile>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Ok(meta) = fs::metadata(entry.path()) else { continue };
        let path = format!("{prefix}{name}");
        if meta.is_dir() && depth > 1 {
            collect(&entry.path(), &format!("{path}/"), depth - 1, found);
        } else if meta.is_file() && !name.ends_with(".part") && found.len() < MAX_FILES {
            found.push(HubFile { path, bytes: Some(meta.len()), sha256: None });
        }
    }
}

/// The file of that SHA-256 and length in any snapshot of a repository of Hugging Face's folders,
/// which keep large files by their hash.
pub(in crate::models) fn by_hash(
    root: &Path,
    repo: &str,
    file: &str,
    sha256: &str,
    bytes: u64,
) -> Option<PathBuf> {
    let folder = repo_folder(root, repo).join("snapshots");
    let candidates = fs::read_dir(folder).ok()?.flatten().map(|e| e.path().join(file));
    let is_it = |path: &PathBuf| {
        let blob = fs::canonicalize(path).ok();
        let named = blob.as_deref().and_then(Path::file_name).is_some_and(|n| n == sha256);
        named && fs::metadata(path).is_ok_and(|m| m.len() == bytes)
    };
    is_relative(file).then(|| candidates.into_iter().find(is_it)).flatten()
}
