//! The directory of a model without its weights: of a model that is not on this machine only the
//! first bytes of its files are fetched.
//!
//! What comes from a hub is not checked against a hash, which only the whole file has: it serves for
//! planning, nothing is computed from it.

use std::fs::{self, File};
use std::io::{self, BufReader, Read as _, Write as _};
use std::path::Path;

use millrace_shared::model::ModelFiles;
use millrace_shared::model::gguf::Gguf;

use super::catalogue::{CATALOGUE, find};
use super::fetch::Source;
use super::hub::{self, Choice, Hub, HubError, HubFile, HubName, choose};
use super::resolve::{existing, fetched, hub_name, target_of};
use super::{ModelError, Progress, Settings, resolve};

/// The most that is fetched of a GGUF file: the largest vocabularies take some 10 MB.
const MOST_BYTES: u64 = 64 << 20;
/// The most that is fetched of a small file.
const MOST_JSON: u64 = 64 << 20;
/// The most of a safetensors file: its own limit.
const MOST_DIRECTORY: u64 = 100_000_000;
/// Most files of a model.
const MOST_FILES: usize = 4096;

/// The directory of a model: of a file, of the cache, else from the hub. Where the hub does not
/// answer, the model is fetched as a whole. Blocks.
///
/// # Errors
/// As [`resolve()`], and if it is no sound model file.
pub fn header(model: &str, progress: &mut dyn Progress) -> Result<ModelFiles, ModelError> {
    header_with(model, &Settings::from_env()?, progress)
}

/// [`header`] with other places.
///
/// # Errors
/// As [`header`].
pub fn header_with(
    model: &str,
    settings: &Settings,
    progress: &mut dyn Progress,
) -> Result<ModelFiles, ModelError> {
    if let Some(path) = existing(model)? {
        return Ok(ModelFiles::open(&path)?);
    }
    if let Some(name) = hub_name(CATALOGUE, model) {
        return of_hub(&name, settings);
    }
    let entry = find(CATALOGUE, model).map_err(ModelError::Unknown)?;
    if let Some(path) = fetched(entry, settings) {
        return Ok(ModelFiles::open(&path)?);
    }
    let hub = Hub::new(settings);
    let source = entry.hub.filter(|_| settings.source.is_none_or(|s| s == Source::Hub));
    let source = source.filter(|_| !settings.offline);
    let found = source.map(|s| gguf(&hub, &hub.url(s.repo, s.revision, s.file), entry.bytes));
    match found {
        Some(Ok(gguf)) => Ok(ModelFiles::of_gguf(gguf, &target_of(entry, settings))?),
        other => {
            let problem = other.and_then(Result::err);
            tracing::debug!(model, ?problem, "the header alone cannot be had");
            Ok(ModelFiles::open(&resolve(model, progress)?)?)
        }
    }
}

/// Of a GGUF file, whose length is known.
fn gguf(hub: &Hub<'_>, url: &str, bytes: u64) -> Result<Gguf, String> {
    let body = hub.beginning(url, MOST_BYTES.min(bytes)).map_err(HubError::into_text)?;
    Gguf::read(BufReader::with_capacity(1 << 16, body), bytes).map_err(|e| e.to_string())
}

/// Of a name of the hub: of what is on this machine, else of what the hub has.
fn of_hub(name: &HubName, settings: &Settings) -> Result<ModelFiles, ModelError> {
    if let Some(path) = hub::on_this_machine(name, settings) {
        return Ok(ModelFiles::open(&path)?);
    }
    let failed = |problem: String| ModelError::Fetch { name: name.to_string(), attempts: problem };
    let hub = Hub::new(settings);
    let listing = hub::list(&hub, name, settings).map_err(|e| failed(e.into_text()))?;
    let url = |file: &HubFile| hub.url(&name.repo, &listing.commit, &file.path);
    match choose(&listing.files, name.file.as_deref()).map_err(failed)? {
        Choice::Gguf(files) => {
            let file = hub::only_part(&files).map_err(failed)?;
            let unknown = || failed(format!("the hub does not say how long {} is", file.path));
            let bytes = file.bytes.ok_or_else(unknown)?;
            let gguf = gguf(&hub, &url(file), bytes).map_err(failed)?;
            Ok(ModelFiles::of_gguf(gguf, Path::new(&file.path))?)
        }
        Choice::Folder(files) => {
            if files.len() > MOST_FILES {
                return Err(failed(format!("it has {} files, more than any model", files.len())));
            }
            let folder =
                tempfile::tempdir().map_err(ModelError::io("create", Path::new("/tmp")))?;
            for file in files {
                stand_in(&hub, &url(&file), &file, folder.path())
                    .map_err(|problem| failed(format!("{}: {problem}", file.path)))?;
            }
            Ok(ModelFiles::open(folder.path())?)
        }
    }
}

/// A file of a folder as far as its directory needs it: of weights there is a hole in the file.
fn stand_in(hub: &Hub<'_>, url: &str, file: &HubFile, folder: &Path) -> Result<(), String> {
    let target = folder.join(&file.path);
    let io = |e: io::Error| e.to_string();
    if !file.path.ends_with(".safetensors") {
        // Texts of the tokenizer are of no use here.
        if !file.path.ends_with("config.json") && !file.path.ends_with(".index.json") {
            return Ok(());
        }
        let mut body = hub.beginning(url, MOST_JSON).map_err(HubError::into_text)?;
        let mut bytes = Vec::new();
        body.read_to_end(&mut bytes).map_err(io)?;
        return fs::write(target, bytes).map_err(io);
    }
    let mut body = hub.beginning(url, 1 << 20).map_err(HubError::into_text)?;
    let mut head = Vec::new();
    body.read_to_end(&mut head).map_err(io)?;
    let length = head.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let length = length.filter(|&n| n <= MOST_DIRECTORY).ok_or("it has no sound header")?;
    if head.len() as u64 <= 8 + length {
        head.clear();
        let body = hub.beginning(url, 8 + length).map_err(HubError::into_text)?;
        body.take(8 + length).read_to_end(&mut head).map_err(io)?;
    }
    let bytes = file.bytes.ok_or("the hub does not say how long it is")?;
    let mut out = File::create(target).map_err(io)?;
    head.truncate((8 + length) as usize);
    out.write_all(&head).and_then(|()| out.set_len(bytes)).map_err(io)
}
